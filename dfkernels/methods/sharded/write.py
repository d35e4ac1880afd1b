"""Writing a manifest: every file is read once and looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..._io.files import FileError
from .._reporting import Callback, reporting
from . import _manifest

__all__ = ["write_manifest"]


def write_manifest(
    folder: str | Path,
    *,
    key: str | None = None,
    scale: float | Sequence[float] = 1.0,
    offset: float | Sequence[float] = 0.0,
    force: bool = False,
    callback: Callback | None = None,
    progress: bool = False,
) -> Path:
    """Writes `manifest.json` into a folder of shards, which a `ShardedCloud` is opened by. Reads
    every file once.

    Args:
        folder: With .safetensors files, or else with .npy files, in the order of the numbers in
            their names. Each holds rows ``[n, *E]``, all of one shape and dtype: float64/32/16,
            bfloat16 or uint8.
        key: Of the array in each .safetensors file; None where a file holds one array only.
        scale, offset: Atoms are scale * row + offset: a number, or one for each channel, the first
            axis of E. Latents that are normalised to (z - mean)/std have the scale 1/std and the
            offset -mean/std.
        force: Whether to replace a manifest that is there.
        callback: callback(rows, all rows) after each block that was read.
        progress: Whether to show a bar on stderr.

    Returns:
        The path of the manifest.

    Raises:
        ValueError: A shard is missing in the numbering or truncated, lacks the key, has another
            shape or dtype than the first, holds NaN or inf, or ends in a row of zeros, as one does
            whose writer died; there is a manifest already, or it cannot be written. It is a
            `FileError`, whose message names the file.
        TypeError, ValueError: scale or offset is no finite number, nor one for each channel.
    """
    folder = Path(folder)
    path = folder / _manifest.NAME
    if path.exists() and not force:
        raise FileError(f"{path}: is there already: force replaces it")
    with reporting("manifest", callback, progress, 0) as report:
        made = _manifest.make(folder, key, scale, offset, report)
    # as it will be opened: two names of one file are refused here
    made.located(folder, range(len(made.shards)))
    made.write(path)
    return path
