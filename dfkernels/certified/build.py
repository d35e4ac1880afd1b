"""Builds the index of a cloud (see index.py) in blocks of atoms, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .._constants import CODE_TILE, MOST_AXES
from ..ops.common.moments import load
from .index import CloudIndex, Limits, has_fine_level
from .rounding import FEW_ROUNDINGS, UNIT, double_sums, round_up

_BLOCK_NUMBERS = 1 << 22  # numbers of atoms that are looked at together
_AXES_SAMPLE = 8192  # atoms from which the principal axes are found
_MEDIAN_SAMPLE = 256  # atoms whose median is the first guess of the centre
_REMOTE_SHARE = 1024  # one atom in so many, or eight, may be remote ...
_REMOTE_RATIO = 32.0  # ... if it is so many times as far from the centre as all the others
_F32 = {"dtype": torch.float32, "device": "cpu"}
_F64 = {"dtype": torch.float64, "device": "cpu"}
_P = ParamSpec("_P")
_R = TypeVar("_R")


def independent_of_torch_state(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Runs a function without autocast, gradients and inference mode, which a caller may have set.

    Since nothing here leaves a dtype or a device to a default either, an index has the same bits
    wherever it was built, and it can be used everywhere.
    """

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return wrapped


@independent_of_torch_state
def build_index(
    y: Tensor,
    scale: float | Tensor,
    offset: float | Tensor,
    seed: int = 0,
    masked: Tensor | None = None,
) -> CloudIndex:
    """Returns the index of the atoms scale * y + offset.

    Args:
        y: [N, d] on the CPU.
        scale, offset: map the stored numbers to the data: numbers, or float64 tensors [d].
        seed: for the sample and the random projection that find the principal axes.
        masked: bool [N] on the CPU: atoms that may hold anything and have no influence on the
            index. A query for which such an atom counts after all takes all atoms.

    Raises:
        ValueError: atoms so large that float32 cannot hold their distances.
    """
    y = y.detach()
    atoms = _Atoms(y, scale, offset, masked)
    N, d = y.shape
    K = max(1, min(MOST_AXES, d // 4, N * y.element_size() // 16))
    basis, axis_scale = _axes(atoms, K, torch.Generator(device="cpu").manual_seed(seed))
    index = _Codes(atoms, basis, axis_scale, has_fine_level(d, y.element_size())).index()
    if not all(bool(t.isfinite().all()) for t in index):
        raise ValueError(
            "index: expected atoms whose distances float32 can hold, got an overflow; y in other"
            " units, or without an index and tolerance"
        )
    return index


def principal_axes(t: Tensor, K: int, generator: torch.Generator) -> Tensor:
    """Principal axes [K, d] of t [n, d], orthonormal up to rounding, by decreasing variance.

    Randomised SVD with one power iteration.
    """
    probe = t @ torch.randn(t.shape[1], min(t.shape[1], K + 16), generator=generator, **_F32)
    probe = torch.linalg.qr(t.T @ probe).Q
    image = (t @ probe).double()  # its squares may underflow in float32, and eigh would fail
    axes = torch.linalg.eigh(image.T @ image).eigenvectors.flip(1)
    return torch.linalg.qr(probe.double() @ axes[:, :K]).Q.T.float().contiguous()


class _Atoms:
    """The atoms scale * y + offset in float64, some at a time, and which of them get codes."""

    def __init__(
        self, y: Tensor, scale: float | Tensor, offset: float | Tensor, masked: Tensor | None
    ) -> None:
        self.y, self.scale, self.offset = y, scale, offset
        self.N, self.d = y.shape
        step = max(1, _BLOCK_NUMBERS // self.d)
        self.blocks = [slice(i, min(i + step, self.N)) for i in range(0, self.N, step)]
        known = torch.ones(self.N, dtype=torch.bool, device="cpu") if masked is None else ~masked
        middle = self._median(known)
        distance = torch.cat([(self[s] - middle).norm(dim=1) for s in self.blocks])
        self.known = known & ~distance.isnan()
        self.remote = self._remote(distance) & self.known
        self.coded = self.known & ~self.remote
        total = torch.zeros(self.d, **_F64)
        for s in self.blocks:
            total += (self[s] - middle)[self.coded[s]].sum(0)
        self.centre = (middle + total / max(1, int(self.coded.sum()))).float()

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        if isinstance(self.scale, Tensor) or isinstance(self.offset, Tensor):
            return self.y[rows].double() * self.scale + self.offset
        return load(self.y[rows], torch.float64, self.scale, self.offset)

    def _median(self, known: Tensor) -> Tensor:
        """Median [d] of a sample: a few atoms that are far away cannot move it."""
        rows = known.nonzero()[:, 0]
        rows = rows[:: max(1, len(rows) // _MEDIAN_SAMPLE)]
        if len(rows) == 0:
            return torch.zeros(self.d, **_F64)
        return self[rows].median(0).values.nan_to_num(0.0)

    def _remote(self, distance: Tensor) -> Tensor:
        """Which atoms [N] are remote, by their distance from the median.

        As part of the cloud they would blur the bounds of all atoms, since the largest atoms decide
        the centre, the axes and the rounding terms.
        """
        known = distance[self.known]
        if len(known) == 0:
            return torch.zeros_like(self.known)
        most = min(max(8, self.N // _REMOTE_SHARE), (len(known) - 1) // 2)
        return distance > _REMOTE_RATIO * known.kthvalue(len(known) - most).values

    def limits(self, axis_skew: Tensor, atom_norm: Tensor) -> Limits:
        """CloudIndex.limits, from |t| of the coded atoms in float32."""
        centre, count = self.centre.double(), int(self.remote.sum())
        radius, least = atom_norm.double().max() * (1 + 1e-6), 0.0
        if count:
            rows = self.remote.nonzero()[:, 0]
            least = min(float((self[r][None] - centre).norm()) for r in rows)
            least = min(least * (1 - 1e-6), 1e30)
        coordinate_norm = radius + 2 * centre.norm()
        distance, number = (axis_skew.new_tensor(float(a)) for a in (least, count))
        return Limits(axis_skew, radius, coordinate_norm, distance, number)


def _axes(atoms: _Atoms, K: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(basis [K, d], axis_scale [K]) from a sample of the coded atoms."""
    order = torch.randperm(atoms.N, generator=generator, dtype=torch.int64, device="cpu")
    rows = order[atoms.coded[order]][:_AXES_SAMPLE].sort().values
    sample = atoms[rows].float() - atoms.centre
    sample /= sample.abs().max().clamp_min(torch.finfo(torch.float32).tiny)  # squares stay finite
    basis = principal_axes(sample, K, generator)
    deviation = (sample @ basis.T).square().mean(0).sqrt()
    axis_scale = (deviation / deviation.max()).nan_to_num(1.0).clamp_min(1e-3)
    return basis, axis_scale


class _Codes:
    """The codes of all atoms at both levels, and bounds on what each level leaves over."""

    def __init__(self, atoms: _Atoms, basis: Tensor, axis_scale: Tensor, fine: bool) -> None:
        self.atoms, self.basis, self.axis_scale, self.fine = atoms, basis, axis_scale, fine
        N, d, K = atoms.N, atoms.d, len(basis)
        self.V = V = basis.double()
        skew = torch.linalg.matrix_norm(V @ V.T - torch.eye(K, **_F64)) * FEW_ROUNDINGS
        self.axis_skew = skew + 4 * UNIT * d * K
        self.sums_in_double = double_sums(d, K)
        padded = -(-N // CODE_TILE) * CODE_TILE
        self.coarse = torch.zeros(padded, K, dtype=torch.int16, device="cpu")
        fine_shape = (N, -(-d // 32) * 32) if fine else (0, 0)
        self.fine_codes = torch.zeros(fine_shape, dtype=torch.int8, device="cpu")
        self.atom_norm = torch.zeros(N, **_F32)
        self.code_scale, self.remainder_norm, self.axis_error = (
            torch.zeros(1 + fine, N, **_F32) for _ in range(3)
        )

    def index(self) -> CloudIndex:
        for block in self.atoms.blocks:
            rows = self.atoms.coded[block].nonzero()[:, 0] + block.start
            t = self.atoms[rows] - self.atoms.centre.double()
            square = t.square().sum(1)
            self.atom_norm[rows] = square.sqrt().float()
            code = self._add_coarse(rows, t, square)
            if self.fine:
                self._add_fine(rows, t - code @ self.V, square)
        limits = torch.stack(self.atoms.limits(self.axis_skew, self.atom_norm))
        self.atom_norm[self.atoms.remote] = 1.0  # a mark; its square must not overflow
        K = len(self.basis)
        coarse_codes = self.coarse.view(-1, CODE_TILE, K).transpose(1, 2).contiguous()
        return CloudIndex(
            self.atoms.centre, self.basis, self.axis_scale, coarse_codes, self.fine_codes,
            self.atom_norm, self.code_scale, self.remainder_norm, self.axis_error, limits,
        )  # fmt: skip

    def _add_coarse(self, rows: Tensor, t: Tensor, square: Tensor) -> Tensor:
        """Encodes V t of some atoms, |t|^2 = square, and returns what the codes stand for."""
        sums = self.sums_in_double
        h = t @ self.V.T
        codes, self.code_scale[0, rows], code = _encode(h, self.axis_scale.double(), 32767)
        self.coarse[rows] = codes.to(torch.int16)
        code_square = code.square().sum(1)
        left = square - 2 * (h * code).sum(1) + code_square * (1 + self.axis_skew)
        left = left + sums * (square + code_square)
        self.remainder_norm[0, rows] = round_up(left.clamp_min(0).sqrt() * FEW_ROUNDINGS)
        axis_error = (h - code).norm(dim=1) * FEW_ROUNDINGS + sums * square.sqrt()
        self.axis_error[0, rows] = round_up(axis_error)
        return code

    def _add_fine(self, rows: Tensor, remainder: Tensor, square: Tensor) -> None:
        """Encodes what the coarse codes leave over of some atoms."""
        sums = self.sums_in_double
        codes, self.code_scale[1, rows], code = _encode(remainder, 1.0, 127)
        self.fine_codes[rows, : self.atoms.d] = codes.to(torch.int8)
        remainder -= code
        remainder_norm = remainder.norm(dim=1) * FEW_ROUNDINGS + sums * square.sqrt()
        self.remainder_norm[1, rows] = round_up(remainder_norm)
        on_axes = (remainder @ self.V.T).norm(dim=1)
        self.axis_error[1, rows] = round_up(on_axes * FEW_ROUNDINGS + 4 * sums * square.sqrt())


def _encode(h: Tensor, unit: Tensor | float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale [n], codes * unit * scale) of the rows of h: integers of at most `most`."""
    scale = round_up((h / unit).abs().amax(1) / most)
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    units = scale.double()[:, None] * unit
    codes = (h / units).round_()
    return codes, scale, codes * units
