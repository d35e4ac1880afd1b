"""The command line: parses, calls methods, prints.  Exit codes: 0, 1 (a check failed, or an experiment),
2 (bad input), 130 (Ctrl-C).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

from . import __version__
from ._files import FileError, folder
from ._progress import Progress
from .experiments import reproduce


def main(argv: list[str] | None = None) -> int:
    """Run `dfkernels ARGV`; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"\ndfkernels {args.command}: interrupted", file=sys.stderr)
        return 130
    except (FileError, ModuleNotFoundError) as error:
        print(f"dfkernels {args.command}: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dfkernels", description="Exact second-order information of diffused data sets, on PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"dfkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="the main job on real data: tables, figures and one HTML page (2 minutes)"
    )
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default: out)")
    demo.add_argument("--quick", action="store_true", help="fewer atoms, queries and noise levels (seconds)")
    demo.set_defaults(run=_demo)

    reproduction = commands.add_parser(
        "reproduce",
        help="the paper's experiments: tables, figures, every claim checked",
        description="Trains what the experiments need, runs them, and writes tables, figures, Markdown and "
        "one HTML page to DIR. Trained networks stay in DIR: an interrupted run goes on from them.",
    )
    reproduction.add_argument("experiment", choices=(*reproduce.NAMES, "all"))
    reproduction.add_argument(
        "--out", type=Path, default=Path("out/reproduce"), metavar="DIR", help="(default: out/reproduce)"
    )
    reproduction.add_argument(
        "--quick", action="store_true", help="small samples, short training (a minute or two)"
    )
    reproduction.set_defaults(run=_reproduce)

    posterior = commands.add_parser(
        "posterior",
        help="log q, posterior mean, score, Fisher trace and ESS for your own files",
        description="Sums over the atoms of DATA [N, ...] at QUERIES [B, ...]: .npy, .safetensors or .pt; "
        "FILE:KEY picks one tensor of several. Writes log_prob, mean, score, fisher_trace and ess as .npz.",
    )
    posterior.add_argument("data", metavar="DATA", help="atoms, [N, *E]; float64/32/16, bfloat16 or uint8")
    posterior.add_argument("queries", metavar="QUERIES", help="noisy queries, [B, *E]")
    posterior.add_argument("--sigma", type=_positive, required=True, help="noise level, > 0")
    posterior.add_argument("--alpha", type=_number, default=1.0, help="signal level (default: 1)")
    posterior.add_argument(
        "--log-prior", metavar="FILE", help="log weights of the atoms, [N] (default: uniform)"
    )
    posterior.add_argument(
        "--scale", type=_number, default=1.0, help="atoms are scale * DATA + offset (default: 1)"
    )
    posterior.add_argument("--offset", type=_number, default=0.0, help="(default: 0)")
    posterior.add_argument(
        "-o", "--out", type=Path, default=Path("out.npz"), help="result (default: out.npz)"
    )
    posterior.add_argument(
        "--chunk", type=_count, default=1024, help="queries per pass over the atoms (default: 1024)"
    )
    posterior.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="computation (default: float32)"
    )
    posterior.set_defaults(run=_posterior)

    env = commands.add_parser("env", help="what is loaded, what is not, and why")
    env.set_defaults(run=_env)
    return parser


def _demo(args: argparse.Namespace) -> int:
    from .experiments import demo

    return demo.run(args.out, quick=args.quick)


def _reproduce(args: argparse.Namespace) -> int:
    names = reproduce.NAMES if args.experiment == "all" else [args.experiment]
    return reproduce.run(list(names), args.out, quick=args.quick)


def _posterior(args: argparse.Namespace) -> int:
    from .methods import evaluate

    folder(args.out.parent)
    with Progress("posterior", 1) as bar:
        results = evaluate.evaluate(
            args.data,
            args.queries,
            args.sigma,
            args.alpha,
            log_prior=args.log_prior,
            scale=args.scale,
            offset=args.offset,
            dtype=getattr(torch, args.dtype),
            chunk=args.chunk,
            step=bar.at,
        )
    evaluate.save(args.out, results)
    for name, value in results.items():
        print(f"{name:<13}{str(list(value.shape)):<18}mean {value.mean():.6g}")
    print(f"written: {args.out}")
    return 0


def _env(args: argparse.Namespace) -> int:
    from . import env

    return env.main()


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value
