"""The data set: atoms y_i and their log weights, checked once."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ma
from torch import Tensor

from ._io import files
from ._torch import check
from ._torch.objects import Object, Watched, plain
from .certified import build, heaviest, index_file
from .certified.index import CloudIndex

__all__ = ["PointCloud"]

_STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8)
# elements looked at together; bounds the memory of a check on a memory-mapped array
_BLOCK = 1 << 22


class PointCloud(Object):
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
    """

    y = Watched[Tensor]()
    log_prior: Watched[Tensor | None] = Watched()
    _index: Watched[CloudIndex | None] = Watched()
    scale: float
    offset: float

    def __init__(
        self,
        y: Tensor | np.ndarray,
        log_prior: Tensor | np.ndarray | None = None,
        *,
        scale: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        y = _as_tensor("y", y)
        if y.dtype not in _STORED:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _STORED)
            raise TypeError(f"y: expected dtype {names}, got {y.dtype}")
        if y.ndim < 1 or y.numel() == 0:
            raise ValueError(
                f"y: expected shape [N, *E] with N >= 1 and no empty dimension, got {list(y.shape)}"
            )
        state = {
            "scale": check.constant("scale", scale),
            "offset": check.constant("offset", offset),
        }
        with plain(y.device):
            y = y.detach().resolve_neg().contiguous()
            log_prior = _check_log_prior(log_prior, y)
            _check_finite(y, _masked(log_prior))
        self.__setstate__({"y": y, "log_prior": log_prior, "_index": None, **state})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"PointCloud is immutable: cannot set {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"PointCloud is immutable: cannot delete {name}")

    @property
    def _y(self) -> Tensor:
        """y for its shape, dtype and device, which a change in place leaves."""
        return PointCloud.y.peek(self)

    def __len__(self) -> int:
        return self._y.shape[0]

    @property
    def event_shape(self) -> torch.Size:
        """The shape E of one atom."""
        return self._y.shape[1:]

    @property
    def d(self) -> int:
        """The numbers in one atom, prod(E)."""
        return self.event_shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the atoms are stored; computation follows the query's."""
        return self._y.dtype

    @property
    def device(self) -> torch.device:
        return self._y.device

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
        if self.y.element_size() * self.d < 32:
            raise ValueError(
                "index: expected atoms of at least 32 bytes, got "
                f"{self.y.element_size() * self.d} (d = {self.d}, {self.dtype}): "
                "these are read as fast as an index"
            )
        seed = check.integer("seed", seed)
        found = self._index
        if found is None or path is not None:
            with plain(self.device):
                found = self._indexed(None if path is None else Path(path), seed)
            object.__setattr__(self, "_index", found)
        return found

    def _indexed(self, path: Path | None, seed: int) -> CloudIndex:
        flat, masked = self.y.reshape(len(self), -1), _masked(self.log_prior)
        if masked is not None:
            masked = masked.cpu()
        if path is None:
            found = build.build_index(flat.cpu(), self.scale, self.offset, seed, masked)
        else:
            cloud = index_file.fingerprint(flat, self.scale, self.offset)
            if masked is not None:
                cloud += f" masked crc32={files.checksum(masked.to(torch.uint8))}"
            if path.exists():
                found = index_file.load_index(path, cloud)
            else:
                found = self._index or build.build_index(
                    flat.cpu(), self.scale, self.offset, seed, masked
                )
                index_file.save_index(path, found, cloud)
        return CloudIndex(*[t.to(self.device) for t in found])

    def _log_pi(self, dtype: torch.dtype) -> Tensor | None:
        """The log weights, normalised in float64 and then rounded to a dtype: a constant that all
        share costs no digits, and no call has to normalise them anew.
        """
        prior = self.log_prior
        if prior is None:
            return None
        results = vars(self).setdefault("_results", {})
        if dtype not in results:
            with plain(self.device):
                results[dtype] = prior.double().log_softmax(0).to(dtype)
        return results[dtype]

    def _atoms(self) -> heaviest.Atoms:
        """The atoms as a search for the heaviest takes them."""
        y, log_pi = self.y.reshape(len(self), -1), self._log_pi(torch.float64)
        if log_pi is None:
            log_pi = torch.full(
                (), -math.log(len(self)), dtype=torch.float64, device=y.device
            ).expand(len(self))
        return heaviest.Atoms(y, log_pi, self.scale, self.offset)

    def _distances(self) -> heaviest.Distances:
        """The atoms' distances from a centre, for such a search; computed once."""
        atoms, results = self._atoms(), vars(self).setdefault("_results", {})
        if "distances" not in results:
            with plain(self.device):
                results["distances"] = heaviest.distances(atoms)
        return results["distances"]

    def __repr__(self) -> str:
        parts = [
            f"N={len(self)}",
            f"event_shape={tuple(self.event_shape)}",
            str(self.dtype),
            str(self.device),
        ]
        if PointCloud.log_prior.peek(self) is not None:
            parts.append("log_prior=[N]")
        if (self.scale, self.offset) != (1.0, 0.0):
            parts.append(f"scale={self.scale:g}, offset={self.offset:g}")
        return f"PointCloud({', '.join(parts)})"


def _masked(log_prior: Tensor | None) -> Tensor | None:
    """The masked atoms, bool [N]; None where there are none."""
    if log_prior is None:
        return None
    masked = log_prior == -math.inf
    return masked if bool(masked.any()) else None


def _as_tensor(name: str, value: Tensor | np.ndarray) -> Tensor:
    """A dense tensor with the values of a tensor or numpy array, on the same memory where that is
    possible.
    """
    if isinstance(value, Tensor):
        check.stored(name, value)
        return value
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"{name}: expected a torch.Tensor or numpy.ndarray, got {type(value).__name__}; "
            f"convert it: {_conversion(name, value)}"
        )
    if ma.is_masked(value):
        raise ValueError(
            f"{name}: expected an array without masked entries, got {ma.count_masked(value)} of "
            f"{value.size} "
            f"masked; fill them (np.ma.filled({name}, ...)), or leave out atoms by log_prior = -inf"
        )
    array = np.asarray(ma.getdata(value))
    if array.dtype.names is not None:
        raise TypeError(
            f"{name}: expected an array of numbers, got a structured one with fields "
            f"{list(array.dtype.names)}; "
            f'take one field, {name}["{array.dtype.names[0]}"], or '
            f"numpy.lib.recfunctions.structured_to_unstructured({name})"
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    with warnings.catch_warnings():
        # we never write to it
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        try:
            return torch.from_numpy(array)
        except ValueError:
            # strides that torch does not have: negative, or no multiple of an element
            return torch.from_numpy(np.ascontiguousarray(array))
        except TypeError as error:
            raise TypeError(
                f"{name}: numpy array of dtype {array.dtype} cannot become a tensor: {error} "
                f"Convert it: {name}.astype(np.float32)"
            ) from None


def _conversion(name: str, value: object) -> str:
    """The expression that makes an array of something array-like, for an error."""
    for method in ("to_numpy", "toarray"):  # pandas and polars; scipy.sparse
        if hasattr(value, method):
            return f"{name}.{method}()"
    return f"np.asarray({name})" if hasattr(value, "__array__") else f"torch.tensor({name})"


def _check_finite(y: Tensor, masked: Tensor | None) -> None:
    """Raises ValueError for the first value that is not finite in an atom that is not masked."""
    if not y.is_floating_point():
        return
    flat, d = y.view(-1), y[0].numel()
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK]
        lo, hi = torch.aminmax(block)  # one pass, no temporary; NaN propagates
        if math.isfinite(lo) and math.isfinite(hi):
            continue
        bad = start + (~torch.isfinite(block)).nonzero()[:, 0]
        if masked is not None:
            bad = bad[~masked[bad // d]]
        if len(bad):
            at = int(bad[0])
            place = [int(i) for i in np.unravel_index(at, tuple(y.shape))]
            raise ValueError(f"y: expected finite values, got {flat[at].item()} at index {place}")


def _check_log_prior(log_prior: Tensor | np.ndarray | None, y: Tensor) -> Tensor | None:
    if log_prior is None:
        return None
    log_prior = _as_tensor("log_prior", log_prior)
    if not log_prior.is_floating_point():
        raise TypeError(f"log_prior: expected a floating dtype, got {log_prior.dtype}")
    if log_prior.shape != y.shape[:1]:
        raise ValueError(
            f"log_prior: expected shape [{y.shape[0]}] (one weight per atom), got "
            f"{list(log_prior.shape)}"
        )
    if log_prior.device != y.device:
        raise ValueError(f"log_prior: expected device {y.device} as y's, got {log_prior.device}")
    log_prior = log_prior.detach().resolve_neg().contiguous()
    largest = log_prior.max().item()
    if not math.isfinite(largest):  # the maximum is NaN if any is
        raise ValueError(
            f"log_prior: expected values below +inf, no NaN and at least one finite, got a "
            f"maximum of {largest}"
        )
    return log_prior
