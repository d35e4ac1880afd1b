"""`dfkernels index`: the index of a user's own file of atoms."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._io import files
from .._io.files import FileError
from . import arguments, inputs


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "index",
        help="the index of your own file, for certified evaluation of large data sets",
        description=(
            "Builds the index of the atoms of DATA [N, ...], files as for posterior, and writes it"
            " as .safetensors. A program reads it by cloud.index(FILE), where cloud is a PointCloud"
            " of the same atoms. A file that is there already is checked and kept."
        ),
    )
    arguments.add_data(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the index")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
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
