"""The command line: one module per command, which parses, calls methods and prints. The exit codes
are in EXIT_CODES."""

from __future__ import annotations

import argparse
import sys

from .. import __version__
from .._io.console import BROKEN_PIPE, Console
from .._io.files import FileError
from . import audit, env, index, manifest, nll, posterior
from .arguments import is_number

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
        except KeyboardInterrupt as stop:
            how_to_go_on = f": {stop}" if stop.args else ""
            print(f"\n{command}: interrupted{how_to_go_on}", file=sys.stderr)
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
        if takes_one and text.startswith("-") and is_number(text):
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dfkernels",
        description="Exact second-order information of diffused data sets, on PyTorch.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dfkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (posterior, index, manifest, audit, nll, env):
        command.add_to(commands)
    return parser
