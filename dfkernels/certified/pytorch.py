"""The fallback of the op ``select_atoms``, for devices without a kernel: the certified search in
PyTorch, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .._constants import QUERY_GROUP
from .bounds import ProductError, Queries, Sought, parsed
from .index import CloudIndex, check_values
from .rounding import FEW_ROUNDINGS


class Search(Queries):
    """A group of queries, and which atoms are candidates of each.

    Attributes:
        atoms: int64 [n], the atoms that are candidates of any query.
        candidate: bool [Q, n].
        upper: [Q, n], upper bounds of the logits from the last level.
        dropped: the upper bounds of what each step dropped, -inf elsewhere.
    """

    def __init__(self, sought: Sought, index: CloudIndex, gap: float, k: int) -> None:
        super().__init__(sought, index, gap)
        Q, N = len(self.x), len(self.y)
        self.k = k
        self.atoms = torch.arange(N, dtype=torch.int64, device=self.y.device)
        self.candidate = self.atoms.new_ones(Q, N, dtype=torch.bool)
        self.upper = self.x.new_empty(Q, N)
        self.dropped: list[Tensor] = []

    def run(self) -> None:
        """Goes through both levels of the index, then drops the lightest candidates."""
        a = self.z @ self.index.basis.double().T
        product = self._coarse_product(a)
        candidates = self.drop(product, 0, self.coarse_error(a))
        if len(self.index.fine_codes):
            product = product[:, candidates] + self._fine_product()
            self.drop(product, 1, self.fine_error(a))
        self._drop_lightest()

    def _coarse_product(self, a: Tensor) -> Tensor:
        N, K = len(self.index.atom_norm), a.shape[1]
        codes = self.index.coarse_codes.transpose(1, 2).reshape(-1, K)[:N].double()
        return (a * self.index.axis_scale) @ codes.T * self.index.code_scale[0].double()

    def _fine_product(self) -> Tensor:
        codes = self.index.fine_codes[self.atoms, : self.x.shape[1]].double()
        return self.z @ codes.T * self.index.code_scale[1, self.atoms].double()

    def drop(self, product: Tensor, level: int, error: ProductError) -> Tensor:
        """Drops what cannot matter and returns which of `atoms` stay, bool [n].

        Args:
            product: approximate <z, t>, [Q, n].
            level: of the index, 0 for coarse, 1 for fine.
            error: of the product.
        """
        index, atoms = self.index, self.atoms
        norm = index.atom_norm[atoms].double()
        remainder_norm = index.remainder_norm[level, atoms].double()
        axis_error = index.axis_error[level, atoms].double()
        bound = error.bound(norm, remainder_norm, axis_error)
        estimate, self.upper = self.bounds(atoms, product, norm**2, bound)
        estimate = estimate.masked_fill(~self.candidate, -torch.inf)
        # the kernels look at those with the largest upper bounds as well
        self.raise_kth_logit(atoms[estimate.topk(self.k, 1).indices][:, None])
        return self._drop(self.upper < self.threshold)

    def _drop(self, gone: Tensor) -> Tensor:
        gone = gone & self.candidate
        self.dropped.append(self.upper.masked_fill(~gone, -torch.inf))
        self.candidate &= ~gone
        left = self.candidate.any(0)
        self.atoms, self.candidate = self.atoms[left], self.candidate[:, left]
        self.upper = self.upper[:, left]
        return left

    def _drop_lightest(self) -> None:
        """Drops the lightest candidates as far as the tolerance allows.

        `gap` allows for all N atoms at its edge. Where these could outweigh the heaviest, `gap`
        allows for no weight: it asks for atoms, and all of them stay.
        """
        if self.k > 1:
            return
        allowed = len(self.y) * (-self.gap / self.variance).exp()
        left = torch.where(allowed < 1, allowed * (1 - 1e-6) - self.dropped_weight()[:, None], -1.0)
        weight = self.relative_weight(self.upper).masked_fill(~self.candidate, torch.inf).sort(1)
        gone = weight.values.cumsum(1) <= left
        self._drop(torch.zeros_like(gone).scatter(1, weight.indices, gone))

    def selected(self) -> Tensor:
        """bool [Q, N]: the candidates among all atoms."""
        out = self.candidate.new_zeros(len(self.x), len(self.y))
        out[:, self.atoms] = self.candidate
        return out

    def dropped_weight(self) -> Tensor:
        """Upper bound [Q] of the dropped atoms' weight, relative to that of the selected."""
        weight = sum(self.relative_weight(upper).sum(1, keepdim=True) for upper in self.dropped)
        return (weight + self.remote_weight())[:, 0] * FEW_ROUNDINGS


def search_in_pytorch(*args) -> tuple[Tensor, Tensor, Tensor]:
    """The op `select_atoms`, whose arguments select_atoms.py explains, for any device."""
    sought, index, gap, k = parsed(args)
    check_values(index)
    x = sought.x
    atoms = [x.new_empty(0, dtype=torch.int64)]
    counts, dropped = [atoms[0]], [x.new_empty(0, dtype=torch.float64)]
    for b in range(0, len(x), QUERY_GROUP):
        search = Search(sought.part(slice(b, b + QUERY_GROUP)), index, gap, k)
        search.run()
        takes_all = search.takes_all()
        search.candidate &= ~takes_all
        atoms += [search.atoms[candidate] for candidate in search.candidate]
        counts.append(search.candidate.sum(1).masked_fill(takes_all[:, 0], -1))
        dropped.append(search.dropped_weight().masked_fill(takes_all[:, 0], 0))
    return torch.cat(atoms), torch.cat(counts), torch.cat(dropped)
