"""The Sinkhorn gradient flow against finite differences of the divergence, its pool and its
checkpoints, the straight flow against closed forms, and the time posterior against brute force.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings

import pytest
import torch
from tensors import rng

import dfkernels as df
from dfkernels._io.files import FileError
from dfkernels.methods import nsgf
from dfkernels.methods.networks import VectorNet
from dfkernels.methods.reflow import Pairs
from dfkernels.methods.reflow.loss import stratified
from dfkernels.methods.sinkhorn import NotConverged, divergence
from dfkernels.methods.training import train

f64 = torch.float64


def points(n, *event, seed, dtype=f64, scale=1.0, shift=0.0):
    return (scale * torch.randn(n, *event, dtype=f64, generator=rng(seed)) + shift).to(dtype)


def normal(n, generator):
    return torch.randn(n, 2, generator=generator)


def shifted(n, generator):
    return 0.5 * torch.randn(n, 2, generator=generator) + 2


# ---- velocity


@pytest.mark.parametrize("event, blur", [((2,), 0.5), ((1, 3), 1.0)])
def test_velocity_is_the_gradient_of_the_converged_divergence(event, blur):
    """Over a_i, by central differences of S at a marginal error of 1e-12, in float64."""
    x, y = points(6, *event, seed=0), points(5, *event, seed=1, scale=0.6, shift=0.8)
    a, b = (torch.rand(n, dtype=f64, generator=rng(n)) + 0.2 for n in (6, 5))
    v = nsgf.velocity(x, y, blur, a, b, tol=1e-8)
    S = lambda x: float(divergence(x, y, blur, a, b, tol=1e-12, max_iter=10_000).value)
    h, want = 1e-4, torch.empty_like(x).view(6, -1)
    for i, k in itertools.product(*map(range, want.shape)):
        step = torch.zeros_like(want)
        step[i, k] = h
        want[i, k] = (S(x - step.view_as(x)) - S(x + step.view_as(x))) / (2 * h)
    want = want / (a / a.sum())[:, None]
    assert float((v.value - want.view_as(x)).abs().max()) <= 1e-6 * float(want.abs().max())
    assert v.marginal_error == max(v.xy.marginal_error, v.xx.marginal_error) <= 1e-8


@pytest.mark.parametrize("tol", [1e-3, 1e-6])
def test_the_error_of_a_velocity_is_about_tol(tol):
    x, y = points(80, 2, seed=0), points(90, 2, seed=1, scale=0.5, shift=1.0)
    want = nsgf.velocity(x, y, 0.5, tol=1e-11).value
    found = nsgf.velocity(x, y, 0.5, tol=tol).value
    assert float((found - want).norm() / want.norm()) <= 5 * tol


def test_velocities_in_closed_form():
    """Of one particle y's mean less x; to itself 0; to itself moved, the shift."""
    x, y = points(1, 2, seed=0), points(7, 2, seed=1)
    assert torch.allclose(nsgf.velocity(x, y, 0.3).value, y.mean(0) - x, atol=1e-6)
    assert float(nsgf.velocity(y, y, 0.3).value.abs().max()) == 0
    far = torch.tensor([3.0, -40.0], dtype=f64)
    assert torch.allclose(nsgf.velocity(y, y + far, 0.3, tol=1e-9).value, far, atol=1e-7)


def test_a_start_saves_iterations():
    x, y = points(60, 2, seed=0), points(60, 2, seed=1, shift=1.0)
    first = nsgf.velocity(x, y, 0.3, tol=1e-6)
    again = nsgf.velocity(x, y, 0.3, tol=1e-5, start=first)
    assert again.xy.iterations == again.xx.iterations == 1
    moved = nsgf.velocity(x + 1e-3 * first.value, y, 0.3, tol=1e-6, start=first)
    assert moved.xy.iterations < first.xy.iterations


# ---- flow


def test_a_flow_reports_the_divergence_and_the_error_of_each_state():
    x, y = points(40, 2, seed=0), points(50, 2, seed=1, scale=0.5, shift=2.0)
    b = torch.rand(50, generator=rng(2), dtype=f64) + 0.1
    seen = []
    f = nsgf.flow(
        x, y, 0.3, b=b, steps=4, eta=0.5, tol=1e-8, callback=lambda *done: seen.append(done)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert f.t.tolist() == [0, 0.5, 1, 1.5, 2] and torch.equal(f.x[0], x)
    assert float(f.marginal_error.max()) <= 1e-8 and bool((f.divergence.diff() < 0).all())
    for state, after, value in zip(f.x, [*f.x[1:], None], f.divergence, strict=True):
        want = float(divergence(state, y, 0.3, b=b, tol=1e-10).value)
        assert abs(float(value) - want) <= 1e-7
        if after is not None:
            v = nsgf.velocity(state, y, 0.3, b=b, tol=1e-10).value
            assert torch.allclose(after, state + 0.5 * v, atol=1e-6)


def test_one_step_at_small_blur_is_a_transport_map():
    x, y = points(6, 2, seed=0), points(6, 2, seed=1)
    cost = (x[:, None] - y).square().sum(2)
    best = min(itertools.permutations(range(6)), key=lambda p: float(cost[range(6), p].sum()))
    f = nsgf.flow(x, y, 0.02, steps=1, max_iter=10_000)
    assert torch.allclose(f.x[-1], y[list(best)], atol=1e-3)


def test_at_a_step_size_of_two_particles_jump_to_and_fro():
    """Each step multiplies the distance to the target by 1 - eta: what the limit of `flow` is
    about."""
    x, y = points(4, 2, seed=0), points(4, 2, seed=0, shift=3.0)
    for eta, factor in ((1.9, 0.9), (2.0, 1.0), (2.2, 1.2)):
        state, before = x, (x - y).norm()
        for _ in range(2):
            state = state + eta * nsgf.velocity(state, y, 0.1, tol=1e-9).value
        assert abs(float((state - y).norm() / before) - factor**2) <= 1e-6
    message = r"eta: expected 0 < eta < 2 \(a step multiplies the distance to the target by "
    for call in (
        lambda eta: nsgf.flow(x, y, 0.1, steps=2, eta=eta),
        lambda eta: nsgf.sample(lambda x, t: x, x, steps=2, eta=eta),
        lambda eta: pool_of(eta=eta),
    ):
        with pytest.raises(ValueError, match=message + r".*\), got 2$"):
            call(2)
        with pytest.raises(ValueError, match="eta: expected a finite value > 0, got 0"):
            call(0)


def test_what_does_not_converge_is_said_once():
    x, y = points(50, 2, seed=0), points(50, 2, seed=1)
    with pytest.warns(NotConverged, match=r"^velocity: a velocity stopped .* tol = 1.0e-04") as one:
        nsgf.velocity(x, y, 0.05, max_iter=3)
    with pytest.warns(NotConverged, match=r"^flow: 3 of 3 velocities stopped at") as many:
        nsgf.flow(x, y, 0.05, steps=2, max_iter=3)
    with pytest.warns(NotConverged, match=r"^trajectory_pool: \d of 6 velocities") as pool:
        pool_of(blur=0.02, max_iter=2)
    for seen in (one, many, pool):
        assert [w.filename for w in seen] == [__file__]


# ---- pool


def pool_of(**change):
    arguments = dict(batches=3, n=5, steps=2, eta=0.5, generator=rng(0)) | change
    blur = arguments.pop("blur", 0.5)
    source, target = arguments.pop("source", normal), arguments.pop("target", shifted)
    return nsgf.trajectory_pool(source, target, blur, **arguments)


def test_a_pool_holds_the_steps_before_each_move():
    """As many steps as were asked for, not one more; t is k eta."""
    pool = pool_of(tol=1e-5)
    assert len(pool) == pool.size == 30 and pool.t.view(3, 2, 5)[:, :, 0].tolist() == [[0, 0.5]] * 3
    x, v = pool.x.view(3, 2, 5, 2), pool.v.view(3, 2, 5, 2)
    assert torch.equal(x[:, 1], x[:, 0] + 0.5 * v[:, 0])
    g = rng(0)
    for k in range(3):
        start, y = normal(5, g), shifted(5, g)
        assert torch.equal(x[k, 0], start)
        want = nsgf.velocity(start.double(), y.double(), 0.5, tol=1e-9).value
        assert torch.allclose(v[k, 0].double(), want, atol=1e-4)
    assert repr(pool) == "TrajectoryPool(30 of 30 points of shape [2], float32, cpu)"


def test_a_full_pool_drops_what_came_first():
    pool = nsgf.TrajectoryPool(5, (1,))
    for k in range(4):
        pool.add(torch.full((2, 1), float(k)), k, torch.full((2, 1), -float(k)))
    assert len(pool) == 5 and pool.x[:, 0].tolist() == [2, 3, 3, 1, 2]
    assert pool.t.tolist() == [2, 3, 3, 1, 2] and torch.equal(pool.v, -pool.x)
    whole, last = pool_of(), pool_of(size=12)
    assert sorted(last.x.tolist()) == sorted(whole.x[-12:].tolist())
    one = nsgf.TrajectoryPool(3, ())
    one.add(torch.ones(2), 0.5, torch.ones(2))
    assert len(one) == 2 and one.draw(4, rng(0))[0].tolist() == [1, 1, 1, 1]


def test_draws_are_rows_of_the_pool():
    pool = pool_of(dtype=torch.float16)
    assert pool.x.dtype == pool.v.dtype == torch.float16 and pool.t.dtype == torch.float32
    x, t, v = pool.draw(200, rng(1))
    assert {a.dtype for a in (x, t, v)} == {torch.float32}
    rows, drawn = (
        {tuple(row) for row in torch.cat([x.float(), t[:, None], v.float()], 1).tolist()}
        for x, t, v in ((pool.x, pool.t, pool.v), (x, t, v))
    )
    assert drawn <= rows and len(drawn) > 25
    wide = pool_of()
    assert float((wide.x - pool.x.float()).abs().max()) <= 2**-9  # half has 11 bits, |x| < 4


def test_a_killed_run_goes_on_with_the_same_result(tmp_path):
    path = tmp_path / "pool.safetensors"
    whole, g = pool_of(size=17), rng(0)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool_of(size=17, checkpoint=path, every=1, callback=stop)
    seen = []
    done = pool_of(size=17, checkpoint=path, generator=g, callback=lambda *at: seen.append(at))
    assert seen == [(2, 3), (3, 3)]
    assert all(torch.equal(getattr(done, k), getattr(whole, k)) for k in "xtv")
    assert done.added == whole.added == 30
    after = rng(0)
    pool_of(generator=after)
    assert torch.equal(g.get_state(), after.get_state())
    read = pool_of(size=17, checkpoint=str(path), source=None, target=None)  # not called any more
    assert torch.equal(read.x, whole.x)
    for change, said in (
        (dict(blur=0.4), "blur: 0.5 there, 0.4 here"),
        (dict(generator=rng(1)), "generator: "),
        (dict(configuration={"target": "moons"}), "target: nothing there, moons here"),
    ):
        with pytest.raises(FileError, match=f"checkpoint of another configuration: {said}"):
            pool_of(size=17, checkpoint=path, **change)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FileError, match=f"{re.escape(str(path))}: truncated or unreadable"):
        pool_of(size=17, checkpoint=path)
    df._io.tensor_files.save(path, {"a": torch.ones(1)}, {})
    with pytest.raises(FileError, match="no checkpoint of a pool .*configuration.*: delete it"):
        pool_of(checkpoint=path)


# ---- the network


def test_the_loss_is_the_mean_square_of_the_residue():
    pool = pool_of()
    g = rng(3)
    x, t, v = pool.draw(64, g)
    found = nsgf.velocity_loss(lambda x, t: 2 * x - t[:, None], pool, rng(3), batch=64)
    assert float(found) == pytest.approx(float((2 * x - t[:, None] - v).square().mean()), rel=1e-6)


def test_samples_take_the_steps_of_the_pool():
    x, seen = points(3, 2, seed=0), []
    path = nsgf.sample(lambda x, t: seen.append(t) or x * t[:, None], x, steps=3, eta=0.5)
    assert [t.tolist() for t in seen] == [[0.0] * 3, [0.5] * 3, [1.0] * 3]
    assert path.t.tolist() == [0, 0.5, 1, 1.5] and len(path.x) == 4
    assert torch.allclose(path.x[-1], x * 1.25 * 1.5, atol=1e-14)
    assert nsgf.sample(lambda x, t: x, x[:0], steps=2, eta=1.0).x[-1].shape == (0, 2)


@pytest.mark.slow
def test_a_trained_network_reaches_the_target():
    """From a normal law to one of half its width, two away, in three steps; the divergence falls to
    a hundredth."""
    pool = pool_of(batches=10, n=64, steps=3, eta=0.7)
    network = train(
        VectorNet(2, width=64, depth=2),
        lambda network, g: nsgf.velocity_loss(network, pool, g),
        steps=250, lr=5e-3, ema=0.97, generator=rng(1),
    )  # fmt: skip
    x, y = normal(500, rng(5)), shifted(500, rng(6))
    with torch.no_grad():
        end = nsgf.sample(network, x, steps=3, eta=0.7).x[-1]
    before, after = (float(divergence(z, y, 0.5).value) for z in (x, end))
    assert after <= 0.01 * before


# ---- the straight flow


def test_the_straight_flow_takes_the_steps_of_the_sampler():
    """DDIM's at the same times, where all points share them; the last one, to t = 1, ends at the
    posterior mean."""
    cloud = df.PointCloud(points(20, 2, seed=0))
    denoiser = df.Denoiser.exact(cloud, df.schedule.RectifiedFlow())
    t = torch.linspace(0.2, 1, 6, dtype=f64)
    x = points(8, 2, seed=1)
    path = df.sample(denoiser, x, t[:-1])
    want = denoiser(path.x[-1], t[-2])
    assert torch.allclose(nsgf.straight_flow(denoiser, x, 0.2, steps=5), want, atol=1e-12)


def test_every_point_has_its_own_time():
    y = torch.tensor([[1.0, -2.0, 0.5]])
    flow = df.schedule.RectifiedFlow()
    seen = []

    def u(x, t):
        seen.append(t)
        return y - x

    x, t = points(4, 3, seed=0, dtype=torch.float32), torch.tensor([0.0, 0.5, 0.8, 0.99])
    found = nsgf.straight_flow(df.Denoiser(u, flow, "flow"), x, t, steps=2)
    assert torch.allclose(torch.stack(seen), torch.stack([t, (1 + t) / 2]))
    h = (1 - t[:, None]) / 2
    middle = x + h * (y - x)
    assert torch.allclose(found, middle + h * (y - middle), atol=1e-6)
    exact = df.Denoiser.exact(df.PointCloud(y), flow)
    assert torch.allclose(nsgf.straight_flow(exact, x, t, steps=3), y.expand(4, 3), atol=1e-6)


# ---- the time posterior


def brute(x, y, end, log_prior=None, n=20_001):
    """Mean and deviation of t by the trapezoidal rule in z, ln(1 - t) = z^4 ln(end), float64."""
    z = torch.linspace(0, 1, n, dtype=f64)
    u = math.log(end) * z**4
    s, found = u.exp(), []
    prior = torch.zeros(len(y), dtype=f64) if log_prior is None else log_prior
    for q in x:
        square = (q - (1 - s)[:, None, None] * y).square().sum(2)
        logits = prior - square / (2 * s[:, None] ** 2)
        log_w = logits.logsumexp(1) - len(q) * u + u + 3 * z.log()
        w = (log_w - log_w.max()).exp()
        w[-1] /= 2
        w = w / w.sum()
        mean = w @ s
        found.append((1 - mean, (w @ (s - mean).square()).sqrt()))
    return torch.tensor(found, dtype=f64).unbind(1)


@pytest.mark.parametrize("d, scale", [(1, 1.0), (2, 5.0), (8, 0.1), (20, 1.0)])
def test_the_time_posterior_is_the_integral(d, scale):
    """At points of the paths, t from 0 to 1, at an atom, and far away."""
    y = points(12, d, seed=d, scale=scale)
    t = torch.tensor([0.0, 0.3, 0.7, 0.98, 0.9995, 1.0, 0.5], dtype=f64)[:, None]
    x = t * y[:7] + (1 - t) * points(7, d, seed=50 + d)
    x[-1] = 30
    prior = points(12, seed=9)
    prior[3] = -math.inf
    mean, std = brute(x, y, 1e-3, prior)
    found = nsgf.time_posterior(x, df.PointCloud(y, prior))
    assert float(((found.mean - mean) / (1 - mean)).abs().max()) <= 3e-5  # of the rule above
    assert float((found.mean - mean).abs().max()) <= 1e-7
    assert float((found.std - std).abs().max()) <= 1e-6
    single = nsgf.time_posterior(x.float(), df.PointCloud(y.float(), prior))
    assert single.mean.dtype == torch.float32
    assert float((single.mean.double() - mean).abs().max()) <= 2e-6 * (1 + scale)


def test_the_time_of_one_atom_in_closed_form():
    """At the atom 0 in d dimensions q ~ s^-d: E s = (d - 1)/(d - 2) (end^(2-d) - 1)/(end^(1-d) -
    1)."""
    d, end = 5, 0.01
    found = nsgf.time_posterior(
        torch.zeros(1, d, dtype=f64), df.PointCloud(torch.zeros(1, d)), end=end
    )
    want = 1 - (d - 1) / (d - 2) * (end ** (2 - d) - 1) / (end ** (1 - d) - 1)
    assert float(found.mean) == pytest.approx(want, abs=1e-10)
    line = nsgf.time_posterior(torch.zeros(1, 1, dtype=f64), df.PointCloud(torch.zeros(1, 1)))
    assert float(line.mean) == pytest.approx(1 - (1 - 1e-3) / math.log(1e3), abs=1e-10)


def test_later_times_raise_the_mean():
    y = points(30, 2, seed=0)
    x = torch.cat([0.9 * y[:10] + 0.1 * points(10, 2, seed=1), y[:1]])
    ends = [nsgf.time_posterior(x, df.PointCloud(y), end=end).mean for end in (1e-2, 1e-3, 1e-4)]
    assert bool((ends[0] < ends[1] + 1e-12).all() and (ends[1] < ends[2] + 1e-12).all())
    assert float((ends[2] - ends[1])[:-1].max()) <= 1e-3


def test_the_time_posterior_reads_scaled_atoms_and_any_shape():
    stored = torch.randint(256, (9, 1, 2, 2), generator=rng(0), dtype=torch.int64).to(torch.uint8)
    cloud = df.PointCloud(stored, scale=2 / 255, offset=-1)
    y = stored.double() * 2 / 255 - 1
    x = points(3, 1, 2, 2, seed=1)
    found = nsgf.time_posterior(x, cloud)
    want = nsgf.time_posterior(x.view(3, 4), df.PointCloud(y.view(9, 4)))
    assert torch.allclose(found.mean, want.mean, atol=1e-12)
    assert nsgf.time_posterior(x[:0], cloud).mean.shape == (0,)


def test_a_predictor_starts_at_one_half_and_learns_the_mean():
    """The loss of any predictor is at least that of the exact mean."""
    predictor = nsgf.TimePredictor(VectorNet(2, output="scalar", width=16, depth=1))
    x_0, y = points(4000, 2, seed=0), points(4, 2, seed=1, scale=2.0)
    pairs = Pairs(x_0, y[torch.randint(4, (4000,), generator=rng(2))])
    assert predictor(x_0.float()).tolist() == [0.5] * 4000
    half = nsgf.time_loss(lambda x: x.new_full((len(x),), 0.5), pairs, rng(3))
    assert float(half) == pytest.approx(1 / 12, abs=1e-4)
    exact = lambda x: nsgf.time_posterior(x, df.PointCloud(y)).mean
    best = float(nsgf.time_loss(exact, pairs, rng(3)))
    for other in (lambda x: exact(x) + 0.03, lambda x: 0.5 + 0.9 * (exact(x) - 0.5)):
        assert best < float(nsgf.time_loss(other, pairs, rng(3)))
    x = pairs.at(stratified(pairs, rng(3)))
    left = nsgf.time_posterior(x, df.PointCloud(y)).std.square().mean()
    assert best == pytest.approx(float(left), rel=0.1)  # four standard deviations


# ---- state and bad input


def test_nothing_depends_on_the_state_of_torch():
    x = points(6, 2, seed=0, dtype=torch.float32).requires_grad_()
    y, cloud = points(5, 2, seed=1, dtype=torch.float32), df.PointCloud(points(5, 2, seed=1))
    run = lambda: (
        nsgf.velocity(x, y, 0.5).value,
        nsgf.flow(x, y, 0.5, steps=2).x[-1],
        nsgf.time_posterior(x.double(), cloud).mean,
        pool_of().v,
    )
    want, state = run(), torch.get_rng_state()
    assert not any(t.requires_grad for t in want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, run(), want))
    with torch.inference_mode():
        kept = run()
    assert all(map(torch.equal, kept, want)) and not any(t.is_inference() for t in kept)
    odd = torch.randn(5, 4, generator=rng(0))[:, ::2]
    assert torch.equal(
        nsgf.velocity(odd, y, 0.5).value, nsgf.velocity(odd.contiguous(), y, 0.5).value
    )
    assert torch.equal(torch.get_rng_state(), state)


x0, y0 = points(4, 2, seed=0), points(3, 2, seed=1)
flow_schedule = df.schedule.RectifiedFlow()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: nsgf.velocity(x0, y0, 0.5, start=1), TypeError, "start: expected a Velocity, got"),
        (lambda: nsgf.velocity([1.0], y0, 0.5), TypeError, "x: expected a tensor, got list"),
        (lambda: nsgf.velocity(x0, y0[:, :1], 0.5), ValueError, r"y: expected shape \[m, 2\]"),
        (lambda: nsgf.flow(x0, y0, 0.0, steps=1), ValueError, "blur: expected a finite value > 0"),
        (lambda: nsgf.flow(x0, y0, 0.5, steps=0), ValueError, "steps: expected an integer of at l"),
        (
            lambda: pool_of(source=lambda n, g: torch.zeros(4, 2)),
            ValueError,
            r"source: expected 5 points, got shape \[4, 2\]",
        ),
        (lambda: pool_of(target=lambda n, g: 0), TypeError, "target: expected a tensor, got int"),
        (lambda: pool_of(size=4), ValueError, "size: expected an integer of at least 5, got 4"),
        (lambda: pool_of(dtype=torch.float64), ValueError, "dtype: expected torch.float16 or torc"),
        (lambda: nsgf.TrajectoryPool(2, (1,)).draw(1, rng(0)), ValueError, "pool: expected at le"),
        (
            lambda: nsgf.TrajectoryPool(9, (2,), dtype=torch.float16).add(1e5 * x0.abs(), 0.0, x0),
            ValueError,
            "x: expected finite values in float16, got",
        ),
        (
            lambda: nsgf.TrajectoryPool(9, (2,)).add(x0, 0.0, x0[:, :1]),
            ValueError,
            r"v: expected shape \[n, 2\], got \[4, 1\]",
        ),
        (
            lambda: nsgf.TrajectoryPool(9, (2,)).add(x0, 0.0, x0[:3]),
            ValueError,
            "v: expected 4 rows like x, got 3",
        ),
        (
            lambda: nsgf.TrajectoryPool(3, (2,)).add(x0, 0.0, x0),
            ValueError,
            "x: expected at most 3 rows, got 4",
        ),
        (
            lambda: nsgf.velocity_loss(lambda x, t: x, x0, rng(0)),
            TypeError,
            "pool: expected a TrajectoryPool, got Tensor",
        ),
        (
            lambda: nsgf.sample(lambda x, t: x[:, :1], x0, steps=1, eta=1.0),
            ValueError,
            r"network: expected output of shape \[4, 2\], got \[4, 1\]",
        ),
        (
            lambda: nsgf.time_loss(lambda x: x, Pairs(x0, x0), rng(0)),
            ValueError,
            r"predictor: expected times of shape \[4\], got shape \[4, 2\]",
        ),
        (
            lambda: nsgf.time_loss(lambda x: x, x0, rng(0)),
            TypeError,
            "pairs: expected Pairs, got Tensor",
        ),
        (
            lambda: pool_of(generator=None),
            TypeError,
            "generator: expected a torch.Generator, got NoneType",
        ),
        (
            lambda: pool_of().draw(3, None),
            TypeError,
            "generator: expected a torch.Generator, got NoneType",
        ),
        (
            lambda: nsgf.straight_flow(lambda x, t: x, x0, 0.0, steps=1),
            TypeError,
            "denoiser: expected a Denoiser, got function",
        ),
        (
            lambda: nsgf.straight_flow(
                df.Denoiser(lambda x, t: x, df.schedule.EDM()), x0, 0.0, steps=1
            ),
            ValueError,
            r"denoiser: expected the schedule RectifiedFlow\(\), got EDM\(\)",
        ),
        (
            lambda: nsgf.straight_flow(
                df.Denoiser(lambda x, t: x, flow_schedule, "flow"), x0, 1.0, steps=1
            ),
            ValueError,
            r"t: expected times in \[0, 1\), got 1",
        ),
        (lambda: nsgf.time_posterior(x0, y0), TypeError, "cloud: expected a PointCloud, got Tens"),
        (
            lambda: nsgf.time_posterior(x0, df.PointCloud(y0), end=1.0),
            ValueError,
            "end: expected 0 < end < 1, got 1",
        ),
        (
            lambda: nsgf.time_posterior(x0, df.PointCloud(1e5 * y0)),
            ValueError,
            r"cloud: expected atoms y with \|y\| < 4e\+03, beside noise of size 1, got \|y\| up to",
        ),
        (
            lambda: nsgf.time_posterior(x0[:, :1], df.PointCloud(y0)),
            ValueError,
            r"x: expected shape \[B, 2\] to match the cloud, got \[4, 1\]",
        ),
        (
            lambda: nsgf.time_posterior(x0 / 0, df.PointCloud(y0)),
            ValueError,
            "x: expected finite values",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message):
            call()
