"""A data set in many files, larger than the memory: read shard by shard, and merged.

A folder of .npy or .safetensors files becomes a cloud by its manifest, a JSON file that says which
files there are, in which order, and what they held when it was written.
"""

from __future__ import annotations

from .._ranks import RankError
from .cloud import ShardedCloud
from .write import write_manifest

__all__ = ["RankError", "ShardedCloud", "write_manifest"]
