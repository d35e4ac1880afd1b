"""Flows of weighted particles: forces against autograd of the functionals, conservation laws, what
weights and copies do, one particle and duplicates.
"""

from __future__ import annotations

import math
import pickle
import warnings

import pytest
import torch
from tensors import normal, rng
from test_global_state import STATES

import dfkernels as df
from dfkernels.methods.degenerate import DegenerateWeights
from dfkernels.methods.particles import (
    KL,
    KSD,
    SVGD,
    Flow,
    Kalman,
    Metric,
    Particles,
    SinkhornDivergence,
    Stein,
    Variation,
    Wasserstein,
    bandwidth,
    evolve,
)
from dfkernels.methods.particles._weights import copied, reweighted

f64 = torch.float64
METRICS = [Wasserstein(), Kalman(), Kalman(0.3), Stein(1.7), Stein("median")]


def some(M=24, d=3, seed=0, dtype=f64):
    """Particles with unequal weights and velocities."""
    x, v = normal(M, d, seed=seed), normal(M, d, seed=seed + 1)
    return Particles(x.to(dtype), normal(M, seed=seed + 2).to(dtype), v.to(dtype))


def mixture(x):
    """A log-density that is no Gaussian's."""
    x = x.reshape(len(x), -1)
    return torch.logaddexp(-(x - 1).square().sum(1) / 2, -2 * (x + 1.5).square().sum(1))


def score(x):
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        (found,) = torch.autograd.grad(mixture(x).sum(), x, create_graph=True)
    return found


def kernel(x, h):
    return torch.exp(-(x[:, None] - x[None]).square().sum(2) / h)


def blob(x, w, h):
    """sum_i w_i (log q_i + U_i) with the normalised kernel, by all pairs."""
    q = (kernel(x, h) * w).sum(1) * (math.pi * h) ** (-x.shape[1] / 2)
    return (w * (q.log() - mixture(x))).sum()


def ksd(x, w, h):
    """sum_ij w_i w_j k_stein/2, every term of the kernel by autograd in the pairs."""

    def k(a, b):
        return torch.exp(-(a - b).square().sum() / h)

    def stein(a, b):
        s_a, s_b = score(a[None])[0], score(b[None])[0]
        k_a, k_b = torch.func.grad(k, (0, 1))(a, b)
        trace = torch.func.jacrev(torch.func.grad(k, 0), 1)(a, b).trace()
        return (s_a @ s_b) * k(a, b) + s_a @ k_b + s_b @ k_a + trace

    pairs = [w[i] * w[j] * stein(x[i], x[j]) for i in range(len(x)) for j in range(len(x))]
    return torch.stack(pairs).sum() / 2


@pytest.mark.parametrize("energy, functional, M", [(blob, KL, 24), (ksd, KSD, 6)])
def test_forces_and_first_variations_are_the_functionals_derivatives(energy, functional, M):
    p, h = some(M), 1.3
    found = functional(mixture, bandwidth=h)(p)
    x, w = p.x.clone().requires_grad_(), p.weights.requires_grad_()
    F = energy(x, w, h)
    in_x, in_w = torch.autograd.grad(F, (x, w))
    assert abs(found.energy - float(F.detach())) <= 1e-12
    assert float((found.gradient - in_x / p.weights[:, None]).abs().max()) <= 1e-11
    excess = found.value - in_w  # the same up to a constant, since sum w = 1
    assert float((excess - excess[0]).abs().max()) <= 1e-11
    by_score = functional(grad_log_target=score, bandwidth=h)(p)
    assert float((by_score.gradient - found.gradient).abs().max()) <= 1e-12


def test_gfsd_is_the_score_of_the_smoothed_density():
    p, h = some(), 0.9
    found = KL(mixture, score, smoothing="gfsd", bandwidth=h)(p)
    x = p.x.clone().requires_grad_()
    pairs = torch.exp(-(x[:, None] - p.x[None]).square().sum(2) / h)
    log_q = (pairs * p.weights).sum(1).log()
    (want,) = torch.autograd.grad((log_q - mixture(x)).sum(), x)
    assert float((found.gradient - want).abs().max()) <= 1e-12
    excess = (found.value - log_q + mixture(x)).detach()
    assert float((excess - excess[0]).abs().max()) <= 1e-12
    assert math.isnan(found.energy)


def test_svgd_is_the_sum_over_pairs():
    p, h = some(), 2.1
    x = p.x.clone().requires_grad_()
    pairs = torch.exp(-(x[:, None] - p.x[None]).square().sum(2) / h)  # first argument: x_j
    weighted = p.weights[:, None] * kernel(p.x, h)
    want = weighted.T @ score(p.x)
    for i in range(len(p)):
        (pull,) = torch.autograd.grad((p.weights * pairs[:, i]).sum(), x, retain_graph=True)
        want[i] += pull.sum(0)
    found = SVGD(mixture, bandwidth=h)(p)
    assert float((found.gradient + want.detach()).abs().max()) <= 1e-12
    assert found.value is None and math.isnan(found.energy)


def test_sinkhorn_is_the_divergences_gradient():
    p, y = some(12, 2), normal(15, 2, seed=9)
    x, w = p.x.clone().requires_grad_(), p.weights.requires_grad_()
    value = df.methods.sinkhorn.divergence(x, y, 0.8, w, tol=1e-11).value
    in_x, in_w = torch.autograd.grad(value, (x, w))
    functional = SinkhornDivergence(y, 0.8, tol=1e-11)
    found = functional(p)
    assert abs(found.energy - float(value.detach())) <= 1e-12
    assert float((found.gradient - in_x / p.weights[:, None]).abs().max()) <= 1e-8
    excess = found.value - in_w
    assert float((excess - excess[0]).abs().max()) <= 1e-8
    again = functional(p)  # from the last couplings
    assert float((again.gradient - found.gradient).abs().max()) <= 1e-9


def potential(p):
    """A linear functional: no interaction between the particles."""
    return Variation(-score(p.x).detach(), -mixture(p.x), -float(p.weights @ mixture(p.x)))


def hamiltonian(metric, x, log_w, v):
    """T + sum w U for any x and v, differentiable, by all pairs."""
    w = log_w.exp()
    if isinstance(metric, Wasserstein):
        moved = v
    elif isinstance(metric, Kalman):
        c = x - w @ x
        moved = v @ ((w[:, None] * c).T @ c) + metric.ridge * v
    else:
        moved = (kernel(x, metric.bandwidth) * w) @ v
    return (w * ((v * moved).sum(1) / 2 - mixture(x))).sum()


@pytest.mark.parametrize("metric", [m for m in METRICS if m != Stein("median")], ids=repr)
def test_the_equations_of_motion_are_hamiltons(metric):
    """dx/dt = (1/w) dH/dv and dv/dt = -(1/w) dH/dx, so that dH/dt = 0 to rounding."""
    p = some()
    x, v = p.x.clone().requires_grad_(), p.v.clone().requires_grad_()
    in_x, in_v = torch.autograd.grad(hamiltonian(metric, x, p.log_w, v), (x, v))
    x_rate = metric.position_rate(p, p.v)
    v_rate = -metric.kinetic_gradient(p) - potential(p).gradient
    w = p.weights[:, None]
    assert float((x_rate - in_v / w).abs().max()) <= 1e-12
    assert float((v_rate + in_x / w).abs().max()) <= 1e-11
    terms = torch.stack([(in_x * x_rate).sum(), (in_v * v_rate).sum()])
    assert abs(float(terms.sum())) <= 1e-13 * float(terms.abs().max()) + 1e-14


@pytest.mark.parametrize("metric", [Kalman(), Stein(1.7)], ids=repr)
def test_the_energy_is_conserved_to_the_order_of_the_step(metric):
    """Of `Flow.step` itself: over a fixed time the drift halves with the step; and by a method of
    fourth order on the same rates it is below 1e-10."""
    start = some(16, 2)

    def energy(p):
        return float(hamiltonian(metric, p.x, p.log_w, p.v))

    drifts = []
    for steps in (50, 100):
        flow = Flow(potential, 0.5 / steps, friction=0.0, metric=metric, weights=None)
        drifts.append(energy(evolve(flow, start, steps).particles) - energy(start))
    assert 1.8 <= drifts[0] / drifts[1] <= 2.2

    def rates(p):
        return torch.stack(
            [metric.position_rate(p, p.v), -metric.kinetic_gradient(p) - potential(p).gradient]
        )

    p, tau = start, 0.005
    at = lambda k, c: Particles(p.x + c * k[0], p.log_w, p.v + c * k[1])
    for _ in range(100):
        a = rates(p)
        b = rates(at(a, tau / 2))
        c = rates(at(b, tau / 2))
        e = rates(at(c, tau))
        p = at((a + 2 * b + 2 * c + e) / 6, tau)
    assert abs(energy(p) - energy(start)) <= 1e-10 * abs(energy(start))
    assert float((p.x - start.x).abs().max()) > 0.1


@pytest.mark.parametrize("weights, rate", [("continuous", 1.0), (None, None)])
@pytest.mark.parametrize("metric", METRICS, ids=repr)
def test_the_gradient_flow_of_the_blob_lowers_its_energy(metric, weights, rate):
    flow = Flow(
        KL(mixture, bandwidth=0.8), 0.01, friction=None, metric=metric, weights=weights,
        weight_rate=rate,
    )  # fmt: skip
    run = evolve(flow, some(40, 2), 40)
    assert bool((run.energy.diff() < 0).all())
    assert abs(float(run.particles.weights.sum()) - 1) <= 1e-12
    assert run.energy.dtype == run.ess.dtype == f64 and len(run.energy) == 41


def test_weights_alone_lower_the_energy_and_follow_the_exact_exponential():
    """At any rate they stay positive, where 1 - tau a (Phi - <Phi>) would not."""
    still = lambda p: Variation(torch.zeros_like(p.x), -mixture(p.x), 0.0)
    p, rate = some(), 300.0
    found = Flow(still, 0.5, weight_rate=rate).step(Particles(p.x, p.log_w)).log_w
    want = (p.log_w + 0.5 * rate * mixture(p.x)).log_softmax(0)
    assert torch.equal(found, want) and float(found.min()) < -1000
    factor = 1 - 0.5 * rate * (-mixture(p.x) + float(p.weights @ mixture(p.x)))
    assert float(factor.min()) < 0
    blob_energy = lambda log_w: float(blob(p.x, log_w.exp(), 0.8))
    value = KL(mixture, bandwidth=0.8)(p).value
    assert blob_energy(reweighted(p.log_w, value, 0.05)) < blob_energy(p.log_w)


def test_copies_are_the_weights_without_bias():
    """M w_i of each, rounded up or down; survivors stay in place; the mean over draws is M w."""
    log_w = (1.2 * normal(9, seed=3)).log_softmax(0)
    log_w[4] = -math.inf
    log_w = log_w.log_softmax(0)
    want, total, generator = 9 * log_w.exp(), torch.zeros(9, dtype=f64), rng(0)
    for _ in range(1000):
        origin, copy = copied(log_w, generator)
        counts = torch.bincount(origin, minlength=9).double()
        assert bool((counts >= want.floor()).all()) and bool((counts <= want.ceil()).all())
        assert torch.equal(copy, counts == 0)
        assert torch.equal(origin[~copy], torch.arange(9)[~copy])
        total += counts
    assert float((total / 1000 - want).abs().max()) <= 4 * 0.5 / 1000**0.5
    equal, copy = copied(torch.full((7,), -math.log(7.0), dtype=f64), rng(1))
    assert torch.equal(equal, torch.arange(7)) and not bool(copy.any())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dfkernels.methods.degenerate.DegenerateWeights")
def test_duplicate_kill_moves_mass_between_modes():
    """Two modes that particles cannot leave; continuous weights find their masses too."""
    m = torch.tensor([4.0, 0.0], dtype=f64)

    def modes(x):
        right, left = (-(x - s * m).square().sum(1) / 2 for s in (1, -1))
        return torch.logaddexp(right + math.log(0.8), left + math.log(0.2))

    x = normal(100, 2, seed=0)
    mass = lambda run: float(run.particles.weights[run.particles.x[:, 0] > 0].sum())
    found = {}
    for weights in (None, "continuous", "duplicate-kill"):
        rate = None if weights is None else 0.5
        flow = Flow(KL(modes), 0.12, weights=weights, weight_rate=rate)
        run = evolve(flow, Particles(x), 150, generator=rng(1))
        found[weights] = mass(run)
        assert run.particles.ess == pytest.approx(100, abs=1e-9) or weights == "continuous"
    assert abs(found[None] - 0.5) <= 0.15
    assert abs(found["continuous"] - 0.8) <= 0.02
    assert abs(found["duplicate-kill"] - 0.8) <= 0.06
    again = evolve(flow, Particles(x), 150, generator=rng(1))
    assert torch.equal(again.particles.x, run.particles.x)


def test_copies_leave_their_originals_by_the_noise():
    still = lambda p: Variation(torch.zeros_like(p.x), -1000 * p.x[:, 0])
    x = torch.tensor([[0.0, 1], [1, 2], [2, 3]], dtype=f64)
    for friction, options, want in (
        (0.5, {}, math.sqrt(2) * 0.04),
        (None, {}, math.sqrt(0.08)),
        (None, {"copy_noise": 3.0}, 3.0),
    ):
        flow = Flow(still, 0.04, friction, weights="duplicate-kill", weight_rate=1, **options)
        p = flow.step(Particles(x), rng(0))
        generator = rng(0)
        torch.rand((), dtype=f64, generator=generator)  # which particles
        noise = torch.randn(2, 2, dtype=f64, generator=generator)
        assert torch.equal(p.x[2], x[2])
        assert torch.allclose(p.x[:2], x[2] + want * noise, atol=1e-14)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 3e-5), (f64, 1e-12)], ids=str)
def test_a_gaussian_in_ten_dimensions(dtype, tol):
    """float32 follows float64, far off the origin too, and the flow finds mean and covariance."""
    d = 10
    cov = torch.full((d, d), 0.8, dtype=f64).fill_diagonal_(1)
    prec = torch.linalg.inv(cov)
    target = lambda x: -(((x - 3) @ prec.to(x.dtype)) * (x - 3)).sum(1) / 2
    start = 3 + 0.5 * normal(64, d, seed=0)
    few = evolve(Flow(KL(target), 0.12), Particles(start.to(dtype)), 3).particles
    want = evolve(Flow(KL(target), 0.12), Particles(start), 3).particles
    assert few.x.dtype == few.log_w.dtype == few.v.dtype == dtype
    assert float((few.x.double() - want.x).abs().max()) <= tol * 10
    assert float((few.log_w.double() - want.log_w).abs().max()) <= tol * 10
    done = evolve(Flow(KL(target), 0.2), Particles(start.to(dtype)), 100).particles
    mean = done.weights @ done.x
    spread = (done.weights @ (done.x - mean).square()).sum() / d
    assert float((mean - 3).abs().max()) <= 0.05
    assert 0.7 <= float(spread) <= 1


def test_the_kalman_flow_does_not_see_linear_maps():
    """A target and particles stretched by a matrix: the particles of every step are stretched
    too, with a linear functional."""
    stretch = torch.tensor([[3.0, 1.0], [0.0, 0.1]], dtype=f64)
    target = lambda x: -x.square().sum(1) / 2 - x[:, 0].square().square()

    def flow(log_target):
        def at(p):
            x = p.x.clone().requires_grad_()
            with torch.enable_grad():
                value = log_target(x)
                (s,) = torch.autograd.grad(value.sum(), x)
            return Variation(-s, -value.detach())

        return Flow(at, 0.1, metric=Kalman())

    one = evolve(flow(target), Particles(normal(30, 2, seed=0)), 20).particles
    back = torch.linalg.inv(stretch)
    other = evolve(
        flow(lambda x: target(x @ back)), Particles(normal(30, 2, seed=0) @ stretch), 20
    ).particles
    assert float((one.x @ stretch - other.x).abs().max()) <= 1e-11
    assert float((one.log_w - other.log_w).abs().max()) <= 1e-11


@pytest.mark.parametrize("metric", METRICS, ids=repr)
def test_kalman_and_stein_by_either_matrix(metric):
    """More dimensions than particles, and an event shape: as the rows say."""
    p = some(5, 12)
    shaped = Particles(p.x.view(5, 3, 4), p.log_w, p.v.view(5, 3, 4))
    for rate in (lambda q: metric.position_rate(q, q.v), metric.kinetic_gradient):
        found = rate(shaped)
        assert found.shape == (5, 3, 4)
        assert torch.equal(found.reshape(5, 12), rate(p))
    if isinstance(metric, Kalman):
        c = p.x - p.weights @ p.x
        want = p.v @ ((p.weights[:, None] * c).T @ c) + metric.ridge * p.v
        assert float((metric.position_rate(p, p.v) - want).abs().max()) <= 1e-12


FUNCTIONALS = {
    "blob": lambda **how: KL(mixture, **how),
    "gfsd": lambda **how: KL(mixture, smoothing="gfsd", **how),
    "ksd": lambda **how: KSD(mixture, **how),
    "svgd": lambda **how: SVGD(mixture, **how),
}


@pytest.mark.parametrize("name", FUNCTIONALS)
@pytest.mark.parametrize("metric", METRICS, ids=repr)
def test_one_particle_is_a_ball_on_the_potential(name, metric):
    """No kernel moves it; with the ridge of Kalman, or k(x, x) = 1, it is accelerated."""
    if name == "svgd":
        flow = Flow(FUNCTIONALS[name](), 0.1, None, metric, weights=None)
    else:
        flow = Flow(FUNCTIONALS[name](), 0.1, None, metric)
    x = normal(1, 3, seed=0)
    p = flow.step(Particles(x))
    assert p.weights.item() == 1 and p.ess == 1
    scale = metric.ridge if isinstance(metric, Kalman) else 1.0
    if name != "ksd":
        assert float((p.x - x - 0.1 * scale * score(x).detach()).abs().max()) <= 1e-12
    else:
        s = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(score(s).square().sum() / 2, s)  # k_stein(x, x) = |s|^2 + c
        assert float((p.x - x + 0.1 * scale * want).abs().max()) <= 1e-11


@pytest.mark.parametrize("name", FUNCTIONALS)
def test_duplicates_share_what_one_would_have(name):
    """A particle in two halves at one place moves as the whole; one without weight moves nobody."""
    p, functional = some(10, 2), FUNCTIONALS[name](bandwidth=0.9)
    log_w = torch.cat([p.log_w, p.log_w[:1] - math.log(2), p.log_w.new_full((1,), -math.inf)])
    log_w[0] -= math.log(2)
    more = Particles(torch.cat([p.x, p.x[:1], p.x.new_full((1, 2), 0.3)]), log_w)
    found, want = functional(more), functional(Particles(p.x, p.log_w))
    assert float((found.gradient[:10] - want.gradient).abs().max()) <= 1e-12
    assert torch.allclose(found.gradient[10], found.gradient[0], atol=1e-12, rtol=0)
    assert bool(found.gradient.isfinite().all())
    if want.value is not None:
        excess = found.value[:10] - want.value
        assert float((excess - excess[0]).abs().max()) <= 1e-12
    assert math.isnan(want.energy) or abs(found.energy - want.energy) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
@pytest.mark.parametrize("name", ["blob", "gfsd", "ksd"])
def test_weights_down_to_1e_300(name, dtype):
    log_w = torch.linspace(0, -690.7, 30, dtype=dtype)
    p = Particles(normal(30, 2, seed=0, dtype=dtype), log_w)
    flow = Flow(FUNCTIONALS[name](), 0.05, weight_rate=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateWeights)
        run = evolve(flow, p, 20)
    assert bool(run.particles.x.isfinite().all()) and bool(run.particles.log_w.isfinite().all())
    assert abs(float(run.particles.weights.double().sum()) - 1) <= 1e-6
    wide = FUNCTIONALS[name](bandwidth=0.7)(Particles(p.x.double(), p.log_w.double()))
    found = FUNCTIONALS[name](bandwidth=0.7)(p)
    size = float(wide.gradient.abs().max())
    eps = 1e-3 if dtype == torch.float32 else 1e-12  # log weights of 690 are rounded to 3e-5
    assert float((found.gradient.double() - wide.gradient).abs().max()) <= eps * size


def test_bandwidths():
    x = normal(300, 3, seed=0)
    square = (x[:, None] - x[None]).square().sum(2)
    nearest = (square + torch.diag(torch.full((300,), math.inf, dtype=f64))).amin(1).mean()
    upper = square[torch.triu(torch.ones(300, 300), 1).bool()]
    assert bandwidth(x, "nearest") == pytest.approx(float(nearest), rel=1e-13)
    median = float(upper.sqrt().median()) ** 2 / math.log(300)
    assert bandwidth(x, "median") == pytest.approx(median, rel=1e-13)
    assert bandwidth(x, 2) == 2.0 and bandwidth(x[:1], "median") == bandwidth(x[:1], "nearest") == 1
    assert bandwidth(x.view(300, 3, 1), "nearest") == bandwidth(x, "nearest")
    far = (x * 64).round() / 64
    assert bandwidth(far.float() + 2048, "nearest") == pytest.approx(
        bandwidth(far, "nearest"), rel=1e-12
    )
    many = normal(5000, 2, seed=1)
    part = normal(5000, 2, seed=1)[::3]
    assert bandwidth(many, "median") == pytest.approx(
        bandwidth(part, "median") * math.log(len(part)) / math.log(5000), rel=1e-12
    )
    second = lambda rows: torch.cdist(rows, many).square().topk(2, 1, False)[0][:, 1]
    found = torch.cat([second(rows) for rows in many.split(500)])
    assert bandwidth(many, "nearest") == pytest.approx(float(found.mean()), rel=1e-6)
    said = "bandwidth: expected a number where 'nearest' finds none, got 4 particles at one place"
    with pytest.raises(ValueError, match=said):
        bandwidth(torch.ones(4, 2), "nearest")


def test_a_run_in_parts_is_one_run_and_particles_can_be_stored():
    flow = Flow(KL(mixture), 0.1, metric=Stein(), weight_rate=0.5)
    seen = []
    whole = evolve(flow, some(), 9, callback=lambda *at: seen.append(at))
    assert seen == [(k, 9) for k in range(1, 10)]
    first = evolve(flow, some(), 4)
    kept = pickle.loads(pickle.dumps(first.particles))
    second = evolve(flow, kept, 5)
    assert torch.equal(second.particles.x, whole.particles.x)
    assert torch.equal(torch.cat([first.ess, second.ess[1:]]), whole.ess)
    by_steps = some()
    for _ in range(9):
        by_steps = flow.step(by_steps)
    assert torch.equal(by_steps.x, whole.particles.x)
    none = evolve(flow, kept, 0)
    assert none.particles is kept and len(none.ess) == 1
    assert repr(kept) == f"Particles(M=24, event_shape=(3,), torch.float64, ess={kept.ess:.1f})"


def test_degenerate_weights_are_reported():
    flow = Flow(KL(mixture), 0.1, weight_rate=20.0)
    said = r"of \d+\.\d of 24 particles at step \d+: weights='duplicate-kill' puts particles"
    with pytest.warns(DegenerateWeights, match=said) as caught:
        run = evolve(flow, Particles(some().x), 30)
    assert len(caught) == 1 and caught[0].filename == __file__
    low = int((run.ess < 12).nonzero()[0])
    assert f"of {run.ess[low]:.1f} of 24 particles at step {low}" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow = Flow(KL(mixture), 0.1, weights="duplicate-kill", weight_rate=20.0)
        evolve(flow, Particles(some().x), 30, generator=rng(0))


def test_targets_of_the_library():
    """A smoothed data set by its log-density, and a denoiser by its score."""
    y = normal(50, 2, seed=5)
    p = some(20, 2)
    by_log = KL(lambda x: df.ops.log_prob(x, y, 1.0, 0.5))(p)
    denoiser = df.Denoiser.exact(df.PointCloud(y), df.schedule.EDM())
    by_score = KL(grad_log_target=lambda x: denoiser.score(x, 0.5))(p)
    assert float((by_log.gradient - by_score.gradient).abs().max()) <= 1e-11
    assert by_score.value is None and by_log.value is not None


@pytest.mark.filterwarnings("ignore::dfkernels.methods.degenerate.DegenerateWeights")
def test_a_flow_to_draws_of_a_target():
    y = 0.5 * normal(200, 2, seed=1) + 2
    run = evolve(
        Flow(SinkhornDivergence(y, 0.4), 1.0, friction=None, weight_rate=0.5),
        Particles(normal(60, 2, seed=0)), 6,
    )  # fmt: skip
    assert float(run.energy[-1]) <= 0.01 * float(run.energy[0])
    small = SinkhornDivergence(y, 0.4)
    small(Particles(y[:10]))
    assert small(Particles(y[:12])).gradient.shape == (12, 2)  # another number: a cold start


@pytest.mark.parametrize("name", STATES)
def test_global_state_changes_nothing(name):
    flow = Flow(KSD(mixture), 0.05, metric=Stein(), weights="duplicate-kill")
    sink = Flow(KL(mixture), 0.05, metric=Kalman())
    given = some(dtype=torch.float32)
    want = [evolve(flow, given, 2, generator=rng(0)), evolve(sink, given, 2)]
    with STATES[name]():
        fresh = Particles(given.x, given.log_w, given.v)
        found = [evolve(flow, fresh, 2, generator=rng(0)), evolve(sink, fresh, 2)]
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a.particles.x, b.particles.x)
        assert torch.equal(a.ess, b.ess) and not a.particles.x.requires_grad
        assert not a.particles.x.is_inference()
    torch.testing.assert_close(torch.rand(1, generator=rng(0)), torch.rand(1, generator=rng(0)))


@pytest.mark.parametrize("name", STATES)
def test_global_state_does_not_change_a_variation(name):
    given = some(dtype=torch.float32)
    functionals = KL(mixture), KSD(mixture), SVGD(mixture)
    want = [f(given) for f in functionals]
    with STATES[name]():
        found = [f(given) for f in functionals]
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a.gradient, b.gradient)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("metric", [Kalman(0.1), Stein()], ids=["Kalman", "Stein"])
def test_global_state_does_not_change_a_metric(metric, name):
    given = some(dtype=torch.float32)
    rates = lambda: (metric.position_rate(given, given.v), metric.kinetic_gradient(given))
    want = rates()
    with STATES[name]():
        found = rates()
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_metric_says_what_it_lacks():
    p = some()
    with pytest.raises(NotImplementedError, match="^Metric: define position_rate$"):
        Metric().position_rate(p, p.v)
    with pytest.raises(NotImplementedError, match="^Metric: define kinetic_gradient$"):
        Metric().kinetic_gradient(p)


def test_strided_and_differentiable_input_is_left_alone():
    x = normal(3, 24, seed=0).requires_grad_()
    p = Particles(x.T)
    before = p.x.clone()
    found = evolve(Flow(KL(mixture), 0.1), p, 2).particles
    want = evolve(Flow(KL(mixture), 0.1), Particles(before), 2).particles
    assert torch.equal(found.x, want.x) and torch.equal(p.x, before) and x.grad is None
