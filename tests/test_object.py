"""Objects keep their word: what they hand out may be changed, what they were made from is watched,
results that are kept can be differentiated, copied and asked for by several threads.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch

import dfkernels as df
from dfkernels import fisher as fisher_module
from dfkernels.methods.endpoint import EndpointFisher, IsotropicFisher

RESULTS = {
    "log_prob": lambda f: f.log_prob,
    "denoised": lambda f: f.denoised,
    "ess": lambda f: f.ess,
    "eps": lambda f: f.eps,
    "score": lambda f: f.score,
    "trace": lambda f: f.trace(),
    "diagonal": lambda f: f.diagonal(),
    "to_dense": lambda f: f.to_dense(),
    "dropped_mass": lambda f: f.dropped_mass,
    "log_prob_error": lambda f: f.log_prob_error,
    "mean_error": lambda f: f.mean_error,
    "fisher_error": lambda f: f.fisher_error,
    "atoms_read": lambda f: f.atoms_read,
}
DIFFERENTIABLE = list(RESULTS)[:8]


def data(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(60, 4, generator=draw, dtype=torch.float64)
    return (y[:3] + 0.5 * torch.randn(3, 4, generator=draw, dtype=torch.float64)).to(dtype), y.to(
        dtype
    )


def make(dtype=torch.float32, **more):
    x, y = data(dtype)
    return df.DiffusionFisher(x, df.PointCloud(y, **more), 0.9, 0.5)


@pytest.fixture
def found_by_index(monkeypatch):
    """A Fisher of two queries that finds its atoms through an index: a list for the first, all for
    the other."""
    monkeypatch.setattr(fisher_module, "_is_small", lambda cloud: False)
    y = torch.randn(700, 200, generator=torch.Generator().manual_seed(0))
    cloud = df.PointCloud(y)
    cloud.index()
    return lambda: df.DiffusionFisher(
        y[:2] * 0.9, cloud, 0.9, torch.tensor([0.1, 30.0]), tolerance=1e-6
    )


def all_results(f):
    return {name: result(f) for name, result in RESULTS.items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_changed_in_place_changes_no_other(name, found_by_index):
    for new in (make, found_by_index):
        expected = all_results(new())
        f = new()
        RESULTS[name](f).zero_().sub_(7)
        assert_same(all_results(f), expected)
        RESULTS[name](f).numpy()[...] = 3  # behind torch's back
        assert_same(all_results(f), expected)


def test_a_result_changed_in_place_can_still_be_differentiated():
    x, y = data()
    x.requires_grad_()
    f = df.DiffusionFisher(x, df.PointCloud(y), 0.9, 0.5)
    f.denoised.clamp_(-0.1, 0.1)
    (got,) = torch.autograd.grad(f.denoised.sum() + f.log_prob.sum(), x)
    again = df.DiffusionFisher(x, df.PointCloud(y), 0.9, 0.5)
    (expected,) = torch.autograd.grad(again.denoised.sum() + again.log_prob.sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", [*RESULTS, "matmul", "solve", "eigsh"])
@pytest.mark.parametrize("changed", ["x", "alpha", "sigma", "y", "log_prior"])
@pytest.mark.parametrize("computed_before", [False, True])
def test_an_input_changed_in_place_is_named(name, changed, computed_before):
    x, y = data()
    given = {
        "x": x,
        "y": y,
        "log_prior": torch.zeros(60),
        "alpha": torch.full((3,), 0.9),
        "sigma": torch.tensor(0.5),  # one kept as it is, one expanded
    }
    cloud = df.PointCloud(given["y"], given["log_prior"])
    f = df.DiffusionFisher(x, cloud, given["alpha"], given["sigma"])
    use = (
        RESULTS.get(name)
        or {
            "matmul": lambda f: f @ torch.ones(3, 4),
            "solve": lambda f: f.solve(torch.ones(3, 4), 100.0),
            "eigsh": lambda f: f.eigsh(1),
        }[name]
    )
    if computed_before:
        use(f)
    given[changed].view(-1)[:1] += 0.25  # a view shares its base's counter
    with pytest.raises(
        RuntimeError, match=f"^{changed}: changed in place since this .* was made; make another"
    ):
        use(f)
    assert repr(f).startswith("DiffusionFisher(shape=(3, 4, 4)")  # an error must stay readable


def test_what_an_object_hands_out_itself_is_watched():
    cloud = make().cloud
    cloud.y.mul_(2)
    with pytest.raises(RuntimeError, match="^y: changed in place since this PointCloud was made"):
        df.DiffusionFisher(torch.zeros(1, 4), cloud, 1.0, 1.0).log_prob  # noqa: B018
    f = make()
    f.sigma.mul_(2)
    with pytest.raises(RuntimeError, match="^sigma: changed in place"):
        f.trace()


def test_an_index_changed_in_place_is_named(found_by_index):
    f = found_by_index()
    f.cloud.index().atom_norm.mul_(0)
    for use in (
        lambda: f.log_prob,
        lambda: f.cloud.index(),
        lambda: df.top_k(f.x, f.cloud, 1, 1, 1, tolerance=0.1),
    ):
        with pytest.raises(RuntimeError, match="^index.atom_norm: changed in place"):
            use()


@pytest.mark.parametrize("subclass", [EndpointFisher, IsotropicFisher])
def test_other_operators_watch_their_x(subclass):
    x = torch.randn(3, 4)
    more = (x + 1, x - 1, "centred") if subclass is EndpointFisher else (torch.ones(3),)
    f = subclass(x, 0.9, 0.5, *more)
    x += 1
    with pytest.raises(
        RuntimeError, match=f"^x: changed in place since this {subclass.__name__} was made"
    ):
        f.solve(torch.ones(3, 4), 9.0)


def test_inference_tensors_are_copied_since_they_cannot_be_watched():
    x, y = data()
    expected = all_results(make())
    with torch.inference_mode():
        x, y = x.clone(), y.clone()
        f = df.DiffusionFisher(x, df.PointCloud(y), torch.tensor(0.9), torch.full((3,), 0.5))
        assert_same(all_results(f), expected)
        x += 1
        y += 1
        assert_same(all_results(f), expected)
    assert_same(all_results(f), expected)
    weight = torch.ones(3, 4, requires_grad=True)
    (f.denoised * weight).sum().backward()  # autograd may save what the object hands out
    x, y = data()
    of_x = df.DiffusionFisher(x.requires_grad_(), f.cloud, 0.9, 0.5)
    of_x.trace().sum().backward()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_result_first_asked_for_without_a_graph_has_one_when_needed(name, off):
    x, y = data(torch.float64)
    x.requires_grad_()
    sigma = torch.tensor(0.5, requires_grad=True)  # float32: made float64 inside the constructor
    cloud = df.PointCloud(y)
    expected = torch.autograd.grad(
        RESULTS[name](df.DiffusionFisher(x, cloud, 0.9, sigma)).sum(), (x, sigma)
    )
    with off():
        f = df.DiffusionFisher(x, cloud, 0.9, sigma)
        assert not RESULTS[name](f).requires_grad
    torch.testing.assert_close(torch.autograd.grad(RESULTS[name](f).sum(), (x, sigma)), expected)
    with off():
        assert not RESULTS[name](f).requires_grad


def test_x_may_require_a_gradient_after_the_first_result():
    f = make()
    before = f.trace()
    f.x.requires_grad_()
    assert not before.requires_grad and f.trace().requires_grad


def saved(f):
    file = io.BytesIO()
    torch.save(f, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "save": saved,
    "pickle": lambda f: pickle.loads(pickle.dumps(f)),
}


@pytest.mark.parametrize("again", COPIES)
@pytest.mark.parametrize("asked", ["nothing", "everything", "everything, with a graph"])
def test_copies_at_any_time(again, asked, found_by_index):
    for new in (make, found_by_index):
        f = new()
        sigma = f.sigma.double().requires_grad_()
        # f.sigma is no leaf
        f = df.DiffusionFisher(f.x.clone(), f.cloud, 0.9, sigma, tolerance=f.tolerance)
        if asked.endswith("graph"):
            f.x.requires_grad_()
        if asked != "nothing":
            all_results(f)
        other = COPIES[again](f)
        assert type(other) is df.DiffusionFisher and other.x.requires_grad == f.x.requires_grad
        assert (other.x is f.x) == (again == "copy")
        assert_same(all_results(other), all_results(f))
        if again != "copy":
            other.cloud.y.add_(1)
            all_results(f)  # shares nothing


def test_a_copy_of_a_changed_object_is_refused():
    f = make()
    f.x.add_(1)
    for again in COPIES.values():
        with pytest.raises(RuntimeError, match="^x: changed in place"):
            again(f)


def test_threads_that_ask_at_once_get_the_same():
    expected = all_results(make())
    f, results = make(), []
    start = threading.Barrier(8)

    def ask():
        start.wait()
        results.append(all_results(f))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for result in results:
        assert_same(result, expected)


@pytest.mark.parametrize(
    "level", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_dtype_of_x_whatever_that_of_the_levels(level, dtype):
    x, y = data(dtype)
    for levels in (torch.ones(3, dtype=level), torch.ones((), dtype=level)):
        f = df.DiffusionFisher(x, df.PointCloud(y), levels, levels)
        results = {n: RESULTS[n](f) for n in DIFFERENTIABLE}
        results |= {
            "solve": f.solve(x, 100.0),
            "matmul": f @ x,
            "values": f.eigsh(2)[0],
            "vectors": f.eigsh(2)[1],
        }
        results["weight"] = df.top_k(x, f.cloud, levels, levels, 2).weight
        assert {n: r.dtype for n, r in results.items()} == dict.fromkeys(results, dtype)


def test_an_attribute_set_anew_drops_the_results():
    f = make()
    f.trace()
    f.x = f.x + 1
    torch.testing.assert_close(f.trace(), f.to_dense().diagonal(dim1=1, dim2=2).sum(1))
