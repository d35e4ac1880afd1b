"""What a cloud in files says of single atoms: the heaviest, and those that a tolerance leaves."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from ...certified.certificate import Certificate
from ...law import Law
from ._certified import Searches, find
from ._files import Files
from ._heaviest import k_heaviest, of_all, of_found
from ._index import Indexes, too_short
from ._manifest import Numbers
from ._pass import Pass

__all__ = ["Searched"]


class Searched(Law, abc.ABC):
    """A law whose atoms are in files, which may have indexes."""

    folder: Path
    scale: Numbers  # pyrefly: ignore[bad-override]  # of channels too
    offset: Numbers  # pyrefly: ignore[bad-override]
    _files: Files

    @abc.abstractmethod
    def _over(self, x: Tensor, files: Iterable[int] | None = None) -> Pass:
        """A pass over some files, or all of them, for queries x."""

    def _k_heaviest(self, x: Tensor, alpha: Tensor, sigma: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self._expect_one_rank("top_k")
        over = self._over(x)
        return k_heaviest(over, x, alpha, sigma, of_all(over, x), k)

    def _k_heaviest_within(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, k: int, tolerance: float
    ) -> tuple[Tensor, Tensor]:
        over = self._over(x)
        found = find(self._searches.indexes, x, alpha, sigma, over.numbers, tolerance, k)
        return k_heaviest(over, x, alpha, sigma, of_found(over, found), k)

    def _certificate(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, tolerance: float
    ) -> Certificate:
        return self._searches.found(x, alpha, sigma, self._over(x).numbers, tolerance).certificate

    @property
    def _searches(self) -> Searches:
        results = vars(self).setdefault("_results", {})
        if "searches" not in results:
            results["searches"] = Searches(Indexes(self._files, self.scale, self.offset))
        return results["searches"]

    def _no_index(self) -> str | None:
        if self._files.ranks.size > 1:
            return "ranks search no indexes: leave it out, or open the cloud without group"
        if (why := too_short(self._files)) is not None:
            return why
        if (missing := self._searches.indexes.missing()) is None:
            return None
        return (
            f"{missing} is missing: `dfkernels index {self.folder}` or cloud.index() writes the "
            "indexes"
        )

    def _expect_one_rank(self, name: str) -> None:
        if (size := self._files.ranks.size) > 1:
            raise ValueError(
                f"{name}: expected a cloud of one rank, got one of {size}: open it without group"
            )
