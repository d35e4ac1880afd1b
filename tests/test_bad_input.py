"""What people get wrong, at every door: a network, a condition, a schedule or data that cannot be
right is an error that names it, or a warning, and `check` and `audit` say what is wrong.
"""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from tensors import normal
from torch import nn

import dfkernels as df
from dfkernels import schedule

TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SMOOTH = schedule.Tabulated(TABLE)
NOISE = (0.1, 10.0)
TIMES = df.time_grid(SMOOTH, 2, NOISE)


X, CLOUD = normal(3, 2), df.PointCloud(normal(200, 2, seed=1))
DOORS = {
    "sample": lambda denoiser, x, cloud: df.sample(denoiser, x, TIMES),
    "log_prob": lambda denoiser, x, cloud: df.log_prob(
        denoiser, x, NOISE, "divergence", method="heun", steps=2
    ),
    "check": lambda denoiser, x, cloud: df.check(denoiser, cloud, queries=8),
    "audit": lambda denoiser, x, cloud: df.audit(
        denoiser, cloud, None, levels=2, queries=8, points=4, samples=0
    ),
}
doors = pytest.mark.parametrize("door", DOORS)


class Table(nn.Module):
    """Knows its timesteps by a table of embeddings."""

    def __init__(self, steps=1000):
        super().__init__()
        self.table = nn.Embedding(steps, 1).double()

    def forward(self, x, t):
        return x * self.table(t)


class Rows(Table):
    """The same, with a tensor as the table."""

    def forward(self, x, t):
        return x * self.table.weight[t]


def conditional(x, t, label):
    return x * label


LINEAR = nn.Linear(2, 2)  # in float32
JOINED = nn.Linear(3, 2).double()
IMAGES = nn.Conv2d(1, 1, 1).double()
GIVEN = r"network: expected a prediction for x \[(\d+), 2\] float64 on cpu, t \[\1\] float64 on cpu"
BAD = {
    "NaN": (
        lambda x, t: x * math.nan,
        ValueError,
        r"network: returned NaN or inf for (\d+) of \1 samples, first for sample 0 at t = ",
    ),
    "one NaN": (
        lambda x, t: torch.where(torch.arange(len(x))[:, None] == 1, math.nan, x),
        ValueError,
        r"network: returned NaN or inf for 1 of \d+ samples, first for sample 1 at t = ",
    ),
    "another shape": (
        lambda x, t: x[:, :1],
        ValueError,
        r"network: expected output of shape \[(\d+), 2\], got \[\1, 1\]$",
    ),
    "another device": (
        lambda x, t: x.to("meta"),
        ValueError,
        "network: expected output on cpu like x, got meta$",
    ),
    "integers": (
        lambda x, t: x.long(),
        TypeError,
        "network: expected output of a floating dtype, got torch.int64$",
    ),
    "nothing": (lambda x, t: None, TypeError, "network: expected a tensor, .*, got NoneType$"),
    "a condition missing": (
        conditional,
        TypeError,
        GIVEN + r"; it raised TypeError: .*'label' \(conditions are keyword arguments, of the call "
        r"or of denoiser.bind\(\.\.\.\)\)$",
    ),
    "a table of times": (
        Table(),
        RuntimeError,
        GIVEN + r"; it raised RuntimeError: .*a schedule with discrete=True, or a clock",
    ),
    "an indexed table of times": (
        Rows(),
        IndexError,
        GIVEN + r"; it raised IndexError: .*a schedule with discrete=True, or a clock",
    ),
    "t beside x": (
        lambda x, t: JOINED(torch.cat([x, t], 1)),
        RuntimeError,
        GIVEN + r"; it raised RuntimeError: .* beside x \[B, d\] it is t\[:, None\]\)$",
    ),
    "t times x": (
        lambda x, t: x * t,
        RuntimeError,
        GIVEN + r"; it raised RuntimeError: .* beside x \[B, d\] it is t\[:, None\]\)$",
    ),
    "a dtype that a function hides": (
        lambda x, t: LINEAR(x),
        RuntimeError,
        GIVEN + "; it raised RuntimeError: .*df.methods.Called shows them",
    ),
    "another error": (
        lambda x, t: torch.linalg.cholesky(torch.zeros(2)),
        RuntimeError,
        GIVEN + "; it raised RuntimeError: linalg.cholesky: .*[^)]$",
    ),
}


@doors
@pytest.mark.parametrize("case", BAD)
def test_a_network_that_cannot_be_right_is_named(case, door):
    network, kind, message = BAD[case]
    with pytest.raises(kind, match=f"^(?s:{message})"):
        DOORS[door](df.Denoiser(network, SMOOTH), X, CLOUD)


@doors
def test_data_of_another_shape_are_named(door):
    """The network's own error, with what it was given."""
    x, cloud = normal(3, 2, 3, 3), df.PointCloud(normal(50, 2, 3, 3, seed=1))
    message = r"^network: expected a prediction for x \[\d+, 2, 3, 3\] .*does the network take samp"
    with pytest.raises(RuntimeError, match=message):
        DOORS[door](df.Denoiser(lambda x, t: IMAGES(x), SMOOTH), x, cloud)


def test_the_network_s_own_error_is_the_cause():
    with pytest.raises(RuntimeError) as caught:
        df.Denoiser(Table(), SMOOTH)(X, 3)
    assert type(caught.value.__cause__) is RuntimeError
    assert str(caught.value.__cause__) in str(caught.value)
    assert caught.value.__cause__.__traceback__.tb_next.tb_next is not None  # into the network


class OutOfMemory(RuntimeError):
    """Stands for errors that somebody looks for by their type."""


@pytest.mark.parametrize("kind", [OutOfMemory, ValueError, NotImplementedError, KeyError])
def test_errors_of_other_types_stay_what_they_are(kind):
    error = kind("mine")

    def network(x, t):
        raise error

    with pytest.raises(kind) as caught:
        df.Denoiser(network, SMOOTH)(X, 3)
    assert caught.value is error


def test_a_network_within_a_network_is_named_once():
    guided = df.ClassifierFreeGuidance(lambda x, t, label: x @ x, 2.0, {"label": 0})
    with pytest.raises(RuntimeError) as caught:
        df.Denoiser(guided, SMOOTH)(X, 3, label=torch.ones(3))
    assert str(caught.value).count("expected a prediction for") == 1
    trace = df.MatchedTrace(lambda x, t: x @ x, df.Denoiser(lambda x, t: x, SMOOTH))
    with pytest.raises(RuntimeError, match="^trace network: expected a prediction for x .3, 2. "):
        trace(X, 3)


def test_what_a_data_set_raises_in_the_place_of_a_network_is_complete():
    y = normal(5, 2)
    denoiser = df.Denoiser.exact(df.PointCloud(y), SMOOTH)
    y += 1
    with pytest.raises(RuntimeError, match="^y: changed in place since this PointCloud was made"):
        denoiser(X, 3)


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.exact, self.dropout = df.Denoiser.exact(CLOUD, SMOOTH).eval(), nn.Dropout(0.2)

    def forward(self, x, t):
        return self.dropout(self.exact.eps(x, t))


@doors
def test_a_network_in_train_mode_is_named(door):
    torch.manual_seed(0)
    denoiser = df.Denoiser(Random(), SMOOTH)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = DOORS[door](denoiser, X, CLOUD)
    if door in ("check", "audit"):
        report = found if door == "check" else found.check
        assert (found.ok, report.cause) == (False, "train mode")
        assert "call .eval()" in found.verdict
    else:
        said = [str(w.message) for w in seen if "training mode" in str(w.message)]
        assert len(said) == 1 and said[0].startswith(f"{door}: the network is in training mode")
        assert "dropout" in said[0] and "denoiser.eval()" in said[0]


@pytest.mark.parametrize("which", ["from_diffusers", "as_diffusers"])
def test_a_scheduler_of_an_unknown_class_is_named(which):
    odd = type("OddScheduler", (), {"config": SimpleNamespace(prediction_type="epsilon")})()
    given = CLOUD if which == "as_diffusers" else nn.Identity()
    with pytest.raises(ValueError, match="^scheduler: expected a scheduler with .*, got OddSch"):
        getattr(df.adapt, which)(given, odd)


@pytest.mark.parametrize(
    "a, b, units", [(2.0, -1.0, "[0, 1] for [-1, 1]"), (0.5, 0.5, "[-1, 1] for [0, 1]")]
)
def test_data_of_another_scale_are_named_by_check(a, b, units):
    """A network of the data a y + b, and a file that holds y."""
    y = torch.rand(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = y if a == 2 else 2 * y - 1
    network = df.Denoiser.exact(df.PointCloud(a * y + b), SMOOTH)
    report = df.check(network, df.PointCloud(y), queries=32)
    assert not report.ok and report.cause == "data scale", report
    assert f"the data y mapped to {a:g} y {'-' if b < 0 else '+'} {abs(b):g} " in report.verdict
    assert df.check(network, df.PointCloud(y, scale=a, offset=b), queries=32).ok, units
    audited = df.audit(network, df.PointCloud(y), None, levels=2, queries=32)
    assert not audited.ok and not audited.levels
    assert f"the data y mapped to {a:g} y" in audited.verdict


ENDS_WITHOUT_SIGNAL = torch.cat([TABLE[:-1], TABLE.new_zeros(1)])


def test_a_table_that_ends_without_signal_is_named():
    with pytest.raises(ValueError, match=r"^alphas_cumprod: .* \(zero terminal SNR: cut it, .*"):
        schedule.Tabulated(ENDS_WITHOUT_SIGNAL)
    made = type("DDIMScheduler", (), {"alphas_cumprod": ENDS_WITHOUT_SIGNAL})()
    made.config = SimpleNamespace(prediction_type="epsilon")
    with pytest.raises(ValueError, match="^scheduler: .* without signal .rescale_betas_zero_snr."):
        df.adapt.from_diffusers(nn.Identity(), made)


def test_a_flow_that_starts_without_signal_is_named():
    flow = schedule.RectifiedFlow()
    denoiser = df.Denoiser(df.Denoiser.exact(CLOUD, flow).eps, flow, "epsilon")
    with pytest.raises(ValueError, match="^t: expected alpha > 0 at every node, got alpha = 0 at"):
        df.sample(denoiser, X, torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match="^t: x_0 of an 'epsilon' network does not exist where al"):
        denoiser(X, 0.0)
    with pytest.raises(ValueError, match="^noise: expected a finite value, got inf"):
        df.log_prob(denoiser, X, (0.1, math.inf), "divergence")
    report = df.check(denoiser, CLOUD, queries=32)
    assert report.ok and "alpha = 0 at t = 0" in report.notes[0]


def test_zero_terminal_snr_on_one_side_only_is_named_by_check():
    """A network of Stable Diffusion's table, rescaled, used with the table itself."""
    root = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    table = torch.cumprod(1 - root.square(), 0)
    alpha = table.sqrt()
    rescaled = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    rescaled = torch.cat([rescaled[:-1], rescaled[-2:-1] / 4]).square()
    y = 0.5 + 3 * normal(300, 2, seed=3)  # of a size to which the noise at the end matters
    theirs = df.Denoiser.exact(df.PointCloud(y), schedule.Tabulated(rescaled))
    network = lambda x, t: (
        theirs.levels(x, t)[0][:, None] * theirs.eps(x, t)
        - theirs.levels(x, t)[1][:, None] * theirs(x, t)
    )
    tabulated = df.Denoiser(network, schedule.Tabulated(table), "v_prediction")
    report = df.check(tabulated, df.PointCloud(y))
    assert report.cause == "noise level", report
    assert "With the noise levels of this table rescaled to zero terminal SNR" in report.verdict


def test_an_adaptive_solver_of_a_staircase_is_refused():
    discrete = schedule.Tabulated(TABLE, discrete=True)
    denoiser = df.Denoiser(lambda x, t: x, discrete)
    message = "^method: expected 'rk4' or 'heun' with a discrete schedule, .* got 'dopri5'$"
    with pytest.raises(ValueError, match=message):
        df.log_prob(denoiser, X, NOISE, "divergence")
    assert denoiser.evaluations == 0


def test_integer_timesteps_are_taken_as_they_are():
    denoiser = df.Denoiser(Table(), schedule.Tabulated(TABLE, discrete=True))
    steps = torch.tensor([900, 500, 20])
    with torch.no_grad():
        found = df.sample(denoiser, X, steps)
        wanted = df.sample(denoiser, X, steps.double())
    assert found.t.tolist() == [900, 500, 20] and torch.equal(found.x[-1], wanted.x[-1])
    with pytest.raises(ValueError, match=r"^t: expected real numbers of shape .* got torch.bool"):
        df.sample(denoiser, X, torch.tensor([True, False]))


@pytest.mark.parametrize(
    "kind, t, message",
    [
        ("EDMEulerScheduler", 500.0, r"times ln\(sigma\)/4 in \[-11, 11\], got 500"),
        ("CosineDPMSolverMultistepScheduler", 2.0, r"times 2 atan\(sigma\)/pi in \[0, 1\], got 2"),
    ],
)
def test_a_timestep_of_another_clock_is_named(kind, t, message):
    """1 to 1000, where the model is given a function of sigma."""
    made = type(kind, (), {"precondition_outputs": None})()
    made.config = SimpleNamespace(prediction_type="epsilon", sigma_data=0.5)
    with pytest.raises(ValueError, match=f"^timestep: expected {message}$"):
        df.adapt.as_diffusers(CLOUD, made)(X, t)
    assert bool(df.adapt.as_diffusers(CLOUD, made)(X, 0.9).sample.isfinite().all())
