"""`dfkernels audit`: a trained network against its data, with a page to read."""

from __future__ import annotations

import argparse
import inspect
from functools import partial
from pathlib import Path

import torch

from .._io import files
from .._io.files import FileError
from .._page import extra
from ..methods.audit import AuditReport, audit
from ..methods.audit.task import Points
from ..methods.audit_page import write_page
from ..methods.denoiser import PREDICTION_TYPES, Denoiser
from ..methods.sharded import ShardedCloud
from . import arguments, inputs, networks, schedules
from .progress import progress

_DEFAULTS = {name: p.default for name, p in inspect.signature(audit).parameters.items()}
_REPORT, _PAGE, _CHECKPOINT = "audit.json", "audit.html", "checkpoint.json"


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "audit",
        help="a trained network against its data: fit, memorisation, calibration, a page to read",
        description=(
            "Compares a network with the exact posterior mean of its training data, with itself on"
            " data that it was not trained on, and its samples with the data. Writes audit.html, a"
            " page with the verdict and figures, and audit.json, all numbers, to DIR, and prints"
            " the tables. What is finished stays in DIR: the same command goes on from there. The"
            " exit code is 0 whatever the verdict."
        ),
    )
    parser.add_argument(
        "network",
        metavar="NETWORK",
        help=(
            "module:function or file.py:function, a function without arguments that returns a"
            " network(x, t) or a df.Denoiser; or a file: .pt2 of torch.export,"
            f" {', '.join(networks.SCRIPTED)} of TorchScript. Its code is run"
        ),
    )
    _add_data(parser)
    _add_conventions(parser)
    _add_amounts(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("audit"), metavar="DIR", help="(default: audit)"
    )
    parser.add_argument("--device", default="cpu", help="as torch names it (default: cpu)")
    parser.set_defaults(run=_run)


def _add_data(parser: argparse.ArgumentParser) -> None:
    files_read = "[N, *E], in a file as for posterior, or a folder with a manifest.json"
    parser.add_argument(
        "--train", metavar="FILE", help=f"the training data, or a random part of them: {files_read}"
    )
    parser.add_argument(
        "--held-out",
        metavar="FILE",
        help="data of the same law that the network was not trained on; at least one of the two",
    )
    arguments.add_scale(parser, "FILE")


def _add_conventions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--schedule",
        metavar="NAME",
        help=(
            f"such as VP or 'VP(beta_max=20)', of {', '.join(schedules.NAMES)}; not for a Denoiser"
        ),
    )
    parser.add_argument(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="what the network returns; not for a Denoiser",
    )
    parser.add_argument(
        "--clock",
        type=arguments.number,
        metavar="FACTOR",
        help="the network is given FACTOR * t (default: t); not for a Denoiser",
    )


def _add_amounts(parser: argparse.ArgumentParser) -> None:
    """How much is measured, under the names that `audit` has for it."""
    positive, some = arguments.positive, partial(arguments.count, least=0)
    parser.add_argument(
        "--noise",
        nargs=2,
        type=positive,
        metavar=("LOW", "HIGH"),
        help="noise levels sigma/alpha (default: by the data)",
    )
    for name, kind, what in (
        ("levels", arguments.count, "how many noise levels"),
        ("queries", arguments.count, "per level and kind of data"),
        ("points", some, "of each kind, whose likelihood is computed; 0: none"),
        ("samples", some, "how many are drawn; 0: none"),
        ("width", positive, "of a bin of quantised data, after --scale, for bits per dimension"),
        ("seed", some, "of all random numbers"),
    ):
        default = _DEFAULTS.get(name, 0)
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{what}{shown}")


def _run(args: argparse.Namespace) -> int:
    extra.require("report", extra.REPORT)
    for name in (_REPORT, _PAGE, _CHECKPOINT):
        files.prepare(args.out / name)
    train, held_out = _data(args)
    denoiser = _denoiser(args, next(cloud for cloud in (train, held_out) if cloud is not None))
    try:
        report = _audited(args, denoiser, train, held_out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"what is finished is in {args.out}; the same command goes on from there"
        ) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise FileError("not enough memory: fewer --queries need less") from None
        raise FileError(f"{args.network}: {networks.described(error)}") from None
    files.write(args.out / _REPORT, lambda file: file.write(report.to_json().encode()))
    write_page(report, args.out / _PAGE, train)
    (args.out / _CHECKPOINT).unlink(missing_ok=True)
    print(f"{report}\nwritten: {args.out / _PAGE}, {args.out / _REPORT}")
    return 0


def _data(args: argparse.Namespace) -> tuple[Points | None, Points | None]:
    """The training and the held-out data, of one shape."""
    if args.train is None and args.held_out is None:
        raise FileError("--train, --held-out: expected at least one of them")
    train, held_out = (
        None if name is None else _moved(args, _opened(args, name))
        for name in (args.train, args.held_out)
    )
    if train is not None and held_out is not None and train.event_shape != held_out.event_shape:
        raise FileError(
            f"{args.held_out}: expected data of shape {list(train.event_shape)}, as in"
            f" {args.train}, got {list(held_out.event_shape)}"
        )
    return train, held_out


def _opened(args: argparse.Namespace, name: str) -> Points:
    folder = inputs.manifest_folder(name)
    if folder is None:
        return inputs.cloud(name, None, args.scale, args.offset)
    return ShardedCloud(folder)


def _moved(args: argparse.Namespace, cloud: Points) -> Points:
    try:
        return cloud.to(args.device)
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch has no CUDA
        raise FileError(f"--device {args.device}: {files.first_sentence(error)}") from None


def _denoiser(args: argparse.Namespace, cloud: Points) -> Denoiser:
    """The network on the device, called once on states like those of the audit."""
    denoiser = networks.load(args.network, args.schedule, args.prediction_type, args.clock)
    denoiser = denoiser.to(args.device)
    dtype = torch.float64 if cloud.dtype == torch.float64 else torch.float32
    atoms = cloud.rows(torch.arange(min(3, len(cloud)), dtype=torch.int64, device="cpu")).to(dtype)
    networks.try_out(args.network, denoiser, atoms)
    return denoiser


def _audited(
    args: argparse.Namespace,
    denoiser: Denoiser,
    train: Points | None,
    held_out: Points | None,
) -> AuditReport:
    names = {"train": args.train, "held_out": args.held_out, "network": args.network}
    with progress("audit", "parts") as step:
        try:
            with inputs.blaming(names):
                return audit(
                    denoiser,
                    train,
                    held_out,
                    noise=None if args.noise is None else tuple(args.noise),
                    levels=args.levels,
                    queries=args.queries,
                    points=args.points,
                    samples=args.samples,
                    width=args.width,
                    generator=torch.Generator("cpu").manual_seed(args.seed),
                    checkpoint=args.out / _CHECKPOINT,
                    callback=step,
                )
        except ValueError as error:  # names the file or the argument at fault
            raise FileError(str(error)) from None
