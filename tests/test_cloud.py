"""PointCloud: what it keeps, what it refuses, and that it looks at every value exactly once."""

from __future__ import annotations

import copy
import math
import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
import torch

from dfkernels import DiffusionFisher, GaussianMixture, PointCloud, _atoms, ops, top_k
from dfkernels.certified import build


def test_keeps_what_it_is_given():
    y = torch.randn(7, 2, 3)
    prior = torch.tensor([0.0, -math.inf, 1, 2, 3, 4, 5])
    cloud = PointCloud(y, prior, scale=2, offset=-1)
    assert len(cloud) == 7 and cloud.event_shape == (2, 3) and cloud.d == 6
    assert cloud.dtype == torch.float32 and cloud.device.type == "cpu"
    assert cloud.y.data_ptr() == y.data_ptr() and torch.equal(cloud.log_prior, prior)
    assert (cloud.scale, cloud.offset) == (2.0, -1.0)
    assert (
        repr(cloud)
        == "PointCloud(N=7, event_shape=(2, 3), torch.float32, cpu, log_prior=[N], scale=2,"
        " offset=-1)"
    )


def test_is_immutable():
    cloud = PointCloud(torch.zeros(2, 3))
    for name in ("y", "log_prior", "scale", "new"):
        with pytest.raises(AttributeError, match=f"^PointCloud is immutable: cannot set {name}$"):
            setattr(cloud, name, None)


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
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
    assert (
        cloud.y.is_contiguous() and not cloud.y.requires_grad and torch.equal(cloud.y, y.detach().T)
    )


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8]
)
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
    monkeypatch.setattr(_atoms, "_BLOCK", 10)
    PointCloud(torch.randn(9, 3))
    assert calls == [10, 10, 7]


@pytest.mark.parametrize(
    ("value", "name"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_finds_what_is_not_finite(monkeypatch, value, name, dtype):
    monkeypatch.setattr(_atoms, "_BLOCK", 7)
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
        match=(
            "^dtype: expected a cast that keeps torch.float32 values, got torch.uint8; requantise y"
        ),
    ):
        cloud.to(torch.uint8)
    with pytest.raises(ValueError, match=r"^y: expected finite values, got inf at index \[0, 0\]$"):
        PointCloud(torch.full((1, 1), 1e6)).to(torch.float16)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: PointCloud([[1.0]]),
            TypeError,
            "y: expected a torch.Tensor or numpy.ndarray, got list; convert it: torch.tensor(y)",
        ),
        (
            lambda: PointCloud(torch.zeros(3, 2, dtype=torch.int64)),
            TypeError,
            "y: expected float64, float32, float16, bfloat16 or uint8, got int64: .float() "
            "converts it",
        ),
        (
            lambda: PointCloud(torch.tensor(1.0)),
            ValueError,
            "y: expected shape [N, *E] with N >= 1 and no empty dimension, got []",
        ),
        (
            lambda: PointCloud(torch.zeros(0, 2)),
            ValueError,
            "y: expected shape [N, *E] with N >= 1 and no empty dimension, got [0, 2]",
        ),
        (
            lambda: PointCloud(torch.zeros(2, 0)),
            ValueError,
            "y: expected shape [N, *E] with N >= 1 and no empty dimension, got [2, 0]",
        ),
        (
            lambda: PointCloud(torch.zeros(2, 2), scale=math.inf),
            ValueError,
            "scale: expected a finite value, got inf",
        ),
        (
            lambda: PointCloud(torch.zeros(2, 2), scale="2"),
            TypeError,
            "scale: expected a number, got str",
        ),
        (
            lambda: PointCloud(torch.zeros(2, 2), offset=math.nan),
            ValueError,
            "offset: expected a finite value, got nan",
        ),
        (
            lambda: PointCloud(torch.zeros(2, 2), torch.zeros(3)),
            ValueError,
            "log_prior: expected shape [2] (one weight per atom), got [3]",
        ),
        (
            lambda: PointCloud(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)),
            TypeError,
            "log_prior: expected a floating dtype, got torch.int64",
        ),
        (
            lambda: PointCloud(torch.zeros(2, 2), torch.full((2,), -math.inf)),
            ValueError,
            (
                "log_prior: expected values below +inf, no NaN and at least one finite, got a"
                " maximum of -inf"
            ),
        ),
        (
            lambda: PointCloud(torch.zeros(2, 2), torch.tensor([0.0, math.nan])),
            ValueError,
            (
                "log_prior: expected values below +inf, no NaN and at least one finite, got a"
                " maximum of nan"
            ),
        ),
        (
            lambda: PointCloud(torch.zeros(2, 2), torch.tensor([0.0, math.inf])),
            ValueError,
            (
                "log_prior: expected values below +inf, no NaN and at least one finite, got a"
                " maximum of inf"
            ),
        ),
    ],
)
def test_errors(make, kind, message):
    with pytest.raises(kind) as error:
        make()
    assert str(error.value) == message


# ---- containers


DATA = np.arange(12, dtype=np.float32).reshape(4, 3)


def field_of_a_record():
    """A field of a packed record: strides that are no multiple of an element."""
    records = np.zeros(4, dtype=[("flag", "u1"), ("y", "f4", 3)])
    records["y"] = DATA
    return records["y"]


@pytest.mark.parametrize(
    "array",
    [
        DATA.astype(">f4"),
        DATA.astype("<f4"),
        DATA.astype(">f8"),
        DATA.astype(">f2"),
        DATA.astype(np.uint8),
        DATA[::-1][::-1],
        np.flip(np.flip(DATA, 1).copy(), 1),
        np.asfortranarray(DATA),
        field_of_a_record(),
        np.ma.array(DATA),
        np.ma.array(DATA, mask=False),
        np.matrix(DATA),
        np.broadcast_to(DATA, (4, 3)),
    ],
)
def test_arrays_with_the_same_values_are_taken(array):
    array.flags.writeable = False
    cloud = PointCloud(array)
    assert cloud.y.tolist() == DATA.tolist()
    assert str(cloud.dtype)[6:] == array.dtype.newbyteorder("=").name
    prior = PointCloud(DATA, np.asarray(array)[:, 0]).log_prior if array.dtype != np.uint8 else None
    assert prior is None or prior.tolist() == DATA[:, 0].tolist()


class Frame:
    """As pandas, polars and scipy.sparse spell it."""

    def __init__(self, method):
        setattr(self, method, lambda: DATA)


def meta():
    return torch.empty(4, 3, device="meta")


TENSORS = {
    "COO": lambda: torch.eye(4).to_sparse(),
    "CSR": lambda: torch.eye(4).to_sparse_csr(),
    "CSC": lambda: torch.eye(4).to_sparse_csc(),
    "BSR": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "BSC": lambda: torch.eye(4).to_sparse_bsc((2, 2)),
    "nested, jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(3), torch.ones(2)], layout=torch.jagged
    ),
    "nested, strided": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    "meta": meta,
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.quint8),
    "complex": lambda: torch.ones(4, 3, dtype=torch.complex64),
    "bool": lambda: torch.ones(4, 3).bool(),
}


# torch warns of its prototypes and of quantization
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_tensors_of_another_kind_are_refused_by_name(make):
    with pytest.raises((TypeError, ValueError), match="^y: expected "):
        PointCloud(make())
    with pytest.raises((TypeError, ValueError), match="^log_prior: expected "):
        PointCloud(torch.zeros(4, 3), make())


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (np.ma.masked_values([[0.0, 1.0], [-999.0, 5.0]], -999.0), ValueError,
         "expected an array without masked entries, got 1 of 4 masked; fill them "
         "(np.ma.filled(NAME, ...)), or "
         "leave out atoms by log_prior = -inf"),
        (np.zeros(4, dtype=[("a", "f4"), ("b", "f4")]), TypeError,
         "expected an array of numbers, got a structured one with fields ['a', 'b']; take one "
         "field, NAME[\"a\"], "
         "or numpy.lib.recfunctions.structured_to_unstructured(NAME)"),
        (Frame("to_numpy"), TypeError,
         "expected a torch.Tensor or numpy.ndarray, got Frame; convert it: NAME.to_numpy()"),
        (Frame("toarray"), TypeError,
         "expected a torch.Tensor or numpy.ndarray, got Frame; convert it: NAME.toarray()"),
        (Frame("__array__"), TypeError,
         "expected a torch.Tensor or numpy.ndarray, got Frame; convert it: np.asarray(NAME)"),
        ([[1.0]], TypeError,
         "expected a torch.Tensor or numpy.ndarray, got list; convert it: torch.tensor(NAME)"),
    ],
)  # fmt: skip
def test_other_containers_are_refused_with_the_way_out(value, kind, message):
    for name, call in (
        ("y", lambda: PointCloud(value)),
        ("log_prior", lambda: PointCloud(DATA, value)),
    ):
        with pytest.raises(kind) as error:
            call()
        assert str(error.value) == f"{name}: {message.replace('NAME', name)}"


@pytest.mark.parametrize(
    "array", [np.array([[None]]), np.ones((2, 2), np.longdouble), np.array([["a"]])]
)
def test_numpy_of_another_kind_is_refused(array):
    message = (
        f"^y: numpy array of dtype {array.dtype} cannot become a tensor: .* Convert it: y.astype"
    )
    with pytest.raises(TypeError, match=message):
        PointCloud(array)


def test_a_lazily_negated_tensor_is_taken_by_value():
    lazy = torch.randn(4, 3, dtype=torch.complex64).conj().imag
    assert lazy.is_neg() and not PointCloud(lazy).y.is_neg()
    assert torch.equal(PointCloud(lazy).y, lazy)


@pytest.mark.parametrize("number", [np.float32(2), np.int64(2), np.array(2.0), torch.tensor(2)])
def test_numbers_of_any_library(number):
    cloud = PointCloud(DATA, scale=number, offset=number)
    assert (type(cloud.scale), cloud.scale, cloud.offset) == (float, 2.0, 2.0)


# ---- log weights, and atoms without weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.0, -1e2, 1e5, -1e8, 1e12])
@pytest.mark.parametrize("given", [torch.float64, torch.float32])
def test_log_weights_need_not_be_normalised(dtype, constant, given):
    draw = torch.Generator().manual_seed(0)
    y, x = torch.randn(100, 3, generator=draw), torch.randn(5, 3, generator=draw)
    prior = torch.randn(100, generator=draw, dtype=torch.float64)
    shifted = (prior + constant).to(given)
    true = reference(x.double(), y.double(), 1.0, 0.5, (shifted.double() - constant))
    p = DiffusionFisher(x.to(dtype), PointCloud(y, shifted), 1.0, 0.5)
    eps = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(p.log_prob.double(), true.log_prob, rtol=eps, atol=eps)
    torch.testing.assert_close(p.ess.double(), true.ess, rtol=eps, atol=eps)
    torch.testing.assert_close(p.denoised.double(), true.mean, rtol=eps, atol=eps)


def reference(x, y, alpha, sigma, log_prior):
    return ops.Posterior(*ops.posterior(x, y, alpha, sigma, torch.log_softmax(log_prior, 0)))


def test_log_weights_are_prepared_once(monkeypatch):
    cloud = PointCloud(DATA, np.arange(4.0))
    for dtype in (torch.float32, torch.float64):
        assert cloud._log_pi(dtype) is cloud._log_pi(dtype) and cloud._log_pi(dtype).dtype == dtype
        assert float(cloud._log_pi(dtype).exp().sum()) == pytest.approx(1, rel=1e-6)
    assert cloud.log_prior.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_masked_atom_may_hold_anything(value, dtype, monkeypatch):
    monkeypatch.setattr(_atoms, "_BLOCK", 7)
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(9, 2, 3, generator=draw).to(dtype)
    prior = torch.zeros(9, dtype=torch.float64)
    prior[[0, 4, 8]] = -math.inf
    clean = PointCloud(y.clone(), prior)
    y[0], y[4, 1, 2], y[8] = value, value, value
    cloud = PointCloud(y, prior)
    x = torch.randn(2, 2, 3, generator=draw, dtype=torch.float64)
    for of in (
        lambda c: DiffusionFisher(x, c, 0.9, 0.5).score,
        lambda c: DiffusionFisher(x, c, 0.9, 0.5).to_dense(),
        lambda c: DiffusionFisher(x.float(), c, 0.9, 0.5).trace() if dtype != torch.float64 else x,
        lambda c: top_k(x, c, 0.9, 0.5, 6).weight,
        lambda c: top_k(x, c, 0.9, 0.5, 6).index,
    ):
        assert torch.equal(of(cloud), of(clean))
    again = pickle.loads(pickle.dumps(cloud)).to(torch.float16)
    assert DiffusionFisher(x, again, 0.9, 0.5).trace().isfinite().all()
    y = y.clone()
    y[5, 0, 1] = math.nan
    with pytest.raises(
        ValueError, match=r"^y: expected finite values, got nan at index \[5, 0, 1\]$"
    ):
        PointCloud(y, prior)


def test_an_index_file_belongs_to_a_mask(tmp_path, monkeypatch):
    real = build.build_index
    masks = []

    def watched(y, scale, offset, seed, masked=None):
        masks.append(masked)
        return real(y, scale, offset, seed)

    monkeypatch.setattr(build, "build_index", watched)
    y, prior = torch.randn(64, 40), torch.zeros(64)
    prior[3] = -math.inf
    path = tmp_path / "y.safetensors"
    PointCloud(y, prior).index(path)
    assert masks[0].dtype == torch.bool and masks[0].nonzero().tolist() == [[3]]
    PointCloud(y, prior + 5).index(path)  # other weights, the same mask
    for other in (None, torch.zeros(64), prior.flip(0)):
        with pytest.raises(ValueError, match="the index of another cloud"):
            PointCloud(y, other).index(path)
    PointCloud(y).index()
    assert masks[1:] == [None]


def test_the_index_moves_with_the_atoms_and_not_with_others():
    cloud = PointCloud(torch.randn(300, 40, generator=torch.Generator().manual_seed(0)))
    index = cloud.index()
    copied = cloud.to("cpu", copy=True)
    assert copied is not cloud and copied._index is not None
    assert all(torch.equal(a, b) for a, b in zip(copied.index(), index, strict=True))
    assert cloud.to(torch.float64)._index is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N", [2, 1000])
def test_probabilities_in_place_of_their_logarithms_are_warned_of(dtype, N):
    y, weights = torch.zeros(N, 2), torch.arange(1.0, N + 1, dtype=dtype)
    weights /= weights.sum()
    for make in (PointCloud, GaussianMixture):
        how = {} if make is PointCloud else {"variance": 1.0}
        with pytest.warns(RuntimeWarning, match=r"^log_prior: .* pass .*weights\.log\(\)$") as seen:
            make(y, log_prior=weights, **how)
        assert seen[0].filename == __file__


def test_no_logarithms_are_taken_for_probabilities():
    one_hot, masked = torch.eye(4)[0], torch.tensor([0.25, 0.75, -math.inf, -math.inf])
    equal = torch.full((4,), 0.25)  # the same weights either way
    near, beyond = torch.tensor([0.1, 0.2, 0.3, 0.401]), torch.tensor([-0.1, 0.2, 0.3, 0.6])
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for log_prior in (one_hot, masked, equal, near, beyond, weights.log(), 0 * weights):
            PointCloud(torch.zeros(4, 2), log_prior)
        PointCloud(torch.zeros(1, 2), torch.ones(1))
