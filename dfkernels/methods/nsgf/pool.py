"""Points of trajectories with their velocities, in a memory of fixed size."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._torch import check, words

__all__ = ["STORED", "TrajectoryPool"]

STORED = (torch.float16, torch.float32)


class TrajectoryPool:
    """A ring buffer of points x, times t and velocities v: what `velocity_loss` trains on.

    When it is full, what is added takes the place of what was added first.

    Args:
        size: How many points it holds.
        event_shape: The shape E of a point.
        dtype: torch.float32 or torch.float16, in which x and v are stored; t is in float32. A point
            takes 2 d numbers of this dtype and one of float32.
        device: Where it is.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """

    x: Tensor
    t: Tensor
    v: Tensor

    def __init__(
        self,
        size: int,
        event_shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.size = check.integer("size", size, 1)
        check.choice("dtype", dtype, STORED)
        with torch.inference_mode(False):
            self.x = torch.zeros(self.size, *event_shape, dtype=dtype, device=device)
            self.t = torch.zeros(self.size, dtype=torch.float32, device=device)
            self.v = torch.zeros_like(self.x)
        self.added = 0

    def __len__(self) -> int:
        """The number of points that it holds now."""
        return min(self.added, self.size)

    def __repr__(self) -> str:
        return (
            f"TrajectoryPool({len(self)} of {self.size} points of shape {[*self.x.shape[1:]]}, "
            f"{words.dtype(self.x)}, {self.x.device})"
        )

    def add(self, x: Tensor, t: float, v: Tensor) -> None:
        """Adds the points of one step.

        Args:
            x: ``[n, *E]`` in any floating dtype, n at most the pool's size.
            t: Their time.
            v: Their velocities ``[n, *E]``.

        Raises:
            TypeError, ValueError: An argument is wrong, or a value is not finite in the pool's
                dtype; the message names it.
        """
        t = check.constant("t", t)
        rows = {name: self._row(name, a) for name, a in (("x", x), ("v", v))}
        if len(x) > self.size:
            raise check.mismatch("x", f"at most {self.size} rows", len(x))
        if len(v) != len(x):
            raise check.mismatch("v", f"{len(x)} rows like x", len(v))
        at = torch.arange(self.added, self.added + len(x), dtype=torch.int64, device="cpu")
        at = (at % self.size).to(self.x.device)
        self.x[at], self.v[at], self.t[at] = rows["x"], rows["v"], t
        self.added += len(x)

    def _row(self, name: str, a: Tensor) -> Tensor:
        check.tensor(name, a)
        if a.shape[1:] != self.x.shape[1:] or not a.dim():
            want = words.shape(["n", *self.x.shape[1:]])
            raise check.mismatch(name, f"shape {want}", [*a.shape])
        if a.device != self.x.device:
            raise check.mismatch(name, f"device {self.x.device} like the pool", a.device)
        out = a.detach().to(self.x.dtype)
        if not bool(out.isfinite().all()):
            worst = a.detach().abs().max().item()
            raise check.mismatch(name, f"finite values in {words.dtype(self.x)}", f"{worst:g}")
        return out

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draws n points with replacement: x ``[n, *E]``, t [n] and v ``[n, *E]``, in float32.

        Raises:
            TypeError, ValueError: An argument is wrong, or the pool is empty.
        """
        check.generator(generator)
        n = check.integer("n", n, 1)
        if not len(self):
            raise check.mismatch("pool", "at least one point", "an empty one")
        at = torch.randint(
            len(self), (n,), generator=generator, dtype=torch.int64, device=generator.device
        ).to(self.x.device)
        return self.x[at].float(), self.t[at], self.v[at].float()
