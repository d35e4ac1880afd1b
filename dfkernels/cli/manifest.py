"""`dfkernels manifest`: the manifest of a folder of shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..methods.sharded import ShardedCloud, write_manifest
from . import arguments
from .progress import progress


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "manifest",
        help="the manifest of a folder of shards, for data sets larger than the memory",
        description=(
            "Reads the .safetensors or else the .npy files of FOLDER, rows [n, *E] of one shape and"
            " dtype, and writes FOLDER/manifest.json: which files there are, in the order of the"
            " numbers in their names, and checksums. A program opens them by"
            " df.ShardedCloud(FOLDER)."
        ),
    )
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--key", help="the array in each .safetensors file, where it has several")
    arguments.add_scale(parser, "ROW", arguments.numbers)
    parser.add_argument("--force", action="store_true", help="replace a manifest that is there")
    parser.add_argument(
        "--check", action="store_true", help="compare all checksums with those of the manifest"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.check:
        cloud = ShardedCloud(args.folder)
        with progress("manifest", "rows") as step:
            cloud.verify(callback=step)
        print(f"{len(cloud.files)} files are as in {Path(args.folder) / 'manifest.json'}")
        return 0
    with progress("manifest", "rows") as step:
        path = write_manifest(
            args.folder,
            key=args.key,
            scale=args.scale,
            offset=args.offset,
            force=args.force,
            callback=step,
        )
    print(f"{ShardedCloud(args.folder)}\nwritten: {path}")
    return 0
