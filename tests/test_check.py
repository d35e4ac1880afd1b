"""`df.check` passes sound networks, and finds and names every mistake planted around the exact
denoiser, which stands for a network that is wrong by a few per cent.
"""

from __future__ import annotations

import math

import pytest
import torch
from tensors import column
from torch import nn

import dfkernels as df
from dfkernels import schedule
from dfkernels.methods.denoiser import PREDICTION_TYPES

SCHEDULES = {
    "VP": schedule.VP(),
    "EDM": schedule.EDM(),
    "RectifiedFlow": schedule.RectifiedFlow(),
    "ReversedRectifiedFlow": schedule.ReversedRectifiedFlow(),
    "Tabulated": schedule.Tabulated(
        torch.cumprod(
            1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square(), 0
        )
    ),
}
KIND = {"VP": "epsilon", "EDM": "sample", "Tabulated": "v_prediction"}


def ring() -> torch.Tensor:
    """An ellipse in the plane, off the origin."""
    turn = torch.linspace(0, 2 * math.pi, 801)[:-1]
    return torch.stack([turn.cos() + 0.5, 0.7 * turn.sin()], 1)


def blobs() -> torch.Tensor:
    """Images [3, 3, 3]: mixtures of a few patterns."""
    generator = torch.Generator().manual_seed(5)
    patterns = torch.randn(6, 3, 3, 3, generator=generator)
    weights = torch.randn(500, 6, generator=generator).relu()
    return torch.einsum("nk,kcij->ncij", weights, patterns) / 2 + 0.3


class Network(nn.Module):
    """What a network with a smooth error (of 3 %) returns for data y under a schedule, at the time
    and the state that it understands by t and x.
    """

    def __init__(self, y, sch, kind, seed=0, time=lambda t: t, scale=lambda x, t: x, error=0.03):
        super().__init__()
        self.exact, self.kind = df.Denoiser.exact(df.PointCloud(y), sch), kind
        self.seed, self.time, self.scale, self.error = seed, time, scale, error

    def forward(self, x, t):
        sch = self.exact.schedule
        t = self.time(t.double())
        low, high = sch.t_range
        t = t.clamp(max(low, 1e-4), min(high, 1e6) * (1 - 1e-9))
        x = self.scale(x, t)
        eps, mean = self.exact.both(x, t)
        alpha, sigma = (column(level, x) for level in sch(t))
        alpha_rate, sigma_rate = (column(rate, x) for rate in sch.rates(t))
        out = {
            "epsilon": eps,
            "sample": mean,
            "v_prediction": alpha * eps - sigma * mean,
            "flow": alpha_rate * mean + sigma_rate * eps,
            "score": -eps / sigma,
        }[self.kind]
        generator = torch.Generator().manual_seed(self.seed)
        d = x[0].numel()
        w = torch.randn(d, d, generator=generator).to(x) * 1.5 / (d**0.5 * x.std())
        phase = 6 * torch.rand(d, generator=generator).to(x)
        error = torch.sin(x.flatten(1) @ w + phase).view_as(x) * 2**0.5
        return out + self.error * out.square().mean().sqrt() * error


def kind_of(name: str) -> str:
    return KIND.get(name, "flow")


def check(network, sch, kind, y, **given) -> df.CheckReport:
    return df.check(df.Denoiser(network, sch, kind), df.PointCloud(y), queries=64, **given)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_sound_network_passes(name, kind):
    for seed, y in enumerate((ring(), blobs())):
        network = Network(y, SCHEDULES[name], kind, seed)
        generator = torch.Generator().manual_seed(seed)
        report = check(network, SCHEDULES[name], kind, y, generator=generator)
        assert report.ok and report.cause is None and "perhaps" not in report.verdict, report
        assert all(0 < level.error < level.allowed for level in report.levels)
        assert all(level.ess > 90 for level in report.levels)


def test_the_exact_denoiser_has_no_error():
    y = ring().double()
    report = df.check(df.Denoiser.exact(df.PointCloud(y), schedule.VP()), df.PointCloud(y))
    assert report.ok and report.evaluations == 4
    assert max(level.error for level in report.levels) < 1e-12
    assert report.levels[0].sigma / report.levels[0].alpha >= y.std(0).square().mean().sqrt() * 0.9


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("data", [ring, blobs])
def test_a_wrong_sign_is_named(name, data):
    kind, y = kind_of(name), data()
    network = Network(y, SCHEDULES[name], kind)
    report = check(lambda x, t: -network(x, t), SCHEDULES[name], kind, y)
    assert report.cause == ("flow sign" if kind == "flow" else "sign")
    assert not report.ok and "With the output negated the error falls from" in report.verdict
    assert max(report.explanations[0].errors) < max(level.error for level in report.levels) / 5


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_wrong_prediction_type_is_named(name, kind):
    y, sch = blobs(), SCHEDULES[name]
    # with sigma = t and alpha = 1 the velocity is eps
    same = {"epsilon", "flow"} if name == "EDM" and kind in ("epsilon", "flow") else {kind}
    changes = {f"prediction_type={one!r}" for one in same}
    for claimed in PREDICTION_TYPES:
        if claimed not in same:
            report = check(Network(y, sch, kind), sch, claimed, y)
            assert report.cause == "prediction type", (claimed, report)
            assert report.explanations[0].change in changes


CLOCKS = {
    "reversed": ("VP", "epsilon", lambda t: 1 - t, "1 - t as"),
    "reversed flow": ("RectifiedFlow", "flow", lambda t: 1 - t, "1 - t as"),
    "reversed table": ("Tabulated", "v_prediction", lambda t: 999 - t, "999 - t as"),
    "999 t": ("VP", "epsilon", lambda t: t / 999, "999 t as"),
    "1000 t": ("ReversedRectifiedFlow", "flow", lambda t: t / 1000, "1000 t as"),
    "t/1000": ("Tabulated", "epsilon", lambda t: 1000 * t, "t/1000 as"),
    "ln(s)/4": ("EDM", "sample", lambda t: (4 * t).exp(), "ln(sigma/alpha)/4 as"),
    "sigma^2": ("EDM", "epsilon", lambda t: t.sqrt(), "sigma^2 as"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CLOCKS)
def test_a_wrong_clock_is_named(case):
    name, kind, time, change = CLOCKS[case]
    y = blobs()
    network = Network(y, SCHEDULES[name], kind, time=time)
    report = check(network, SCHEDULES[name], kind, y)
    assert report.cause == "clock", report
    # 999 t and 1000 t are the same to a thousandth
    assert change.replace("1000", "999") in report.verdict.replace("1000", "999")
    assert report.evaluations < 60


@pytest.mark.slow
def test_two_mistakes_at_once_are_named():
    """Z-image and its like: the clock is reversed and the velocity is eps - x_0."""
    y, sch = blobs(), schedule.RectifiedFlow()
    network = Network(y, sch, "flow", time=lambda t: 1 - t / 1000)
    report = check(lambda x, t: -network(x, t), sch, "flow", y)
    assert report.cause == "clock"
    assert "(1 - t) as the network's time and the output negated" in report.verdict


@pytest.mark.slow
@pytest.mark.parametrize("data", [ring, blobs])
@pytest.mark.parametrize(
    "name, kind, scale, change",
    [
        ("VP", "epsilon", lambda sch, t: sch.alpha(t), "x/alpha given"),
        ("RectifiedFlow", "flow", lambda sch, t: sch.alpha(t), "x/alpha given"),
        (
            "EDM",
            "epsilon",
            lambda sch, t: (1 + t**2).sqrt(),
            "x/sqrt(alpha^2 + sigma^2) given",
        ),
        (
            "EDM",
            "sample",
            lambda sch, t: (0.25 + t**2).sqrt(),
            "x/sqrt(alpha^2/4 + sigma^2) given",
        ),
    ],
)
def test_a_wrong_input_scale_is_named(data, name, kind, scale, change):
    y, sch = data(), SCHEDULES[name]
    network = Network(y, sch, kind, scale=lambda x, t: x * column(scale(sch, t), x))
    report = check(network, sch, kind, y)
    assert report.cause == "input scale" and change in report.verdict, report


@pytest.mark.parametrize("factor", [0.18215, 0.5, 2.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_wrong_output_scale_is_named(name, factor):
    kind, y = kind_of(name), blobs()
    network = Network(y, SCHEDULES[name], kind)
    report = check(lambda x, t: factor * network(x, t), SCHEDULES[name], kind, y)
    assert report.cause == "output scale", report
    times = float(report.explanations[0].change.removeprefix("the output times "))
    assert times == pytest.approx(1 / factor, rel=0.1)


MAPS = {  # what the network was trained on, of the cloud's y
    "[0, 1] for [-1, 1]": (0.5, 0.5),
    "[-1, 1] for [0, 1]": (2.0, -1.0),
    "scale factor": (0.18215, 0.0),
    "shift and scale of SD3": (1.5305, -0.0609 * 1.5305),
    "shift": (1.0, 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MAPS)
@pytest.mark.parametrize("name", ["VP", "EDM", "RectifiedFlow"])
def test_another_scale_of_the_data_is_named(case, name):
    (a, b), kind, y = MAPS[case], kind_of(name), blobs()
    network = Network(a * y + b, SCHEDULES[name], kind, error=0.01)
    report = check(network, SCHEDULES[name], kind, y)
    assert report.cause == "data scale", report
    change = report.explanations[0].change.split()
    assert change[:4] == ["the", "data", "y", "mapped"]
    if report.explanations[0].fitted == 2:
        assert float(change[5]) == pytest.approx(a, rel=0.06)
        sign = -1 if change[7] == "-" else 1
        assert sign * float(change[8]) == pytest.approx(b, abs=0.06 * a)


@pytest.mark.slow
def test_latents_that_were_normalised_per_channel_are_named():
    y, sch = blobs(), schedule.VP()
    a, b = torch.tensor([0.4, 1.5, 0.8]), torch.tensor([0.5, -0.4, 0.1])
    network = Network(a[:, None, None] * y + b[:, None, None], sch, "v_prediction")
    report = check(network, sch, "v_prediction", y)
    best = report.explanations[0]
    assert report.cause == "data scale" and best.fitted == 6, report
    numbers = [
        [float(n) for n in part.split(")")[0].split(",")] for part in best.change.split("(")[1:]
    ]
    assert torch.allclose(torch.tensor(numbers), torch.stack([a, b]), atol=0.06)


@pytest.mark.slow
def test_levels_of_another_schedule_are_named():
    for y, name, other, sch in (
        (ring(), "SubVP(beta_min=0.1, beta_max=20.0)", schedule.SubVP(), schedule.VP()),
        (blobs(), "place of", schedule.VP(0.1, 12.0), schedule.VP()),
    ):
        report = check(Network(y, other, "epsilon", error=0.01), sch, "epsilon", y)
        assert report.cause == "noise level" and name in report.verdict, report


@pytest.mark.slow
def test_a_flow_whose_levels_are_shifted_twice_is_named():
    y, sch = blobs(), schedule.ReversedRectifiedFlow()
    network = Network(y, sch, "flow", time=lambda t: 3 * t / (1 + 2 * t))
    report = check(network, sch, "flow", y)
    assert report.cause == "noise level" and "in place of" in report.verdict, report


class Dropout(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.dropout = network, nn.Dropout(0.1)

    def forward(self, x, t):
        return self.dropout(self.network(x, t))


def test_train_mode_is_named_and_left_as_it_was():
    y, sch = blobs(), schedule.VP()
    network = Dropout(Network(y, sch, "epsilon", error=0.01).eval())
    denoiser = df.Denoiser(network, sch)
    torch.manual_seed(0)
    report = df.check(denoiser, df.PointCloud(y), queries=64)
    assert report.cause == "train mode" and "call .eval()" in report.verdict, report
    assert network.dropout.training and not network.network.training
    assert df.check(denoiser.eval(), df.PointCloud(y), queries=64).ok


def test_a_network_that_draws_numbers_is_named():
    y, sch = blobs(), schedule.VP()
    network, generator = Network(y, sch, "epsilon"), torch.Generator().manual_seed(0)
    noisy = lambda x, t: network(x, t) + 0.05 * torch.randn(x.shape, generator=generator)
    report = check(noisy, sch, "epsilon", y)
    assert report.cause == "random" and "Two calls" in report.verdict


def test_guidance_is_named():
    y, sch = ring(), schedule.VP()
    label = (y[:, 0] < 0.5).long()
    part = y[label == 0]
    networks = [Network(part, sch, "epsilon"), Network(y, sch, "epsilon")]

    def network(x, t, label):  # 1: no condition
        both = networks[0](x, t), networks[1](x, t)
        return torch.where(label[:, None] == 0, *both)

    guided = df.ClassifierFreeGuidance(network, 4.0, {"label": 1})
    report = check(guided, sch, "epsilon", part, label=torch.zeros(64, dtype=torch.int64))
    assert report.cause == "guidance" and "scale 1 in place of 4" in report.verdict, report
    assert guided.scale == 4


def wrong_networks(y: torch.Tensor, sch: schedule.Schedule, kind: str):
    """Networks whose error has none of the causes."""
    d = y[0].numel()
    w = torch.randn(d, d, generator=torch.Generator().manual_seed(3)) / d**0.5
    yield "zero", lambda x, t: torch.zeros_like(x)
    yield "random", lambda x, t: torch.tanh(x.flatten(1) @ w).view_as(x)
    order = torch.randperm(d, generator=torch.Generator().manual_seed(4))
    yield "other data", Network(y.flatten(1)[:, order].view_as(y), sch, kind)
    exact = df.Denoiser.exact(df.PointCloud(y), sch)
    part = df.Denoiser.exact(df.PointCloud(y[y.flatten(1)[:, 0] > 0.5]), sch)

    def guided(x, t):
        mean = exact(x, t) + 4 * (part(x, t) - exact(x, t))
        alpha, sigma = (column(level, x) for level in sch(t.double()))
        eps = (x - alpha * mean) / sigma
        rates = (column(rate, x) for rate in sch.rates(t.double()))
        alpha_rate, sigma_rate = rates
        flow = alpha_rate * mean + sigma_rate * eps
        return {"epsilon": eps, "sample": mean, "flow": flow}[kind]

    yield "guided", guided


@pytest.mark.slow
@pytest.mark.parametrize("name", ["VP", "EDM", "RectifiedFlow"])
def test_no_cause_is_named_where_none_applies(name):
    sch, kind, y = SCHEDULES[name], kind_of(name), blobs()
    for what, network in wrong_networks(y, sch, kind):
        report = check(network, sch, kind, y)
        assert report.cause == "unknown", (what, report)
        assert "None of" in report.verdict


def test_a_change_that_explains_most_of_an_error_is_said_to():
    """A negated velocity of a network that is off by half a standard deviation besides."""
    y, sch = ring(), schedule.RectifiedFlow()
    network = Network(y, sch, "flow", error=0.6)
    report = check(lambda x, t: -network(x, t), sch, "flow", y)
    assert report.cause == "unknown"
    assert "explains all of it, but one explains most: with the output negated" in report.verdict
    assert "Perhaps the velocity points the other way" in report.verdict
    assert "still 1.5 times what a sound network has" in report.verdict


def test_a_report_prints_a_table_and_repeats():
    y, sch = ring(), schedule.VP()
    denoiser, cloud = df.Denoiser(Network(y, sch, "epsilon"), sch), df.PointCloud(y)
    report = df.check(denoiser, cloud)
    assert str(report) == str(df.check(denoiser, cloud))
    lines = str(report).splitlines()
    assert lines[0].split()[:5] == ["sigma/alpha", "t", "ESS", "error", "allowed"]
    assert len(lines) == 6 and lines[4] == report.verdict and lines[5].startswith("Note: ")
    other = df.check(denoiser, cloud, generator=torch.Generator().manual_seed(1))
    assert other.ok and other != report


def test_levels_and_queries_may_be_given_and_conditions_reach_the_network():
    y, sch, seen = ring(), schedule.EDM(), []
    network = Network(y, sch, "sample")

    def labelled(x, t, label):
        seen.append(label)
        return network(x, t)

    report = df.check(
        df.Denoiser(labelled, sch, "sample"),
        df.PointCloud(y),
        noise=(0.5, 8.0),
        queries=10,
        label=torch.zeros(10),
    )
    assert report.ok and [label.shape for label in seen] == [(10,)] * 4
    assert [level.sigma for level in report.levels] == pytest.approx([0.5, 2.0, 8.0])


def test_masked_atoms_and_every_storage_are_taken():
    y = ring()
    prior = torch.zeros(len(y))
    prior[::2] = -math.inf
    y[::2] = math.nan
    cloud, sch = df.PointCloud(y, prior), schedule.VP()
    assert df.check(df.Denoiser.exact(cloud, sch), cloud).ok
    images = (blobs() * 40 + 100).clamp(0, 255).to(torch.uint8)
    cloud = df.PointCloud(images, scale=1 / 40, offset=-2.5)
    network = Network(images / 40 - 2.5, sch, "epsilon")
    assert df.check(df.Denoiser(network, sch), cloud).ok
    half = df.PointCloud(blobs().bfloat16())
    assert df.check(df.Denoiser.exact(half, sch), half).ok


def test_a_noise_predictor_of_a_schedule_without_signal_at_its_end_gets_a_note():
    y, sch = ring(), schedule.RectifiedFlow()
    report = df.check(df.Denoiser(Network(y, sch, "epsilon"), sch), df.PointCloud(y))
    assert report.ok and "alpha = 0 at t = 0" in report.notes[0]


def error_of(denoiser, cloud, **given):
    with pytest.raises((TypeError, ValueError)) as caught:
        df.check(denoiser, cloud, **given)
    return str(caught.value)


def test_bad_input_is_named():
    y, sch = ring(), schedule.VP()
    cloud, zero = df.PointCloud(y), df.Denoiser(lambda x, t: torch.zeros_like(x), sch)
    assert error_of(zero.network, cloud).startswith("denoiser: expected a Denoiser, got function")
    assert error_of(zero, y).startswith(
        "cloud: expected a PointCloud, a ShardedCloud or a GaussianMixture, got Tensor; wrap it"
    )
    nan = df.Denoiser(lambda x, t: torch.full_like(x, math.nan), sch)
    assert error_of(nan, cloud).startswith("network: returned NaN or inf for 256 of 256 samples")
    fixed = df.Denoiser(lambda x, t: torch.zeros(len(x), 3), sch)
    assert error_of(fixed, cloud) == "network: expected output of shape [256, 2], got [256, 3]"
    assert error_of(zero, df.PointCloud(y[:1])) == (
        "cloud: expected at least 4 atoms of comparable weight, got an ESS of 1"
    )
    same = df.PointCloud(torch.ones(50, 2))
    assert (
        error_of(zero, same) == "cloud: expected atoms that differ, got atoms that are all the same"
    )
    far = error_of(zero, df.PointCloud(1000 * y))
    assert far.startswith("schedule: expected noise sigma/alpha up to ") and "units" in far
    on_cpu = "queries: expected an integer of at least 1, got 0"
    assert error_of(zero, cloud, queries=0) == on_cpu
    low = error_of(zero, cloud, noise=(1e-5, 1e-4))
    assert low.startswith("noise: expected levels at which several atoms share")


def test_the_standard_ddpm_table_is_searched():
    """Rescaled to zero terminal SNR it has three entries below 2^-24 before its 0."""
    table = schedule.Tabulated(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))
    network = df.Denoiser(lambda x, t: 0 * x, table)
    y = torch.rand(20, 4, generator=torch.Generator().manual_seed(1))
    report = df.check(network, df.PointCloud(y), queries=4)
    assert not report.ok and "noise level" in [found.cause for found in report.explanations]


def test_a_change_that_does_not_qualify_hides_none_that_does(monkeypatch):
    y, sch = ring(), schedule.VP()
    exact = df.Denoiser.exact(df.PointCloud(y), sch)
    far = [
        df.methods.convention.Explanation("clock", "one", (0.1,) * 3, 0.72, changes=2),
        df.methods.convention.Explanation("input scale", "other", (0.1,) * 3, 0.95),
    ]
    monkeypatch.setattr(df.methods.convention, "explanations", lambda *given: far)
    shift = 1.0
    for _ in range(2):  # then the error is 2.8 times what is allowed: one falls by less than 4
        report = check(lambda x, t, shift=shift: exact(x, t) + shift, sch, "sample", y)
        shift *= 2.8 / max(level.error / level.allowed for level in report.levels)
    assert far[0].rank < far[1].rank
    assert report.cause == "input scale" and "With other the error falls" in report.verdict
    assert report.explanations == (far[1], far[0])


def test_a_table_of_classes_is_not_taken_for_one_of_times():
    y, sch = ring()[::16], schedule.EDM()
    network = Network(y, sch, "sample", time=lambda t: (4 * t).exp())
    network.classes = nn.Embedding(10, 2)
    report = df.check(df.Denoiser(network, sch, "sample"), df.PointCloud(y), queries=16)
    assert report.cause == "clock", report


def test_a_network_that_ignores_its_input_has_no_other_noise_levels():
    y = 2 * torch.rand(500, 8, generator=torch.Generator().manual_seed(1)) - 1
    constant = lambda x, t: y.mean(0).expand_as(x)
    report = check(constant, schedule.Cosine(), "sample", y)
    assert report.cause == "unknown", report


def test_few_atoms_of_many_dimensions_are_not_taken_for_other_units():
    y = torch.randn(400, 784, generator=torch.Generator().manual_seed(1))
    zero = df.Denoiser(lambda x, t: torch.zeros_like(x), SCHEDULES["Tabulated"])
    few = error_of(zero, df.PointCloud(y))
    assert few.endswith(
        "400 atoms are too few, in 784 dimensions, at the noise that the schedule reaches"
    )
    assert "units" not in few
