"""The data set: atoms y_i and their log weights, checked once."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from ._atoms import checked_log_prior, checked_stored, finite, masked
from ._io import files
from ._torch import check, diagnosis
from ._torch.objects import Watched, plain
from .certified import build, heaviest, index_file
from .certified.index import CloudIndex, unindexable
from .certified.select_atoms import op as select_atoms
from .law import Drawn, Law, checked_rows, different_points, per_channel
from .ops.common.about_mean import log_norm
from .ops.transport_chain import Chain

__all__ = ["PointCloud"]


class PointCloud(Law):
    """The data set: N atoms y_i = scale * y[i] + offset with log weights log pi_i, immutable, their
    values checked once.

    Args:
        y: [N, *E], N >= 1, a tensor or numpy array (a memory map stays one); float64/32/16,
            bfloat16 or uint8.
        log_prior: [N] floating, or None for uniform. Need not be normalised; -inf masks an atom,
            whatever it holds, NaN included; at least one is finite.
        scale, offset: finite numbers that map the stored values to the data, e.g. scale=2/255,
            offset=-1 for uint8 images.

    The constructor looks at every value once, in blocks, so that no later call has to. It keeps y
    without copying if y is contiguous, in the machine's byte order and no inference tensor. If you
    change y or log_prior in place afterwards, the next use raises RuntimeError; a change of the
    memory of a numpy array, or through `.data`, goes unseen, and the results are then wrong. Both
    are detached: for derivatives with respect to the atoms or their weights call the ops.

    Raises:
        TypeError: A type, layout or dtype is wrong.
        ValueError: A shape is wrong, or a value is not finite.

    Warns:
        RuntimeWarning: log_prior looks like probabilities in place of their logarithms: numbers in
            [0, 1), not all the same, whose sum is 1.
    """

    y = Watched[Tensor]()
    _index: Watched[CloudIndex | None] = Watched()

    def __init__(
        self,
        y: Tensor | np.ndarray,
        log_prior: Tensor | np.ndarray | None = None,
        *,
        scale: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        y = checked_stored("y", y)
        state = {
            "scale": check.constant("scale", scale),
            "offset": check.constant("offset", offset),
        }
        with plain(y.device):
            y = y.detach().resolve_neg().contiguous()
            log_prior = checked_log_prior(log_prior, "y", y)
            finite("y", y, masked(log_prior))
        self.__setstate__({"y": y, "log_prior": log_prior, "_index": None, **state})

    @property
    def _y(self) -> Tensor:
        """y for its shape, dtype and device, which a change in place leaves."""
        return PointCloud.y.peek(self)

    def to(self, *args: Any, **kwargs: Any) -> PointCloud:
        """A cloud with y moved or cast as by `Tensor.to`; self where nothing changes.

        log_prior moves but keeps its dtype. The index moves along, unless y is cast: then the
        atoms are others.

        Raises:
            TypeError: A cast between floating and integer storage: requantise the data instead.
            ValueError: A narrower dtype overflows.
        """
        with plain(self.device):
            y = self.y.to(*args, **kwargs)
        if y.dtype.is_floating_point != self.dtype.is_floating_point:
            raise TypeError(
                f"dtype: expected a cast that keeps {self.dtype} values, got {y.dtype}; "
                f"requantise y instead"
            )
        if y is self.y:
            return self
        prior = None if self.log_prior is None else self.log_prior.to(y.device)
        moved = PointCloud(y, prior, scale=self.scale, offset=self.offset)
        if self._index is not None and y.dtype == self.dtype:
            found = CloudIndex(*[part.to(y.device) for part in self._index])
            object.__setattr__(moved, "_index", found)
        return moved

    def index(self, path: str | Path | None = None, *, seed: int = 0) -> CloudIndex:
        """The index of the atoms that `tolerance=` works with: built when first asked for, then
        kept.

        Args:
            path: a .safetensors file: read, memory-mapped, if it is there, else written.
            seed: of the sample and the random projection that find the principal axes. It changes
                how fast the results come, never the results by more than the tolerance.

        Seconds per 10^5 atoms of a few thousand numbers; about a quarter of the size of float32
        atoms, at most 1.3 times the size of uint8 ones.

        Raises:
            ValueError: The file is damaged, of another format or of another cloud, or cannot be
                written (a `FileError`); the atoms have less than 32 bytes, and are read as fast as
                any index; or float32 cannot hold their distances.
        """
        if (why := unindexable(self.d, self.dtype)) is not None:
            raise ValueError(f"index: {why}")
        seed = check.integer("seed", seed)
        found = self._index
        if found is None or path is not None:
            with plain(self.device):
                found = self._indexed(None if path is None else Path(path), seed)
            object.__setattr__(self, "_index", found)
        return found

    def _indexed(self, path: Path | None, seed: int) -> CloudIndex:
        flat, without = self.y.reshape(len(self), -1), masked(self.log_prior)
        if without is not None:
            without = without.cpu()
        if path is None:
            found = build.build_index(flat.cpu(), self.scale, self.offset, seed, without)
        else:
            cloud = index_file.fingerprint(flat, self.scale, self.offset)
            if without is not None:
                cloud += f" masked crc32={files.checksum(without.to(torch.uint8))}"
            if path.exists():
                found = index_file.load_index(path, cloud)
            else:
                found = self._index or build.build_index(
                    flat.cpu(), self.scale, self.offset, seed, without
                )
                index_file.save_index(path, found, cloud)
        return CloudIndex(*[t.to(self.device) for t in found])

    @torch.no_grad()
    def _select(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, tolerance: float, k: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The atoms that can carry weight, found through the index: with a tolerance all but that
        part of the mass, with k only those that can be among the k heaviest. Levels are [B].

        Returns:
            (atoms [M], counts [B], dropped [B]): the atoms of one query after another, a count of
            -1 where all should be taken, and a bound on what is left out.
        """
        x, y = x.detach().reshape(len(x), -1), self.y.reshape(len(self), -1)
        prior = self._log_pi(x.dtype)
        if k is None:
            gap = math.log(len(self) / tolerance)
        else:
            # logits in float64 and with the priors in float64 may come in another order, by two
            # roundings of a prior
            largest = math.log(len(self))
            if prior is not None:
                largest = prior[prior > -math.inf].abs().max().item()
            gap = 2 * torch.finfo(x.dtype).eps * largest
        queries = (x, y, alpha.detach(), sigma.detach(), prior, self.scale, self.offset)
        return diagnosis.call(select_atoms, (*queries, *self.index(), gap, k or 1), x=x, y=y)

    def posterior(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, **lists: Tensor
    ) -> ops.Posterior:
        """`ops.posterior` over the atoms; `lists`: its atoms and counts."""
        return ops.posterior(x, self.y, alpha, sigma, **self._given(x, lists))

    def _eps(self, p: Any, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return p.eps(x, alpha, sigma)

    def _score(self, p: Any, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return p.score(x, alpha, sigma)

    def fisher_matvec(
        self,
        x: Tensor,
        v: Tensor,
        alpha: float | Tensor,
        sigma: float | Tensor,
        **lists: Tensor,
    ) -> Tensor:
        """`ops.fisher_matvec` over the atoms."""
        return ops.fisher_matvec(x, self.y, v, alpha, sigma, **self._given(x, lists))

    def fisher_diagonal(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, **lists: Tensor
    ) -> Tensor:
        """`ops.fisher_diagonal` over the atoms."""
        return ops.fisher_diagonal(x, self.y, alpha, sigma, **self._given(x, lists))

    def fisher_dense(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, **lists: Tensor
    ) -> Tensor:
        """`ops.fisher_dense` over the atoms."""
        return ops.fisher_dense(x, self.y, alpha, sigma, **self._given(x, lists))

    def rows(self, numbers: Tensor) -> Tensor:
        """Some atoms: values, scale and offset applied.

        Args:
            numbers: Of the atoms, int64 [n], from 0 to N - 1.

        Returns:
            [n, *E] in float64 on the cloud's device.

        Raises:
            TypeError: They are no int64 tensor [n].
            ValueError: There is no such atom.
        """
        numbers = checked_rows(numbers, len(self)).to(self.device)
        with plain(self.device):
            return self.y[numbers].double() * self.scale + self.offset

    def draw(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, *, seed: int) -> Drawn:
        rows = ops.draw(x, self.y, alpha, sigma, seed=seed, **self._given(x, {}))
        return Drawn(rows, self.y[rows].to(x.dtype) * self.scale + self.offset)

    def _given(self, x: Tensor, lists: dict[str, Tensor]) -> dict[str, Any]:
        """What the ops take beside the levels."""
        shared = {"scale": self.scale, "offset": self.offset}
        return {"log_prior": self._log_pi(x.dtype), **shared, **lists}

    def _sampled(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        return self.rows(rows)

    def _without_repeats(self, count: int, generator: torch.Generator) -> Tensor:
        return different_points(self, count, generator)

    def _k_heaviest(self, x: Tensor, alpha: Tensor, sigma: Tensor, k: int) -> tuple[Tensor, Tensor]:
        def log_total() -> Tensor:
            whole = self.posterior(x, alpha, sigma).log_prob.detach()
            return whole + log_norm(sigma, self.d)

        given = (x.double().reshape(len(x), -1), alpha.double(), sigma.double())
        search = (*given, self._atoms(), self._distances(), k)
        found = heaviest.heaviest_for(x.dtype, *search, log_total)
        return found.index, found.logit - found.log_total[:, None]

    def _chain(
        self,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        rates: Tensor | None,
        transposed: bool,
    ) -> Chain:
        y = self.y.to(x.dtype) * self.scale + self.offset
        return ops.transport_chain(
            x, y, alpha, sigma, self.log_prior, rates=rates, transposed=transposed
        )

    def _mapped(self, a: Tensor, b: Tensor, most: int) -> PointCloud:
        if len(a) == 1:  # without a pass that checks the atoms again
            scale, offset = a.item() * self.scale, a.item() * self.offset + b.item()
            return self._replaced(scale=scale, offset=offset, _index=None)
        step = -(-self.y.numel() // most)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        y = self.y[::step].to(dtype) * self.scale + self.offset
        prior = None if self.log_prior is None else self.log_prior[::step]
        return PointCloud(y * per_channel(a, y) + per_channel(b, y), prior)

    def _replaced(self, **state: object) -> PointCloud:
        """A copy with other values of some attributes."""
        other = copy.copy(self)
        other.__setstate__(state)
        return other

    def _fingerprint(self) -> str:
        prior = self.log_prior
        weights = "" if prior is None else f" weights crc32={files.checksum(prior.cpu())}"
        flat = self.y.reshape(len(self), -1)
        return index_file.fingerprint(flat, self.scale, self.offset) + weights

    def _no_index(self) -> str | None:
        return (
            None if self._index is not None else "the cloud has no index: call cloud.index() first"
        )

    def _atoms(self) -> heaviest.Atoms:
        """The atoms as a search for the heaviest takes them."""
        y = self.y.reshape(len(self), -1)
        return heaviest.Atoms(y, self._log_pi_of_all(), self.scale, self.offset)

    def _distances(self) -> heaviest.Distances:
        """The atoms' distances from a centre, for such a search; computed once."""
        atoms, results = self._atoms(), vars(self).setdefault("_results", {})
        if "distances" not in results:
            with plain(self.device):
                results["distances"] = heaviest.distances(atoms)
        return results["distances"]
