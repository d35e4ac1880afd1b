"""PF-ODE likelihood: Gaussian and cloud closed forms, orders by a fitted slope, every source of the
trace."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import SCHEDULES
from tensors import normal

from dfkernels import DiffusionFisher, PointCloud, ops, schedule
from dfkernels.methods import traces
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.likelihood import Divergence, Hutchinson, exact, log_prob
from dfkernels.methods.trace_matching import MatchedTrace

VARIANCE = torch.tensor([0.09, 1.0, 4.0], dtype=torch.float64)
NOISE = (0.05, 20.0)


def at(sch, s):
    """t, alpha, sigma in float64 where sigma/alpha = s."""
    t = sch.t_of_log_snr(torch.tensor(-2 * math.log(s), dtype=torch.float64))
    return t, *sch(t)


def gaussian(sch):
    """The ideal denoiser of N(0, diag VARIANCE), and tr F. F = 1/(alpha^2 VARIANCE + sigma^2), eps
    = sigma F x."""

    def fisher(x, t):
        alpha, sigma = (level.view(-1, 1) for level in sch(t))
        return 1 / (alpha**2 * VARIANCE + sigma**2), sigma

    def eps(x, t):
        f, sigma = fisher(x, t)
        return (sigma * f * x).to(x.dtype)

    return Denoiser(eps, sch), lambda x, t: fisher(x, t)[0].sum(1).expand(len(x)).to(x.dtype)


def normal_log_prob(x, variance):
    return -(x.square() / variance + (2 * math.pi * variance).log()).sum(1) / 2


def with_true_prior(result, log_prior):
    return result.log_prob - result.latent_log_prob + log_prior


def gaussian_error(sch, trace, noise=NOISE, dtype=torch.float64, **how):
    """Largest error of log_prob for N(0, diag VARIANCE) with the exact prior at s_max."""
    _, alpha, sigma = at(sch, noise[0])
    x = (normal(6, 3) * (alpha**2 * VARIANCE + sigma**2).sqrt()).to(dtype)
    result = log_prob(gaussian(sch)[0], x, noise, trace, **how)
    latent = result.latent.double() / at(sch, noise[1])[1]
    truth = normal_log_prob(x.double(), alpha**2 * VARIANCE + sigma**2)
    return (
        (with_true_prior(result, normal_log_prob(latent, VARIANCE + noise[1] ** 2)) - truth)
        .abs()
        .max()
    )


def ideal_traces(sch):
    """Every source of the trace that is exact for a Gaussian with independent coordinates."""
    denoiser, trace = gaussian(sch)

    def residual(x, t):  # E|eps - epsbar|^2/d = 1 - sigma^2 tr F/d
        return 1 - sch.sigma(t) ** 2 * trace(x, t) / 3

    def paper(x, t):  # E|x_0|^2/d
        alpha, sigma = (level.view(-1, 1) for level in sch(t))
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        return ((gain * x) ** 2 + VARIANCE * (1 - alpha * gain)).mean(1)

    generator = torch.Generator().manual_seed(0)
    return {
        "closed form": trace,
        "residual": MatchedTrace(residual, denoiser),
        "paper": MatchedTrace(paper, denoiser, "paper"),
        "divergence": Divergence(),
        "one by one": Divergence(chunk=1),
        "two by two, forward": Divergence(chunk=2, mode="jvp"),
        "Hutchinson": Hutchinson(generator),  # v_j^2 = 1: exact for a diagonal Jacobian
        "Hutchinson, forward": Hutchinson(generator, probes=3, mode="jvp"),
    }


@pytest.mark.parametrize("name", ideal_traces(schedule.VP()))
@pytest.mark.parametrize(
    "sch", [schedule.VP(), schedule.RectifiedFlow()], ids=lambda s: type(s).__name__
)
def test_a_gaussian_s_density_by_every_trace(sch, name):
    # order 4, h = 0.06
    assert gaussian_error(sch, ideal_traces(sch)[name], method="rk4", steps=100) < 1e-5


@pytest.mark.parametrize("sch", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "method, order, steps", [("heun", 2, (32, 64, 128)), ("rk4", 4, (16, 32, 64))]
)
def test_the_claimed_order(sch, method, order, steps):
    trace = gaussian(sch)[1]
    errors = [gaussian_error(sch, trace, method=method, steps=m) for m in steps]
    logs = torch.tensor([[math.log(m), 1.0] for m in steps], dtype=torch.float64)
    slope = torch.linalg.lstsq(logs, torch.stack(errors).log()[:, None]).solution[0].item()
    assert -slope == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("sch", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_adaptive_solver_keeps_its_tolerance(sch):
    errors = [
        gaussian_error(sch, gaussian(sch)[1], method="dopri5", rtol=tol, atol=tol)
        for tol in (1e-5, 1e-8)
    ]
    # local tolerances, relative to states up to |x/alpha| = 60, over some 50 steps
    assert errors[0] < 5e-3 and errors[1] < 5e-6


@pytest.mark.parametrize("sch", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_flow_of_a_cloud_carries_the_posterior_s_own_log_prob(sch):
    """Two independent ways to log q_t: the mixture's log-sum-exp, and the integral of tr F along
    the flow."""
    cloud, noise = PointCloud(normal(12, 2, 3, seed=1)), (0.3, 20.0)
    _, alpha, sigma = at(sch, noise[0])
    x = alpha * cloud.y[:6] + sigma * normal(6, 2, 3)
    result = log_prob(
        Denoiser.exact(cloud, sch), x, noise, exact(cloud, sch), method="rk4", steps=100
    )
    last = at(sch, noise[1])[1:]
    # of latent/alpha
    there = DiffusionFisher(result.latent, cloud, *last).log_prob + 6 * last[0].log()
    here = DiffusionFisher(x, cloud, alpha, sigma).log_prob
    assert (with_true_prior(result, there) - here).abs().max() < 1e-4
    plain = log_prob(Denoiser.exact(cloud, sch), x, noise, Divergence(), method="rk4", steps=100)
    assert (plain.log_prob - result.log_prob).abs().max() < 1e-10


def test_the_normal_prior_at_a_high_noise_level_is_enough():
    cloud, sch, noise = PointCloud(normal(12, 6, seed=1)), schedule.EDM(), (0.3, 1e4)
    x = cloud.y[:6] + 0.3 * normal(6, 6)
    result = log_prob(
        Denoiser.exact(cloud, sch), x, noise, exact(cloud, sch), method="rk4", steps=200
    )
    here = DiffusionFisher(x, cloud, 1.0, 0.3).log_prob
    # |mean| |x|/s^2 is about 1e-4
    assert (result.log_prob - here).abs().max() < 1e-3


def test_data_std_is_the_prior_s():
    """Isotropic data: N(0, s_max^2 + std^2) is exact, at any s_max."""
    sch, variance = schedule.VP(), 2.25

    def eps(x, t):
        alpha, sigma = (level[:, None] for level in sch(t))
        return sigma * x / (alpha**2 * variance + sigma**2)

    denoiser = Denoiser(eps, sch)
    _, alpha, sigma = at(sch, 0.1)
    x = normal(5, 4)
    result = log_prob(denoiser, x, (0.1, 2.0), Divergence(), data_std=1.5, method="rk4", steps=100)
    truth = normal_log_prob(x, alpha**2 * variance + sigma**2 + torch.zeros(4, dtype=torch.float64))
    assert (result.log_prob - truth).abs().max() < 1e-5
    assert torch.allclose(
        result.latent_log_prob,
        normal_log_prob(result.latent / at(sch, 2.0)[1], torch.full((4,), 6.25)),
    )


def test_the_latent_is_the_flow_s_end():
    sch = schedule.VP()
    result = log_prob(
        gaussian(sch)[0], normal(5, 3), NOISE, gaussian(sch)[1], method="rk4", steps=100
    )
    (_, first, _), (_, last, _) = at(sch, NOISE[0]), at(sch, NOISE[1])
    scale = ((VARIANCE + NOISE[1] ** 2) / (VARIANCE + NOISE[0] ** 2)).sqrt() * last / first
    assert torch.allclose(result.latent, normal(5, 3) * scale, rtol=1e-6)


@pytest.mark.parametrize("event", [(), (3,), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("trace", ["exact", "divergence", "hutchinson"])
def test_schedules_agree_on_x_over_alpha(event, trace):
    """Identity 9: log q_x + d ln alpha, the bits and the latent's noise depend on x/alpha and s
    only."""
    cloud = PointCloud(normal(9, *event, seed=1))
    xbar = cloud.y[:4] + 0.3 * normal(4, *event)
    bits, nats = [], []
    for sch in SCHEDULES:
        source = {
            "exact": exact(cloud, sch),
            "divergence": Divergence(),
            "hutchinson": Hutchinson(torch.Generator().manual_seed(3), 2, "gaussian"),
        }[trace]
        _, alpha, _ = at(sch, 0.3)
        result = log_prob(
            Denoiser.exact(cloud, sch), alpha * xbar, (0.3, 10.0), source, method="rk4", steps=20
        )
        bits.append(result.bits_per_dim)
        nats.append(result.log_prob + math.prod(event) * alpha.log())
    # rounding of t(s), worst for the table, times derivatives of order 1 over 80 stages
    assert max((b - bits[0]).abs().max().item() for b in bits) < 1e-9
    assert max((n - nats[0]).abs().max().item() for n in nats) < 1e-9


def test_bits_per_dim_counts_the_bin():
    """1 nat = 1/ln 2 bits; uniform density 1/2 on [-1, 1] with 2^8 bins of width 2/256 is 8
    bits/dim."""
    sch = schedule.VP()
    denoiser, trace = gaussian(sch)
    x = normal(5, 3)
    plain = log_prob(denoiser, x, NOISE, trace)
    alpha = at(sch, NOISE[0])[1]
    nats = plain.log_prob + 3 * alpha.log()
    assert torch.allclose(plain.bits_per_dim, -nats / 3 / math.log(2), rtol=1e-12)
    binned = log_prob(denoiser, x, NOISE, trace, width=2 / 256)
    assert torch.allclose(
        binned.bits_per_dim - plain.bits_per_dim, torch.tensor(7.0, dtype=torch.float64)
    )
    assert torch.equal(binned.log_prob, plain.log_prob)


def test_dequantised_bits_bound_the_bits_of_the_levels():
    """Theis et al. 2016: the mean over u of bits at k + u is at least -log2 P(bin k)/d, and near it
    here."""
    sch, width = schedule.EDM(), 0.5
    denoiser = Denoiser(lambda x, t: t[:, None] * x / (1 + t[:, None] ** 2), sch)
    u = torch.linspace(0, 1, 201, dtype=torch.float64)[:, None]
    x = width * (2 + u)
    result = log_prob(
        denoiser, x, (0.01, 20.0), Divergence(), data_std=1.0, width=width, method="rk4", steps=100
    )
    std = math.sqrt(1 + 0.01**2)
    mass = torch.special.ndtr(x[-1, 0] / std) - torch.special.ndtr(x[0, 0] / std)
    gap = torch.trapezoid(result.bits_per_dim, u[:, 0]) + mass.log2()
    assert 0 < gap.item() < 0.05


def test_hutchinson_is_unbiased_and_rademacher_has_less_variance():
    """2^13 repetitions of one image: the mean within 4 standard errors of the exact divergence's
    result."""
    cloud, sch, n = PointCloud(normal(12, 4, seed=1)), schedule.EDM(), 1 << 13
    denoiser = Denoiser.exact(cloud, sch)
    x = (cloud.y[:1] + 0.5 * normal(1, 4)).expand(n, -1)
    truth = log_prob(denoiser, x[:1], (0.5, 5.0), Divergence(), method="heun", steps=5).log_prob
    variance = {}
    for kind in ("rademacher", "gaussian"):
        source = Hutchinson(torch.Generator().manual_seed(0), kind=kind)
        value = log_prob(denoiser, x, (0.5, 5.0), source, method="heun", steps=5).log_prob
        variance[kind] = value.var().item()
        assert abs((value.mean() - truth).item()) < 4 * math.sqrt(variance[kind] / n)
    assert variance["rademacher"] < variance["gaussian"] / 2
    source = Hutchinson(torch.Generator().manual_seed(0), probes=4)
    four = log_prob(denoiser, x, (0.5, 5.0), source, method="heun", steps=5).log_prob.var().item()
    # relative error of a variance: 2 %
    assert four == pytest.approx(variance["rademacher"] / 4, rel=0.15)


@pytest.mark.parametrize(
    "how",
    [dict(method="rk4", steps=5), dict(method="dopri5", rtol=1e-3, atol=1e-3)],
    ids=["rk4", "dopri5"],
)
def test_the_trace_error_is_the_spread_of_the_probes(how):
    """Of 2^12 repetitions of one image."""
    cloud, n = PointCloud(normal(12, 4, seed=1)), 1 << 12
    denoiser = Denoiser.exact(cloud, schedule.EDM())
    x = (cloud.y[:1] + 0.5 * normal(1, 4)).expand(n, -1)
    how = how | {"noise": (0.5, 5.0)}
    source = Hutchinson(torch.Generator().manual_seed(0), probes=4)
    found = log_prob(denoiser, x, trace=source, **how)
    said = found.trace_error.square().mean().item()
    assert found.log_prob.var().item() == pytest.approx(said, rel=0.1)
    one = log_prob(denoiser, x[:2], trace="hutchinson", **how).trace_error
    assert one.shape == (2,) and bool(one.isnan().all())
    for trace in ("divergence", "exact", exact(cloud, schedule.EDM())):
        assert log_prob(denoiser, x[:2], trace=trace, **how).trace_error.tolist() == [0, 0]


def test_derivatives_that_vmap_cannot_batch_are_taken_one_by_one():
    """As that of a diffusers U-Net's group normalisation, under torch.no_grad()."""
    v = normal(3, 2, 1, 4, 4)

    def pull(one):
        one.is_contiguous(memory_format=torch.channels_last)
        return (2 * one,)

    with pytest.raises(RuntimeError, match="inside of vmap"):
        torch.func.vmap(pull)(v)
    assert torch.equal(traces._pulled(pull, v), 2 * v)

    def broken(one):
        raise RuntimeError("out of cheese")

    with pytest.raises(RuntimeError, match="out of cheese"):
        traces._pulled(broken, v)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_with_a_generator_for_each_sample_the_batch_does_not_matter(kind):
    cloud = PointCloud(normal(12, 2, 2, seed=1))
    denoiser, x = Denoiser.exact(cloud, schedule.VP()), normal(3, 2, 2)

    def value(*samples):
        seeded = [torch.Generator().manual_seed(i) for i in samples]
        source = Hutchinson(seeded, 2, kind)
        result = log_prob(denoiser, x[[*samples]], (0.3, 5.0), source, method="heun", steps=3)
        return torch.stack([result.log_prob, result.trace_error])

    together = value(0, 1, 2)
    for order in ((2,), (1, 0)):
        assert torch.allclose(value(*order), together[:, [*order]], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="^generator: expected one for each of 3 samples, got 1$"):
        source = Hutchinson([torch.Generator()])
        log_prob(denoiser, x, (0.3, 5.0), source, method="heun", steps=3)


@given(st.integers(0, 2**31), st.integers(1, 4), st.sampled_from(["rademacher", "gaussian"]))
@settings(max_examples=10, deadline=None)
def test_the_probes_are_the_generator_s_and_fixed_along_the_path(seed, probes, kind):
    cloud, sch = PointCloud(normal(12, 2, 2, seed=1)), schedule.VP()
    denoiser, x = Denoiser.exact(cloud, sch), normal(3, 2, 2)
    generator = torch.Generator().manual_seed(seed)
    if kind == "gaussian":
        v = torch.randn(probes, 3, 2, 2, dtype=torch.float64, generator=generator)
    else:
        v = torch.randint(2, (probes, 3, 2, 2), dtype=torch.float64, generator=generator) * 2 - 1

    def trace(x, t):  # <v, F v> over the same probes at every point of the path
        fisher = DiffusionFisher(x, cloud, *sch(t))
        return sum((u * (fisher @ u)).flatten(1).sum(1) for u in v) / probes

    def value(source):
        return log_prob(denoiser, x, (0.3, 5.0), source, method="heun", steps=3).log_prob

    first = value(Hutchinson(generator.manual_seed(seed), probes, kind))
    assert torch.equal(first, value(Hutchinson(generator.manual_seed(seed), probes, kind)))
    assert torch.allclose(first, value(trace), rtol=1e-10, atol=1e-10)
    forward = value(Hutchinson(generator.manual_seed(seed), probes, kind, "jvp"))
    assert torch.allclose(first, forward, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["heun", "rk4", "dopri5"])
@pytest.mark.parametrize("trace", ["exact", "divergence"])
@pytest.mark.parametrize("seed", range(3))
def test_float32_keeps_its_dtype_and_follows_float64(method, trace, seed):
    sch, cloud = schedule.VP(), PointCloud(normal(12, 6, seed=seed, dtype=torch.float32))
    x = normal(4, 6, seed=seed + 100, dtype=torch.float32)
    source = exact(cloud, sch) if trace == "exact" else Divergence()
    how = {"method": method, "steps": None if method == "dopri5" else 16}
    single, double = (
        log_prob(Denoiser.exact(cloud, sch), x.to(dtype), (0.3, 20.0), source, **how)
        for dtype in (torch.float32, torch.float64)
    )
    for part in (
        single.log_prob,
        single.bits_per_dim,
        single.latent,
        single.latent_log_prob,
        single.error,
    ):
        assert part.dtype == torch.float32
    # Equal steps: rounding alone. Each of 64 evaluations has a trace and a state, some 20 in size,
    # off by a few roundings; they are carried with the score, at most |x|/s^2 = 60. Steps that
    # follow the error are others in float32, and both solutions have errors that the estimates
    # tell.
    bound = 64 * 20 * torch.finfo(torch.float32).eps * 4 + 0 * double.error
    if method == "dopri5":
        bound = bound + 10 * (single.error.double() + double.error)
    assert ((single.log_prob - double.log_prob).abs() < bound).all()


@pytest.mark.parametrize(
    "source, calls, products",
    [
        (Divergence(), 1, 3),
        (Divergence(chunk=2, mode="jvp"), 2, 3),
        (Hutchinson(torch.Generator(), 5), 1, 5),
        (Hutchinson(torch.Generator(), 5, mode="jvp"), 1, 5),
    ],
)
@pytest.mark.parametrize("method, stages", [("heun", 2), ("rk4", 4)])
def test_evaluations_products_and_steps_are_counted(source, calls, products, method, stages):
    done = []
    denoiser = gaussian(schedule.VP())[0]
    result = log_prob(
        denoiser,
        normal(2, 3),
        NOISE,
        source,
        method=method,
        steps=3,
        callback=lambda *at: done.append(at),
    )
    stages = 3 * stages + 1  # the last for the error estimate
    assert (result.evaluations, result.products) == (stages * calls, stages * products)
    assert denoiser.evaluations == result.evaluations and done == [(1, 3), (2, 3), (3, 3)]


def test_matched_traces_share_the_flow_s_evaluation():
    traces = ideal_traces(schedule.VP())
    for form in ("residual", "paper"):
        trace, done = traces[form], []
        for how, stages in ((dict(method="rk4", steps=3), 13), (dict(method="dopri5"), None)):
            result = log_prob(
                trace.denoiser, normal(2, 3), NOISE, trace, **how,
                callback=lambda *at, done=done: done.append(at),
            )  # fmt: skip
            assert result.products == 0 and (result.evaluations == stages or not stages)
        assert (
            done[:3] == [(1, 3), (2, 3), (3, 3)]
            and done[-1] == (100, 100)
            and sorted(done[3:]) == done[3:]
        )
        # the first step's length costs 2; the last slope is used again
        assert result.evaluations % 6 == 2


def test_the_gradient_is_the_score():
    """d log q_{t_min}(x)/dx through the solver, for the ideal denoiser of a cloud."""
    cloud, sch = PointCloud(normal(12, 3, seed=1)), schedule.VP()
    (t, alpha, sigma), last = at(sch, 0.5), at(sch, 20.0)[1:]
    denoiser = Denoiser.exact(cloud, sch)
    for source in (exact(cloud, sch), Divergence(), Divergence(mode="jvp")):
        x = (alpha * cloud.y[:4] + sigma * normal(4, 3)).requires_grad_()
        result = log_prob(denoiser, x, (0.5, 20.0), source, method="rk4", steps=50)
        there = DiffusionFisher(result.latent, cloud, *last).log_prob
        gradient = torch.autograd.grad(with_true_prior(result, there).sum(), x)[0]
        # order 4 at h = 0.07
        assert torch.allclose(gradient, denoiser.score(x, t), rtol=1e-4, atol=1e-4)


def test_without_a_graph_the_derivatives_are_still_taken():
    layer = torch.nn.Linear(3, 3, dtype=torch.float64)
    torch.nn.init.eye_(layer.weight)
    denoiser = Denoiser(lambda x, t: layer(x) * 0.1, schedule.EDM())
    with torch.no_grad():
        result = log_prob(denoiser, normal(2, 3), (0.5, 5.0), Divergence(), method="rk4", steps=4)
    assert not result.log_prob.requires_grad
    # tr F = 0.3/sigma, so that log q falls by 0.3 (s_max - s_min)
    assert result.latent_log_prob - result.log_prob == pytest.approx(-0.3 * 4.5, rel=1e-3)


def test_networks_and_traces_that_fail_are_named():
    sch, x = schedule.EDM(), torch.ones(2, 3)
    good = Denoiser(lambda x, t: x * 0.5, sch)

    def message(denoiser, trace, kind=ValueError):
        with pytest.raises(kind) as caught:
            log_prob(denoiser, x, (0.5, 5.0), trace)
        return str(caught.value)

    spoilt = Denoiser(lambda x, t: x * math.nan, sch)
    for source in (lambda x, t: x.sum(1), Divergence(), Hutchinson(torch.Generator(), mode="jvp")):
        assert (
            message(spoilt, source)
            == "network: returned NaN or inf for 2 of 2 samples, first for sample 0 at t = 0.5"
        )
    assert message(good, lambda x, t: x) == "trace: expected output of shape [2], got [2, 3]"
    assert message(good, lambda x, t: x.sum(1) / 0) == (
        "trace: returned NaN or inf for 2 of 2 samples, first for sample 0 at t = 0.5"
    )
    assert message(good, lambda x, t: 1.0, TypeError) == "trace: expected a tensor, got float"
    assert message(good, lambda x, t: x.sum(1).long(), TypeError) == (
        "trace: expected output of a floating dtype, got torch.int64"
    )
    assert message(good, 1.0, TypeError) == "trace: expected a callable trace(x, t), got float"
    assert message(good, "matched") == (
        "trace: expected 'exact' or 'hutchinson' or 'divergence', got 'matched'"
    )
    assert message(good, "exact") == (
        "trace: expected 'exact' with a Denoiser.exact only, whose data set is known, got the "
        "denoiser of a network: pass df.methods.traces.exact(cloud, schedule)"
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (
            {"noise": (0.0, 1.0)},
            "noise: expected 0 < noise[0] < noise[1] (levels sigma/alpha), got (0.0, 1.0)",
        ),
        (
            {"noise": (2.0, 1.0)},
            "noise: expected 0 < noise[0] < noise[1] (levels sigma/alpha), got (2.0, 1.0)",
        ),
        ({"method": "euler"}, "method: expected 'heun' or 'rk4' or 'dopri5', got 'euler'"),
        ({"method": "rk4", "steps": 0}, "steps: expected an integer of at least 1, got 0"),
        (
            {"steps": 100},
            "steps: expected None with method='dopri5', which chooses its steps by rtol and atol "
            "(method='rk4' takes as many as you say), got 100",
        ),
        *(
            (
                {"method": method, name: value},
                f"{name}: expected None with method={method!r}, which takes `steps` equal steps, "
                f"got {value}",
            )
            for method in ("rk4", "heun")
            for name, value in (("rtol", 1e-3), ("atol", 1e-6), ("max_evaluations", 10))
        ),
        (
            {"generator": torch.Generator()},
            "generator: expected None unless trace='hutchinson', whose probes it draws, got a "
            "Generator",
        ),
        ({"data_std": -1.0}, "data_std: expected a finite value >= 0, got -1.0"),
        ({"width": 0.0}, "width: expected a finite value > 0, got 0.0"),
        ({"rtol": 0.0}, "rtol: expected a finite value > 0, got 0.0"),
        ({"rtol": 1e-15}, "rtol: expected at least 1.8e-15 with x in torch.float64, got 1e-15"),
        ({"max_evaluations": 0}, "max_evaluations: expected an integer of at least 1, got 0"),
        ({"atol": math.inf}, "atol: expected a finite value, got inf"),
    ],
)
def test_bad_arguments_are_named(call, message):
    denoiser, trace = gaussian(schedule.VP())
    with pytest.raises(ValueError) as caught:
        log_prob(denoiser, **{"x": normal(2, 3), "noise": NOISE, "trace": trace, **call})
    assert str(caught.value) == message


OTHERS = [
    (schedule.VP(), schedule.VP(beta_max=19.9)),
    (schedule.VP(), schedule.Cosine()),
    (schedule.VP(), schedule.EDM()),
    (schedule.EDM(), schedule.VP()),  # whose range ends before
]


@pytest.mark.parametrize("own, other", OTHERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("method", ["heun", "dopri5"])
def test_a_trace_of_another_schedule_is_refused(own, other, method):
    """Its density is another one: a likelihood would be wrong in silence."""
    cloud = PointCloud(normal(6, 3))
    denoiser = Denoiser.exact(cloud, own)
    matched = MatchedTrace(lambda x, t: x.sum(1), Denoiser.exact(cloud, other))
    kinds = (exact(cloud, other), "exact(cloud, schedule)"), (matched, "a MatchedTrace")
    for trace, what in kinds:
        with pytest.raises(ValueError) as caught:
            log_prob(denoiser, normal(2, 3), (2.0, 5.0), trace, method=method)
        assert str(caught.value).startswith(
            f"trace: expected {what} of the denoiser's schedule, {own!r}, got one of {other!r}, "
            "with levels that differ from its at t = "
        )


def test_a_trace_of_an_equal_schedule_or_of_other_atoms_is_taken():
    cloud, table = PointCloud(normal(6, 3)), torch.linspace(0.999, 0.01, 50, dtype=torch.float64)
    x, noise = normal(2, 3), (0.1, 5.0)
    denoiser = Denoiser.exact(cloud, schedule.Tabulated(table))
    other = PointCloud(cloud.y.clone())
    wanted = log_prob(denoiser, x, noise, "exact", method="heun", steps=4).log_prob
    found = exact(other, schedule.Tabulated(table.clone()))
    got = log_prob(denoiser, x, noise, found, method="heun", steps=4).log_prob
    assert torch.allclose(got, wanted, rtol=1e-12)


def test_a_range_that_the_schedule_does_not_reach_is_an_error():
    denoiser, trace = gaussian(schedule.VP())
    with pytest.raises(ValueError, match=r"^noise: expected levels in .* VP\(.* reaches, got "):
        log_prob(denoiser, normal(2, 3), (0.1, 1e6), trace)


@pytest.mark.parametrize(
    "make, kind, message",
    [
        (lambda g: Hutchinson(0), TypeError, "generator: expected a torch.Generator, got int"),
        (lambda g: Hutchinson([g, 0]), TypeError, "generator: expected a torch.Generator, got int"),
        (
            lambda g: Hutchinson(g, 0),
            ValueError,
            "probes: expected an integer of at least 1, got 0",
        ),
        (
            lambda g: Hutchinson(g, 1, "uniform"),
            ValueError,
            "kind: expected 'rademacher' or 'gaussian', got 'uniform'",
        ),
        (lambda g: Hutchinson(g, mode="fd"), ValueError, "mode: expected 'jvp' or 'vjp', got 'fd'"),
        (lambda g: Divergence(0), ValueError, "chunk: expected an integer of at least 1, got 0"),
        (lambda g: Divergence(mode="fd"), ValueError, "mode: expected 'jvp' or 'vjp', got 'fd'"),
    ],
)
def test_bad_sources_are_named(make, kind, message):
    with pytest.raises(kind) as caught:
        make(torch.Generator())
    assert str(caught.value) == message


def test_a_trace_by_name_is_its_source():
    sch, cloud = schedule.VP(), PointCloud(normal(12, 3, seed=1))
    denoiser, x = Denoiser.exact(cloud, sch), normal(4, 3)
    draw = torch.Generator().manual_seed(3)
    for name, source in (
        ("exact", exact(cloud, sch)),
        ("divergence", Divergence()),
        ("hutchinson", Hutchinson(torch.Generator().manual_seed(0))),
    ):
        found, expected = (
            log_prob(denoiser, x, (0.5, 5.0), t, method="heun", steps=3) for t in (name, source)
        )
        assert torch.equal(found.log_prob, expected.log_prob)
        assert found.products == expected.products
    state = draw.get_state()
    other = log_prob(denoiser, x, (0.5, 5.0), "hutchinson", generator=draw, method="heun", steps=3)
    assert not torch.equal(other.log_prob, found.log_prob)
    assert not torch.equal(draw.get_state(), state)


@pytest.mark.parametrize("trace", ["exact", "source"])
def test_the_exact_likelihood_reads_the_data_once_per_evaluation(trace, monkeypatch):
    calls = []
    posterior = ops.posterior
    monkeypatch.setattr(ops, "posterior", lambda *a, **k: calls.append(1) or posterior(*a, **k))
    sch, cloud = schedule.VP(), PointCloud(normal(12, 3, seed=1))
    source = "exact" if trace == "exact" else exact(cloud, sch)
    result = log_prob(
        Denoiser.exact(cloud, sch), normal(4, 3), (0.5, 5.0), source, method="heun", steps=3
    )
    assert len(calls) == result.evaluations == 7


class Shifted(torch.nn.Module):
    """The eps of N(shift[label], 1)."""

    shift = torch.tensor([0.0, 2.0, -3.0], dtype=torch.float64)

    def forward(self, x, t, label):
        t = t[:, None]
        return t * (x - self.shift[label][:, None]) / (1 + t**2)


@pytest.mark.parametrize("trace", ["divergence", "hutchinson", "matched"])
def test_conditions_reach_the_network_and_the_trace_network(trace):
    label, x = torch.tensor([2, 0, 1]), normal(3, 4)
    denoiser, seen = Denoiser(Shifted(), schedule.EDM()), []

    def m(x, t, label):
        seen.append(label)
        return 1 / (1 + t**2)

    source = MatchedTrace(m, denoiser) if trace == "matched" else trace
    result = log_prob(denoiser, x, (0.1, 50.0), source, data_std=1.0, label=label)
    shift = Shifted.shift[label][:, None]
    truth = normal_log_prob(x - shift, torch.full((4,), 1 + 0.1**2))
    prior = normal_log_prob(result.latent - shift, torch.full((4,), 1 + 50.0**2))
    assert (with_true_prior(result, prior) - truth).abs().max() < 1e-3
    assert all(torch.equal(one, label) for one in seen) and (trace != "matched" or seen)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'label'"):
        log_prob(denoiser, x, (0.1, 50.0), "divergence")


def test_progress_is_shown_on_stderr_and_reported_to_the_callback(capsys):
    denoiser, done = gaussian(schedule.VP())[0], []
    how = {"method": "heun", "steps": 3, "progress": True}
    log_prob(
        denoiser, normal(2, 3), NOISE, "divergence", callback=lambda *at: done.append(at), **how
    )
    out, err = capsys.readouterr()
    assert done == [(1, 3), (2, 3), (3, 3)] and out == "" and "log_prob: 100%" in err
    log_prob(denoiser, normal(2, 3), NOISE, "divergence", **{**how, "progress": False})
    assert capsys.readouterr().err == ""
