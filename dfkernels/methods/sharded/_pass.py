"""How the files of a cloud are read, for results and for derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..._merge import merge
from ...certified import heaviest
from ...law import per_channel
from ...partial import Partial
from .._reporting import Callback, reporting
from ._files import Files
from ._manifest import Numbers

__all__ = ["Pass", "stacked"]

T = TypeVar("T", Partial, tuple[Tensor, ...])


@dataclass(frozen=True, eq=False)
class Pass:
    """Some files of a cloud, which can be read as often as needed.

    Attributes:
        files: The files of the cloud.
        numbers: Which of them, in order.
        count: Rows that are read together.
        scale, offset: What maps rows to atoms.
        diagonal: Whether diag C is wanted.
        pinned: Whether a GPU takes the rows.
        callback, progress: As for `ShardedCloud.partial`.
    """

    files: Files
    numbers: Sequence[int]
    count: int
    scale: Numbers
    offset: Numbers
    diagonal: bool = False
    pinned: bool = False
    callback: Callback | None = None
    progress: bool = False

    def by_file(
        self, name: str, given: Mapping[str, object], nothing: T, add: Callable[[T, Tensor], T]
    ) -> Iterator[T]:
        """What the rows of each file make together, by whichever rank: add(add(nothing, block),
        block) and so on. Both the results and the derivatives are put together from these, in the
        order of the files.

        Args:
            name: Of the progress bar.
            given: What the results depend on, by name.
            nothing: A Partial, or a tuple of tensors in float64.
            add: Of what was made so far and rows.
        """
        ranks, owner = self.files.ranks, self.files.owner
        of_pass = ("numbers", "count", "scale", "offset", "diagonal")
        how = {"manifest": self.files.crc32, **{n: getattr(self, n) for n in of_pass}}
        ranks.agree(f"a pass for {name}", {**given, **how})
        own = self._by_own_file(ranks.share(self.numbers, owner), name, nothing, add)
        return ranks.exchanged(self.numbers, owner, own, nothing)

    def _by_own_file(
        self, numbers: Sequence[int], name: str, nothing: T, add: Callable[[T, Tensor], T]
    ) -> Iterator[T]:
        total, done, made = sum(self.files.sizes[i] for i in numbers), 0, nothing
        with reporting(
            name, self.callback, self.progress and self.files.ranks.rank == 0, total
        ) as report:
            for block, y in self.files.blocks(numbers, self.count, self.pinned):
                made = add(made, y)
                done += len(y)
                report(done, total)
                if block.last == self.files.sizes[block.file]:
                    yield made
                    made = nothing

    def block(
        self,
        y: Tensor,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        v: Tensor | None,
        lists: tuple[Tensor, Tensor] | None = None,
    ) -> Partial:
        """The Partial of rows, which are overwritten where there are numbers for each channel;
        lists (atoms, counts) as in `Partial.of`.
        """
        y, scale, offset = self.stored(y, x)
        given: dict[str, Any] = {"v": v, "diagonal": self.diagonal}
        if lists is not None:
            given |= {"atoms": lists[0].to(x.device), "counts": lists[1].to(x.device)}
        return Partial.of(x, y, alpha, sigma, scale=scale, offset=offset, **given)

    def stored(self, y: Tensor, x: Tensor) -> tuple[Tensor, float, float]:
        """Rows, scale and offset as the ops take them with queries x. Where there are numbers for
        each channel, the rows are overwritten, by values in x's dtype.
        """
        y = y.to(x.device)
        if isinstance(self.scale, float) and isinstance(self.offset, float):
            return y, self.scale, self.offset
        y, scale, offset = y.to(x.dtype), *(stacked(n) for n in (self.scale, self.offset))
        return y.mul_(per_channel(scale, y)).add_(per_channel(offset, y)), 1.0, 0.0

    def atoms(self, y: Tensor, x: Tensor) -> heaviest.Atoms:
        """Rows as a search for the heaviest takes them, all of the same weight; see `stored`."""
        y, scale, offset = self.stored(y, x)
        log_pi = torch.zeros((), dtype=torch.float64, device=y.device).expand(len(y))
        return heaviest.Atoms(y.flatten(1), log_pi, scale, offset)

    def nothing(self, x: Tensor, alpha: Tensor, sigma: Tensor, v: Tensor | None) -> Partial:
        """The Partial of no rows."""
        shape = (0, *self.files.manifest.event_shape)
        like = torch.empty(shape, dtype=self.files.dtype, device="cpu")
        return self.block(like, x, alpha, sigma, v)

    def whole(self, x: Tensor, alpha: Tensor, sigma: Tensor, v: Tensor | None) -> Partial:
        """The Partial of all rows."""
        with self.files.ranks.telling():
            nothing = self.nothing(x, alpha, sigma, v)
        given = {"x": x, "alpha": alpha, "sigma": sigma, "v": v}
        add = lambda part, y: merge([part, self.block(y, x, alpha, sigma, v)])
        total = nothing
        for part in self.by_file("atoms", given, nothing, add):
            total = merge([total, part])
        return total


def stacked(numbers: Numbers) -> Tensor:
    """A number or those of the channels, [1] or [C] in float64."""
    each = (numbers,) if isinstance(numbers, float) else numbers
    return torch.tensor(each, dtype=torch.float64, device="cpu")
