"""The posterior sums of a user's own file of atoms at a file of queries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .._io import arrays, files
from .._io.files import FileError
from .._torch import check
from ..fisher import DiffusionFisher
from . import inputs

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
    """log_prob [B], mean [B, *E], score [B, *E], fisher_trace [B], ess [B] for queries [B, *E] and
    atoms [N,
    *E] from files.

    data, queries and log_prior [N] are FILE or FILE:KEY, as `arrays.load` reads them. Atoms stay in
    their file (memory-mapped) and their dtype where that is float32, float16, bfloat16 or uint8, or
    float64 and `dtype` too; others are converted to `dtype`. Queries are converted chunk by chunk,
    `chunk` rows sharing one pass over the atoms. Integers are converted only where nothing is lost.
    scale and offset map the atoms only.
    `step(done, total)` is called after each chunk, in rows.

    Raises files.FileError naming the file at fault (and the rows, for queries), for anything wrong
    with a file or its contents; ValueError or TypeError naming the argument otherwise.
    """
    check.choice("dtype", dtype, tuple(inputs.EXACT))
    chunk = check.integer("chunk", chunk, 1)
    if torch.tensor(check.constant("sigma", sigma), dtype=dtype, device="cpu") <= 0:
        raise ValueError(
            f"sigma: expected a number that is > 0 in {inputs.short(dtype)} too, got {sigma}"
        )
    cloud, asked = inputs.cloud(data, log_prior, scale, offset, dtype), arrays.load(queries)
    if asked.ndim < 1 or asked.shape[1:] != cloud.y.shape[1:] or not len(asked):
        expected = ", ".join(["B", *map(str, cloud.y.shape[1:])])
        raise FileError(
            f"{queries}: expected shape [{expected}] with B >= 1 to match {data}, got"
            f" {list(asked.shape)}"
        )
    parts: dict[str, list[np.ndarray]] = {name: [] for name in FIELDS}
    chunk = min(chunk, len(asked))
    for start in range(0, len(asked), chunk):
        rows = asked[start : start + chunk]
        x = inputs.converted(queries, rows, dtype, start)
        inputs.check_finite(queries, x, start)
        place = f"{queries}, rows {start} to {start + len(rows) - 1}"
        with inputs.blaming({"x": place, "y": data, "log_prior": log_prior}, place):
            at = DiffusionFisher(x, cloud, alpha, sigma)
            for name, value in zip(
                FIELDS, (at.log_prob, at.denoised, at.score, at.trace(), at.ess), strict=True
            ):
                parts[name].append(value.numpy())
        step(start + len(rows), len(asked))
    return {name: np.concatenate(values) for name, values in parts.items()}


def save(path: Path, results: dict[str, np.ndarray]) -> None:
    """Write the results as .npz, whole or not at all, to exactly this name. Raises
    files.FileError."""
    files.write(path, lambda file: np.savez(file, **results))
