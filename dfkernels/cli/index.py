"""`dfkernels index`: the index of a user's own file of atoms, or of a folder of shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._io import files
from .._io.files import FileError
from ..methods.sharded import ShardedCloud
from . import arguments, inputs
from .progress import progress


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "index",
        help="the index of your own data, for certified evaluation of large data sets",
        description=(
            "Builds the index of the atoms of DATA [N, ...], a file as for posterior, and writes it"
            " as .safetensors. A program reads it by cloud.index(FILE), where cloud is a PointCloud"
            " of the same atoms. Where DATA is a folder with a manifest.json, or that file, each of"
            " its files gets an index beside it, FILE.index, for df.ShardedCloud(DATA). An index"
            " that is there already is checked and kept, so that a run which was killed goes on."
        ),
    )
    arguments.add_data(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the index; not for a folder, but needed elsewhere"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    folder = inputs.manifest_folder(args.data)
    return _of_file(args) if folder is None else _of_folder(args, folder)


def _of_file(args: argparse.Namespace) -> int:
    if args.out is None:
        raise FileError("--out: expected the name of the index")
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


def _of_folder(args: argparse.Namespace, folder: Path) -> int:
    given = {"--out": args.out, "--log-prior": args.log_prior}
    given |= {"--scale": args.scale != 1.0, "--offset": args.offset != 0.0}
    for name, value in given.items():
        if value:
            raise FileError(f"{name}: expected none with {args.data}, whose manifest says all")
    cloud = ShardedCloud(folder)
    try:
        with progress("index", "rows") as step:
            cloud.index(callback=step)
    except ValueError as error:
        raise FileError(str(error)) from None
    print(f"{len(cloud.files)} files have their indexes in {folder}")
    return 0
