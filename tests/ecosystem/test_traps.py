"""`df.check` and `df.audit` over a network of every library, read by its adapter: one that fits the
data, and one with a mistake that users of the library make, which is found and named.

The networks are exact: a data set in the library's own convention, within the library's own
wrappers where it has any. EDM and score_sde, which are no packages, have stand-ins.
"""

from __future__ import annotations

import pytest
import torch
from small_data import column, noise

import dfkernels as df
from dfkernels import adapt


def cloud(a=1.0, b=0.0, seed=6):
    """Images [3, 3, 3], mixtures of a few patterns, as a y + b."""
    patterns, weights = noise(6, 3, 3, 3, seed=5), noise(400, 6, seed=seed).relu()
    return df.PointCloud(a * (torch.einsum("nk,kcij->ncij", weights, patterns) / 2 + 0.3) + b)


def diffusers_clock(library, planted):
    """What SD3 is given, 1000 sigma, and what Flux is."""
    scheduler = library.FlowMatchEulerDiscreteScheduler()
    clock = (lambda sigma: sigma) if planted else (lambda sigma: 1000 * sigma)
    return adapt.from_diffusers(adapt.as_diffusers(cloud(), scheduler), scheduler, clock=clock)


def diffusers_shift(library, planted):
    """`set_timesteps` shifts the sigmas of its table, which are shifted already: a model that is
    told of the sigmas so made is at other levels than its input.
    """
    scheduler = library.FlowMatchEulerDiscreteScheduler(shift=3.0)
    once = library.FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.double().flip(0)
    shifted = 3 * once / (1 + 2 * once)

    def clock(sigma):
        if not planted:
            return 1000 * sigma
        i = torch.searchsorted(once, sigma.contiguous()).clamp(1, len(once) - 1)
        part = (sigma - once[i - 1]) / (once[i] - once[i - 1])
        return 1000 * torch.lerp(shifted[i - 1], shifted[i], part)

    plain = library.FlowMatchEulerDiscreteScheduler()
    return adapt.from_diffusers(adapt.as_diffusers(cloud(), plain), scheduler, clock=clock)


def diffusers_zero_snr(library, planted):
    """A model that was trained with `rescale_betas_zero_snr`, and a scheduler that says nothing of
    it.
    """
    how = dict(prediction_type="v_prediction", beta_schedule="scaled_linear")
    told = library.DDIMScheduler(**how, rescale_betas_zero_snr=not planted)
    trained = library.DDIMScheduler(**how, rescale_betas_zero_snr=True)
    return adapt.from_diffusers(adapt.as_diffusers(cloud(4.0), trained), told)


def edm(library, planted):
    """EDM2's latents are normalised before they reach the network: (z - mean)/deviation/2."""
    data = cloud(0.5 / 1.7, -0.3 * 0.5 / 1.7) if planted else cloud()
    return adapt.from_edm(adapt.as_edm(data))


def k_diffusion_wrapper(library, planted):
    """A wrapper returns x_0; what is inside returns the noise, as does `get_eps`."""
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    exact = df.Denoiser.exact(cloud(), df.schedule.Tabulated(table))
    model = library.external.DiscreteEpsDDPMDenoiser(exact.eps, table, quantize=False)

    def noise(x, sigma):
        return model.get_eps(x * column(model.get_scalings(sigma)[1], x), model.sigma_to_t(sigma))

    noise.sigma_min, noise.sigma_max = model.sigma_min, model.sigma_max
    return adapt.from_k_diffusion(noise if planted else model)


def azula(library, planted):
    """Data are at t = 0 there, and at t = 1 elsewhere."""
    exact = adapt.as_azula(cloud(), library.VPSchedule())
    network = lambda x, t: exact(x, 1 - t) if planted else exact(x, t)
    network.schedule = exact.schedule
    return adapt.from_azula(network)


def flow_matching(library, planted):
    """The velocity of diffusers and others is the negative."""
    path = library.CondOTProbPath()
    exact = adapt.as_velocity(cloud(), path)
    velocity = lambda x, t: -exact(x, t) if planted else exact(x, t)
    return adapt.from_flow_matching(velocity, path)


def torchcfm(library, planted):
    """`sample_location_and_conditional_flow(x0, x1)` of the data first, and then the noise."""
    matcher = library.ConditionalFlowMatcher(0.1)
    exact = adapt.as_torchcfm(cloud(), matcher)
    swapped = lambda t, x: -exact(1 - t, x)
    return adapt.from_torchcfm(swapped if planted else exact, matcher)


class VESDE:
    sigma_min, sigma_max = 0.01, 50.0

    def marginal_prob(self, x, t):
        return x, self.sigma_min * (self.sigma_max / self.sigma_min) ** t


def score_sde(library, planted):
    """Networks of VESDE return the score itself, others the noise."""

    def model(x, sigma):
        mean = df.ops.posterior(x, cloud().y, 1.0, sigma.float()).mean
        eps = (x - mean) / column(sigma, x)
        return eps if planted else -eps / column(sigma, x)

    return adapt.from_score_sde(model, VESDE())


# what is imported, the denoiser, the size of the data, the cause, and what the verdict says
CASES = {
    "diffusers, clock": ("diffusers", diffusers_clock, 1, "clock", "1000 t as the network's time"),
    "diffusers, shift": ("diffusers", diffusers_shift, 1, "clock", "1000 t as the network's time"),
    "diffusers, zero SNR": ("diffusers", diffusers_zero_snr, 4, "noise level", "zero terminal"),
    "EDM": (None, edm, 1, "data scale", "the data y mapped to"),
    "k-diffusion": (
        "k_diffusion",
        k_diffusion_wrapper,
        1,
        "prediction type",
        "prediction_type='epsilon'",
    ),
    "azula": ("azula.noise", azula, 1, "clock", "1 - t as the network's time"),
    "flow_matching": ("flow_matching.path", flow_matching, 1, "flow sign", "output negated"),
    "torchcfm": (
        "torchcfm.conditional_flow_matching",
        torchcfm,
        1,
        "clock",
        "1 - t as the network's time and the output negated",
    ),
    "score_sde": (None, score_sde, 1, "prediction type", "prediction_type='epsilon'"),
}


def covering(column):
    """Every case, counted in a column of the table."""
    mark = lambda case: pytest.mark.covers(case.partition(",")[0], column)
    return [pytest.param(case, marks=mark(case), id=case) for case in CASES]


@pytest.fixture
def made(case, request):
    """The denoiser that fits, the one with the mistake, the data, and what has to be found."""
    name, make, size, cause, said = CASES[case]
    if name == "k_diffusion":
        library = request.getfixturevalue("k_diffusion")
    else:
        library = None if name is None else pytest.importorskip(name)
    return make(library, False), make(library, True), cloud(float(size)), cause, said


@pytest.mark.parametrize("case", covering("check"))
def test_a_network_that_fits_passes_and_a_planted_mistake_is_named(case, made):
    sound, planted, data, cause, said = made
    report = df.check(sound, data, queries=64)
    assert report.ok and report.cause is None, report
    assert max(level.error for level in report.levels) < 0.02
    report = df.check(planted, data, queries=64)
    assert report.cause == cause and said in report.verdict, report


@pytest.mark.parametrize("case", covering("audit"))
def test_an_audit_measures_a_network_that_fits_and_stops_at_a_planted_mistake(case, made):
    """What is exact has no distance from the exact mean, and memorises."""
    sound, planted, data, cause, said = made
    size = float(CASES[case][2])
    how = dict(levels=3, queries=32, points=8, samples=16)
    report = df.audit(sound, data, cloud(size, seed=7), **how)
    found = {finding.name: finding.status for finding in report.findings}
    assert found["convention"] == "good" and found["memorisation"] == "bad", report
    for level in report.levels:
        assert level.errors.distance.value < 4e-4 * level.best.value + 1e-6
    report = df.audit(planted, data, cloud(size, seed=7), **how)
    assert not report.ok and report.check.cause == cause and report.levels == ()
    assert said in report.verdict
