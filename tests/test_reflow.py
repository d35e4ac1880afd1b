"""Reflow: pairs and reversed pairs of flows that are known in closed form, mixtures, straightness,
the exact next flow, and rounds that are killed and go on.
"""

from __future__ import annotations

import math

import pytest
import torch
from tensors import normal, rng
from torch import nn

import dfkernels as df
from dfkernels._io import tensor_files
from dfkernels._io.files import FileError
from dfkernels.methods import reflow
from dfkernels.methods.reflow import Pairs

f64 = torch.float64
T = torch.linspace(0, 1, 41, dtype=f64)


def gaussian(std, mean=0.0, schedule=None):
    """The exact flow of N(mean, std^2): its posterior mean."""
    schedule = schedule or df.schedule.RectifiedFlow()

    def posterior_mean(x, t):
        alpha, sigma = (level.view(-1, *[1] * (x.ndim - 1)) for level in schedule(t.double()))
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return (mean + gain * (x - alpha * mean)).to(x.dtype)

    return df.Denoiser(posterior_mean, schedule, "sample")


def straight(std, mean=0.0):
    """The flow whose paths are the chords of b = mean + std a."""

    def v(x, t):
        t = t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        a = (x - t * mean) / (1 + t * (std - 1))
        return mean + (std - 1) * a

    return df.Denoiser(v, df.schedule.RectifiedFlow(), "flow")


def constant(value):
    return df.Denoiser(lambda x, t: torch.full_like(x, value), df.schedule.RectifiedFlow(), "flow")


# ---- pairs


@pytest.mark.parametrize("dtype, tol", [(f64, 3e-3), (torch.float32, 3e-3)], ids=str)
@pytest.mark.parametrize("event", [(), (3,), (1, 2, 2)], ids=str)
def test_pairs_of_gaussian_data_are_a_scaling(event, dtype, tol):
    """The flow from N(0, 1) to N(m, s^2) takes a to m + s a."""
    noise = normal(7, *event, dtype=dtype)
    made = reflow.pairs(gaussian(0.5, 2.0), noise, T[:-1])
    assert made.noise.equal(noise) and made.sample.dtype == dtype
    assert (made.sample - (2 + 0.5 * noise)).abs().max() <= tol


@pytest.mark.parametrize("method, order", [("ddim", 1), ("heun", 2)])
def test_the_order_of_the_methods(method, order):
    noise, flow = normal(50, 1), gaussian(0.5, 2.0)
    t = [torch.linspace(0, 1, steps + 1, dtype=f64) for steps in (20, 40)]
    # sigma = 0 at the last node is no place for a "sample" network: a step of Euler's goes there
    error = [(reflow.pairs(flow, noise, u[:-1], method).sample - 2 - 0.5 * noise) for u in t]
    ratio = (error[0].abs().mean() / error[1].abs().mean()).item()
    assert 2 ** (order - 0.25) <= ratio <= 2 ** (order + 0.5)


def test_ddim_is_the_samplers_ddim():
    flow, x = gaussian(0.5, 2.0), normal(5, 2)
    t = T[1:-1]
    made = reflow.pairs(flow, x, t, "ddim")
    path = df.sample(flow, (1 - t[0]) * x, t, method="ddim")
    torch.testing.assert_close(made.sample, flow(path.x[-1], t[-1]))


@pytest.mark.parametrize(
    "schedule",
    [df.schedule.VP(), df.schedule.EDM(), df.schedule.ReversedRectifiedFlow()],
    ids=lambda s: type(s).__name__,
)
def test_every_schedule_is_the_same_flow(schedule):
    """A grid of the same noise levels, from pure noise where the schedule has it."""
    t = df.time_grid(schedule, 200, (1e-3, 150.0), "edm")
    noise = normal(6, 2)
    made = reflow.pairs(gaussian(0.5, 2.0, schedule), noise, t)
    # the path starts at sigma x_0, where the mean alpha m is missing
    assert (made.sample - (2 + 0.5 * noise)).abs().max() <= 0.03
    back = reflow.reverse_pairs(gaussian(0.5, 2.0, schedule), made.sample, t, rng(), noise=1e-3)
    assert (back.noise - noise).abs().max() <= 0.03


def test_the_velocity_of_a_flow_network_is_its_output():
    flow, x = constant(3.0), normal(4, 2)
    for t in (0.0, 0.3, 1.0):
        torch.testing.assert_close(reflow.velocity(flow, x, t), torch.full_like(x, 3.0))
    # its time runs the other way
    reversed_ = df.Denoiser(
        lambda x, t: torch.full_like(x, 3.0), df.schedule.ReversedRectifiedFlow(), "flow"
    )
    torch.testing.assert_close(reflow.velocity(reversed_, x, 0.3), torch.full_like(x, -3.0))


def test_one_step_of_a_straight_flow_is_exact():
    noise = normal(9, 2)
    for method in ("ddim", "heun"):
        made = reflow.pairs(straight(0.5, 2.0), noise, torch.tensor([0.0, 1.0]), method)
        torch.testing.assert_close(made.sample, 2 + 0.5 * noise)
    one = reflow.pairs(straight(0.5, 2.0), noise, torch.tensor([0.0]))
    torch.testing.assert_close(one.sample, 2 + 0.5 * noise)


# ---- reversed pairs


def test_reversed_pairs_of_gaussian_data():
    y = 2 + 0.5 * normal(400, 3)
    back = reflow.reverse_pairs(gaussian(0.5, 2.0), y, T, rng(), noise=1e-4)
    assert back.sample.equal(y)
    assert (back.noise - (y - 2) / 0.5).abs().max() <= 3e-3
    # 1,200 normal numbers: standard errors 0.04 and 0.14
    assert abs(back.noise_power - 1) <= 0.16 and abs(back.noise_kurtosis - 3) <= 0.6


def test_power_and_kurtosis():
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) * 2
    two = Pairs(signs, signs)
    assert two.noise_power == 4.0 and two.noise_kurtosis == 1.0
    one = Pairs(torch.tensor([[0.0, 0.0, 0.0, 4.0]]), torch.zeros(1, 4))
    assert one.noise_kurtosis == pytest.approx((3 + 81) / 4 / 9, rel=1e-12)  # about the mean, 1
    none = Pairs(torch.zeros(0, 2), torch.zeros(0, 2))
    assert math.isnan(none.noise_power) and math.isnan(none.noise_kurtosis)


def test_a_cloud_cannot_be_reversed_from_its_atoms_but_nearby():
    y = normal(60, 8, seed=1).sign()  # |y|^2/d = 1, kurtosis 1
    flow = df.Denoiser.exact(df.PointCloud(y), df.schedule.RectifiedFlow())
    noised = reflow.reverse_pairs(flow, y, T[:-1], rng(), noise=0.02)
    # 480 numbers: standard errors 0.065 and 0.22
    assert abs(noised.noise_power - 1) <= 0.3 and abs(noised.noise_kurtosis - 3) <= 0.9
    with pytest.raises(ValueError, match=r"^t: .* does not exist where sigma = 0, as at t = 1 of"):
        reflow.reverse_pairs(flow, y, T[:-1], rng(), noise=0.0)
    # with noise so small that x is y to rounding, at the last node the atom holds all weight
    t = torch.cat([T[:-1], torch.tensor([1 - 1e-9], dtype=f64)])
    x = y
    for after, before in zip(t.flip(0), t.flip(0)[1:], strict=False):
        x = x + (before - after) * reflow.velocity(flow, x, after)
    assert Pairs(x, y).noise_kurtosis < 2


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_exact_inversion_undoes_the_steps(method):
    flow, noise = gaussian(0.3, 1.0), normal(20, 2)
    t = torch.linspace(0.1, 0.9, 8, dtype=f64)
    z = (1 - t[0]) * noise
    from dfkernels.methods.reflow._straight import TABLEAUS, advance, path_of

    path = path_of(flow.schedule, t)
    for i in range(len(t) - 1):
        z = advance(flow, path, TABLEAUS[method], z, i, i + 1)
    # the data whose noised state is z: xi is drawn from the same generator
    xi = torch.randn(z.shape, dtype=f64, generator=rng(3))
    y = (z - 0.1 * xi) / 0.9
    back = reflow.reverse_pairs(flow, y, t, rng(3), method, noise=0.1, exact=True)
    assert (back.noise - noise).abs().max() <= 1e-12
    rough = reflow.reverse_pairs(flow, y, t, rng(3), method, noise=0.1)
    assert (rough.noise - noise).abs().max() >= 1e-4


def test_a_step_that_cannot_be_undone_is_an_error():
    stiff = df.Denoiser(lambda x, t: -5 * x, df.schedule.RectifiedFlow(), "flow")
    with pytest.raises(ValueError, match=r"t: expected steps short enough .* t = 0 to 0\.99"):
        reflow.reverse_pairs(stiff, normal(3, 2), torch.tensor([0.0]), rng(), "ddim", exact=True)


# ---- mixtures


def marked(n, value):
    return Pairs(torch.full((n, 1), value), torch.full((n, 1), value + 10))


@pytest.mark.parametrize("ratio, real", [(0.0, 0), (0.3, 3), (1.0, 10), (0.25, 2)])
def test_a_mixture_has_whole_pairs_of_both_kinds(ratio, real):
    both = reflow.mix(marked(10, 0.0), marked(20, 1.0), ratio, rng())
    assert len(both) == 10 and int((both.noise == 1).sum()) == real
    assert (both.sample - both.noise == 10).all()  # noise and sample stay together


def test_a_mixture_takes_every_row_before_any_again():
    real = Pairs(torch.arange(4.0)[:, None], torch.arange(4.0)[:, None])
    both = reflow.mix(marked(10, 9.0), real, 0.6, rng())
    counts = torch.bincount(both.noise[both.noise < 9].long(), minlength=4)
    assert sorted(counts.tolist()) == [1, 1, 2, 2]
    made = Pairs(torch.arange(10.0)[:, None], torch.arange(10.0)[:, None])
    some = reflow.mix(made, marked(10, 99.0), 0.5, rng()).noise[:, 0]
    assert some[some < 99].sort().values.tolist() != list(range(5))  # drawn from all
    assert some.gt(50).diff().ne(0).sum() > 1  # in random order
    kept = reflow.mix(made, real, 0.0, rng()).noise[:, 0]
    assert kept.sort().values.tolist() == list(range(10)) and kept.tolist() != list(range(10))


def test_a_mixture_keeps_the_law_that_a_sum_destroys():
    n, ratio = 40_000, 0.3
    made, real = (Pairs(normal(n, 1, seed=s), normal(n, 1, seed=s + 1)) for s in (1, 3))
    both = reflow.mix(made, real, ratio, rng()).sample
    printed = (1 - ratio) * made.sample + ratio * real.sample
    error = 5 * math.sqrt(2 / n)  # standard errors of a variance
    assert abs(both.var().item() - 1) <= error
    assert abs(printed.var().item() - 0.58) <= error


# ---- straightness


@pytest.mark.parametrize("std, d", [(0.5, 1), (1.5, 3)])
def test_independent_gaussian_pairs_leave_a_known_variance(std, d):
    """For a ~ N(0, 1) and b ~ N(m, s^2), independent, the chords' variance given x_t is
    s^2/((1 - t)^2 + t^2 s^2), whose integral is s pi/2."""
    n = 20_000
    pairs = Pairs(normal(n, d, seed=1), 3 + std * normal(n, d, seed=2))
    found = reflow.straightness(gaussian(std, 3.0), pairs, rng(), times=4)
    assert abs(found.value - d * std * math.pi / 2) <= 4 * found.error
    assert 0 < found.error < 0.05 * found.value
    # the same from the pairs alone, smoothed by h: Var u - Cov(u, x_t)^2/(Var x_t + h^2)
    few, h = pairs[:1500], 0.3
    t = torch.linspace(0, 1, 10_001, dtype=f64)
    cov = t * std**2 - (1 - t)
    rest = 1 + std**2 - cov**2 / ((1 - t) ** 2 + t**2 * std**2 + h**2)
    alone = reflow.straightness_of_pairs(few, h, rng())
    # of 1,500 pairs in d dimensions the kernel's own sample explains a little more
    assert alone.value == pytest.approx(d * rest.mean().item(), rel=0.02 + 0.05 * d)


def test_the_variance_of_few_pairs_is_that_of_the_smoothed_law():
    """Three pairs on a line: the integral over x and t, by a sum over grids."""
    a, b = torch.tensor([0.0, 1.0, 2.0], dtype=f64), torch.tensor([1.0, 0.0, 2.0], dtype=f64)
    h, u = 0.8, b - a
    x = torch.linspace(-5, 7, 1201, dtype=f64)[:, None]
    total = 0.0
    for t in ((torch.arange(200, dtype=f64) + 0.5) / 200).tolist():
        logits = -((x - (1 - t) * a - t * b) ** 2) / (2 * h**2)
        w = torch.softmax(logits, 1)
        variance = (w * u**2).sum(1) - (w * u).sum(1) ** 2
        density = logits.exp().mean(1) / (h * math.sqrt(2 * math.pi))
        total += (density * variance).sum().item() * 0.01 / 200
    many = Pairs(a.repeat(1000)[:, None], b.repeat(1000)[:, None])  # the same law
    found = reflow.straightness_of_pairs(many, h, rng(), times=32)
    assert found.value == pytest.approx(total, rel=0.03)


def test_straight_pairs_are_straight():
    noise = normal(500, 2)
    pairs = Pairs(noise, 2 + 0.5 * noise)
    assert reflow.straightness(straight(0.5, 2.0), pairs, rng()).value <= 1e-28
    found = reflow.straightness_of_pairs(pairs, 0.02, rng())
    assert found.value <= 2 * (0.5 * 0.02 / 0.5) ** 2  # chords within h of a point, slope at most 1
    bent = reflow.straightness(constant(0.0), pairs, rng())
    chords = (pairs.sample - pairs.noise).square().sum(1)
    assert bent.value == pytest.approx(chords.mean().item(), rel=1e-12)
    assert bent.error == pytest.approx((chords.std() / 500**0.5).item(), rel=1e-12)


def test_reflow_of_exact_pairs_straightens():
    """Independent pairs of a Gaussian: the next flow's own pairs are straight, and keep the law."""
    n, h = 2000, 0.1
    independent = Pairs(normal(n, 1, seed=1), 0.5 * normal(n, 1, seed=2))
    second = reflow.exact(independent, h)
    made = reflow.pairs(second, normal(n, 1, seed=3), T)
    assert made.sample.std().item() == pytest.approx(0.5, rel=0.1)
    before = reflow.straightness_of_pairs(independent, h, rng()).value
    after = reflow.straightness_of_pairs(made, h, rng()).value
    assert before > 0.6 and after < 0.02 * before


def test_the_exact_velocity_is_the_kernel_average():
    pairs = Pairs(normal(30, 2, 2, seed=1), normal(30, 2, 2, seed=2))
    x, t, h = normal(8, 2, 2, seed=3), torch.tensor([0.0, 0.4, 0.4, 1.0] * 2, dtype=f64), 0.7
    found = reflow.velocity(reflow.exact(pairs, h), x, t)
    for i in range(8):
        z = pairs.at(t[i].item())
        w = torch.softmax(-(x[i] - z).square().flatten(1).sum(1) / (2 * h**2), 0)
        want = (w[:, None, None] * (pairs.sample - pairs.noise)).sum(0)
        torch.testing.assert_close(found[i], want)
    assert reflow.exact(pairs, h).network.extra_repr() == "30 pairs, bandwidth=0.7"


# ---- loss


def test_the_loss_is_the_straightness_per_number():
    noise = normal(64, 3)
    pairs = Pairs(noise, noise + 2)
    assert reflow.loss(constant(0.0), pairs, rng()).item() == pytest.approx(4, rel=1e-12)
    assert reflow.loss(constant(2.0), pairs, rng()).item() <= 1e-28
    empty = reflow.loss(constant(0.0), pairs[:0], rng())
    assert empty.item() == 0


def test_the_times_of_the_loss_fill_the_interval():
    seen = []
    flow = df.Denoiser(
        lambda x, t: seen.append(t) or torch.zeros_like(x), df.schedule.RectifiedFlow(), "flow"
    )
    reflow.loss(flow, Pairs(normal(100, 1), normal(100, 1)), rng())
    assert (100 * seen[0]).long().sort().values.tolist() == list(range(100))


# ---- rounds


class Line(nn.Module):
    """v(x, t) = a + b x + c t, of a flow that can only shift and scale."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Parameter(torch.zeros((), dtype=torch.float32)) for _ in range(3)
        )

    def forward(self, x, t):
        return self.a + self.b * x + self.c * t[:, None]


def line():
    return df.Denoiser(Line(), df.schedule.RectifiedFlow(), "flow")


def recipe(current, generator):
    noise = torch.randn(200, 1, generator=generator, dtype=torch.float32)
    return Pairs(noise, noise + 1)


HOW = {"steps": 150, "batch": 64, "lr": 0.05, "ema": 0.9}


def weights(flow):
    return torch.stack([p.detach() for p in flow.network.parameters()])


def test_rounds_train_on_what_the_recipe_makes():
    first, seen = line(), []
    flows = reflow.rounds(first, recipe, 2, **HOW, callback=lambda *a: seen.append(a))
    assert len(flows) == 2 and weights(first).eq(0).all()
    for flow in flows:
        x = torch.linspace(-2, 2, 5)[:, None]
        assert (reflow.velocity(flow, x, 0.5) - 1).abs().max() <= 0.03
        assert not flow.training and not any(p.requires_grad for p in flow.parameters())
    assert seen[0] == (0, 300) and seen[-1] == (300, 300) and len(set(seen)) == 301


def test_each_round_is_made_by_the_one_before():
    calls = []

    def shifted(current, generator):
        noise = torch.randn(100, 1, generator=generator)
        calls.append(weights(current))
        return Pairs(noise, reflow.pairs(current, noise, T).sample + 1)

    flows = reflow.rounds(line(), shifted, 3, **HOW)
    assert calls[0].eq(0).all()
    for before, found in zip(calls[1:], flows, strict=False):
        assert before.equal(weights(found))
    assert [weights(flow)[0].item() for flow in flows] == pytest.approx([1, 2, 3], abs=0.1)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """Files are written whole or not at all, so that a kill is a stop between two of them."""
    whole = reflow.rounds(line(), recipe, 3, **HOW)

    def kill(done, total):
        if done == 150 + 90:  # in the second round, after a checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reflow.rounds(line(), recipe, 3, **HOW, folder=tmp_path, every=40, callback=kill)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "round-2-pairs.safetensors",
        "round-2.pt",
        "round-3-pairs.safetensors",
        "round-3.pt",
    ]
    made, seen = [], []

    def watched(current, generator):
        made.append(1)
        return recipe(current, generator)

    how = {**HOW, "folder": tmp_path, "every": 40, "callback": lambda *a: seen.append(a[0])}
    flows = reflow.rounds(line(), watched, 3, **how)
    assert len(made) == 1  # of the last round; the second's are read
    assert seen[:3] == [150, 230, 231]  # round 2 is read, round 3 goes on at step 80
    for found, expected in zip(flows, whole, strict=True):
        assert weights(found).equal(weights(expected))
    again = reflow.rounds(line(), watched, 3, **how)
    assert len(made) == 1 and weights(again[-1]).equal(weights(whole[-1]))


def test_files_of_another_configuration_are_refused_by_name(tmp_path):
    how = {**HOW, "steps": 5, "folder": tmp_path}
    reflow.rounds(line(), recipe, 1, **how, configuration={"ratio": 0.3})

    def refused(first=None, **other):
        given = {**how, "configuration": {"ratio": 0.3}, **other}
        with pytest.raises(FileError) as error:
            reflow.rounds(first or line(), recipe, 1, **given)
        return str(error.value).removeprefix(f"{tmp_path}/")

    end = ": delete it, or name another file"
    steps = f"round-2.pt: checkpoint of another configuration: steps: 5 there, 6 here{end}"
    assert refused(steps=6) == steps
    said = "round-2-pairs.safetensors: pairs of another configuration: "
    assert refused(configuration={"ratio": 0.5}) == f"{said}ratio: 0.3 there, 0.5 here{end}"
    assert refused(seed=1) == f"{said}seed: 0 there, 1 here{end}"
    other = line()
    other.network.a.data += 1
    assert refused(other).startswith(f"{said}previous: ")
    file = tmp_path / "round-2-pairs.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert refused().startswith("round-2-pairs.safetensors: truncated or unreadable")
    file.unlink()
    said = "round-2.pt: checkpoint of another configuration: "
    assert refused(seed=1) == f"{said}seed: 0 there, 1 here{end}"
    tensor_files.save(file, {"noise": torch.zeros(2, 1)}, {})
    assert refused() == f"{file.name}: no pairs of reflow: name another folder"


def test_global_state_changes_nothing():
    def found():
        flow = gaussian(0.5, 2.0)
        noise = torch.randn(4, 3, generator=rng(), dtype=torch.float32, device="cpu")
        made = reflow.pairs(flow, noise, T[:-1])
        back = reflow.reverse_pairs(flow, made.sample, T, rng())
        both = reflow.mix(made, back, 0.5, rng())
        value = reflow.straightness_of_pairs(both, 0.5, rng())
        flows = reflow.rounds(line(), recipe, 1, **HOW)
        return [made.sample, back.noise, both.noise, *flows[0].network.parameters()], value

    plain, value = found()
    torch.set_default_dtype(f64)
    try:
        with torch.inference_mode():
            other, again = found()
    finally:
        torch.set_default_dtype(torch.float32)
    assert again == value
    for a, b in zip(plain, other, strict=True):
        assert a.equal(b) and not b.is_inference()


# ---- what is refused

GOOD = Pairs(torch.zeros(3, 2), torch.ones(3, 2))
FLOW = constant(1.0)
X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: Pairs(X, X[:2]), ValueError, r"sample: expected shape \[3, 2\] like noise"),
        (lambda: Pairs(X, X.double()), TypeError, "sample: expected float32 like noise"),
        (lambda: Pairs(X.long(), X.long()), TypeError, "noise: expected float32 or float64"),
        (lambda: GOOD[0], TypeError, "rows: expected a slice, a list or a tensor"),
        (lambda: reflow.pairs(FLOW, 3, T), TypeError, "noise: expected a tensor, got int"),
        (lambda: reflow.pairs(FLOW, X, T.flip(0)), ValueError, "t: expected noise that falls"),
        (lambda: reflow.pairs(FLOW, X, T[:0]), ValueError, r"t: expected real numbers of shape"),
        (lambda: reflow.pairs(FLOW, X, 10), TypeError, "t: expected a tensor"),
        (lambda: reflow.pairs(FLOW, X, T, "rk4"), ValueError, "method: expected 'ddim' or 'heun'"),
        (lambda: reflow.pairs(FLOW, X, 2 * T), ValueError, r"t: expected values in \[0, 1\]"),
        (
            lambda: reflow.reverse_pairs(FLOW, X, T, rng(), noise=1.0),
            ValueError,
            r"noise: expected a number in \[0, 1\), got 1.0",
        ),
        (
            lambda: reflow.reverse_pairs(FLOW, X, T[20:], rng(), noise=0.6),
            ValueError,
            "t: expected a node with more noise than 0.6, got 0.5 for the first",
        ),
        (lambda: reflow.mix(GOOD, X, 0.3, rng()), TypeError, "real: expected Pairs, got Tensor"),
        (
            lambda: reflow.mix(GOOD, GOOD, 1.5, rng()),
            ValueError,
            r"ratio: expected a number in \[0, 1\], got 1.5",
        ),
        (
            lambda: reflow.mix(GOOD, GOOD[:0], 0.5, rng()),
            ValueError,
            "real: expected at least one pair, got none",
        ),
        (
            lambda: reflow.mix(GOOD, Pairs(X[:, :1], X[:, :1]), 0.5, rng()),
            ValueError,
            r"real.noise: expected shape \[0, 2\]",
        ),
        (
            lambda: reflow.mix(GOOD, GOOD, 0.5, 0),
            TypeError,
            "generator: expected a torch.Generator, got int",
        ),
        (lambda: reflow.loss(FLOW, GOOD, 0), TypeError, "generator: expected a torch.Generator"),
        (
            lambda: reflow.reverse_pairs(FLOW, X, T, 0),
            TypeError,
            "generator: expected a torch.Generator",
        ),
        (
            lambda: reflow.straightness_of_pairs(GOOD, 1.0, 0),
            TypeError,
            "generator: expected a torch.Generator",
        ),
        (
            lambda: reflow.rounds(line(), None, 1, steps=1),
            TypeError,
            r"recipe: expected a callable recipe\(current, generator\), got NoneType",
        ),
        *(
            (call, TypeError, "denoiser: expected a Denoiser, got PointCloud")
            for call in (
                lambda: reflow.velocity(df.PointCloud(X), X, 0.5),
                lambda: reflow.loss(df.PointCloud(X), GOOD, rng()),
                lambda: reflow.pairs(df.PointCloud(X), X, T),
                lambda: reflow.reverse_pairs(df.PointCloud(X), X, T, rng()),
                lambda: reflow.straightness(df.PointCloud(X), GOOD, rng()),
                lambda: reflow.rounds(df.PointCloud(X), recipe, 1, steps=1),
            )
        ),
        (lambda: reflow.exact(GOOD, 0.0), ValueError, "bandwidth: expected a finite value > 0"),
        (lambda: reflow.exact(X, 1.0), TypeError, "pairs: expected Pairs, got Tensor"),
        (lambda: reflow.exact(GOOD[:0], 1.0), ValueError, "pairs: expected at least one pair"),
        (
            lambda: reflow.straightness_of_pairs(GOOD[:0], 1.0, rng()),
            ValueError,
            "pairs: expected at least one pair",
        ),
        (
            lambda: reflow.straightness(FLOW, GOOD, rng(), times=0),
            ValueError,
            "times: expected an integer of at least 1, got 0",
        ),
        (lambda: reflow.loss(FLOW, X, rng()), TypeError, "pairs: expected Pairs, got Tensor"),
        (
            lambda: reflow.rounds(FLOW, recipe, 1, steps=1),
            TypeError,
            "denoiser: expected one of an nn.Module with parameters to train",
        ),
        (
            lambda: reflow.rounds(line(), lambda c, g: X, 1, steps=1),
            TypeError,
            "recipe: expected Pairs from it, got Tensor",
        ),
        (
            lambda: reflow.rounds(line(), lambda c, g: GOOD[:0], 1, steps=1),
            ValueError,
            "recipe: expected at least one pair from it, got none",
        ),
    ],
)
def test_what_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_sizes_of_nothing_and_one():
    empty = torch.zeros(0, 2)
    assert reflow.pairs(FLOW, empty, T).sample.shape == (0, 2)
    back = reflow.reverse_pairs(FLOW, empty, T, rng(), exact=True)
    assert back.noise.shape == (0, 2)
    assert len(reflow.mix(GOOD[:0], GOOD, 0.5, rng())) == 0
    assert math.isnan(reflow.straightness(FLOW, GOOD[:0], rng()).value)
    one = reflow.straightness_of_pairs(GOOD[:1], 1.0, rng())
    assert one.value == 0 and math.isnan(one.error)
    assert reflow.velocity(reflow.exact(GOOD[:1], 1e-3), X, 0.5).equal(torch.ones(3, 2))
