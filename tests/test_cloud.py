"""PointCloud: what it keeps, what it refuses, and that it looks at every value exactly once."""

from __future__ import annotations

import copy
import math
import pickle
import tracemalloc

import numpy as np
import pytest
import torch

from dfkernels import PointCloud
from dfkernels import cloud as cloud_module


def test_keeps_what_it_is_given():
    y = torch.randn(7, 2, 3)
    prior = torch.tensor([0.0, -math.inf, 1, 2, 3, 4, 5])
    cloud = PointCloud(y, prior, scale=2, offset=-1)
    assert len(cloud) == 7 and cloud.event_shape == (2, 3) and cloud.d == 6
    assert cloud.dtype == torch.float32 and cloud.device.type == "cpu"
    assert cloud.y.data_ptr() == y.data_ptr() and torch.equal(cloud.log_prior, prior)
    assert (cloud.scale, cloud.offset) == (2.0, -1.0)
    assert repr(cloud) == (
        "PointCloud(N=7, event_shape=(2, 3), torch.float32, cpu, log_prior=[N], scale=2, offset=-1)"
    )


def test_is_immutable():
    cloud = PointCloud(torch.zeros(2, 3))
    for name in ("y", "log_prior", "scale", "new"):
        with pytest.raises(AttributeError, match=f"^PointCloud is immutable: cannot set {name}$"):
            setattr(cloud, name, None)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_and_pickles(again):
    y, log_prior = torch.arange(6.0).reshape(3, 2), torch.tensor([0.0, 1.0, -math.inf])
    cloud = PointCloud(y, log_prior, scale=2, offset=1)
    other = again(cloud)
    assert torch.equal(other.y, cloud.y) and torch.equal(other.log_prior, cloud.log_prior)
    assert (other.scale, other.offset) == (2.0, 1.0)
    with pytest.raises(AttributeError, match="^PointCloud is immutable: cannot set y$"):
        other.y = cloud.y


def test_strided_atoms_become_contiguous_and_leave_the_graph():
    y = torch.randn(3, 4, requires_grad=True)
    cloud = PointCloud(y.T)
    assert cloud.y.is_contiguous() and not cloud.y.requires_grad and torch.equal(cloud.y, y.detach().T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_storage_types(dtype):
    assert PointCloud(torch.ones(3, 2, dtype=dtype)).dtype == dtype


def test_memory_map_stays_one(tmp_path, recwarn):
    """A read-only map of 64 MB is taken without a copy and without a warning."""
    path = tmp_path / "y.npy"
    np.save(path, np.ones((1 << 14, 1024), np.float32))
    mapped = np.load(path, mmap_mode="r")
    tracemalloc.start()
    cloud = PointCloud(mapped)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cloud.y.data_ptr() == mapped.ctypes.data and peak < 1 << 20 and len(recwarn) == 0


def test_looks_once(monkeypatch):
    calls = []
    real = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda block: calls.append(block.numel()) or real(block))
    monkeypatch.setattr(cloud_module, "_BLOCK", 10)
    PointCloud(torch.randn(9, 3))
    assert calls == [10, 10, 7]


@pytest.mark.parametrize(("value", "name"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_finds_what_is_not_finite(monkeypatch, value, name, dtype):
    monkeypatch.setattr(cloud_module, "_BLOCK", 7)
    y = torch.zeros(5, 2, 3, dtype=dtype)
    y[3, 1, 2] = value
    with pytest.raises(ValueError) as error:
        PointCloud(y)
    assert str(error.value) == f"y: expected finite values, got {name} at index [3, 1, 2]"


def test_to():
    cloud = PointCloud(torch.ones(3, 2), torch.zeros(3, dtype=torch.float64), scale=2, offset=1)
    assert cloud.to("cpu") is cloud and cloud.to(torch.float32) is cloud
    half = cloud.to(torch.bfloat16)
    assert (
        half.dtype == torch.bfloat16
        and half.log_prior.dtype == torch.float64
        and (half.scale, half.offset) == (2, 1)
    )
    with pytest.raises(
        TypeError,
        match="^dtype: expected a cast that keeps torch.float32 values, got torch.uint8; requantise y",
    ):
        cloud.to(torch.uint8)
    with pytest.raises(ValueError, match=r"^y: expected finite values, got inf at index \[0, 0\]$"):
        PointCloud(torch.full((1, 1), 1e6)).to(torch.float16)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: PointCloud([[1.0]]), TypeError, "y: expected a torch.Tensor or numpy.ndarray, got list; convert it: torch.tensor(y)"),
        (lambda: PointCloud(torch.zeros(3, 2, dtype=torch.int64)), TypeError,
         "y: expected dtype float64, float32, float16, bfloat16, uint8, got torch.int64"),
        (lambda: PointCloud(torch.tensor(1.0)), ValueError,
         "y: expected shape [N, *E] with N >= 1 and no empty dimension, got []"),
        (lambda: PointCloud(torch.zeros(0, 2)), ValueError,
         "y: expected shape [N, *E] with N >= 1 and no empty dimension, got [0, 2]"),
        (lambda: PointCloud(torch.zeros(2, 0)), ValueError,
         "y: expected shape [N, *E] with N >= 1 and no empty dimension, got [2, 0]"),
        (lambda: PointCloud(torch.zeros(2, 2), scale=math.inf), ValueError,
         "scale: expected a finite value, got inf"),
        (lambda: PointCloud(torch.zeros(2, 2), scale="2"), TypeError, "scale: expected a number, got str"),
        (lambda: PointCloud(torch.zeros(2, 2), offset=math.nan), ValueError,
         "offset: expected a finite value, got nan"),
        (lambda: PointCloud(torch.zeros(2, 2), torch.zeros(3)), ValueError,
         "log_prior: expected shape [2] (one weight per atom), got [3]"),
        (lambda: PointCloud(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)), TypeError,
         "log_prior: expected a floating dtype, got torch.int64"),
        (lambda: PointCloud(torch.zeros(2, 2), torch.full((2,), -math.inf)), ValueError,
         "log_prior: expected values below +inf, no NaN and at least one finite, got a maximum of -inf"),
        (lambda: PointCloud(torch.zeros(2, 2), torch.tensor([0.0, math.nan])), ValueError,
         "log_prior: expected values below +inf, no NaN and at least one finite, got a maximum of nan"),
        (lambda: PointCloud(torch.zeros(2, 2), torch.tensor([0.0, math.inf])), ValueError,
         "log_prior: expected values below +inf, no NaN and at least one finite, got a maximum of inf"),
    ],
)  # fmt: skip
def test_errors(make, kind, message):
    with pytest.raises(kind) as error:
        make()
    assert str(error.value) == message


def test_numpy_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="^y: numpy array of dtype object cannot become a tensor: "):
        PointCloud(np.array([[None]]))
