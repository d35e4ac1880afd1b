"""`python -m experiments demo | reproduce | audit | public`: the library on real data; the
experiments of the paper and its siblings; a network that memorises and one that does not; one that
others trained."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dfkernels import cli

from . import NAMES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="What dfkernels computes on real data, every number checked.",
        epilog=cli.EXIT_CODES.replace("  2  ", "  1    a check failed\n  2  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="the main job on real data: tables, figures and one HTML page (2 minutes)"
    )
    _common(demo, _demo, "out", "fewer atoms, queries and noise levels (seconds)")

    reproduction = commands.add_parser(
        "reproduce",
        help="the experiments of the paper and its siblings, every claim checked",
        description=(
            "Trains what the experiments need, runs them, and writes tables, figures, Markdown and"
            " one HTML page to DIR. Trained networks stay in DIR: an interrupted run goes on from"
            " them."
        ),
    )
    reproduction.add_argument("experiment", choices=(*NAMES, "all"))
    quick = "small samples, short training (a minute or two)"
    _common(reproduction, _reproduce, "out/reproduce", quick)

    audit = commands.add_parser(
        "audit",
        help="two networks on Fashion-MNIST, one of them overfitted: checked and audited",
        description=(
            "Trains a U-Net on the 60,000 images and another on 300 of them, audits both, and"
            " writes Markdown, figures and an HTML page for each to DIR. Trained networks stay in"
            " DIR: an interrupted run goes on from them."
        ),
    )
    audit.add_argument(
        "--data",
        type=Path,
        default=None,
        metavar="FOLDER",
        help=(
            "where Fashion-MNIST's *-images-idx3-ubyte.gz are (default:"
            " /usr/share/datasets/fashion-mnist, of Debian's package dataset-fashion-mnist)"
        ),
    )
    _common(audit, _audit, "out/audit", "scikit-learn's digits, short training (seconds)")

    public = commands.add_parser(
        "public",
        help="a network that nobody here trained: sampled, its likelihood, audited",
        description=(
            "Takes the network of the package 21cmPSDenoiser, and writes its numbers as Markdown"
            " and a figure to DIR."
        ),
    )
    _common(public, _public, "out/public", "few samples and probes (a minute or two)")
    return parser


def _common(
    command: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    out: str,
    quick: str,
) -> None:
    """Every command's folder for results, and its small version; `quick` says what that leaves."""
    said = f"folder for the results (default: {out})"
    command.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help=said)
    command.add_argument("--quick", action="store_true", help=quick)
    command.set_defaults(run=run)


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    return demo.run(args.out, quick=args.quick)


def _reproduce(args: argparse.Namespace) -> int:
    from . import reproduce

    names = list(NAMES) if args.experiment == "all" else [args.experiment]
    return reproduce.run(names, args.out, quick=args.quick)


def _audit(args: argparse.Namespace) -> int:
    from . import audit

    return audit.run(args.out, args.data, quick=args.quick)


def _public(args: argparse.Namespace) -> int:
    from . import public

    return public.run(args.out, quick=args.quick)


def main(argv: list[str] | None = None) -> int:
    """Run `python -m experiments ARGV`; returns the exit code."""
    return cli.run(_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
