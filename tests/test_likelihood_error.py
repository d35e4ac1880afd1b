"""The integration says how good it is: spikes and stiffness between atoms, the estimate against the
truth, the limit on evaluations, units, one pass over the data per evaluation.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from dfkernels import PointCloud, ops, schedule
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.likelihood import Divergence, exact, log_prob

TOP = 20.0


def integration(low, dtype=torch.float64, seed=0, unit=1.0, sch=None, **how):
    """(error, estimated error, evaluations) [5] for held-out points of a cloud of 40 atoms in 3
    dimensions: the flow's log density from the level TOP on is known in closed form.
    """
    sch = sch or schedule.EDM()
    draw = torch.Generator().manual_seed(seed)
    y = torch.randn(40, 3, dtype=torch.float64, generator=draw)
    x = ((y[:5] + 0.3 * torch.randn(5, 3, dtype=torch.float64, generator=draw)) * unit).to(dtype)
    y = (y * unit).to(dtype)
    cloud = PointCloud(y)
    (alpha, sigma), (alpha_top, sigma_top) = (
        sch(sch.t_of_log_snr(-2 * math.log(s * unit))) for s in (low, TOP)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        ours = log_prob(
            Denoiser.exact(cloud, sch),
            (alpha * x).to(dtype),
            (low * unit, TOP * unit),
            exact(cloud, sch),
            **how,
        )
    true = ops.posterior(
        (alpha * x).to(dtype).double(), y.double(), alpha.item(), sigma.item()
    ).log_prob
    end = ops.posterior(
        ours.latent.double(), y.double(), alpha_top.item(), sigma_top.item()
    ).log_prob
    end = end + 3 * alpha_top.log()
    found = ours.log_prob.double() - ours.latent_log_prob.double() + end
    return (found - true).abs(), ours.error.double(), ours.evaluations


@pytest.mark.parametrize("low", [0.1, 0.03, pytest.param(0.01, marks=pytest.mark.slow)])
def test_spikes_between_atoms_are_found_by_default(low):
    """The trace is a spike of height 1/s^2 and width s^2 where the weights switch."""
    error, estimate, evaluations = integration(low)
    assert error.max() < 0.01 and evaluations <= 5000
    assert estimate.max() < 0.1


@pytest.mark.parametrize(
    "how", [{"method": "heun", "steps": 64}, {"method": "rk4"}, {}], ids=["heun", "rk4", "dopri5"]
)
@pytest.mark.parametrize("low", [1.0, 0.3, 0.1, 0.03])
def test_the_estimate_tells_the_error(low, how):
    """Of 5 samples: the largest error within a factor of 20 below and 30 above; none of a nat in
    silence."""
    error, estimate, _ = integration(low, **how)
    assert error.max() / 20 < estimate.max() < 30 * error.max()
    assert bool((estimate > 0.05)[error > 1].all())


def test_a_large_error_is_a_warning_and_a_small_one_is_not():
    cloud, sch = (
        PointCloud(torch.randn(40, 3, generator=torch.Generator().manual_seed(0))),
        schedule.EDM(),
    )
    x = cloud.y[:2] + 0.2
    with pytest.warns(RuntimeWarning, match="error of the integration is up to .* take more steps"):
        log_prob(
            Denoiser.exact(cloud, sch), x, (0.01, 20.0), exact(cloud, sch), method="rk4", steps=16
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_prob(Denoiser.exact(cloud, sch), x, (1.0, 20.0), exact(cloud, sch))


def test_an_integration_without_end_says_where_it_stopped():
    with pytest.raises(RuntimeError) as caught:
        integration(0.001, max_evaluations=500)
    words = str(caught.value)
    assert words.startswith("log_prob: gave up at noise level 0.001")
    evaluations = int(words.split(" after ")[1].split()[0])
    assert 500 - 6 < evaluations <= 500 and "Raise max_evaluations = 500 or noise[0]" in words


def test_a_velocity_that_is_not_finite_is_not_tried_forever():
    """Where values are not looked at, as on an accelerator, NaN makes the error NaN."""
    from dfkernels.methods.solvers import Unfinished, adaptive

    y = (torch.ones(2, dtype=torch.float64),)
    with pytest.raises(Unfinished):
        adaptive(
            lambda u, y: (y[0] * math.nan,),
            y,
            0.0,
            1.0,
            lambda step: step.error[0].max().item(),
            print,
            10**6,
        )


@pytest.mark.parametrize("unit", [1e-12, 1e12])
@pytest.mark.parametrize("how", [{"method": "rk4", "steps": 16}, {}], ids=["rk4", "dopri5"])
def test_units_change_nothing(unit, how):
    for dtype in (torch.float32, torch.float64):
        plain, scaled = integration(0.3, dtype, **how), integration(0.3, dtype, unit=unit, **how)
        # log_prob is 83 off; float32 of that is 1e-5
        slack = 1e-9 if dtype == torch.float64 else 1e-2
        assert (scaled[0] - plain[0]).abs().max() < slack
        assert abs(scaled[2] - plain[2]) <= 12


def test_one_pass_over_the_data_per_evaluation(monkeypatch):
    calls, whole = [], ops.posterior
    monkeypatch.setattr(
        ops, "posterior", lambda *args, **how: calls.append(1) or whole(*args, **how)
    )
    cloud, sch = (
        PointCloud(torch.randn(9, 3, generator=torch.Generator().manual_seed(0))),
        schedule.VP(),
    )
    result = log_prob(
        Denoiser.exact(cloud, sch),
        cloud.y[:2],
        (0.5, 5.0),
        exact(cloud, sch),
        method="heun",
        steps=4,
    )
    assert len(calls) == result.evaluations == 9
    other = PointCloud(cloud.y.clone())  # another cloud: nothing to share
    log_prob(
        Denoiser.exact(cloud, sch),
        cloud.y[:2],
        (0.5, 5.0),
        exact(other, sch),
        method="heun",
        steps=4,
    )
    assert len(calls) == 9 + 18


def test_the_adaptive_steps_are_differentiable():
    sch = schedule.EDM()

    def value(x, scale):
        denoiser = Denoiser(lambda x, t: t[:, None] * x / (scale + t[:, None] ** 2), sch)
        return log_prob(denoiser, x, (0.5, 2.0), Divergence(), rtol=1e-6, atol=1e-6).log_prob

    x = torch.randn(
        2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    # other steps, other errors
    assert torch.autograd.gradcheck(value, (x, scale), rtol=1e-2, atol=1e-4)


def test_one_stiff_sample_is_not_averaged_away():
    alone = integration(0.03)[0]
    assert alone.max() < 0.01  # with calm samples beside it, the same bound
    sch = schedule.EDM()
    y = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cloud, stiff = PointCloud(y), y[:1] + 0.3
    calm = y[:1].expand(200, 3)
    many = log_prob(
        Denoiser.exact(cloud, sch), torch.cat([stiff, calm]), (0.05, 20.0), exact(cloud, sch)
    )
    one = log_prob(Denoiser.exact(cloud, sch), stiff, (0.05, 20.0), exact(cloud, sch))
    assert (many.log_prob[0] - one.log_prob[0]).abs() < 1e-2
