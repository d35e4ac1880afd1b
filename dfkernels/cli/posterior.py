"""The posterior sums of a user's own file of atoms at a file of queries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._io import arrays, files
from .._io.files import FileError
from .._torch import check
from ..cloud import PointCloud
from ..fisher import DiffusionFisher

FIELDS = ("log_prob", "mean", "score", "fisher_trace", "ess")
_BLOCK = 1 << 22  # numbers converted together
_EXACT = {
    torch.float32: 1 << 24,
    torch.float64: 1 << 53,
}  # integers up to here are numbers of that dtype


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
    check.choice("dtype", dtype, tuple(_EXACT))
    chunk = check.integer("chunk", chunk, 1)
    if torch.tensor(check.constant("sigma", sigma), dtype=dtype, device="cpu") <= 0:
        raise ValueError(
            f"sigma: expected a number that is > 0 in {_short(dtype)} too, got {sigma}"
        )
    atoms, asked = arrays.load(data), arrays.load(queries)
    prior = None if log_prior is None else arrays.load(log_prior)
    _check_shapes(data, atoms, queries, asked, log_prior, prior)
    if prior is not None:
        prior = _converted(log_prior, prior, torch.float64)
    if atoms.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.uint8, dtype):
        atoms = _converted(data, atoms, dtype, masked=None if prior is None else prior == -math.inf)
    with _blaming({"y": data, "log_prior": log_prior}):
        cloud = PointCloud(atoms, prior, scale=scale, offset=offset)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in FIELDS}
    chunk = min(chunk, len(asked))
    for start in range(0, len(asked), chunk):
        rows = asked[start : start + chunk]
        x = _converted(queries, rows, dtype, start)
        _check_finite(queries, x, start)
        place = f"{queries}, rows {start} to {start + len(rows) - 1}"
        with _blaming({"x": place, "y": data, "log_prior": log_prior}, place):
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


def _check_shapes(
    data: str,
    atoms: Tensor,
    queries: str,
    asked: Tensor,
    log_prior: str | None,
    prior: Tensor | None,
) -> None:
    """Raises FileError naming the one file whose shape is at fault: the atoms' is what the others
    go by."""
    if atoms.ndim < 1 or atoms.numel() == 0:
        raise FileError(
            f"{data}: expected shape [N, *E] with N >= 1 and no empty dimension, got"
            f" {list(atoms.shape)}"
        )
    if prior is not None and prior.shape != atoms.shape[:1]:
        raise FileError(
            f"{log_prior}: expected shape [{len(atoms)}], one log weight per atom of {data}, got "
            f"{list(prior.shape)}"
        )
    if asked.ndim < 1 or asked.shape[1:] != atoms.shape[1:] or not len(asked):
        expected = ", ".join(["B", *map(str, atoms.shape[1:])])
        raise FileError(
            f"{queries}: expected shape [{expected}] with B >= 1 to match {data}, got"
            f" {list(asked.shape)}"
        )


def _converted(
    name: str, t: Tensor, dtype: torch.dtype, first: int = 0, masked: Tensor | None = None
) -> Tensor:
    """`t` [n, ...], whose row 0 is row `first` of the file, in `dtype`. Numbers with a fraction are
    rounded.

    Raises FileError for integers that `dtype` does not have and for numbers beyond its range, but
    for those in the rows that are `masked` [n], whose values do not matter.
    """
    if t.dtype == dtype:
        return t
    out = torch.empty(t.shape, dtype=dtype, device="cpu")
    rows = max(1, _BLOCK // max(1, t[:1].numel()))
    for start in range(0, len(t), rows):
        block, into = t[start : start + rows], out[start : start + rows]
        into.copy_(block)
        if block.is_floating_point():
            lost = into.isinf() & ~block.to(torch.float64).isinf()
        else:
            most = _EXACT[dtype]
            values = block.numpy()
            if -most <= int(values.min()) and int(values.max()) <= most:
                continue
            lost = torch.from_numpy((values < -most) | (values > most))
        if masked is not None:
            lost[masked[start : start + rows]] = False
        if bool(lost.any()):
            index = lost.nonzero()[0].tolist()
            place = [first + start + index[0], *index[1:]]
            way_out = (
                "; --dtype float64 computes with more digits" if dtype == torch.float32 else ""
            )
            raise FileError(
                f"{name}: expected numbers that {_short(dtype)} can hold, got"
                f" {block[tuple(index)].item()} at index {place}{way_out}"
            )
    return out


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_finite(name: str, x: Tensor, first: int) -> None:
    """Raises FileError for the first NaN or inf of x [n, ...], whose row 0 is row `first` of the
    file."""
    bad = ~x.isfinite()
    if bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        place = [first + index[0], *index[1:]]
        raise FileError(
            f"{name}, row {place[0]}: expected finite values, got {x[tuple(index)].item()} at index"
            f" {place}"
        )


@contextmanager
def _blaming(names: dict[str, str | None], otherwise: str | None = None) -> Iterator[None]:
    """An error that begins with the name of an argument is that of the argument's file; one that
    begins with another name (a number that the caller gave, an environment variable) stays as it
    is; any other is put down to `otherwise`.
    """
    try:
        yield
    except FileError:
        raise
    except (TypeError, ValueError) as error:
        argument, colon, _ = str(error).partition(":")
        named = bool(colon) and argument.isidentifier()
        name = names.get(argument) if named else otherwise
        if name is None:
            raise
        raise FileError(f"{name}: {error}") from None
