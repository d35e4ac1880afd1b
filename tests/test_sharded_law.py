"""A ShardedCloud is a law like any other: derivatives by reading the files again, and what takes a
`cloud` takes it, with the results of the PointCloud of the same atoms."""

from __future__ import annotations

import contextlib
import copy
import pickle

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from shards import write_shards
from tensors import normal, rng
from test_global_state import STATES
from torch.autograd import forward_ad

import dfkernels as df
from dfkernels import DiffusionFisher, PointCloud, ShardedCloud, cli
from dfkernels._io import rows
from dfkernels.methods.sharded import write_manifest

f64 = torch.float64
SIZES = (7, 1, 30, 12)


def opened(folder, y, memory=1 << 20, **stored):
    """The cloud of files of SIZES rows, or as many as `y` is in a list of."""
    parts = y.split(SIZES) if isinstance(y, torch.Tensor) else y
    return ShardedCloud(write_shards(folder, parts, **stored), memory=memory)


Y = normal(50, 2, 3)
X, V = normal(3, 2, 3, seed=1), normal(3, 2, 2, 3, seed=2)
LEVELS = torch.tensor([0.9, 1.0, 0.0], dtype=f64), torch.tensor([0.5, 0.8, 2.0], dtype=f64)


@pytest.fixture
def cloud(tmp_path):
    return opened(tmp_path / "shards", Y, memory=600)  # six rows at once


def results(cloud, x, alpha, sigma, v):
    """What a pass gives, by name."""
    F = DiffusionFisher(x, cloud, alpha, sigma)
    found = {name: getattr(F, name) for name in ("log_prob", "denoised", "ess", "score", "eps")}
    return found | {"trace": F.trace(), "product": F @ v, "diagonal": F.diagonal()}


NAMES = ("log_prob", "denoised", "ess", "score", "eps", "trace", "product", "diagonal")


def close(found, want, tol=1e-9):
    torch.testing.assert_close(found, want, rtol=tol, atol=tol)


@pytest.mark.parametrize("names", [*[(name,) for name in NAMES], NAMES], ids="-".join)
def test_gradients_are_those_of_the_point_cloud(cloud, names):
    def gradients(cloud):
        queries = [t.clone().requires_grad_() for t in (X, *LEVELS, V)]
        out = results(cloud, *queries)
        loss = sum((out[name] * normal(*out[name].shape, seed=3)).sum() for name in names)
        return torch.autograd.grad(loss, queries, allow_unused=True, materialize_grads=True)

    for found, want in zip(gradients(cloud), gradients(PointCloud(Y)), strict=True):
        close(found, want)


@pytest.mark.parametrize("given", range(4))
def test_forward_mode(cloud, given):
    def moved(cloud):
        queries = [X, *LEVELS, V]
        with forward_ad.dual_level():
            queries[given] = forward_ad.make_dual(queries[given], queries[given].cos())
            out = results(cloud, *queries)
            tangents = {name: forward_ad.unpack_dual(out[name]).tangent for name in NAMES}
        return {n: torch.zeros_like(out[n]) if t is None else t for n, t in tangents.items()}

    found, want = moved(cloud), moved(PointCloud(Y))
    for name in NAMES:
        close(found[name], want[name])


def test_functional_transforms(cloud):
    whole = PointCloud(Y)
    log_prob = lambda cloud: lambda x: cloud.posterior(x[None], 1.0, 0.7).log_prob[0]
    mean = lambda cloud: lambda x: cloud.posterior(x[None], 1.0, 0.7).mean[0]
    trace = lambda cloud: lambda x: cloud.posterior(x[None], 1.0, 0.7).fisher_trace[0]
    many = lambda cloud: torch.func.vmap(log_prob(cloud))(X)
    vectors = lambda cloud: torch.func.vmap(lambda v: cloud.fisher_matvec(X, v, 1.0, 0.7))(
        V.movedim(1, 0)
    )
    stacks = lambda cloud: torch.func.vmap(lambda v: cloud.fisher_matvec(X, v, 1.0, 0.7))(
        torch.stack([V, 2 * V.flip(1)])
    )
    for call in (
        lambda cloud: torch.func.grad(log_prob(cloud))(X[0]),
        lambda cloud: torch.func.grad(trace(cloud))(X[0]),
        lambda cloud: torch.func.jacrev(mean(cloud))(X[0]),
        lambda cloud: torch.func.jacfwd(mean(cloud))(X[0]),
        lambda cloud: torch.func.jacrev(lambda x: cloud.fisher_matvec(x, X, 1.0, 0.7))(X),
        lambda cloud: torch.func.jacfwd(lambda x: cloud.fisher_diagonal(x, 1.0, 0.7))(X),
        lambda cloud: torch.func.jvp(trace(cloud), (X[0],), (V[0, 0],))[1],
        lambda cloud: torch.func.hessian(log_prob(cloud))(X[0]),
        lambda cloud: torch.func.jacrev(torch.func.jacrev(log_prob(cloud)))(X[0]),
        many,
        vectors,
        stacks,
    ):
        close(call(cloud), call(whole))
    hessian = torch.func.hessian(log_prob(cloud))(X[0]).reshape(6, 6)
    close(-hessian, DiffusionFisher(X[:1], cloud, 1.0, 0.7).to_dense()[0])


def test_checkpoints_and_batched_cotangents(cloud):
    x = X.clone().requires_grad_()
    call = lambda x: cloud.posterior(x, 1.0, 0.7).fisher_trace.sum()
    (want,) = torch.autograd.grad(call(x), x)
    kept = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(kept, x)[0], want)
    mean = cloud.posterior(x, 1.0, 0.7).mean
    cotangents = normal(4, *X.shape, seed=6)
    with pytest.raises(NotImplementedError) as raised:
        torch.autograd.grad(mean, x, cotangents, is_grads_batched=True)
    assert str(raised.value) == (
        "is_grads_batched: expected False with a ShardedCloud: loop over the cotangents, or call "
        "torch.func.vjp and torch.func.vmap"
    )


def test_second_derivatives_work_or_are_refused(cloud):
    x = X.clone().requires_grad_()
    alpha, sigma = (t.clone().requires_grad_() for t in LEVELS)

    def second(out, first, then):
        (grad,) = torch.autograd.grad(out.sum(), first, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), then)[0]

    def both(make, first, then):
        return [second(make(c.posterior(x, alpha, sigma)), first, then) for c in (cloud, whole)]

    whole = PointCloud(Y)
    log_prob, mean = (lambda p: p.log_prob), (lambda p: p.mean.square())
    for make, first, then in (
        (log_prob, x, x),
        (log_prob, x, sigma),
        (log_prob, sigma, x),
        (log_prob, alpha, alpha),
    ):
        close(*both(make, first, then))
    beside_v = cloud.partial(x, 1.0, 0.7, v=V.clone().requires_grad_()).posterior()
    close(second(mean(beside_v), x, x), second(mean(whole.posterior(x, 1.0, 0.7)), x, x))
    for make, first in ((lambda p: p.fisher_trace, x), (mean, sigma)):
        with pytest.raises(NotImplementedError) as raised:
            second(make(cloud.posterior(x, alpha, sigma)), first, x)
        assert str(raised.value) == (
            "x, alpha, sigma, v: expected first derivatives of a ShardedCloud, got a second one, "
            "which only log_prob in x, alpha and sigma and the mean in x have: call the operators "
            "for a PointCloud of some of the atoms, cloud.rows(numbers)"
        )


def test_derivatives_stay_within_the_memory_and_say_how_far_they_are(cloud, monkeypatch):
    read, said, alive = rows.read, [], []

    def spied(at, first, last, into):
        alive.append(into.nbytes)
        return read(at, first, last, into)

    monkeypatch.setattr(rows, "read", spied)
    x = X.clone().requires_grad_()
    part = cloud.partial(x, 1.0, 0.7, callback=lambda *at: said.append(at))
    once = len(said)
    part.posterior().log_prob.sum().backward(retain_graph=True)
    assert len(said) == once  # results of the pass
    part.posterior().fisher_trace.sum().backward()
    assert said[:once] == said[once:] and said[-1] == (50, 50)
    assert max(alive) <= 300


def test_global_state_changes_no_gradient(cloud):
    def gradients(x):
        p = cloud.partial(x, 0.9, 0.7, v=V, diagonal=True)
        out = (*p.posterior(), p.fisher_matvec(), p.fisher_diagonal())
        return torch.autograd.grad(sum(t.square().sum() for t in out), x)[0]

    expected = gradients(X.clone().requires_grad_())
    with contextlib.ExitStack() as states:
        for name in ("default dtype float64", "default device meta", "autocast bfloat16"):
            states.enter_context(STATES[name]())
        assert torch.equal(gradients(X.clone().requires_grad_()), expected)
    with torch.no_grad():
        assert not cloud.posterior(X.clone().requires_grad_(), 1.0, 0.7).mean.requires_grad
    empty = torch.zeros(0, 2, 3, dtype=f64, requires_grad=True)
    p = cloud.partial(empty, 1.0, 0.7, v=empty.detach())
    loss = p.posterior().fisher_trace.sum() + p.fisher_matvec().sum()
    assert torch.autograd.grad(loss, empty)[0].shape == (0, 2, 3)


def test_a_query_changed_in_place_before_the_backward_pass(cloud):
    x = X.clone()
    leaf = X.clone().requires_grad_()
    given = leaf * 1.0
    p = cloud.posterior(given, 1.0, 0.7)
    given += 1
    found = torch.autograd.grad(p.fisher_trace.sum(), leaf)[0]
    want = x.requires_grad_()
    whole = df.ops.posterior(want, Y, 1.0, 0.7).fisher_trace
    close(found, torch.autograd.grad(whole.sum(), want)[0])


def test_derivatives_of_some_files_merge(cloud):
    def gradient(parts):
        x = X.clone().requires_grad_()
        p = df.merge(c.partial(x, 0.9, 0.7, v=V, files=f) for c, f in parts)
        loss = p.posterior().fisher_trace.sum() + p.fisher_matvec().square().sum()
        return torch.autograd.grad(loss + p.posterior().log_prob.sum(), x)[0]

    whole = gradient([(cloud, None)])
    close(gradient([(cloud, [0, 2]), (cloud, [1, 3])]), whole)
    close(gradient([(cloud, []), (cloud, [0, 1]), (cloud, [2, 3]), (cloud, [])]), whole)


def test_a_file_that_changes_before_the_backward_pass(cloud):
    p = cloud.posterior(X.clone().requires_grad_(), 1.0, 0.7)
    name = cloud.folder / "part2.npy"
    np.save(name, np.load(name) + 1)
    with pytest.raises(ValueError, match="part2.npy: has changed since the cloud was opened"):
        p.fisher_trace.sum().backward()


def test_float32_gradients_are_as_exact_as_one_pass(tmp_path):
    y, x = Y.float(), X.float()
    cloud = opened(tmp_path / "a", y, memory=400)

    def gradient(cloud, x, name):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(results(cloud, x, 1.0, 0.7, V.to(x.dtype))[name].sum(), x)[0]

    for name in NAMES:
        want = gradient(PointCloud(y), x.double(), name)
        errors = [(gradient(c, x, name) - want).abs().max() for c in (cloud, PointCloud(y))]
        assert errors[0] <= 2 * errors[1] + 1e-6 * want.abs().max(), name


def test_log_prob_merged_from_64_shards_is_as_exact_as_one_pass(tmp_path):
    """The target: at most twice the error."""
    y = normal(64 * 40, 48, dtype=torch.float32)
    cloud = opened(tmp_path / "a", list(y.split(40)), memory=1 << 16)
    for sigma in (0.02, 0.5, 20.0):
        x = y[::80] + sigma * normal(32, 48, seed=4, dtype=torch.float32)
        want = df.ops.log_prob(x.double(), y, 1.0, sigma)
        error = (cloud.log_prob(x, 1.0, sigma) - want).abs().max()
        of_one = (df.ops.log_prob(x, y, 1.0, sigma) - want).abs().max()
        rounding = torch.finfo(torch.float32).eps / 2 * want.abs().max()
        assert error <= 2 * max(of_one, rounding)
        merged = cloud.partial(x, 1.0, sigma)
        inside = (merged.log_mass - merged.log_weight - want).abs().max()
        assert inside <= 2 * max(of_one, rounding)


@pytest.mark.filterwarnings("ignore:log_prob. the estimated error")
def test_methods_take_it(cloud):
    """With the numbers of the PointCloud of the same atoms."""
    schedule, whole = df.schedule.EDM(), PointCloud(Y)
    cloud = ShardedCloud(cloud.folder)
    x = 3 * X
    t = df.time_grid(schedule, 6, (0.3, 10.0))

    def log_prob(cloud, trace):
        found = df.log_prob(
            df.Denoiser.exact(cloud, schedule), x, (0.5, 10.0), trace, method="heun", steps=4
        )
        return found.log_prob

    def gradient(cloud):
        z = x.clone().requires_grad_()
        denoiser = df.Denoiser.exact(cloud, schedule)
        last = df.sample(denoiser, z, t, method="heun").x[-1]
        return torch.autograd.grad(last.square().sum(), z)[0]

    def gradient_of_log_prob(cloud):
        z, denoiser = x.clone().requires_grad_(), df.Denoiser.exact(cloud, schedule)
        found = df.log_prob(denoiser, z, (0.5, 10.0), "exact", method="heun", steps=4)
        return torch.autograd.grad(found.log_prob.sum(), z)[0]

    def guided(cloud):
        denoiser = df.Denoiser.exact(cloud, schedule)
        loss = lambda z: (z - 1).square().flatten(1).sum(1)
        return df.guide(loss, x, t, denoiser, form="exact", cloud=cloud, steps=2)[0]

    for call in (
        lambda cloud: df.sample(df.Denoiser.exact(cloud, schedule), x, t, method="heun").x[-1],
        lambda cloud: log_prob(cloud, "exact"),
        lambda cloud: log_prob(cloud, "divergence"),
        lambda cloud: log_prob(cloud, "hutchinson"),
        lambda cloud: log_prob(cloud, df.Divergence(mode="jvp")),
        gradient,
        gradient_of_log_prob,
        guided,
        lambda cloud: df.transport_test(cloud, schedule, t, x=x).A,
        lambda cloud: cloud.sample(9, rng(5)),
        lambda cloud: cloud._without_repeats(50, rng(5)),
        lambda cloud: DiffusionFisher(x, cloud, 1.0, 0.7).eigsh(2, largest=False)[0],
        lambda cloud: DiffusionFisher(x, cloud, 1.0, 0.7).solve(x, 0.5),
    ):
        close(call(cloud), call(whole), 1e-8)


def checked_alike(denoiser, cloud):
    found, want = (df.check(denoiser, c) for c in (cloud, PointCloud(Y)))
    assert (found.ok, found.cause) == (want.ok, want.cause)
    for one, other in zip(found.levels, want.levels, strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-6, abs=1e-9)
    return found


def test_check(cloud):
    exact = df.Denoiser.exact(cloud, df.schedule.EDM())
    assert checked_alike(exact, ShardedCloud(cloud.folder)).ok


@pytest.mark.slow
def test_check_names_what_is_wrong(tmp_path):
    """By some hundred passes over the files."""
    cloud, schedule = opened(tmp_path / "a", list(Y.split(25))), df.schedule.EDM()
    exact = df.Denoiser.exact(cloud, schedule)
    doubled = df.Denoiser(lambda x, t: 2 * exact(x / 2, t / 2), schedule, "sample")
    assert checked_alike(doubled, cloud).cause == "data scale"


def test_it_is_an_object_like_a_point_cloud(cloud):
    assert isinstance(cloud, df.Law) and cloud.d == 6 and cloud.device.type == "cpu"
    assert cloud.log_prior is None and (cloud.scale, cloud.offset) == (1.0, 0.0)
    want = cloud.posterior(X, 1.0, 0.7)
    for other in (copy.copy(cloud), copy.deepcopy(cloud), pickle.loads(pickle.dumps(cloud))):
        assert torch.equal(other.posterior(X, 1.0, 0.7).mean, want.mean)
    denoiser = copy.deepcopy(df.Denoiser.exact(cloud, df.schedule.EDM())).to("cpu")
    assert torch.equal(denoiser.double()(X, 0.7), want.mean)
    assert cloud.to("cpu") is cloud and cloud.to(torch.float64) is cloud
    assert cloud.to("meta").device.type == "meta" and cloud.device.type == "cpu"
    with pytest.raises(TypeError) as raised:
        cloud.to(torch.float32)
    assert str(raised.value) == (
        "dtype: expected none, or torch.float64 as in the files, got torch.float32: computation "
        "follows the queries' dtype"
    )
    with pytest.raises(AttributeError) as raised:
        cloud.memory = 3
    assert str(raised.value) == "ShardedCloud is immutable: cannot set memory"
    close(cloud.rows(torch.tensor([49, 0, 7, 0])), Y[[49, 0, 7, 0]], 0)
    assert cloud.rows(torch.tensor([], dtype=torch.int64)).shape == (0, 2, 3)


def refused(error, message, call):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


def test_refusals(cloud):
    no_y = "a ShardedCloud has no y, as its atoms are in files: cloud.rows(numbers) reads some"
    refused(AttributeError, no_y, lambda: cloud.y)
    refused(
        ValueError,
        "numbers: expected atoms from 0 to 49, got 50",
        lambda: cloud.rows(torch.tensor([3, 50])),
    )
    refused(
        TypeError,
        "numbers: expected an int64 tensor [n], got torch.float32 [2]",
        lambda: cloud.rows(torch.zeros(2)),
    )
    refused(
        ValueError,
        "x: expected shape [B, 2, 3] to match the cloud, got [3, 3, 2]",
        lambda: DiffusionFisher(X.mT, cloud, 1.0, 0.7),
    )
    refused(
        ValueError,
        f"tolerance: {cloud.folder / 'part0.npy.index'} is missing: `dfkernels index "
        f"{cloud.folder}` or cloud.index() writes the indexes",
        lambda: DiffusionFisher(X, cloud, 1.0, 0.7, tolerance=1e-6),
    )
    refused(
        ValueError,
        "v: expected shape [3, 2, 3] or [3, K, 2, 3], got [3, 2]",
        lambda: cloud.fisher_matvec(X, X[..., 0], 1.0, 0.7),
    )
    refused(
        ValueError,
        "sigma: expected a finite value > 0, got 0.0",
        lambda: cloud.posterior(X, 1.0, 0.0),
    )


def test_a_file_that_is_read_for_some_rows_only_is_checked(cloud):
    name = cloud.folder / "part2.npy"
    np.save(name, np.load(name) + 1)
    other = ShardedCloud(cloud.folder)
    assert other.rows(torch.tensor([0])).shape == (1, 2, 3)
    with pytest.raises(ValueError, match="part2.npy: has changed since manifest.json was written"):
        other.rows(torch.tensor([10]))
    with pytest.raises(ValueError, match="part2.npy: has changed since the cloud was opened"):
        cloud.rows(torch.tensor([10]))


SCALE, OFFSET = (0.5, 2.0), (-1.0, 0.25)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.uint8], ids=str
)
@pytest.mark.parametrize("given", ["both", "scale", "offset"])
def test_numbers_for_each_channel(tmp_path, dtype, given):
    y = (40 * Y + 128).clamp(1, 255).to(dtype) if dtype == torch.uint8 else Y.to(dtype)
    stored = {"scale": SCALE, "offset": OFFSET}
    stored = stored if given == "both" else {given: stored[given]}
    cloud = opened(tmp_path / "a", y, memory=6 * (2 * 6 * dtype.itemsize + 48), **stored)
    scale, offset = (
        torch.tensor(stored.get(n, d)).double().reshape(-1, 1)
        for n, d in (("scale", 1.0), ("offset", 0.0))
    )
    whole = PointCloud(scale * y.double() + offset)
    units = 60.0 if dtype == torch.uint8 else 1.0
    queries = (units * X, 1.0, 0.7 * units, V)
    for name, found in results(cloud, *queries).items():
        close(found, results(whole, *queries)[name])
    close(cloud.sample(9, rng(1)), whole.sample(9, rng(1)), 0)
    a, b = torch.tensor([2.0, 3.0]).double(), torch.tensor([0.5, 0.0]).double()
    for part in (slice(None), slice(1)):
        mapped = cloud._mapped(a[part], b[part], 1 << 22).posterior(*queries[:3])
        close(mapped.mean, whole._mapped(a[part], b[part], 1 << 22).posterior(*queries[:3]).mean)
    x = X.float().requires_grad_()
    p = cloud.posterior(units * x, 1.0, 0.7 * units)
    assert torch.autograd.grad(p.fisher_trace.sum(), x)[0].dtype == torch.float32


def test_channels_in_the_manifest(tmp_path):
    cloud = opened(tmp_path / "a", Y, scale=torch.tensor(SCALE), offset=list(OFFSET))
    assert (cloud.scale, cloud.offset) == (SCALE, OFFSET)
    expected = "N=50, event_shape=(2, 3), torch.float64, files=4, scale=[2], offset=[2]"
    assert repr(cloud) == f"ShardedCloud({expected})"
    bad = lambda error, message, **stored: refused(
        error, message, lambda: write_manifest(cloud.folder, force=True, **stored)
    )
    expected = "expected a number, or 2 of them, one for each channel of rows [2, 3]"
    bad(ValueError, f"scale: {expected}, got 3 numbers", scale=[1, 2, 3])
    bad(ValueError, f"offset: {expected}, got 0 numbers", offset=())
    bad(ValueError, "offset[1]: expected a finite value, got nan", offset=[0, float("nan")])
    bad(TypeError, "scale[0]: expected a number, got str", scale=["1", 2])
    bad(TypeError, "scale: expected a number, got str", scale="12")
    refused(
        ValueError,
        "memory: expected at least two rows, 144 bytes, got 143",
        lambda: ShardedCloud(cloud.folder, memory=143),
    )
    argv = ["manifest", str(cloud.folder), "--force", "--scale", "0.5,2", "--offset=-1,0.25"]
    assert cli.main(argv) == 0
    assert (ShardedCloud(cloud.folder).scale, ShardedCloud(cloud.folder).offset) == (SCALE, OFFSET)
    flat = opened(tmp_path / "b", Y.reshape(50, 6)[:, 0])
    refused(
        ValueError,
        "scale: expected a number of rows [], got 2 numbers",
        lambda: write_manifest(flat.folder, force=True, scale=[1, 2]),
    )
    assert opened(tmp_path / "c", Y[:, :1], scale=[2]).scale == 2.0
