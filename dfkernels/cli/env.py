"""What is loaded, what is not, and why: `python -m dfkernels env`."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata
from typing import Any

import torch

from .. import __version__
from .._torch import backend
from .._torch import native as _native


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("env", help="what is loaded, what is not, and why")
    parser.set_defaults(run=lambda args: main())


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cuda_devices() -> list[str]:
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(index)
        devices.append(
            f"{p.name}, capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        )
    return devices


def environment() -> dict[str, Any]:
    """Collect versions, hardware, the compiled part and every backend, fit for JSON.

    Returns:
        Among others ``backends``: for each name "" where it can run here, else the reason why not.
    """
    return {
        "dfkernels": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": _version("numpy"),
        "triton": _version("triton"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "cuda": _cuda_devices(),
        "native": {"available": _native.available, "reason": _native.reason, **_native.info()},
        "backends": backend.reasons(),
    }


def table(env: dict[str, Any]) -> str:
    """Format what `environment` returns as lines of two columns."""
    native = env["native"]
    rows = [
        (key, str(env[key]))
        for key in ("dfkernels", "python", "torch", "numpy", "triton", "machine", "threads")
    ]
    rows += [(f"cuda:{i}", device) for i, device in enumerate(env["cuda"])] or [
        ("cuda", "no device")
    ]
    if native["available"]:
        rows += [
            ("native", "loaded"),
            ("  instruction set", f"{native['isa']} (of {', '.join(native['isa_levels'])})"),
            ("  compiler", native["compiler"]),
            ("  flags", native["flags"]),
            (
                "  torch",
                (
                    f"built with {native['built_with_torch']}, runs with {native['target_torch']}"
                    " and later"
                ),
            ),
        ]
    else:
        rows.append(("native", f"not loaded: {native['reason']}"))
    rows += [
        (f"backend {name}", "can run" if not why else f"cannot run: {why}")
        for name, why in env["backends"].items()
    ]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)


def main() -> int:
    """Print the table and return 0."""
    print(table(environment()))
    return 0
