"""`dfkernels posterior`: the posterior sums of a user's own atoms at a file of queries."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from .._io import arrays, files
from .._io.files import FileError
from .._torch import check
from ..cloud import PointCloud
from ..methods._posterior_sums import FIELDS, posterior_sums
from ..methods.sharded import ShardedCloud
from . import arguments, inputs
from .progress import progress


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "posterior",
        help="log q, posterior mean, score, Fisher trace and ESS for your own files",
        description=(
            "Sums over the atoms of DATA [N, ...] at QUERIES [B, ...]: .npy, .npz, .safetensors,"
            " .pt or .pth; FILE:KEY picks one array of several, a.b being entry b of dict a. DATA"
            " may be a folder of shards with a manifest, too. Writes log_prob, mean, score,"
            " fisher_trace and ess as .npz."
        ),
    )
    arguments.add_data(parser)
    parser.set_defaults(scale=None, offset=None)  # a manifest has its own
    parser.add_argument(
        "--memory",
        type=arguments.size,
        metavar="BYTES",
        help="atoms of a folder of shards in memory at once, such as 512M (default: 1G)",
    )
    parser.add_argument(
        "queries", metavar="QUERIES", help="noisy queries, [B, *E], of any real dtype"
    )
    parser.add_argument("--sigma", type=arguments.positive, required=True, help="noise level, > 0")
    parser.add_argument(
        "--alpha", type=arguments.number, default=1.0, help="signal level (default: 1)"
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("out.npz"), help="result (default: out.npz)"
    )
    parser.add_argument(
        "--force", action="store_true", help="let the result replace one of the inputs"
    )
    parser.add_argument(
        "--chunk",
        type=arguments.count,
        default=1024,
        help="queries per pass over the atoms (default: 1024)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="computation (default: float32)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if not args.force:
        _refuse_inputs(args)
    files.prepare(args.out)
    dtype = getattr(torch, args.dtype)
    try:
        if torch.tensor(check.constant("sigma", args.sigma), dtype=dtype, device="cpu") <= 0:
            raise FileError(
                f"sigma: expected a number that is > 0 in {args.dtype} too, got {args.sigma}"
            )
        results = _evaluated(args, _cloud(args, dtype), dtype)
    except ValueError as error:  # names the file or the argument at fault
        raise FileError(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise FileError("not enough memory: a smaller --chunk needs less") from None
    # With the result on standard output, what is said about it goes where the progress bar is.
    notes = sys.stderr if files.is_standard_output(args.out) else sys.stdout
    save(args.out, results)
    for name, value in results.items():
        print(f"{name:<13}{list(value.shape)!s:<18}mean {value.mean():.6g}", file=notes)
    print(f"written: {args.out}", file=notes)
    return 0


def _refuse_inputs(args: argparse.Namespace) -> None:
    """Raises FileError if the result would replace one of the inputs, under whatever name."""
    for name in (args.data, args.queries, args.log_prior):
        path = None if name is None else arrays.split(name)[0]
        if path is not None and files.is_same(path, args.out):
            raise FileError(
                f"{args.out}: is the input {path}: name another result, or --force to replace it"
            )


def _cloud(args: argparse.Namespace, dtype: torch.dtype) -> PointCloud | ShardedCloud:
    """The atoms of DATA. Raises FileError."""
    folder = inputs.manifest_folder(args.data)
    if folder is None:
        if args.memory is not None:
            raise FileError(
                "--memory: expected it with a folder of shards only, and DATA is a file"
            )
        scale = 1.0 if args.scale is None else args.scale
        offset = 0.0 if args.offset is None else args.offset
        return inputs.cloud(args.data, args.log_prior, scale, offset, dtype)
    for option in ("log_prior", "scale", "offset"):
        if getattr(args, option) is not None:
            what = "has no log_prior" if option == "log_prior" else f"has its own {option}"
            raise FileError(f"--{option.replace('_', '-')}: expected none, since {folder} {what}")
    return inputs.sharded(folder, args.memory, dtype)


def _evaluated(
    args: argparse.Namespace, cloud: PointCloud | ShardedCloud, dtype: torch.dtype
) -> dict[str, np.ndarray]:
    """log_prob [B], mean [B, *E], score [B, *E], fisher_trace [B], ess [B] of all queries.

    Raises:
        FileError: Anything wrong with a file or its contents; it names the file, and the rows.
        ValueError: An argument is wrong.
    """
    asked = arrays.load(args.queries)
    if asked.ndim < 1 or asked.shape[1:] != cloud.event_shape or not len(asked):
        expected = ", ".join(["B", *map(str, cloud.event_shape)])
        raise FileError(
            f"{args.queries}: expected shape [{expected}] with B >= 1 to match {args.data}, got"
            f" {list(asked.shape)}"
        )
    parts: dict[str, list[np.ndarray]] = {name: [] for name in FIELDS}
    chunk = min(args.chunk, len(asked))
    with progress("posterior", "queries") as step:
        for start in range(0, len(asked), chunk):
            rows = asked[start : start + chunk]
            x = inputs.converted(args.queries, rows, dtype, start)
            inputs.check_finite(args.queries, x, start)
            place = f"{args.queries}, rows {start} to {start + len(rows) - 1}"
            names = {"x": place, "y": args.data, "log_prior": args.log_prior}
            with inputs.blaming(names, place):
                found = posterior_sums(x, cloud, args.alpha, args.sigma)
            for name, value in found.items():
                parts[name].append(value.numpy())
            step(start + len(rows), len(asked))
    return {name: np.concatenate(values) for name, values in parts.items()}


def save(path: Path, results: dict[str, np.ndarray]) -> None:
    """Write the results as .npz, whole or not at all, to exactly this name. Raises FileError."""
    # pyrefly: ignore[bad-argument-type]  NumPy's stub takes the names for its own keyword
    files.write(path, lambda file: np.savez(file, **results))
