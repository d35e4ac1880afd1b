"""`df.audit` measures what is known in closed form, and its verdict names what was planted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math

import pytest
import torch
from tensors import normal
from test_global_state import STATES
from torch import nn

import dfkernels as df
from dfkernels import schedule
from dfkernels.methods.audit import estimates, thresholds, verdict

EDM = schedule.EDM()
VARIANCES = torch.tensor([0.2, 0.5, 1.0, 1.0, 1.5, 2.0], dtype=torch.float64)
D = len(VARIANCES)
LEVELS = 4
SIZES = {"levels": LEVELS, "queries": 120, "points": 32, "samples": 48}


def data(count=400, seed=0):
    """Points of the law N(0, diag VARIANCES)."""
    return normal(count, D, seed=seed) * VARIANCES.sqrt()


TRAIN, HELD_OUT = df.PointCloud(data(400, 1)), df.PointCloud(data(300, 2))


class OfTheLaw(nn.Module):
    """The exact noise prediction for the law, and what is planted below the level `planted`: a
    matrix P with sigma eps += P x.
    """

    def __init__(self, sch=EDM, matrix=None, planted=0.7):
        super().__init__()
        self.schedule, self.matrix, self.planted = sch, matrix, planted

    def forward(self, x, t):
        alpha, sigma = (level.view(-1, 1) for level in self.schedule(t.double()))
        eps = sigma * x / (sigma**2 + alpha**2 * VARIANCES)
        if self.matrix is not None:
            low = sigma / alpha < self.planted
            eps = eps + torch.where(low, x @ self.matrix.T / sigma, 0.0)
        return eps


class Weighted(OfTheLaw):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x, t, shift=0.0):
        return self.scale * super().forward(x, t) + shift


def audit(network, kind="epsilon", sch=EDM, train=TRAIN, held_out=HELD_OUT, **given):
    return df.audit(df.Denoiser(network, sch, kind), train, held_out, **(SIZES | given))


def finding(report, name):
    (found,) = (one for one in report.findings if one.name == name)
    return found


def near(estimate, truth, sigmas=4.5):
    return abs(estimate.value - truth) < sigmas * estimate.error


@pytest.fixture(scope="module")
def sound():
    return audit(OfTheLaw())


@pytest.fixture(scope="module")
def memorising():
    return df.audit(df.Denoiser.exact(TRAIN, EDM), TRAIN, HELD_OUT, **SIZES)


# ---- numbers that are known


def test_a_network_of_the_law_has_the_numbers_of_the_law(sound):
    assert len(sound.levels) == LEVELS
    assert sound.settings.queries == 120 and sound.settings.train == 400
    noise = [level.noise for level in sound.levels]
    assert noise == sorted(noise) and noise[0] == pytest.approx(sound.settings.noise[0])
    for level in sound.levels:
        s2 = level.noise**2
        share = (s2 / (s2 + VARIANCES)).mean().item()  # sigma tr J/d
        variance = (s2 * VARIANCES / (s2 + VARIANCES)).mean().item()
        assert near(level.train.network, variance) and near(level.held_out.network, variance)
        assert near(level.gap, 0) and 0 < level.gap.error < variance
        # J is diagonal, and Hutchinson's estimate exact
        assert level.jacobian.trace.value == pytest.approx(share, rel=1e-9)
        assert level.jacobian.asymmetry.value < 1e-8
        top = (s2 / (s2 + VARIANCES)).max().item()
        assert level.jacobian.eigenvalue == pytest.approx(top, rel=1e-6)
        assert level.jacobian.impossible == 0
        assert level.calibration.predicted.value == pytest.approx(variance, rel=1e-8)
        assert level.calibration.actual == level.held_out.network
        assert near(level.calibration.ratio, 1)
        assert level.baseline > 0.99 * variance


def test_the_exact_mean_beside_it_is_that_of_the_training_data(sound):
    low, high = sound.levels[0], sound.levels[-1]
    for level in sound.levels:
        if level is not low:  # the same mean by two ways; with one atom alone it is of rare points
            assert near(level.train.exact, level.best.value)
        assert level.exact_gap.value > -3 * level.exact_gap.error and near(level.linear_gap, 0)
        excess = level.train.network.value - level.train.exact.value
        assert level.train.excess.value == pytest.approx(excess)
    assert low.train.ess < 2 < 100 < high.train.ess
    # what is chance is taken out of the gap
    assert 3 * high.gap.error < math.hypot(high.train.network.error, high.held_out.network.error)
    assert low.best.value < 1e-4 < low.noise**2  # one atom alone
    error = high.jacobian.trace.value - high.jacobian.exact_trace.value
    assert high.jacobian.trace_error.value == pytest.approx(error)
    assert high.held_out.distance.value < 0.1 * high.held_out.network.value


@pytest.mark.parametrize("sch", [EDM, schedule.VP(), schedule.RectifiedFlow()], ids=repr)
def test_likelihoods_are_those_of_the_law(sch):
    width, noise = 1.0, (0.1, 1.5)
    report = audit(
        OfTheLaw(sch), sch=sch, noise=noise, width=width, levels=2, samples=0, points=200
    )
    found = report.likelihood
    low = found.noise[0]
    # points spread over bins, under the law at the lowest level
    v = VARIANCES + low**2
    nats = -((VARIANCES + width**2 / 12) / v + (2 * math.pi * v).log()).mean().item() / 2
    assert near(found.train, nats) and near(found.held_out, nats) and near(found.gap, 0)
    bits = -nats / math.log(2) - math.log2(width)
    assert near(found.held_out_bits, bits)
    assert found.integration < 0.01 and found.points == 200 and report.samples is None


def test_without_a_width_the_points_are_noisy(sound):
    v = VARIANCES + sound.likelihood.noise[0] ** 2
    nats = -(1 + (2 * math.pi * v).log()).mean().item() / 2
    assert near(sound.likelihood.held_out, nats)
    assert sound.likelihood.width is None and sound.likelihood.held_out_bits is None


def test_a_sound_network_has_a_clean_verdict(sound):
    assert sound.ok, sound
    names = [found.name for found in sound.findings]
    assert names == [
        *("convention", "fit", "memorisation", "gradient", "eigenvalues", "calibration"),
        *("likelihood", "copies"),
    ]
    assert {found.status for found in sound.findings} == {"good"}
    assert sound.verdict == "\n".join(found.text for found in sound.findings)
    assert str(sound).endswith(sound.verdict) and "sigma/alpha" in str(sound)


def test_samples_are_beside_the_data(sound):
    found = sound.samples
    assert found.count == 48 and found.samples.shape == (16, D) and found.rows.shape == (48,)
    rows, distances, ratios = (of[:16] for of in (found.rows, found.distances, found.ratios))
    atoms = TRAIN.y[rows]
    distance = (found.samples.double() - atoms).square().mean(1).sqrt()
    torch.testing.assert_close(distance, distances, rtol=1e-4, atol=1e-6)
    every = torch.cdist(found.samples.double(), TRAIN.y)
    assert torch.equal(every.argmin(1), rows)
    two = every.topk(2, largest=False).values
    torch.testing.assert_close(two[:, 0] / two[:, 1], ratios, rtol=1e-4, atol=1e-6)
    assert bool((found.distances.diff() >= 0).all())
    assert found.distances.shape == found.ratios.shape == (48,)
    assert found.distance == found.distances.median().item()
    assert (found.ratios < 1 / 3).double().mean().item() == pytest.approx(found.ratio.value)
    beside = torch.cdist(HELD_OUT.y, TRAIN.y).min(1).values.sort().values / D**0.5
    torch.testing.assert_close(found.held_out_distances, beside, rtol=1e-4, atol=1e-6)
    assert found.expected == 3 / 301
    assert near(found.train_side, 0.5) and near(found.closer, found.expected)
    middle = torch.cdist(HELD_OUT.y, TRAIN.y).min(1).values.median().item() / D**0.5
    assert found.held_out_distance == pytest.approx(middle)


def test_samples_follow_the_law_of_the_network():
    found = audit(OfTheLaw(), levels=2, points=0, samples=16).samples
    square = (found.samples.double().square() / VARIANCES).flatten()
    assert square.mean().item() == pytest.approx(1, abs=4 * (2 / len(square)) ** 0.5)


# ---- what is planted is found


def test_the_exact_denoiser_memorises(memorising):
    low = memorising.levels[0]
    for level in memorising.levels:
        assert level.train.network == pytest.approx(level.train.exact, rel=1e-6, abs=1e-12)
        assert level.held_out.distance.value < 1e-12
    assert low.memorised.value == pytest.approx(1)
    assert low.calibration.ratio.value < 0.1
    names = ("memorisation", "calibration", "likelihood", "copies")
    assert [finding(memorising, name).status for name in names] == ["bad"] * 4
    assert finding(memorising, "fit").status == "good"
    assert finding(memorising, "gradient").status == "good"
    assert "100%" in finding(memorising, "memorisation").text
    assert memorising.samples.ratio.value > 0.9 and memorising.samples.train_side.value > 0.9
    assert memorising.samples.closer.value > 0.9 and not memorising.ok


def test_one_that_knows_both_kinds_alike_does_not_memorise():
    both = df.PointCloud(torch.cat([TRAIN.y, HELD_OUT.y]))
    report = df.audit(df.Denoiser.exact(both, EDM), TRAIN, HELD_OUT, **SIZES)
    assert finding(report, "memorisation").status == "good"
    assert finding(report, "likelihood").status == "good"
    assert all(near(level.gap, 0) for level in report.levels)
    assert near(report.samples.train_side, 0.5)


def antisymmetric():
    a = normal(D, D, seed=5)
    return (a - a.T) / (a - a.T).norm()


def test_data_that_cannot_show_memorisation_are_no_sign_of_its_absence():
    # the same points on both sides: not even the exact mean has a difference
    report = df.audit(
        df.Denoiser.exact(TRAIN, EDM), TRAIN, TRAIN, levels=2, points=0, samples=0, queries=400
    )
    assert finding(report, "memorisation").status == "unknown"


def test_an_antisymmetric_part_is_measured():
    p = 0.5 * antisymmetric()
    report = audit(OfTheLaw(matrix=p), points=0, samples=0)
    low = [level for level in report.levels if level.noise < 0.7]
    assert 0 < len(low) < LEVELS
    for level in report.levels:
        j = (level.noise**2 / (level.noise**2 + VARIANCES)).diag()
        j = j + p if level in low else j
        truth = ((j - j.T).norm() / j.norm()).item()
        assert level.jacobian.asymmetry.value == pytest.approx(truth, rel=0.15, abs=1e-8)
    found = finding(report, "gradient")
    assert found.status == "bad" and report.likelihood is None
    assert ", ".join(f"{level.noise:.3g}" for level in low) + ":" in found.text


def test_an_impossible_eigenvalue_is_measured():
    v = normal(D, seed=6)
    v = v / v.norm()
    p = 2.0 * torch.outer(v, v)
    report = audit(OfTheLaw(matrix=p), points=0, samples=0)
    largest = 0.0
    for level in report.levels:
        j = (level.noise**2 / (level.noise**2 + VARIANCES)).diag()
        j = j + p if level.noise < 0.7 else j
        truth = torch.linalg.eigvalsh(j)[-1].item()
        assert level.jacobian.eigenvalue == pytest.approx(truth, rel=1e-6)
        impossible = truth > 1 + thresholds.IMPOSSIBLE
        assert level.jacobian.impossible == impossible
        largest = max(largest, truth) if impossible else largest
    found = finding(report, "eigenvalues")
    assert found.status == "bad" and f"up to {largest:.3g}." in found.text
    assert finding(report, "gradient").status == "good"


def blind(x, t):
    """A network of x_0 that ignores x below the level 0.7."""
    return torch.where(t.view(-1, 1) < 0.7, 0.0, df.Denoiser(OfTheLaw(), EDM)(x, t))


def test_an_eigenvalue_is_one_of_the_jacobian_where_that_changes_within_a_step():
    # of few points in many dimensions, in float32, differences reach from one atom to the next
    train, held_out = (df.PointCloud(normal(100, 1024, seed=i).float()) for i in (5, 6))
    exact = df.Denoiser.exact(train, schedule.VP())
    report = df.audit(exact, train, held_out, queries=32, points=0, samples=0)
    assert max(level.jacobian.eigenvalue for level in report.levels) < 1 + 1e-4


def test_an_undertrained_level_is_named():
    report = audit(blind, "sample", points=0, samples=0)
    found = finding(report, "fit")
    low = [f"{level.noise:.3g}" for level in report.levels if level.noise < 0.7]
    assert found.status == "bad" and f"sigma/alpha = {', '.join(low)}:" in found.text
    # x_0 does not depend on x, and the variance that this implies is 0
    assert "too small" in finding(report, "calibration").text


def test_a_wrong_convention_ends_the_audit():
    network = OfTheLaw()
    report = audit(lambda x, t: -network(x, t))
    assert report.check.cause == "sign" and report.levels == () and report.samples is None
    assert report.likelihood is None and not report.ok
    (found,) = report.findings
    assert found.name == "convention" and found.text.endswith(
        "All else has no meaning, and was not measured."
    )
    assert str(report) == report.verdict


def test_data_of_two_laws_are_noticed():
    shrunk = df.PointCloud(0.5 * HELD_OUT.y)
    report = audit(OfTheLaw(), held_out=shrunk, points=0, samples=0)
    (found,) = (one for one in report.findings if one.name == "limits")
    assert "the two do not follow the same law" in found.text and found.status == "unknown"


def test_data_of_two_laws_accuse_no_network():
    report = audit(OfTheLaw(), held_out=df.PointCloud(HELD_OUT.y + 2.0), levels=2)
    found = {one.name: one for one in report.findings}
    for name in ("likelihood", "copies"):
        assert found[name].status == "unknown" and "different laws" in found[name].text, name


def test_few_points_in_many_dimensions_are_one_law():
    # the mean of the training data is nearer to these than to others, by chance
    train, held_out = (df.PointCloud(normal(50, 256, seed=i)) for i in (7, 8))
    network = lambda x, t: x * t.view(-1, 1) / (1 + t.view(-1, 1) ** 2)
    report = df.audit(df.Denoiser(network, EDM), train, held_out, points=0, samples=0)
    assert not any("same law" in one.text for one in report.findings)


def test_queries_come_in_uneven_batches(monkeypatch):
    how = {"points": 0, "samples": 0, "queries": 7, "levels": 2}
    whole = audit(OfTheLaw(), **how)
    monkeypatch.setattr("dfkernels.methods.audit.task._NUMBERS", 2 * D)  # two queries to a batch
    for level, at_once in zip(audit(OfTheLaw(), **how).levels, whole.levels, strict=True):
        assert level.jacobian.trace == pytest.approx(at_once.jacobian.trace)
        assert level.held_out.network == pytest.approx(at_once.held_out.network)


def test_duplicates_need_no_lower_levels():
    thrice = df.PointCloud(TRAIN.y.repeat(3, 1))
    lows = [
        audit(OfTheLaw(), train=train, points=0, samples=0).settings.noise[0]
        for train in (TRAIN, thrice)
    ]
    assert lows[1] > lows[0] / 4


# ---- without one of the two


@pytest.mark.parametrize(("count", "status"), [(60, "bad"), (20, "unknown")])
def test_held_out_points_that_are_training_data_are_noticed(count, status):
    held_out = df.PointCloud(torch.cat([data(400, 1)[:count], data(100 - count, 2)]))
    report = df.audit(
        df.Denoiser.exact(TRAIN, EDM), TRAIN, held_out, levels=2, points=0, samples=16
    )
    (found,) = [f for f in report.findings if f"{count} of 100 held-out points are also" in f.text]
    assert (found.name, found.status) == ("limits", status)


def test_a_point_of_both_kinds_is_no_sign_of_copies():
    report = audit(OfTheLaw(), held_out=TRAIN, levels=2, points=0, samples=128)
    assert report.samples.train_side.value == 1.0  # all are counted as training data
    assert finding(report, "copies").status == "good"
    assert not any(one.name == "samples" for one in report.findings)


def test_without_training_data():
    report = audit(OfTheLaw(), train=None)
    for level in report.levels:
        assert level.train is level.best is level.gap is level.memorised is None
        assert level.held_out.exact is level.held_out.ess is level.jacobian.exact_trace is None
        assert near(level.calibration.ratio, 1)
    assert report.likelihood.train is report.likelihood.gap is report.samples is None
    assert report.likelihood.held_out is not None and report.ok
    assert finding(report, "limits").text.startswith(
        "Without its training data nothing can be said"
    )
    assert "memorisation" not in [found.name for found in report.findings]
    assert df.AuditReport.from_json(report.to_json()).to_json() == report.to_json()


def test_without_held_out_data(memorising):
    report = df.audit(df.Denoiser.exact(TRAIN, EDM), TRAIN, None, **SIZES)
    for level in report.levels:
        assert level.held_out is level.gap is None and level.errors is level.train
    assert report.samples.closer is report.samples.train_side is None
    # by chance: among the training points themselves
    assert report.samples.chance_ratio.value < 0.1
    assert finding(report, "copies").status == "bad"
    assert finding(report, "limits").text.startswith("Without held-out data")
    assert report.likelihood.gap is None
    assert "training data" in finding(report, "calibration").text
    # one that generalises is no worse for being beaten by the exact mean, which memorises
    report = audit(OfTheLaw(), held_out=None, points=0, samples=0)
    assert finding(report, "fit").status == "good"
    low = report.levels[0].train
    assert low.excess.value > 0.9 * low.network.value > 3 * low.excess.error


def test_a_width_without_points_is_refused():
    with pytest.raises(ValueError, match="^width: expected None with points=0, .* out, got 0.1$"):
        audit(OfTheLaw(), points=0, width=0.1)


def test_few_held_out_points_are_used_several_times():
    report = audit(OfTheLaw(), held_out=df.PointCloud(data(20, 3)), levels=2, points=8, samples=8)
    assert report.settings.queries == 120  # 6 of each
    assert "20 held-out points are few" in finding(report, "limits").text
    (level, _) = report.levels
    assert near(level.gap, 0)
    assert report.samples.expected == 1 / 21


def test_errors_are_those_over_data_points():
    """A network that returns 0 is off by |y|^2/d, whatever the noise."""
    few = df.PointCloud(data(20, 3))
    given = {"held_out": few, "points": 0, "samples": 0}
    report = audit(blind, "sample", **given)
    square = few.y.square().mean(1)
    low = [level for level in report.levels if level.noise < 0.7]
    for level in low:
        expected = (square.mean().item(), square.std().item() / 20**0.5)
        assert level.held_out.network == pytest.approx(expected)
    assert len(low) == 2 and low[0].train.network != low[1].train.network  # of other points


# ---- the same again


def test_the_same_seed_gives_the_same_report(sound):
    again = audit(OfTheLaw())
    assert again.to_json() == sound.to_json()
    other = audit(OfTheLaw(), generator=torch.Generator().manual_seed(5))
    assert other.to_json() != sound.to_json()
    for a, b in zip(sound.levels, other.levels, strict=True):
        apart = math.hypot(a.held_out.network.error, b.held_out.network.error)
        assert abs(a.held_out.network.value - b.held_out.network.value) < 4.5 * apart


def test_conditions_go_to_every_call():
    given = {"levels": 2, "points": 8, "samples": 8}
    plain = audit(Weighted(), **given)
    assert plain.ok
    same = audit(Weighted(), shift=torch.zeros(1, 1, dtype=torch.float64), **given)
    assert same.levels == plain.levels and same.likelihood == plain.likelihood
    other = audit(Weighted(), shift=torch.full((1, 1), 0.2, dtype=torch.float64), **given)
    for a, b in zip(other.levels, plain.levels, strict=True):
        # the mean of x_0 is off by 0.2 sigma/alpha, which no Jacobian shows
        off = (0.2 * a.noise) ** 2
        assert near(a.held_out.network, b.held_out.network.value + off)
        assert a.jacobian.trace.value == pytest.approx(b.jacobian.trace.value)


def test_the_global_state_of_torch_changes_nothing(memorising):
    with contextlib.ExitStack() as states:
        for state in ("default dtype float64", "default device meta", "autocast bfloat16"):
            states.enter_context(STATES[state]())
        exact = df.audit(df.Denoiser.exact(TRAIN, EDM), TRAIN, HELD_OUT, **SIZES)
    assert exact.to_json() == memorising.to_json()


def test_a_report_goes_through_json(memorising):
    text = memorising.to_json()
    back = df.AuditReport.from_json(text)
    assert back.to_json() == text and str(back) == str(memorising)
    assert back.settings == memorising.settings and back.check == memorising.check
    assert torch.equal(back.samples.samples, memorising.samples.samples)
    assert back.samples.samples.dtype == torch.float32
    with pytest.raises(ValueError, match="text: expected the report of an audit as JSON"):
        df.AuditReport.from_json(text[:100])
    other = json.dumps({**json.loads(text), "format": "another"})
    with pytest.raises(ValueError, match="its format is 'another', not 'dfkernels audit 1'"):
        df.AuditReport.from_json(other)


class Stop(Exception):
    pass


def test_a_killed_audit_goes_on(sound, tmp_path):
    path, calls = tmp_path / "audit.json", []

    def stop(done, total):
        calls.append((done, total))
        if done == 4:
            raise Stop

    network = OfTheLaw()
    with pytest.raises(Stop):
        audit(network, checkpoint=path, callback=stop)
    total = 1 + LEVELS + 2 + 1
    assert calls == [(i, total) for i in range(5)]
    denoiser = df.Denoiser(network, EDM)
    report = df.audit(denoiser, TRAIN, HELD_OUT, checkpoint=path, **SIZES)
    assert report.to_json() == sound.to_json()
    assert 0 < denoiser.evaluations < sound.evaluations
    # what is finished is only read
    denoiser.evaluations = 0
    again = df.audit(denoiser, TRAIN, HELD_OUT, checkpoint=path, **SIZES)
    assert again.to_json() == sound.to_json() and denoiser.evaluations == 0


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"generator": torch.Generator().manual_seed(1)}, "seed"),
        ({"queries": 60}, "queries"),
        ({"train": df.PointCloud(data(400, 3))}, "train"),
        ({"held_out": None}, "held_out"),
        ({"network": Weighted(1.01)}, "network"),
        ({"shift": torch.tensor([0.0])}, "conditions"),
    ],
    ids=["seed", "queries", "train", "held_out", "network", "conditions"],
)
def test_a_checkpoint_of_another_audit_is_refused(change, key, tmp_path):
    path = tmp_path / "audit.json"
    given = {"network": Weighted(), "levels": 2, "points": 0, "samples": 0, "checkpoint": path}
    audit(**given)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"audit.json: checkpoint of another .*: {key}: "):
        audit(**{**given, **change})
    assert path.read_bytes() == before
    text = json.loads(before)
    del text["parts"]["level 1"]["result"]["best"]
    path.write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"audit.json: checkpoint of another version.*\(level 1\)"):
        audit(**given)
    path.write_bytes(before[:-20])
    with pytest.raises(ValueError, match="audit.json: no checkpoint of an audit, or a damaged"):
        audit(**given)


def test_a_checkpoint_knows_the_data_of_an_exact_denoiser(tmp_path):
    path = tmp_path / "audit.json"
    given = {"levels": 2, "points": 0, "samples": 0, "checkpoint": path}
    df.audit(df.Denoiser.exact(TRAIN, EDM), TRAIN, HELD_OUT, **given)
    other = df.Denoiser.exact(df.PointCloud(data(400, 3)), EDM)
    with pytest.raises(ValueError, match="checkpoint of another configuration: network: "):
        df.audit(other, TRAIN, HELD_OUT, **given)


# ---- errors and rules


def test_samples_with_one_nearest_point_are_no_sign(sound):
    """All samples lie at one held-out point, as those without detail lie at the one that is most
    like the mean: that it is of this kind is chance.
    """
    found = audit(lambda x, t: HELD_OUT.y[7] + 1e-6 * x, "sample", points=0)
    assert found.check.cause == "unknown" and found.samples.train_side == (0.0, 0.5)
    copied = sound.samples
    swapped = dataclasses.replace(copied, train_side=estimates.Estimate(1.0, 0.5))
    assert [one.status for one in verdict.of_samples(swapped)] == ["good"]


def test_samples_without_detail_are_no_copies(sound):
    near_all = dataclasses.replace(sound.samples, closer=estimates.Estimate(0.5, 0.05))
    (found,) = verdict.of_samples(near_all)
    assert found.status == "unknown" and "they may lack detail" in found.text
    copies = dataclasses.replace(near_all, ratio=estimates.Estimate(0.4, 0.05))
    (found,) = verdict.of_samples(copies)
    assert found.status == "bad" and "40% (by chance 0%) have a nearest" in found.text
    assert "50% (by chance 1%) are nearer to a training atom" in found.text


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        ((1.5, 0.2), None),
        ((1.1, 0.001), None),
        ((1.5, 0.1), "too large"),
        ((0.5, 0.1), "too small"),
    ],
    ids=["uncertain", "small", "large", "low"],
)
def test_a_variance_must_be_off_by_much_and_clearly(ratio, said, sound):
    level = sound.levels[1]
    off = level.calibration._replace(ratio=estimates.Estimate(*ratio))
    levels = (dataclasses.replace(level, calibration=off),)
    found = next(one for one in verdict.of_levels(levels, 1e-7) if one.name == "calibration")
    assert found.status == ("good" if said is None else "bad")
    assert said is None or f"it is {said} at sigma/alpha = {level.noise:.3g}" in found.text


def test_a_small_error_of_the_trace_is_allowed_at_high_noise(sound):
    for noise, status in ((1.0, "bad"), (10.0, "good")):
        level = sound.levels[-1]
        off = level.calibration._replace(
            ratio=estimates.Estimate(0.6, 0.01), actual=estimates.Estimate(1.0, 0.01)
        )
        levels = (dataclasses.replace(level, calibration=off, alpha=1.0, sigma=noise),)
        found = next(one for one in verdict.of_levels(levels, 1e-7) if one.name == "calibration")
        assert found.status == status


def gapped(level, part, memorised):
    """A level whose gap is a part of the network's own error and a part of the exact mean's."""
    own = level.held_out.network.value * part
    return dataclasses.replace(
        level,
        gap=estimates.Estimate(own, own / 10),
        exact_gap=estimates.Estimate(own / memorised, own / memorised / 10),
        memorised=estimates.Estimate(memorised, memorised / 5),
    )


@pytest.mark.parametrize(
    ("part", "memorised", "said"),
    [
        (0.1, 0.01, None),
        (0.3, 0.01, "begins to memorise"),
        (0.8, 0.01, "memorises"),
        (0.1, 0.1, "begins to memorise"),
        (0.1, 0.4, "memorises"),
    ],
)
def test_memorisation_is_measured_by_the_exact_mean_and_by_the_network(
    part, memorised, said, sound
):
    levels = (gapped(sound.levels[0], part, memorised),)
    found = next(one for one in verdict.of_levels(levels, 1e-7) if one.name == "memorisation")
    assert found.status == ("good" if said is None else "bad")
    assert said is None or f"The network {said} at" in found.text


def test_a_tiny_difference_of_likelihood_is_no_finding(sound):
    tiny = dataclasses.replace(
        sound.likelihood, gap=estimates.Estimate(0.01, 0.001), integration=0.0
    )
    (found,) = verdict.of_likelihood(tiny)
    assert found.status == "good"


def test_samples_that_are_far_from_the_data_are_named(sound):
    far = dataclasses.replace(sound.samples, distances=2 * sound.samples.distances)
    found, copies = verdict.of_samples(far)
    assert found.name == "samples" and found.status == "bad" and copies.status == "good"
    median = sound.samples.held_out_distances.median()
    share = (far.distances > median).double().mean().item()
    assert f"Of 48 samples, {share:.0%} (by chance 50%) are farther" in found.text


def test_an_asymmetry_that_may_be_chance_is_no_finding(sound):
    level = sound.levels[0]
    unclear = level.jacobian._replace(asymmetry=estimates.Estimate(0.35, 0.05))
    levels = (dataclasses.replace(level, jacobian=unclear),)
    (found,) = (one for one in verdict.of_levels(levels, 1e-7) if one.name == "gradient")
    assert found.status == "good" and "at most 0.35, not clearly more than the 0.3" in found.text


def test_an_error_of_the_integration_is_no_difference(memorising):
    found = memorising.likelihood
    assert found.gap.value > 3 * found.gap.error
    rough = dataclasses.replace(found, integration=found.gap.value)
    (one,) = verdict.of_likelihood(rough)
    assert one.status == "good" and "(the integration is known to 6 only)" in one.text


def test_standard_errors():
    values = torch.tensor([1.0, 3.0, 2.0, 6.0], dtype=torch.float64)
    assert estimates.mean(values, 4) == pytest.approx((3.0, values.std().item() / 2))
    assert estimates.mean(values, 2) == pytest.approx((3.0, 1.0))  # of 2 and 4
    a, b = normal(500, 4).unbind(1)[:2]
    found = estimates.ratio(2 + a, 4 + b, 500)
    assert found.value == pytest.approx(0.5, abs=4 * found.error)
    assert found.error == pytest.approx(math.sqrt(1 + 0.25) / 4 / math.sqrt(500), rel=0.2)
    assert estimates.ratio(a, 0 * b, 500) is None
    # what a control explains is taken out, and the mean stays where the control's is 0
    chance = normal(500, seed=3)
    cleared = estimates.without_chance(0.3 + 2 * chance + 0.1 * a, chance, 500)
    found = estimates.mean(cleared, 500)
    assert found.error < 0.01 and near(found, 0.3)
    none = estimates.share(torch.zeros(97, dtype=torch.bool))
    assert none == pytest.approx((0.0, math.sqrt(98 / 99**2 / 100)))
