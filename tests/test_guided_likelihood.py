"""NLL against guidance and seeds: Gaussian classes, whose guided flows have a closed form, and runs
that are killed and go on."""

from __future__ import annotations

import json
import math

import pytest
import torch

import dfkernels as df
from dfkernels import schedule
from dfkernels.methods.guided_likelihood import (
    GuidedSample,
    ScaleSummary,
    guided_likelihood,
    summarised,
)

NOISE = (0.1, 20.0)
MEANS = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]], dtype=torch.float64)  # null, the class


def classes(sch, means, variance, scale):
    """The guided denoiser of N(means_k, variance_k I), whose noise prediction is linear."""
    variance = torch.tensor(variance, dtype=torch.float64)

    def eps(x, t, label):
        alpha, sigma = (level[:, None] for level in sch(t))
        v = variance[label][:, None]
        return (sigma * (x - alpha * means[label]) / (alpha**2 * v + sigma**2)).to(x.dtype)

    guided = df.ClassifierFreeGuidance(eps, scale, {"label": 0})
    return df.Denoiser(guided, sch).bind(label=torch.tensor([1]))


class Flow:
    """xbar = x/alpha of the flow at scale w between the levels s and S, in closed form:
    xbar_s = center + ratio (xbar_S - center), for equal variances, or equal means of 0.
    """

    def __init__(self, means, variance, scale):
        null, own = variance
        power = lambda s: (null + s * s) ** ((1 - scale) / 2) * (own + s * s) ** (scale / 2)
        self.ratio = power(NOISE[0]) / power(NOISE[1])
        self.center = means[0] + scale * (means[1] - means[0])

    def sample(self, start):
        return self.center + self.ratio * (start - self.center)

    def nll(self, x, data_std):
        """Nats per number at xbar_s = x, from N(0, S^2 + data_std^2)."""
        start, variance = self.center + (x - self.center) / self.ratio, NOISE[1] ** 2 + data_std**2
        prior = (start.square() / variance + math.log(2 * math.pi * variance)).mean(-1) / 2
        return prior + math.log(self.ratio)


def noise_of(seed, shape=(3,)):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("under", ["model", "guided"])
@pytest.mark.parametrize(
    "sch, means, variance",
    [(schedule.VP(), MEANS, (1.0, 1.0)), (schedule.EDM(), 0 * MEANS, (1.0, 0.25))],
    ids=["means, VP", "variances, EDM"],
)
def test_gaussian_classes(sch, means, variance, under):
    at = lambda scale: classes(sch, means, variance, scale)
    how = dict(sampling_steps=20, method="rk4", steps=80, data_std=0.5, dtype=torch.float64)
    rows = guided_likelihood(at, (3,), (0, 1, 3), (5, 2), NOISE, under=under, batch=3, **how)
    assert [row[:2] for row in rows] == [(w, seed) for w in (0, 1, 3) for seed in (5, 2)]
    grid = df.time_grid(sch, 20, NOISE, "edm")
    first, last = sch(grid[0]), sch(grid[-1])
    for row in rows:
        start = math.hypot(NOISE[1], 0.5) * noise_of(row.seed)
        own, model = (Flow(means, variance, w) for w in (row.scale, 1))
        x = df.sample(at(row.scale), first[0] * start, grid, "heun").x[-1] / last[0]
        assert (x - own.sample(start)).abs().max() < 0.02  # Heun's error over 20 steps
        wanted = (own if under == "guided" else model).nll(x, 0.5).item()
        assert row.nll == pytest.approx(wanted, abs=1e-5)  # rk4's over 80
        assert row.bits_per_dim == pytest.approx(row.nll / math.log(2), rel=1e-12)
        assert 0 < row.integration_error < 1e-5
        # Rademacher probes are exact for a diagonal Jacobian, but for rounding
        assert 0 <= row.trace_error < 1e-12
        assert row.evaluations == 2 * 20 + 4 * 80 + 1


def test_the_mean_under_the_guided_flow_is_the_entropy_of_its_law():
    """And what it is less than under the model is the divergence between two normal laws."""
    at, n = lambda scale: classes(schedule.EDM(), MEANS, (1.0, 1.0), scale), 256
    how = dict(sampling_steps=30, method="rk4", steps=30, dtype=torch.float64, batch=n)
    guided, model = (
        guided_likelihood(at, (3,), (2.0,), range(n), NOISE, under=under, **how)
        for under in ("guided", "model")
    )
    flow, std = Flow(MEANS, (1.0, 1.0), 2.0), math.hypot(NOISE[1], 1.0)
    entropy = math.log(2 * math.pi * math.e * (std * flow.ratio) ** 2) / 2
    found = summarised(guided)[0]
    assert abs(found.nll - entropy) < 4 * found.standard_error
    assert found.standard_error == pytest.approx(1 / math.sqrt(2 * 3 * n), rel=0.2)
    gap = [a.nll - b.nll for a, b in zip(model, guided, strict=True)]
    # law of the other flow: the center is elsewhere, the variance the same
    shift = (1 - flow.ratio) * (flow.center - MEANS[1])
    divergence = (shift.square().mean() / (2 * (std * flow.ratio) ** 2)).item()
    error = torch.tensor(gap).std().item() / math.sqrt(n)
    assert abs(sum(gap) / n - divergence) < 4 * error + 1e-3


class Mixing(torch.nn.Module):
    """A noise prediction whose Jacobian is not diagonal; counts the samples that it was given."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w = torch.nn.Parameter(0.3 * torch.randn(4, 4, generator=generator).double())
        self.samples = 0

    def forward(self, x, t, label):
        self.samples += len(x)
        out = (x.flatten(1) @ self.w).tanh() * (1 + label[:, None] / 4)
        return out.view(x.shape)


def mixing():
    network = Mixing()

    def at(scale):
        guided = df.ClassifierFreeGuidance(network, scale, {"label": 0})
        return df.Denoiser(guided, schedule.VP()).bind(label=torch.tensor([2]))

    return at, network


QUICK = dict(
    shape=(1, 2, 2), noise=(0.1, 5.0), sampling_steps=4, method="rk4", steps=4, dtype=torch.float64
)


def close(some, others, tolerance=1e-12):
    for a, b in zip(some, others, strict=True):
        assert a[:2] == b[:2]
        assert torch.allclose(torch.tensor(a[2:6]), torch.tensor(b[2:6]), atol=tolerance, rtol=0)


def test_a_row_is_that_of_its_seed_whatever_else_is_computed():
    at, _ = mixing()
    together = guided_likelihood(at, scales=(1, 4), seeds=range(5), batch=5, **QUICK)
    alone = guided_likelihood(at, scales=(4,), seeds=(3,), **QUICK)
    close(alone, [together[8]])
    assert max(row.trace_error for row in together) > 1e-4
    pairs = guided_likelihood(at, scales=(1, 4), seeds=range(5), batch=2, **QUICK)
    close(pairs, together)


def test_the_trace_error_is_the_probes_spread():
    """Over many seeds the exact trace is off by as much as is said."""
    at, _ = mixing()
    how = dict(scales=(2,), seeds=range(200), batch=200, **QUICK)
    exact = guided_likelihood(at, trace="divergence", **how)
    found = guided_likelihood(at, probes=3, **how)
    off = [a.nll - b.nll for a, b in zip(found, exact, strict=True)]
    said = summarised(found)[0].trace_error
    assert math.sqrt(sum(e * e for e in off) / len(off)) == pytest.approx(said, rel=0.2)
    assert all(row.trace_error == 0 for row in exact)


class Killed(BaseException):
    pass


def test_a_run_that_was_killed_goes_on_with_the_same_bits(tmp_path):
    at, network = mixing()
    how = dict(scales=(1, 3), seeds=range(5), batch=2, configuration={"prompt": "σ"}, **QUICK)
    whole = guided_likelihood(at, checkpoint=tmp_path / "whole.json", **how)
    calls = []

    def killed(done, total):
        calls.append((done, total))
        if done == 27:  # in the fourth of six batches
            raise Killed

    file = tmp_path / "part.json"
    with pytest.raises(Killed):
        guided_likelihood(at, checkpoint=file, callback=killed, **how)
    assert calls == [(i, 48) for i in range(1, 28)]  # 4 + 4 steps each
    assert [(r["scale"], r["seed"]) for r in json.loads(file.read_text())["rows"]] == [
        *((1.0, seed) for seed in range(5))
    ]
    network.samples = 0
    assert guided_likelihood(at, checkpoint=file, **how) == whole
    assert file.read_bytes() == (tmp_path / "whole.json").read_bytes()
    spent, network.samples = network.samples, 0
    assert guided_likelihood(at, checkpoint=file, **how) == whole and network.samples == 0
    assert spent == 5 * (2 * 2 * 4 + 4 * 4 + 1)  # guided: two evaluations each; model: one


def test_a_finished_run_may_be_given_more(tmp_path):
    at, network = mixing()
    file = tmp_path / "rows.json"
    first = guided_likelihood(at, scales=(1,), seeds=(0, 1), checkpoint=file, **QUICK)
    network.samples = 0
    more = guided_likelihood(at, scales=(2, 1), seeds=(1, 2), checkpoint=file, **QUICK)
    assert more[2] == first[1]
    assert network.samples == 2 * 33 + 1 * 25  # the scale 2 twice, the scale 1 once
    assert len(json.loads(file.read_text())["rows"]) == 5


def test_one_probe_has_no_spread_and_the_file_stays_json(tmp_path):
    at, _ = mixing()
    file = tmp_path / "rows.json"
    how = dict(scales=(1,), seeds=(0,), probes=1, checkpoint=file, **QUICK)
    row = guided_likelihood(at, **how)[0]
    assert math.isnan(row.trace_error)
    assert '"trace_error": null' in file.read_text()
    again = guided_likelihood(at, **how)[0]
    assert math.isnan(again.trace_error) and again[:5] == row[:5] and again[6] == row[6]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(under="guided"), "under: model there, guided here"),
        (dict(steps=5), "steps: 4 there, 5 here"),
        (dict(trace="divergence"), "trace: hutchinson there, divergence here"),
        (dict(configuration={"prompt": "b"}), "prompt: a there, b here"),
        (dict(configuration={}), "prompt: a there, nothing here"),
        (dict(dtype=torch.float32), "dtype: float64 there, float32 here"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_of_another_configuration_are_refused(tmp_path, change, message):
    at, _ = mixing()
    how = dict(scales=(1,), seeds=(0,), checkpoint=tmp_path / "rows.json", **QUICK)
    how["configuration"] = {"prompt": "a"}
    guided_likelihood(at, **how)
    with pytest.raises(ValueError) as caught:
        guided_likelihood(at, **how | change)
    assert str(caught.value) == (
        f"{tmp_path}/rows.json: results of another configuration: {message}: delete it, or name "
        "another file"
    )


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "{}", '{"configuration": {}, "rows": [{"scale": 1}]}', "\udcff"],
    ids=["empty", "truncated", "list", "nothing", "row", "bytes"],
)
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, content):
    at, _ = mixing()
    file = tmp_path / "rows.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"rows.json: no results to go on from.*: delete it"):
        guided_likelihood(at, scales=(1,), seeds=(0,), checkpoint=file, **QUICK)
    assert file.read_bytes() == before


def test_a_directory_is_no_file_of_results(tmp_path):
    at, _ = mixing()
    with pytest.raises(ValueError, match="cannot write: it is a directory"):
        guided_likelihood(at, scales=(1,), seeds=(0,), checkpoint=tmp_path, **QUICK)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (dict(scales=()), ValueError, "scales: expected at least one, got none"),
        (dict(scales=(1, 2, 1)), ValueError, "scales: expected distinct ones, got 1 twice"),
        (dict(scales=(math.nan,)), ValueError, "scales: expected a finite value, got nan"),
        (dict(seeds=(-1,)), ValueError, "seeds: expected an integer of at least 0, got -1"),
        (dict(seeds=(0.5,)), TypeError, "seeds: expected an integer, got float"),
        (dict(under="w"), ValueError, "under: expected 'model' or 'guided', got 'w'"),
        (dict(data_std=-1), ValueError, "data_std: expected a finite value >= 0, got -1.0"),
        (dict(shape=(0,)), ValueError, "shape: expected an integer of at least 1, got 0"),
        (dict(batch=0), ValueError, "batch: expected an integer of at least 1, got 0"),
        (dict(noise=(2, 1)), ValueError, "noise: expected 0 < noise[0] < noise[1]"),
        (
            dict(trace=df.Hutchinson(torch.Generator())),
            ValueError,
            "trace: expected 'hutchinson' with probes=, whose probes follow the seeds, got a",
        ),
        (dict(method="euler"), ValueError, "method: expected 'heun' or 'rk4' or 'dopri5'"),
        (dict(method="dopri5"), ValueError, "steps: expected None with method='dopri5', which ch"),
        (
            dict(trace="exact", probes=2),
            ValueError,
            "probes: expected None unless trace='hutchinson', which draws them, got 2",
        ),
        (dict(probes=0), ValueError, "probes: expected an integer of at least 1, got 0"),
        (dict(dtype=torch.float16), ValueError, "dtype: expected "),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, kind, message):
    at, network = mixing()
    with pytest.raises(kind) as caught:
        guided_likelihood(at, **dict(scales=(1,), seeds=(0,), **QUICK) | change)
    assert str(caught.value).startswith(message)
    assert network.samples == 0


def test_what_makes_no_denoiser_and_what_returns_nan_is_named():
    message = "^denoiser_at: expected a function that returns a Denoiser, got float$"
    with pytest.raises(TypeError, match=message):
        guided_likelihood(float, scales=(1,), seeds=(0,), **QUICK)
    broken = df.Denoiser(lambda x, t: x * (math.nan if len(x) == 3 else 1), schedule.VP())
    with pytest.raises(ValueError, match=r"NaN or inf .* \(guidance scale 2, seeds 7 to 9\)$"):
        guided_likelihood(lambda w: broken, scales=(2,), seeds=(7, 8, 9), **QUICK)


def test_the_summary_of_a_scale():
    row = lambda scale, nll, **more: GuidedSample(scale, 0, nll, 0.0, **more, evaluations=1)
    rows = [
        row(2.0, 1.0, integration_error=0.1, trace_error=3.0),
        row(1.0, 5.0, integration_error=0.2, trace_error=0.0),
        row(2.0, 3.0, integration_error=0.3, trace_error=4.0),
    ]
    two, one = summarised(rows)
    assert two == ScaleSummary(2.0, 2, 2.0, 1.0, 0.3, math.sqrt(12.5))
    assert one[:3] == (1.0, 1, 5.0) and math.isnan(one.standard_error)
