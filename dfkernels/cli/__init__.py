"""The command line: parses, calls methods, prints. The exit codes are in EXIT_CODES."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

from .. import __version__
from .._io import arrays, files
from .._io.console import BROKEN_PIPE, Console
from .._io.files import FileError

EXIT_CODES = f"""exit codes:
  0    done
  2    bad arguments, bad input, or a result that cannot be written
  130  interrupted (Ctrl-C)
  {BROKEN_PIPE}  done, results written, but nobody read standard output to its end"""


def main(argv: list[str] | None = None) -> int:
    """Run `dfkernels ARGV`; returns the exit code. Raises SystemExit for --help and for bad
    arguments."""
    parser = _parser()
    command = next(iter(sys.argv[1:] if argv is None else argv), "")
    if command in ("demo", "reproduce"):  # they were commands before they left the package
        parser.exit(2, f"{parser.prog}: error: in a checkout: python -m experiments {command}\n")
    return run(parser, argv)


def run(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> int:
    """Parse ARGV, call the `run` of the subcommand that it names, and return the exit code.

    Every failure that a user can cause becomes one line on standard error. The parser's subcommands
    are stored as `command`, and each sets the default `run`, a function of the parsed arguments.
    """
    with Console() as console:
        try:
            args = parser.parse_args(_joined(sys.argv[1:] if argv is None else argv))
        except SystemExit as stop:
            raise SystemExit(console.code(int(stop.code or 0), parser.prog)) from None
        command = f"{parser.prog} {args.command}"
        try:
            code = args.run(args)
        except KeyboardInterrupt:
            print(f"\n{command}: interrupted", file=sys.stderr)
            code = 130
        except (FileError, ModuleNotFoundError) as error:
            print(f"{command}: error: {error}", file=sys.stderr)
            code = 2
        return console.code(code, command)


def _joined(argv: list[str]) -> list[str]:
    """`--offset -1e-3` as `--offset=-1e-3`, since argparse takes -1e-3 for the name of an
    option."""
    joined: list[str] = []
    for text in argv:
        option = joined[-1] if joined else ""
        takes_one = option.startswith("--") and option != "--" and "=" not in option
        if takes_one and text.startswith("-") and _is_number(text):
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dfkernels",
        description="Exact second-order information of diffused data sets, on PyTorch.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dfkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    posterior = commands.add_parser(
        "posterior",
        help="log q, posterior mean, score, Fisher trace and ESS for your own files",
        description=(
            "Sums over the atoms of DATA [N, ...] at QUERIES [B, ...]: .npy, .npz, .safetensors,"
            " .pt or .pth; FILE:KEY picks one array of several, a.b being entry b of dict a. Writes"
            " log_prob, mean, score, fisher_trace and ess as .npz."
        ),
    )
    _add_data(posterior)
    posterior.add_argument(
        "queries", metavar="QUERIES", help="noisy queries, [B, *E], of any real dtype"
    )
    posterior.add_argument("--sigma", type=_positive, required=True, help="noise level, > 0")
    posterior.add_argument("--alpha", type=_number, default=1.0, help="signal level (default: 1)")
    posterior.add_argument(
        "-o", "--out", type=Path, default=Path("out.npz"), help="result (default: out.npz)"
    )
    posterior.add_argument(
        "--force", action="store_true", help="let the result replace one of the inputs"
    )
    posterior.add_argument(
        "--chunk", type=_count, default=1024, help="queries per pass over the atoms (default: 1024)"
    )
    posterior.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="computation (default: float32)",
    )
    posterior.set_defaults(run=_posterior)

    index = commands.add_parser(
        "index",
        help="the index of your own file, for certified evaluation of large data sets",
        description=(
            "Builds the index of the atoms of DATA [N, ...], files as for posterior, and writes it"
            " as .safetensors. A program reads it by cloud.index(FILE), where cloud is a PointCloud"
            " of the same atoms. A file that is there already is checked and kept."
        ),
    )
    _add_data(index)
    index.add_argument("--out", type=Path, required=True, metavar="FILE", help="the index")
    index.set_defaults(run=_index)

    env = commands.add_parser("env", help="what is loaded, what is not, and why")
    env.set_defaults(run=_env)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what the atoms are."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help=(
            "atoms, [N, *E], of any real dtype; float32/16, bfloat16 and uint8 stay in their file"
            " as they are"
        ),
    )
    parser.add_argument(
        "--log-prior", metavar="FILE", help="log weights of the atoms, [N] (default: uniform)"
    )
    parser.add_argument(
        "--scale", type=_number, default=1.0, help="atoms are scale * DATA + offset (default: 1)"
    )
    parser.add_argument("--offset", type=_number, default=0.0, help="(default: 0)")


def _posterior(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from . import posterior as evaluate

    if not args.force:
        _refuse_inputs(args)
    files.prepare(args.out)
    try:
        with tqdm(desc="posterior", unit=" queries", disable=None, leave=False) as bar:

            def step(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

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
                step=step,
            )
    except ValueError as error:  # names the file or the argument at fault
        raise FileError(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise FileError("not enough memory: a smaller --chunk needs less") from None
    # With the result on standard output, what is said about it goes where the progress bar is.
    notes = sys.stderr if files.is_standard_output(args.out) else sys.stdout
    evaluate.save(args.out, results)
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


def _index(args: argparse.Namespace) -> int:
    from . import inputs

    cloud = inputs.cloud(args.data, args.log_prior, args.scale, args.offset)
    files.prepare(args.out)
    there = args.out.exists()
    try:
        built = cloud.index(args.out)
    except ValueError as error:
        raise FileError(str(error)) from None
    print(f"{built.nbytes / cloud.y.nbytes:.2f} of the size of {args.data}")
    print(f"{'is the index of these atoms' if there else 'written'}: {args.out}")
    return 0


def _env(args: argparse.Namespace) -> int:
    from . import env

    return env.main()


def _number(text: str) -> float:
    if not _is_number(text):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if value <= 0:  # 1e-400 is 0
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return value


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value
