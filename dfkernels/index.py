"""CloudIndex: codes of the atoms, from which bounds on all logits follow without reading the atoms.

With t = y - centre and an almost orthonormal V [K, d] (principal axes), h = V t:
    first, codes  q = round(h / (step scale)): int16 for the first coordinates, int8 for the others, by levels; an
                  atom has its own scale at every level
    rest, shift   at least |t - V^T q step scale| and |h - q step scale|, of all coordinates up to a level
    tail          the same for what the first level leaves over, along the data's own coordinates
docs/certified.md says what follows for <x, y>.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import _files
from .ops._kinds import load

TILE = 64  # atoms side by side in the first level: screen_tile in csrc/problem.h
_ROWS = 1 << 22  # numbers of atoms looked at together
_SAMPLE = 8192  # atoms from which the principal axes are found
_UNIT = 2.0**-53
_FORMAT = "dfkernels index 1"


class CloudIndex(NamedTuple):
    """What `kept_atoms` takes beside the atoms."""

    centre: Tensor  # float32 [d]
    basis: Tensor  # float32 [K, d]
    step: Tensor  # float32 [K]
    first: Tensor  # int16 [tiles, cuts[0], TILE]
    codes: Tensor  # int8 [N, K - cuts[0]]
    tail: Tensor  # int8 [N, d up to a multiple of 32], or [0, 0]
    size: Tensor  # float32 [N]: |t|
    scale: Tensor  # float32 [levels, N], the tail's last
    rest: Tensor  # float32 [levels, N], the tail's last
    shift: Tensor  # float32 [levels without the tail, N]
    cuts: Tensor  # int64 [levels without the tail]: coordinates up to each
    facts: Tensor  # float64 [3]: |V V^T - I|, the largest |t|, the largest |y| plus |centre|

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self)


def fingerprint(y: Tensor, scale: float, offset: float) -> str:
    """Of the atoms scale * y + offset."""
    return f"{list(y.shape)} {y.dtype} scale={scale!r} offset={offset!r} crc32={_files.checksum(y.cpu())}"


def save(path: Path, index: CloudIndex, of: str) -> None:
    """Writes the index of the cloud with fingerprint `of` to a .safetensors file. Raises FileError."""
    _files.save_tensors(path, index._asdict(), {"format": _FORMAT, "cloud": of})


def load_index(path: Path, of: str) -> CloudIndex:
    """The index in a file, memory-mapped. Raises FileError: damaged, of another version or of another cloud."""
    tensors, metadata = _files.read_tensors(path)
    if metadata.get("format") != _FORMAT or set(tensors) != set(CloudIndex._fields):
        found = metadata.get("format", "another kind of file")
        raise _files.FileError(f"{path}: expected {_FORMAT!r}, got {found!r}: remove it and index anew")
    if metadata.get("cloud") != of:
        raise _files.FileError(
            f"{path}: the index of another cloud: expected {of}, got {metadata.get('cloud')}; remove it and index "
            "anew"
        )
    return CloudIndex(**tensors)


def cuts_for(N: int, d: int, itemsize: int) -> list[int]:
    """Coordinates up to each level: 32, 128, 512, ... to d / 6, the basis no more than a tenth of the data."""
    cuts = [max(1, min(32, d // 4, N * itemsize // 16))]
    while len(cuts) < 4 and cuts[-1] % 32 == 0 and (K := 4 * cuts[-1]) <= d // 6 and 40 * K <= N * itemsize:
        cuts.append(K)
    return cuts


def principal_axes(t: Tensor, K: int, generator: torch.Generator) -> Tensor:
    """[K, d], orthonormal up to rounding, by decreasing variance: randomised SVD with one power iteration."""
    probe = t @ torch.randn(t.shape[1], min(t.shape[1], K + 16), generator=generator)
    probe = torch.linalg.qr(t.T @ probe).Q
    image = t @ probe
    axes = torch.linalg.eigh(image.T @ image).eigenvectors.flip(1)
    return torch.linalg.qr((probe @ axes[:, :K]).double()).Q.T.float().contiguous()


def _up(t: Tensor) -> Tensor:
    return torch.nextafter(t.float(), torch.tensor(math.inf))


def _coded(h: Tensor, step: Tensor | float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scale [n], q step scale): |q| <= most, one scale for a row of h."""
    scale = _up((h / step).abs().amax(1) / most).clamp_min(torch.finfo(torch.float32).tiny)
    unit = scale.double()[:, None] * step
    q = (h / unit).round_()
    return q, scale, q * unit


def build(y: Tensor, scale: float, offset: float, seed: int = 0) -> CloudIndex:
    """The index of atoms scale * y + offset, y [N, d] on the CPU."""
    N, d = y.shape
    block = max(1, _ROWS // d)
    blocks = [slice(i, i + block) for i in range(0, N, block)]
    atoms = lambda s: load(y[s], torch.float64, scale, offset)
    centre = (sum(atoms(s).sum(0) for s in blocks) / N).float()
    cuts = cuts_for(N, d, y.element_size())
    K, K0 = cuts[-1], cuts[0]
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(N, generator=generator)[:_SAMPLE].sort().values
    some = atoms(some).float() - centre
    basis = principal_axes(some, K, generator)
    spread = (some @ basis.T).square().mean(0).sqrt()
    step = (spread / spread.max()).nan_to_num(1.0).clamp_min(1e-3)
    V, units = basis.double(), step.double()
    skew = (
        torch.linalg.matrix_norm(V @ V.T - torch.eye(K, dtype=torch.float64)) * (1 + 1e-9) + 4 * _UNIT * d * K
    )
    has_tail = y.element_size() > 1 and d >= 128
    first = torch.zeros(-(-N // TILE) * TILE, K0, dtype=torch.int16)
    flat = first[:N]
    codes = torch.empty(N, K - K0, dtype=torch.int8)
    tail = torch.zeros(N if has_tail else 0, -(-d // 32) * 32 if has_tail else 0, dtype=torch.int8)
    size, shift = torch.empty(N), torch.empty(len(cuts), N)
    scales, rest = torch.empty(len(cuts) + has_tail, N), torch.empty(len(cuts) + has_tail, N)
    for s in blocks:
        t = atoms(s) - centre.double()
        h = t @ V.T
        square = t.square().sum(1)
        size[s] = square.sqrt().float()
        left, wrong = square, torch.zeros_like(square)
        for level, (k0, k1) in enumerate(zip([0, *cuts], cuts, strict=False)):
            part = h[:, k0:k1]
            q, scales[level, s], code = _coded(part, units[k0:k1], 127 if level else 32767)
            rounding = 8 * _UNIT * (d + k1) * k1**0.5
            inside = code.square().sum(1)
            left = left - 2 * (part * code).sum(1) + inside * (1 + skew + rounding)
            wrong = wrong + (part - code).square().sum(1)
            rest[level, s] = _up((left + rounding * square).clamp_min(0).sqrt() * (1 + 1e-9))
            shift[level, s] = _up(wrong.sqrt() * (1 + 1e-9) + rounding * square.sqrt())
            if level == 0:
                flat[s] = q.to(torch.int16)
                if has_tail:
                    e = t - code @ V[:K0]
                    q, scales[-1, s], code = _coded(e, 1.0, 127)
                    tail[s, :d] = q.to(torch.int8)
                    rest[-1, s] = _up((e - code).norm(dim=1) * (1 + 1e-9) + rounding * square.sqrt())
            else:
                codes[s, k0 - K0 : k1 - K0] = q.to(torch.int8)
    radius = size.double().max() * (1 + 1e-6)
    first = first.view(-1, TILE, K0).transpose(1, 2).contiguous()
    facts = torch.stack([skew, radius, radius + 2 * centre.double().norm()])
    return CloudIndex(
        centre, basis, step, first, codes, tail, size, scales, rest, shift, torch.tensor(cuts), facts
    )
