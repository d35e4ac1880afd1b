"""CloudIndex: codes of the atoms, from which bounds on all logits follow without reading the atoms.

With t = y - centre, an almost orthonormal V [K, d] (principal axes, K <= 32) and h = V t:
    first   q = round(h / (step scale)), int16; an atom has its own scale
    tail    round(e / scale), int8, of what that leaves over, e = t - V^T q step scale, along the
            data's own coordinates, with a scale of its own
    rest    of either, at least the norm of what is left over, r;    shift    at least |V r|
docs/certified.md says what follows for <x, y>.

An atom without codes has scale 0 and zeros elsewhere. With size 1 it is set apart, being very far
from all others: it is known to be at least facts[3] away from the centre. With size 0 it was
masked, and nothing is known of it.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .._io import files
from ..ops.common.moments import load
from .fields import AXES, TILE, check_layout, check_values

_ROWS = 1 << 22  # numbers of atoms looked at together
_SAMPLE = 8192  # atoms from which the principal axes are found
_MIDDLE = 256  # atoms whose median is the first guess of the centre
_FEW = 1024  # one atom of so many, or eight, may be set apart
_FAR = 32.0  # if it is so many times as far from the centre as all the others
_UNIT = 2.0**-53
_FORMAT = "dfkernels index 3"
_F32 = {"dtype": torch.float32, "device": "cpu"}
_F64 = {"dtype": torch.float64, "device": "cpu"}


class CloudIndex(NamedTuple):
    """What `kept_atoms` takes beside the atoms: ops/kept_atoms/fields.py has the dtypes and
    shapes."""

    centre: Tensor  # float32 [d]
    basis: Tensor  # float32 [K, d]
    step: Tensor  # float32 [K]
    first: Tensor  # int16 [tiles, K, TILE]
    tail: Tensor  # int8 [N, d up to a multiple of 32], or [0, 0]
    size: Tensor  # float32 [N]: |t|
    scales: Tensor  # float32 [2, N], or [1, N] without a tail
    rest: Tensor  # float32, as scales
    shift: Tensor  # float32, as scales
    facts: Tensor  # float64 [5]: |V V^T - I|; of the atoms with codes the largest |t|, and the largest |y|
    # plus |centre|; of those set apart the least |t|, and how many there are

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self)


def _whatever_torch_is_set_to(f):
    """f without autocast, gradients and inference mode, in which a caller may be.

    With that, and since nothing here leaves a dtype or a device to a default, an index has the same
    bits and can be used everywhere, wherever it was built.
    """

    @functools.wraps(f)
    def wrapped(*args, **kwargs):
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return f(*args, **kwargs)

    return wrapped


def fingerprint(y: Tensor, scale: float, offset: float) -> str:
    """What tells the cloud of atoms scale * y + offset from another one, in an index's file."""
    return f"{list(y.shape)} {y.dtype} scale={scale!r} offset={offset!r} crc32={files.checksum(y.cpu())}"


@_whatever_torch_is_set_to
def save(path: Path, index: CloudIndex, of: str) -> None:
    """Writes the index of the cloud with fingerprint `of` to a .safetensors file. Raises
    FileError."""
    files.save_tensors(path, index._asdict(), {"format": _FORMAT, "cloud": of})


@_whatever_torch_is_set_to
def load_index(path: Path, of: str) -> CloudIndex:
    """The index in a file, memory-mapped.

    Every tensor's name, checksum, dtype, shape and range is checked: a kernel reads what they say.
    Raises FileError, which says what to do: damaged, of another version or of another cloud.
    """
    try:
        tensors, metadata = files.read_tensors(path)
    except files.FileError as error:
        raise files.FileError(f"{error}; remove it and index anew") from None
    if metadata.get("format") != _FORMAT:
        raise _wrong(
            path, f"expected {_FORMAT!r}, got {metadata.get('format', 'another kind of file')!r}"
        )
    if set(tensors) != set(CloudIndex._fields):
        raise _wrong(
            path, f"expected tensors {', '.join(CloudIndex._fields)}, got {', '.join(tensors)}"
        )
    if metadata.get("cloud") != of:
        raise _wrong(
            path, f"the index of another cloud: expected {of}, got {metadata.get('cloud')}"
        )
    tensors = {name: tensors[name] for name in CloudIndex._fields}
    try:
        check_layout(tensors, *_shape(of), torch.device("cpu"))
        check_values(tensors)
    except RuntimeError as error:
        raise _wrong(path, str(error)) from None
    return CloudIndex(**tensors)


def _wrong(path: Path, what: str) -> files.FileError:
    return files.FileError(f"{path}: {what}: remove it and index anew")


def _shape(of: str) -> tuple[int, int]:
    """(N, d) from a fingerprint."""
    N, d = of[1 : of.index("]")].split(",")
    return int(N), int(d)


def has_tail(d: int, itemsize: int) -> bool:
    """Whether rows are so long that one of int8 codes is short beside what else there is of an
    atom."""
    return d >= (128 if itemsize > 1 else 512)


def principal_axes(t: Tensor, K: int, generator: torch.Generator) -> Tensor:
    """[K, d], orthonormal up to rounding, by decreasing variance: randomised SVD with one power
    iteration."""
    probe = t @ torch.randn(t.shape[1], min(t.shape[1], K + 16), generator=generator, **_F32)
    probe = torch.linalg.qr(t.T @ probe).Q
    image = (t @ probe).double()  # whose squares may underflow in float32, on which eigh fails
    axes = torch.linalg.eigh(image.T @ image).eigenvectors.flip(1)
    return torch.linalg.qr(probe.double() @ axes[:, :K]).Q.T.float().contiguous()


def _up(t: Tensor) -> Tensor:
    """In float32, no smaller than t."""
    return torch.nextafter(t.float(), torch.full_like(t, math.inf, dtype=torch.float32))


def _coded(h: Tensor, step: Tensor | float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scale [n], q step scale): |q| <= most, one scale for a row of h."""
    scale = _up((h / step).abs().amax(1) / most).clamp_min(torch.finfo(torch.float32).tiny)
    unit = scale.double()[:, None] * step
    q = (h / unit).round_()
    return q, scale, q * unit


class _Atoms:
    """The atoms scale * y + offset in float64, some at a time, and which of them get codes."""

    def __init__(self, y: Tensor, scale: float, offset: float, masked: Tensor | None) -> None:
        self.y, self.scale, self.offset = y, scale, offset
        self.N, self.d = y.shape
        step = max(1, _ROWS // self.d)
        self.blocks = [slice(i, min(i + step, self.N)) for i in range(0, self.N, step)]
        known = torch.ones(self.N, dtype=torch.bool, device="cpu") if masked is None else ~masked
        middle = self._middle(known)
        size = torch.cat([(self[s] - middle).norm(dim=1) for s in self.blocks])
        self.known = known & ~size.isnan()
        self.apart = self._set_apart(size) & self.known
        self.coded = self.known & ~self.apart
        total = sum((self[s] - middle)[self.coded[s]].sum(0) for s in self.blocks)
        self.centre = (middle + total / max(1, int(self.coded.sum()))).float()

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return load(self.y[rows], torch.float64, self.scale, self.offset)

    def _middle(self, known: Tensor) -> Tensor:
        """[d]: a few atoms that are far away cannot move it."""
        rows = known.nonzero()[:, 0]
        rows = rows[:: max(1, len(rows) // _MIDDLE)]
        if len(rows) == 0:
            return torch.zeros(self.d, **_F64)
        return self[rows].median(0).values.nan_to_num(0.0)

    def _set_apart(self, size: Tensor) -> Tensor:
        """[N]: the few that are very far from all others, by their distance from the middle. As
        part of the cloud they would blur the bounds of all: their size is in the centre, the axes
        and the rounding.
        """
        known = size[self.known]
        if len(known) == 0:
            return torch.zeros_like(self.known)
        most = min(max(8, self.N // _FEW), (len(known) - 1) // 2)
        return size > _FAR * known.kthvalue(len(known) - most).values

    def facts(self, skew: Tensor, size: Tensor) -> Tensor:
        """CloudIndex.facts, from |t| of the coded atoms in float32."""
        centre = self.centre.double()
        radius, least, count = size.double().max() * (1 + 1e-6), 0.0, int(self.apart.sum())
        if count:
            least = min(float((self[r][None] - centre).norm()) for r in self.apart.nonzero()[:, 0])
            least = min(least * (1 - 1e-6), 1e30)
        far = radius + 2 * centre.norm()
        return torch.stack(
            [skew, radius, far, skew.new_tensor(least), skew.new_tensor(float(count))]
        )


@_whatever_torch_is_set_to
def build(
    y: Tensor, scale: float, offset: float, seed: int = 0, masked: Tensor | None = None
) -> CloudIndex:
    """The index of atoms scale * y + offset.

    Args:
        y: [N, d] on the CPU.
        seed: of the sample and the random projection that find the principal axes.
        masked: bool [N] on the CPU: atoms that may hold anything and have no influence on the
            index. Queries for which such an atom counts nevertheless take all atoms.

    Raises ValueError for atoms so large that float32 cannot hold their distances.
    """
    y = y.detach()
    atoms = _Atoms(y, scale, offset, masked)
    (N, d), centre = y.shape, atoms.centre
    K = max(1, min(AXES, d // 4, N * y.element_size() // 16))
    generator = torch.Generator(device="cpu").manual_seed(seed)
    basis, step = _axes(atoms, K, generator)
    V, units = basis.double(), step.double()
    skew = torch.linalg.matrix_norm(V @ V.T - torch.eye(K, **_F64)) * (1 + 1e-9) + 4 * _UNIT * d * K
    long = has_tail(d, y.element_size())
    first = torch.zeros(-(-N // TILE) * TILE, K, dtype=torch.int16, device="cpu")
    tail_shape = (N, -(-d // 32) * 32) if long else (0, 0)
    tail = torch.zeros(*tail_shape, dtype=torch.int8, device="cpu")
    size = torch.zeros(N, **_F32)
    scales, rest, shift = (torch.zeros(1 + long, N, **_F32) for _ in range(3))
    rounding = 8 * _UNIT * (d + K) * K**0.5
    for s in atoms.blocks:
        rows = atoms.coded[s].nonzero()[:, 0] + s.start
        t = atoms[rows] - centre.double()
        h = t @ V.T
        square = t.square().sum(1)
        size[rows] = square.sqrt().float()
        q, scales[0, rows], code = _coded(h, units, 32767)
        inside = code.square().sum(1)
        left = square - 2 * (h * code).sum(1) + inside * (1 + skew) + rounding * (square + inside)
        first[rows] = q.to(torch.int16)
        rest[0, rows] = _up(left.clamp_min(0).sqrt() * (1 + 1e-9))
        shift[0, rows] = _up((h - code).norm(dim=1) * (1 + 1e-9) + rounding * square.sqrt())
        if long:
            e = t - code @ V
            q, scales[1, rows], code = _coded(e, 1.0, 127)
            tail[rows, :d] = q.to(torch.int8)
            e -= code
            rest[1, rows] = _up(e.norm(dim=1) * (1 + 1e-9) + rounding * square.sqrt())
            shift[1, rows] = _up((e @ V.T).norm(dim=1) * (1 + 1e-9) + 4 * rounding * square.sqrt())
    facts = atoms.facts(skew, size)
    size[atoms.apart] = 1.0  # a mark; its square must not overflow
    first = first.view(-1, TILE, K).transpose(1, 2).contiguous()
    index = CloudIndex(centre, basis, step, first, tail, size, scales, rest, shift, facts)
    if not all(bool(t.isfinite().all()) for t in index):
        raise ValueError(
            "index: expected atoms whose distances float32 can hold, got an overflow; y in other units, or without "
            "an index and tolerance"
        )
    return index


def _axes(atoms: _Atoms, K: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(basis [K, d], step [K]) from a sample of the coded atoms."""
    order = torch.randperm(atoms.N, generator=generator, dtype=torch.int64, device="cpu")
    some = order[atoms.coded[order]][:_SAMPLE].sort().values
    some = atoms[some].float() - atoms.centre
    some /= some.abs().max().clamp_min(torch.finfo(torch.float32).tiny)  # no square leaves float32
    basis = principal_axes(some, K, generator)
    spread = (some @ basis.T).square().mean(0).sqrt()
    step = (spread / spread.max()).nan_to_num(1.0).clamp_min(1e-3)
    return basis, step
