"""Schedules against their definitions (autograd of ln alpha and sigma^2) and their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dfkernels import schedule as S


def scaled_linear(steps: int = 1000) -> torch.Tensor:
    """Stable Diffusion's table, as diffusers computes it."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, 0)


def linear(steps: int = 1000) -> torch.Tensor:
    """DDPM's table."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0)


SCHEDULES = {
    "VP": (S.VP(), 0.01, 1.0),
    "VP-narrow": (S.VP(0.5, 3.0), 0.01, 1.0),
    "VP-constant": (S.VP(2.0, 2.0), 0.01, 1.0),
    "SubVP": (S.SubVP(), 0.01, 1.0),
    "VE": (S.VE(), 0.01, 50.0),
    "EDM": (S.EDM(), 0.01, 80.0),
    "RectifiedFlow": (S.RectifiedFlow(), 0.01, 0.99),
    "ReversedRectifiedFlow": (S.ReversedRectifiedFlow(), 0.01, 0.99),
    "Cosine": (S.Cosine(), 0.0, 0.999),
    "Cosine-sine": (S.Cosine(offset=0.0), 0.0, 0.999),
    "GeometricVE": (S.GeometricVE(), 0.0, 1.0),
    "TabulatedVE": (S.TabulatedVE(torch.linspace(0.1, 3, 30).double() ** 3), 0.0, 29.0),
    "Tabulated": (S.Tabulated(scaled_linear()), 0.0, 999.0),
    "Tabulated-DDPM": (S.Tabulated(linear()), 0.0, 999.0),
}
every = pytest.mark.parametrize("name", SCHEDULES)


def times(name: str, n: int = 57) -> torch.Tensor:
    _, lo, hi = SCHEDULES[name]
    return torch.linspace(lo, hi, n, dtype=torch.float64)[1:-1]


@every
def test_f_and_g2_are_the_derivatives(name):
    """f = d ln(alpha)/dt, g2 = d(sigma^2)/dt - 2 f sigma^2, to 1e-10."""
    schedule, t = SCHEDULES[name][0], times(name).requires_grad_()
    alpha, sigma = schedule(t)
    f = torch.autograd.grad(alpha.log().sum() + 0 * t.sum(), t)[0]
    slope = torch.autograd.grad(sigma.square().sum(), t)[0]
    torch.testing.assert_close(schedule.f(t.detach()), f, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        schedule.g2(t.detach()), slope - 2 * f * sigma.detach().square(), rtol=1e-10, atol=1e-10
    )


@every
def test_log_snr_and_its_inverse(name):
    schedule, t = SCHEDULES[name][0], times(name)
    alpha, sigma = schedule(t)
    torch.testing.assert_close(
        schedule.log_snr(t), 2 * (alpha.log() - sigma.log()), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(schedule.t_of_log_snr(schedule.log_snr(t)), t, rtol=1e-9, atol=1e-9)
    assert torch.equal(schedule.alpha(t), alpha) and torch.equal(schedule.sigma(t), sigma)


@every
def test_any_shape_and_dtype(name):
    schedule, t = SCHEDULES[name][0], times(name)[:6]
    for method in (schedule.alpha, schedule.sigma, schedule.f, schedule.g2, schedule.log_snr):
        assert torch.equal(method(t.view(2, 1, 3)), method(t).view(2, 1, 3))
        assert torch.equal(method(t[2]), method(t)[2])
        single = method(t.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(
            single.double(), method(t.float().double()), rtol=3e-5, atol=1e-6
        )
    assert (
        schedule.alpha(float(t[0])).dtype == torch.float64
        and schedule.alpha(float(t[0])).shape == ()
    )


@every
def test_maps_over_a_batch_of_times(name):
    schedule, t = SCHEDULES[name][0], times(name)[:5]
    assert torch.equal(torch.func.vmap(schedule.g2)(t), schedule.g2(t))


def test_closed_forms():
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    same = lambda got, want: torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    beta, integral = 0.1 + 19.9 * t, 0.1 * t + 19.9 * t**2 / 2
    alpha = torch.exp(-integral / 2)
    for schedule, sigma, g2 in (
        (S.VP(), (1 - alpha**2).sqrt(), beta),
        (S.SubVP(), 1 - alpha**2, beta * (1 - alpha**4)),
    ):
        same(schedule.alpha(t), alpha)
        same(schedule.sigma(t), sigma)
        same(schedule.f(t), -beta / 2)
        same(schedule.g2(t), g2)
        same(schedule.beta(t), beta)
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    for schedule, expected in (
        (S.VE(), (one, t.sqrt(), zero, one)),
        (S.EDM(), (one, t, zero, 2 * t)),
        (S.RectifiedFlow(), (t, 1 - t, 1 / t, -2 * (1 - t) / t)),
        (S.ReversedRectifiedFlow(), (1 - t, t, -1 / (1 - t), 2 * t / (1 - t))),
        (
            S.GeometricVE(0.02, 70.0),
            (one, 0.02 * 3500**t, zero, (0.02 * 3500**t) ** 2 * 2 * math.log(3500)),
        ),
    ):
        for got, want in zip(
            (schedule.alpha(t), schedule.sigma(t), schedule.f(t), schedule.g2(t)),
            expected,
            strict=True,
        ):
            same(got, want)


def test_data_end_is_legal():
    for schedule in (
        *(S.VP(), S.SubVP(), S.VE(), S.EDM(), S.Cosine(), S.Cosine(0)),
        S.ReversedRectifiedFlow(),
    ):
        alpha, sigma = schedule(0.0)
        assert alpha == 1 and sigma == 0 and schedule.log_snr(0.0) == torch.inf
    alpha, sigma = S.RectifiedFlow()(1.0)
    assert alpha == 1 and sigma == 0 and S.RectifiedFlow().g2(1.0) == 0


@pytest.mark.parametrize("offset", [0.008, 0.0, 0.3])
def test_the_cosine_schedule_is_the_paper_s(offset):
    """Nichol & Dhariwal 2021, eq. 17."""
    schedule, t = S.Cosine(offset), torch.linspace(0, 1, 101, dtype=torch.float64)
    f = lambda t: torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    alpha_bar = f(t) / f(torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(schedule.alpha(t) ** 2, alpha_bar, rtol=0, atol=1e-15)
    torch.testing.assert_close(schedule.sigma(t) ** 2, 1 - alpha_bar, rtol=0, atol=1e-15)
    alpha, sigma = schedule(1.0)
    assert alpha == 0 and sigma == 1 and schedule.log_snr(1.0) == -math.inf
    assert schedule.t_of_log_snr(-math.inf) == 1 and schedule.t_of_log_snr(math.inf) == 0
    near = torch.tensor([1e-12, 1e-6, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6, 1 - 1e-12]).double()
    found = schedule.t_of_log_snr(schedule.log_snr(near))
    torch.testing.assert_close(found[:4], near[:4], rtol=1e-13, atol=0)
    torch.testing.assert_close(1 - found[4:], 1 - near[4:], rtol=1e-4, atol=0)  # rounding of t


@pytest.mark.parametrize(
    "schedule, end", [(S.RectifiedFlow(), 0.0), (S.ReversedRectifiedFlow(), 1.0), (S.Cosine(), 1.0)]
)
def test_rates_are_finite_where_the_drift_is_not(schedule, end):
    for rate in schedule.rates(end):
        assert torch.isfinite(rate)
    for name in ("f", "g2"):
        with pytest.raises(ValueError, match="^t: expected values in "):
            getattr(schedule, name)(end)


def test_the_two_rectified_flows_are_one_path():
    t, one, other = torch.linspace(0, 1, 9).double(), S.RectifiedFlow(), S.ReversedRectifiedFlow()
    assert torch.equal(one.alpha(1 - t), other.alpha(t))
    assert torch.equal(one.rates(1 - t)[0], -other.rates(t)[0])
    torch.testing.assert_close(one.sigma(1 - t), other.sigma(t))


def test_a_table_of_sigmas_is_met_at_its_own_steps():
    sigmas = torch.tensor([0.002, 0.01, 0.5, 0.6, 80.0], dtype=torch.float64)
    schedule = S.TabulatedVE(sigmas)
    torch.testing.assert_close(schedule.sigma(torch.arange(5)), sigmas, rtol=1e-14, atol=0)
    assert bool((schedule.sigma(torch.linspace(0, 4, 999).double()).diff() > 0).all())
    geometric = S.TabulatedVE(0.01 * 5000 ** (torch.arange(11).double() / 10))
    t = torch.linspace(0, 1, 57, dtype=torch.float64)
    torch.testing.assert_close(
        geometric.sigma(10 * t), S.GeometricVE().sigma(t), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("kind", ["VP", "VE"])
def test_a_discrete_schedule_knows_its_own_steps_only(kind):
    table = linear(50)
    if kind == "VP":
        smooth, discrete = S.Tabulated(table), S.Tabulated(table, discrete=True)
    else:
        s = ((1 - table) / table).sqrt()
        smooth, discrete = S.TabulatedVE(s), S.TabulatedVE(s, discrete=True)
    t = torch.tensor([0.0, 0.4, 7.6, 30.5, 31.5, 49.0], dtype=torch.float64)
    rounded = torch.tensor([0.0, 0.0, 8.0, 30.0, 32.0, 49.0], dtype=torch.float64)
    for name in ("alpha", "sigma", "f", "g2", "log_snr"):
        assert torch.equal(getattr(discrete, name)(t), getattr(smooth, name)(rounded))
        mapped = torch.vmap(getattr(discrete, name))(t)
        assert torch.equal(mapped, getattr(discrete, name)(t))
    assert torch.equal(
        discrete.t_of_log_snr(smooth.log_snr(rounded + (rounded < 49) * 0.3)), rounded
    )
    assert repr(discrete) == f"{type(discrete).__name__}(50 steps, discrete=True)"
    with pytest.raises(ValueError, match=r"^t: expected values in \[0, 49\]"):
        discrete.alpha(49.4)
    with pytest.raises(TypeError, match="^discrete: expected True or False, got int$"):
        type(discrete)(table.flip(0) if kind == "VE" else table, discrete=1)


def test_small_noise_keeps_its_digits_in_float32():
    """sigma of VP at t = 1e-7 in float32: sqrt(1 - alpha^2) would be 0."""
    t = torch.tensor(1e-7)
    assert S.VP().sigma(t).double() == pytest.approx(float(S.VP().sigma(t.double())), rel=1e-6)
    assert 1 - S.VP().alpha(t).square() == 0


def test_table_is_met_at_its_own_steps():
    for table in (scaled_linear(), linear(50), linear().float()):
        schedule = S.Tabulated(table)
        steps = torch.arange(len(table))
        alpha, sigma = schedule(steps.double())
        torch.testing.assert_close(alpha.square(), table.double(), rtol=1e-12, atol=0)
        torch.testing.assert_close(sigma.square(), 1 - table.double(), rtol=1e-10, atol=0)
        assert schedule.alpha(steps).dtype == torch.float64
    assert repr(S.Tabulated(linear(50))) == "Tabulated(50 steps)"


def test_table_is_monotone_and_close_to_its_continuous_limit():
    """log-SNR falls everywhere, so g2 >= 0; between steps a table of every 10th step meets the full
    one."""
    full = scaled_linear()
    coarse = S.Tabulated(full[9::10])
    t = torch.linspace(0, 99, 4001, dtype=torch.float64)
    assert bool((coarse.log_snr(t).diff() < 0).all()) and bool((coarse.g2(t) > 0).all())
    inside = torch.arange(9, 1000, dtype=torch.float64)
    error = (coarse.log_snr((inside - 9) / 10) - torch.logit(full[9:])).abs()
    # the table starts where log-SNR is a logarithm
    assert error[:20].max() < 0.05 and error[20:].max() < 1e-3


def test_linear_log_snr_is_reproduced_exactly():
    lam = torch.linspace(6, -6, 13, dtype=torch.float64)
    schedule = S.Tabulated(torch.sigmoid(lam))
    t = torch.linspace(0, 12, 50, dtype=torch.float64)
    torch.testing.assert_close(schedule.log_snr(t), 6 - t, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(schedule.g2(t), torch.sigmoid(t - 6), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: S.VP()(1.5),
            "t: expected values in [0, 1] for VP(beta_min=0.1, beta_max=20.0), got 1.5",
        ),
        (
            lambda: S.SubVP().g2(-0.25),
            "t: expected values in [0, 1] for SubVP(beta_min=0.1, beta_max=20.0), got -0.25",
        ),
        (
            lambda: S.VP().f(torch.tensor([0.5, float("nan")])),
            "t: expected values in [0, 1] for VP(beta_min=0.1, beta_max=20.0), got nan",
        ),
        (
            lambda: S.EDM()(torch.tensor([1.0, -1.0])),
            "t: expected values in [0, inf) for EDM(), got -1",
        ),
        (
            lambda: S.RectifiedFlow().f(0.0),
            "t: expected values in (0, 1] for RectifiedFlow(), got 0",
        ),
        (
            lambda: S.Tabulated(linear(10))(9.5),
            "t: expected values in [0, 9] for Tabulated(10 steps), got 9.5",
        ),
        (
            lambda: S.VP().t_of_log_snr(-20.0),
            (
                "t_of_log_snr(log_snr): expected values in [0, 1] for VP(beta_min=0.1,"
                " beta_max=20.0), got 1.41275"
            ),
        ),
        (
            lambda: S.Tabulated(torch.tensor([0.5])),
            "alphas_cumprod: expected shape [T] with T >= 2, got [1]",
        ),
        (
            lambda: S.Tabulated(torch.tensor([0.9, 0.5, 0.0])),
            (
                "alphas_cumprod: expected strictly decreasing values inside (0, 1), got values from"
                " 0.9 to 0 (zero terminal SNR: cut it, alphas_cumprod[:-1], or floor the last "
                "entry alone, at min(2**-24, alphas_cumprod[-2] / 4))"
            ),
        ),
        (
            lambda: S.Tabulated(torch.tensor([1.0, 0.5, 0.1])),
            (
                "alphas_cumprod: expected strictly decreasing values inside (0, 1), got values from"
                " 1 to 0.1 (no noise at t = 0: cut it, alphas_cumprod[1:])"
            ),
        ),
        (
            lambda: S.TabulatedVE(torch.tensor([80.0, 0.5, 0.0])),
            (
                "sigmas: expected positive, strictly increasing values, got values from 80 to 0 "
                "(a table that falls: pass sigmas[:-1].flip(0))"
            ),
        ),
        (
            lambda: S.TabulatedVE(torch.tensor([0.1, 0.1])),
            "sigmas: expected positive, strictly increasing values, got values from 0.1 to 0.1",
        ),
        (
            lambda: S.GeometricVE(1.0, 0.5),
            "sigma_min, sigma_max: expected 0 < sigma_min < sigma_max < inf, got 1.0, 0.5",
        ),
        (lambda: S.Cosine(-0.1), "offset: expected at least 0, got -0.1"),
        (
            lambda: S.ReversedRectifiedFlow().g2(1.0),
            "t: expected values in [0, 1) for ReversedRectifiedFlow(), got 1",
        ),
        (
            lambda: S.VP(2.0, 1.0),
            "beta_min, beta_max: expected 0 < beta_min <= beta_max < inf, got 2.0, 1.0",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


def test_compiles():
    schedule = S.VP()
    compiled = torch.compile(
        lambda t: schedule.g2(t) + schedule.sigma(t), fullgraph=True, backend="eager"
    )
    t = torch.linspace(0, 1, 5)
    torch.testing.assert_close(compiled(t), schedule.g2(t) + schedule.sigma(t))


TABLES = {
    "two": torch.tensor([0.9, 0.1], dtype=torch.float64),
    "flat": torch.sigmoid(
        torch.tensor([5.0, 5 - 1e-9, 4.0, 4 - 1e-12, -5.0, -5 - 1e-7], dtype=torch.float64)
    ),
    "DDPM": linear(),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_inverted_to_rounding(name):
    schedule = S.Tabulated(TABLES[name])
    last = len(TABLES[name]) - 1
    t = torch.cat([torch.linspace(0, last, 997), torch.arange(last + 1.0)]).double()
    lam = schedule.log_snr(t)
    found = schedule.t_of_log_snr(lam)
    # in lam, where the table is flat; a rounding of the largest entry, and of t at the steepest
    # place
    steepest = schedule._slope.abs().max().item() * 2
    bound = 4 * 2**-52 * (lam.abs().max().item() + last * steepest)
    assert (schedule.log_snr(found) - lam).abs().max() <= bound
    assert schedule.t_of_log_snr(lam[3]) == found[3]


def test_the_inverse_of_a_table_has_a_derivative():
    schedule = S.Tabulated(linear(20))
    lam = schedule.log_snr(torch.tensor([0.5, 7.3, 18.9], dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(schedule.t_of_log_snr, lam)


@pytest.mark.parametrize("name", ["VP", "Tabulated"])
def test_the_ends_are_met_up_to_rounding_and_no_further(name):
    schedule, high = SCHEDULES[name][0], SCHEDULES[name][2]
    end = schedule.log_snr(torch.tensor(high, dtype=torch.float64))
    slope = (
        schedule.log_snr(torch.tensor(high - 1e-6, dtype=torch.float64)) - end
    ).abs() / 1e-6  # per unit of t
    unit = torch.finfo(torch.float64).eps * max(1.0, end.abs().item(), high * slope.item())
    assert schedule.t_of_log_snr(end - 2 * unit) == pytest.approx(high, rel=1e-13)
    for much in (1e3, 1e6):
        with pytest.raises(ValueError, match="log_snr"):
            schedule.t_of_log_snr(end - much * unit)


@every
def test_numbers_of_any_library_count_as_float64(name):
    schedule, t = SCHEDULES[name][0], float(times(name)[3])
    want = schedule.sigma(torch.tensor(t, dtype=torch.float64))
    for given in (t, np.float64(t), np.array(t), [t]):
        got = schedule.sigma(given)
        assert got.dtype == torch.float64 and got == want
    assert schedule.sigma(np.array([t, t], dtype=np.float32)).dtype == torch.float32
    assert schedule.sigma(np.array([t, t], dtype=">f8")).tolist() == [want, want]


@pytest.mark.parametrize(
    "t",
    [True, 1j, "1", None, torch.tensor(True), torch.tensor(1j), torch.eye(2).to_sparse(),
     np.ma.masked_array([0.5, 0.6], [0, 1]), np.array([True])],
    ids=str,
)  # fmt: skip
def test_what_is_no_number_is_named(t):
    with pytest.raises(TypeError, match="^t: expected"):
        S.VP()(t)


@every
def test_torch_s_global_state_changes_nothing(name):
    schedule, t = SCHEDULES[name][0], float(times(name)[3])
    entries = linear(10).numpy()
    table = lambda: S.Tabulated(entries) if name.startswith("Tab") else schedule
    calls = lambda: [
        *schedule(t),
        schedule.f(t),
        schedule.g2(t),
        *schedule.rates(t),
        schedule.log_snr(t),
        schedule.t_of_log_snr(float(schedule.log_snr(t))),
        *table()(0.5),
    ]
    plain = calls()
    before = torch.get_default_dtype()
    for state in (torch.device("meta"), torch.autocast("cpu"), torch.inference_mode()):
        with state:
            assert all(torch.equal(a, b) for a, b in zip(plain, calls(), strict=True))
    try:
        torch.set_default_dtype(torch.float16)
        assert all(torch.equal(a, b) for a, b in zip(plain, calls(), strict=True))
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", [S.VP, S.SubVP])
def test_the_inverse_is_as_good_where_next_to_no_signal_is_left(kind):
    # log-SNR -18 to -25
    schedule, t = (
        kind(1e-3, 50.0),
        torch.linspace(0.85, 1, 16, dtype=torch.float64),
    )
    torch.testing.assert_close(schedule.t_of_log_snr(schedule.log_snr(t)), t, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", [S.VP, S.SubVP])
def test_log_snr_beyond_the_exponential_of_float32(kind):
    at_end = kind(1.0, 250.0).log_snr(torch.ones(1))
    torch.testing.assert_close(at_end, torch.tensor([-125.5]))


@pytest.mark.parametrize("level", [1e-3, 1e-200])
def test_a_table_whose_log_snr_falls_by_less_than_rounding(level):
    below = math.nextafter(level, 0)
    table = [0.5, level, below, math.nextafter(below, 0), level / 100]
    with pytest.raises(
        ValueError, match="alphas_cumprod: expected entries whose log-SNR differs .* at 1 and 2"
    ):
        S.Tabulated(table)
