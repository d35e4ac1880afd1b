"""Folders of shards, as a ShardedCloud opens them."""

from __future__ import annotations

import numpy as np

from dfkernels.methods.sharded import write_manifest


def write_shards(folder, parts, **manifest):
    """part0.npy, part1.npy and so on, and their manifest; returns the folder."""
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(parts):
        np.save(folder / f"part{i}.npy", part.numpy())
    write_manifest(folder, **manifest)
    return folder
