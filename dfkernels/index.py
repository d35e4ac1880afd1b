"""CloudIndex: codes of the atoms, from which bounds on all logits follow without reading the atoms.

With t = y - centre, an almost orthonormal V [K, d] (principal axes, K <= 32) and h = V t:
    first   q = round(h / (step scale)), int16; an atom has its own scale
    tail    round(e / scale), int8, of what that leaves over, e = t - V^T q step scale, along the data's own
            coordinates, with a scale of its own
    rest    of either, at least the norm of what is left over, r;    shift    at least |V r|
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
_AXES = 32  # most principal axes: most_axes in csrc/problem.h
_SAMPLE = 8192  # atoms from which the principal axes are found
_UNIT = 2.0**-53
_FORMAT = "dfkernels index 2"


class CloudIndex(NamedTuple):
    """What `kept_atoms` takes beside the atoms."""

    centre: Tensor  # float32 [d]
    basis: Tensor  # float32 [K, d]
    step: Tensor  # float32 [K]
    first: Tensor  # int16 [tiles, K, TILE]
    tail: Tensor  # int8 [N, d up to a multiple of 32], or [0, 0]
    size: Tensor  # float32 [N]: |t|
    scales: Tensor  # float32 [2, N], or [1, N] without a tail
    rest: Tensor  # float32, as scales
    shift: Tensor  # float32, as scales
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


def has_tail(d: int, itemsize: int) -> bool:
    """Where rows are so long that one of int8 codes is short beside what else there is of an atom."""
    return d >= (128 if itemsize > 1 else 512)


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
    K = max(1, min(_AXES, d // 4, N * y.element_size() // 16))
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
    long = has_tail(d, y.element_size())
    first = torch.zeros(-(-N // TILE) * TILE, K, dtype=torch.int16)
    flat = first[:N]
    tail = torch.zeros(N if long else 0, -(-d // 32) * 32 if long else 0, dtype=torch.int8)
    size = torch.empty(N)
    scales, rest, shift = (torch.empty(1 + long, N) for _ in range(3))
    rounding = 8 * _UNIT * (d + K) * K**0.5
    for s in blocks:
        t = atoms(s) - centre.double()
        h = t @ V.T
        square = t.square().sum(1)
        size[s] = square.sqrt().float()
        q, scales[0, s], code = _coded(h, units, 32767)
        inside = code.square().sum(1)
        left = square - 2 * (h * code).sum(1) + inside * (1 + skew) + rounding * (square + inside)
        flat[s] = q.to(torch.int16)
        rest[0, s] = _up(left.clamp_min(0).sqrt() * (1 + 1e-9))
        shift[0, s] = _up((h - code).norm(dim=1) * (1 + 1e-9) + rounding * square.sqrt())
        if long:
            e = t - code @ V
            q, scales[1, s], code = _coded(e, 1.0, 127)
            tail[s, :d] = q.to(torch.int8)
            e -= code
            rest[1, s] = _up(e.norm(dim=1) * (1 + 1e-9) + rounding * square.sqrt())
            shift[1, s] = _up((e @ V.T).norm(dim=1) * (1 + 1e-9) + 4 * rounding * square.sqrt())
    radius = size.double().max() * (1 + 1e-6)
    first = first.view(-1, TILE, K).transpose(1, 2).contiguous()
    facts = torch.stack([skew, radius, radius + 2 * centre.double().norm()])
    return CloudIndex(centre, basis, step, first, tail, size, scales, rest, shift, facts)
