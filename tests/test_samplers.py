"""Samplers: claimed orders by a fitted slope, exact inversion, one answer for all schedules, loud
errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import SCHEDULES
from tensors import normal

import dfkernels as df
from dfkernels import PointCloud, schedule
from dfkernels.methods import endpoint
from dfkernels.methods.adjoint import guide
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.grid import nodes, time_grid
from dfkernels.methods.samplers import METHODS, invert, sample

VARIANCE = torch.tensor([0.09, 1.0, 4.0], dtype=torch.float64)
NOISE = (0.05, 5.0)


def gaussian(sch):
    """The ideal denoiser of N(0, diag VARIANCE): eps = sigma x / (alpha^2 VARIANCE + sigma^2)."""

    def eps(x, t):
        alpha, sigma = (level[:, None] for level in sch(t))
        return sigma * x / (alpha**2 * VARIANCE + sigma**2)

    return Denoiser(eps, sch)


def error(sch, method, steps, spacing="log"):
    """Largest error of x/alpha at the data end; the exact flow scales each axis by its standard
    deviation."""
    t = time_grid(sch, steps, NOISE, spacing)
    path = nodes(sch, t)
    start = NOISE[1] * normal(4, 3)
    end = sample(gaussian(sch), start * path.alpha[0], t, method, keep=1).x[0] / path.alpha[-1]
    exact = start * torch.sqrt((VARIANCE + NOISE[0] ** 2) / (VARIANCE + NOISE[1] ** 2))
    return (end - exact).abs().max().item()


@pytest.mark.parametrize("sch", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("method, order", [("ddim", 1), ("heun", 2), ("o-belm", 2)])
def test_the_claimed_order(sch, method, order):
    steps = torch.tensor([40.0, 80, 160, 320], dtype=torch.float64)
    errors = torch.tensor([error(sch, method, int(m), "edm") for m in steps], dtype=torch.float64)
    design = torch.stack([steps.log(), torch.ones_like(steps)], 1)
    slope = torch.linalg.lstsq(design, errors.log()[:, None]).solution[0].item()
    assert -slope == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("method, evaluations", [("ddim", 7), ("heun", 14), ("o-belm", 7)])
def test_evaluations_steps_and_kept_states(method, evaluations):
    sch, calls = schedule.VP(), []
    denoiser = gaussian(sch)
    t = time_grid(sch, 7, NOISE)
    x = normal(2, 3)
    whole = sample(denoiser, x, t, method, callback=lambda done, total: calls.append((done, total)))
    assert denoiser.evaluations == evaluations
    assert calls == [(i, 7) for i in range(1, 8)]
    assert torch.equal(whole.t, t) and len(whole.x) == 8 and whole.x[0] is x
    for keep in (1, 2, 5, 8, 20):
        last = sample(denoiser, x, t, method, keep=keep)
        assert torch.equal(last.t, t[-keep:])
        assert all(torch.equal(a, b) for a, b in zip(last.x, whole.x[-keep:], strict=True))
    still = sample(denoiser, x, t[:1], method)
    assert still.x[0] is x and len(still.x) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spacing", ["log", "edm"])
def test_x_over_alpha_is_the_same_for_every_schedule(method, spacing):
    """Identity 9: everything depends on (x/alpha, sigma/alpha) only."""
    cloud = PointCloud(normal(12, 2, 3, seed=1))
    start = NOISE[1] * normal(4, 2, 3)
    ends = []
    for sch in SCHEDULES:
        t = time_grid(sch, 15, NOISE, spacing)
        path = nodes(sch, t)
        states = sample(Denoiser.exact(cloud, sch), start * path.alpha[0], t, method).x
        ends.append(torch.stack(states) / path.alpha.view(-1, 1, 1, 1))
    # rounding of t, of order 1e-16 / (dt/ds) at the ends of a schedule, through 15 steps
    assert max((e - ends[0]).abs().max().item() for e in ends) < 1e-10


@pytest.mark.parametrize("sch", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("spacing", ["edm", "time"])
@given(st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_o_belm_inverts_its_own_samples(sch, spacing, steps, seed):
    cloud = PointCloud(normal(12, 2, 3, seed=1))
    denoiser, t = Denoiser.exact(cloud, sch), time_grid(sch, steps, NOISE, spacing)
    x = nodes(sch, t).sigma[0] * normal(3, 2, 3, seed=seed)
    there = sample(denoiser, x, t, "o-belm")
    back = invert(denoiser, there.x[-1], t, second=there.x[-2])
    assert torch.equal(back.t, t.flip(0))
    for a, b in zip(back.x, reversed(there.x), strict=True):
        assert (a - b).abs().max().item() <= 1e-10 * x.abs().max().item()


def test_the_inversion_stays_exact_over_the_whole_range_of_a_diffusion_model():
    """s = 80 ... 0.002: rounding amplified by 5e7 stays below 1e-10."""
    sch = schedule.EDM()
    t = time_grid(sch, 50, (0.002, 80.0), "edm")
    denoiser = Denoiser.exact(PointCloud(normal(12, 6, seed=1)), sch)
    x = 80 * normal(5, 6)
    there = sample(denoiser, x, t, "o-belm", keep=2)
    back = invert(denoiser, there.x[-1], t, second=there.x[-2], keep=1)
    assert (back.x[0] - x).abs().max().item() <= 1e-10 * x.abs().max().item()


@pytest.mark.parametrize("sch", SCHEDULES, ids=lambda s: type(s).__name__)
def test_an_image_that_was_not_sampled_is_inverted_and_found_again(sch):
    cloud = PointCloud(normal(12, 6, seed=1))
    denoiser, t, calls = Denoiser.exact(cloud, sch), time_grid(sch, 30, NOISE, "edm"), []
    image = cloud.y[:4] + 0.1 * normal(4, 6)
    back = invert(
        denoiser, image, t, keep=2, callback=lambda done, total: calls.append((done, total))
    )
    assert denoiser.evaluations == 30 and calls == [(i, 30) for i in range(1, 31)]
    path = nodes(sch, t)
    first = path.alpha[-2] / path.alpha[-1] * image + path.alpha[-2] * (
        path.s[-2] - path.s[-1]
    ) * denoiser.eps(image, t[-1])  # DDIM towards the noise
    whole = invert(denoiser, image, t)
    assert torch.allclose(whole.x[1], first, rtol=1e-14, atol=1e-14)
    denoiser.evaluations = 0
    again = sample(denoiser, back.x[-1], t, "o-belm", second=back.x[-2], keep=1)
    assert denoiser.evaluations == 29
    assert (again.x[0] - image).abs().max().item() <= 1e-10


def test_o_belm_starts_with_ddim():
    sch = schedule.VP()
    denoiser, t, x = gaussian(sch), time_grid(sch, 6, NOISE), normal(2, 3)
    ddim = sample(denoiser, x, t[:2], "ddim").x[1]
    assert torch.allclose(sample(denoiser, x, t, "o-belm").x[1], ddim, rtol=1e-13, atol=1e-13)
    given_second = sample(denoiser, x, t, "o-belm", second=ddim)
    again = sample(denoiser, x, t, "o-belm").x[-1]
    assert torch.allclose(given_second.x[-1], again, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_float32_keeps_its_dtype_and_follows_float64(method):
    sch = schedule.VP()
    cloud, t = (
        PointCloud(normal(12, 6, seed=1, dtype=torch.float32)),
        time_grid(sch, 20, NOISE, "edm"),
    )
    x = normal(4, 6, dtype=torch.float32)
    single = sample(Denoiser.exact(cloud, sch), x, t, method, keep=1).x[0]
    double = sample(Denoiser.exact(cloud, sch), x.double(), t, method, keep=1).x[0]
    assert single.dtype == torch.float32
    assert (
        single - double
    ).abs().max().item() < 2e-5  # 20 steps of rounding, some hundred times 6e-8


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_is_differentiable_through_the_solver(method):
    sch = schedule.VP()
    denoiser, t = gaussian(sch), time_grid(sch, 5, NOISE)
    x = normal(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sample(denoiser, x, t, method, keep=1).x[0], x)


def test_wrong_networks_are_named_with_the_time_at_which_they_failed():
    sch = schedule.EDM()
    t = time_grid(sch, 4, (0.1, 10.0))

    def at_the_third(x, t):
        return x * (math.nan if t[0] < 2 else 1)

    with pytest.raises(ValueError) as caught:
        sample(Denoiser(at_the_third, sch), torch.ones(2, 3), t)
    assert (
        str(caught.value)
        == "network: returned NaN or inf for 2 of 2 samples, first for sample 0 at t = 1"
    )
    with pytest.raises(ValueError) as caught:
        invert(Denoiser(lambda x, t: x[:, :2], sch), torch.ones(2, 3), t)
    assert str(caught.value) == "network: expected output of shape [2, 3], got [2, 2]"


X, T = torch.ones(2, 3), time_grid(schedule.VP(), 4, NOISE)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda d: sample(d, X, torch.tensor([1.0, 0.5, 0.0])),
            (
                "t: expected sigma > 0 at every node, got sigma = 0 at t = 0 of VP(beta_min=0.1,"
                " beta_max=20.0); stop short of it, e.g. with time_grid(schedule, steps,"
                " noise=(0.002, 80))"
            ),
        ),
        (
            lambda d: invert(d, X, T.flip(0)),
            (
                "t: expected noise sigma/alpha that strictly falls from node to node, got 0.05 at "
                "t = 0.011594, then 0.158114 at t = 0.045044"
            ),
        ),
        (
            lambda d: sample(d, X, T, "euler"),
            "method: expected 'ddim' or 'heun' or 'o-belm', got 'euler'",
        ),
        (lambda d: sample(d, X, T, keep=0), "keep: expected an integer of at least 1, got 0"),
        (lambda d: invert(d, X, T, keep=-1), "keep: expected an integer of at least 1, got -1"),
        (
            lambda d: time_grid(d.schedule, 4, NOISE, rho=3),
            "rho: expected None with spacing='log': spacing='edm' has it, got 3",
        ),
        (
            lambda d: sample(d, X, T, "heun", second=X),
            "second: expected None unless method='o-belm' and M >= 1, got a tensor",
        ),
        (
            lambda d: sample(d, X, T[:1], "o-belm", second=X),
            "second: expected None unless method='o-belm' and M >= 1, got a tensor",
        ),
        (
            lambda d: invert(d, X, T[:1], second=X),
            "second: expected None where t has one node, got a tensor",
        ),
        (
            lambda d: sample(d, X, T, "o-belm", second=X[:1]),
            "second: expected shape [2, 3] like x, got [1, 3]",
        ),
        (
            lambda d: invert(d, X, T, second=X[:1]),
            "second: expected shape [2, 3] like x, got [1, 3]",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError) as caught:
        call(gaussian(schedule.VP()))
    assert str(caught.value) == message


def test_integer_states_are_named():
    for run in (sample, invert):
        with pytest.raises(TypeError) as caught:
            run(gaussian(schedule.VP()), torch.ones(2, 3, dtype=torch.int64), T)
        assert (
            str(caught.value) == "x: expected float32 or float64, got int64: .float() converts it"
        )


class Shifted(torch.nn.Module):
    """The eps of N(shift, 1), per sample; a call without the shift fails."""

    def forward(self, x, t, shift):
        column = (-1, *[1] * (x.ndim - 1))
        t = t.view(column)
        return t * (x - shift.view(column)) / (1 + t**2)


@pytest.mark.parametrize("method", METHODS)
def test_conditions_reach_the_network(method):
    """Under the flow of N(shift, 1) a sample keeps its place relative to the shift."""
    denoiser = Denoiser(Shifted(), schedule.EDM())
    t = time_grid(denoiser.schedule, 6, (0.1, 3.0))
    shift = torch.tensor([1.0, -2.0], dtype=torch.float64)
    x = torch.ones(2, 3, dtype=torch.float64)
    free = Denoiser(lambda x, t: Shifted()(x, t, torch.zeros(2)), schedule.EDM())
    got = sample(denoiser, x + shift[:, None], t, method, shift=shift)
    expected = sample(free, x, t, method)
    assert torch.allclose(got.x[-1], expected.x[-1] + shift[:, None])
    back = invert(denoiser, got.x[-1], t, shift=shift).x[-1]
    assert torch.allclose(back, invert(free, expected.x[-1], t).x[-1] + shift[:, None])
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'shift'"):
        sample(denoiser, x, t, method)


@pytest.mark.parametrize("form", ["vjp", "jvp", "finite-difference", "paper"])
def test_conditions_reach_the_network_in_guidance_and_its_operators(form):
    denoiser = Denoiser(Shifted(), schedule.EDM())
    t = time_grid(denoiser.schedule, 4, (0.1, 3.0))
    shift, x = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.ones(2, 3).double()
    loss = lambda x_0: x_0.square().sum(1)
    guided = guide(loss, x, t, denoiser, form, steps=2, shift=shift)
    by_hand = guide(loss, x, t, denoiser.bind(shift=shift), form, steps=2)
    assert torch.equal(guided.losses, by_hand.losses)
    many = torch.ones(2, 4, 3).double()  # K copies of each query, and of its condition
    f = endpoint.fisher(form, x, 1.0, denoiser, x0=x, shift=shift)
    assert torch.allclose((f @ many)[:, 0], f @ many[:, 0])


def test_the_package_has_the_daily_functions_themselves():
    assert df.sample is sample and df.invert is invert and df.guide is guide
    assert df.Denoiser is df.methods.Denoiser and df.time_grid is time_grid
    assert df.log_prob is df.methods.likelihood.log_prob
    assert df.transport_test is df.methods.transport.transport_test
    assert df.MatchedTrace is df.methods.trace_matching.MatchedTrace
    assert set(df.__all__) <= set(dir(df))


def test_progress_is_shown_on_stderr(capsys):
    denoiser = Denoiser(lambda x, t: 0 * x, schedule.EDM())
    t, x = time_grid(denoiser.schedule, 3, (0.1, 3.0)), torch.ones(2, 3)
    for call, name in ((sample, "sample"), (invert, "invert")):
        call(denoiser, x, t, progress=True)
        assert f"{name}: 100%" in capsys.readouterr().err
    guide(lambda x_0: x_0.sum(1), x, t, denoiser, "paper", steps=2, progress=True)
    assert "guide: 100%" in capsys.readouterr().err
