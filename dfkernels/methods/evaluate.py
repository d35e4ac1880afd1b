"""The posterior sums of a user's own file of atoms at a file of queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import _files
from ..cloud import PointCloud
from ..fisher import DiffusionFisher

FIELDS = ("log_prob", "mean", "score", "fisher_trace", "ess")


def evaluate(
    data: str,
    queries: str,
    sigma: float,
    alpha: float = 1.0,
    *,
    log_prior: str | None = None,
    scale: float = 1.0,
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
    chunk: int = 1024,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """log_prob [B], mean [B, *E], score [B, *E], fisher_trace [B], ess [B] for queries [B, *E] and atoms [N,
    *E] from files.

    Atoms stay in their file (memory-mapped) and their storage dtype unless that is wider than `dtype`;
    queries are cast to `dtype` chunk by chunk, `chunk` rows sharing one pass over the atoms. scale and offset
    map the atoms only. `step(done, total)` is called after each chunk, in rows.

    Raises _files.FileError naming the file, for anything wrong with a file or its contents.
    """
    atoms, asked = _files.load(data), _files.load(queries)
    prior = None if log_prior is None else _files.load(log_prior)
    if asked.ndim < 1 or tuple(asked.shape[1:]) != tuple(atoms.shape[1:]) or not len(asked):
        expected = ["B", *atoms.shape[1:]]
        raise _files.FileError(
            f"{queries}: expected shape {expected} with B >= 1 to match {data}, got {list(asked.shape)}"
        )
    with _named(data):
        wide = str(atoms.dtype).endswith("float64") and dtype != torch.float64
        cloud = PointCloud(_tensor(atoms, dtype) if wide else atoms, scale=scale, offset=offset)
    if prior is not None:
        with _named(log_prior):
            cloud = PointCloud(cloud.y, _tensor(prior, dtype), scale=scale, offset=offset)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in FIELDS}
    for start in range(0, len(asked), chunk):
        rows = asked[start : start + chunk]
        with _named(f"{queries}, rows {start} to {start + len(rows) - 1}"):
            at = DiffusionFisher(_tensor(rows, dtype), cloud, alpha, sigma)
            for name, value in zip(
                FIELDS, (at.log_prob, at.denoised, at.score, at.trace(), at.ess), strict=True
            ):
                parts[name].append(value.numpy())
        step(start + len(rows), len(asked))
    return {name: np.concatenate(values) for name, values in parts.items()}


def save(path: Path, results: dict[str, np.ndarray]) -> None:
    """Write the results as .npz, whole or not at all. Raises _files.FileError."""
    _files.write(path, lambda file: np.savez(file, **results))


def _tensor(array: Tensor | np.ndarray, dtype: torch.dtype) -> Tensor:
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiu":
            raise TypeError(f"expected real numbers, got dtype {array.dtype}")
        array = torch.from_numpy(np.array(array, dtype=str(dtype).removeprefix("torch.")))
    elif array.is_complex():
        raise TypeError(f"expected real numbers, got dtype {array.dtype}")
    return array.to(dtype)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except _files.FileError:
        raise
    except (TypeError, ValueError) as error:
        raise _files.FileError(f"{name}: {error}") from None
