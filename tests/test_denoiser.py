"""Denoiser: every prediction type is one linear change of variables. Time grids: the nodes of a
solver."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import SCHEDULES
from tensors import column

from dfkernels import DiffusionFisher, PointCloud, schedule
from dfkernels.methods.denoiser import PREDICTION_TYPES, Denoiser
from dfkernels.methods.grid import nodes, time_grid


def network_of(kind, x_0, eps, levels, velocity):
    """A network that answers with the truth in the given parametrisation."""
    alpha, sigma = levels
    return {
        "epsilon": lambda x, t: eps,
        "sample": lambda x, t: x_0,
        "v_prediction": lambda x, t: alpha * eps - sigma * x_0,
        "flow": lambda x, t: velocity,
        "score": lambda x, t: -eps / sigma,
    }[kind]


@pytest.mark.parametrize("sch", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("event", [(), (3,), (2, 3, 4)], ids=str)
def test_every_prediction_type_gives_back_noise_sample_and_score(sch, kind, event):
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 5, *event, dtype=torch.float64, generator=generator)
    t = time_grid(sch, 4, (0.05, 5.0))
    alpha, sigma = (column(level, x_0) for level in sch(t))
    x = alpha * x_0 + sigma * eps

    def path(t):
        alpha, sigma = sch(t)
        return column(alpha, x) * x_0 + column(sigma, x) * eps

    velocity = torch.func.jvp(path, (t,), (torch.ones_like(t),))[1]  # dx_t/dt at fixed x_0 and eps
    if isinstance(sch, schedule.RectifiedFlow):
        assert torch.allclose(velocity, x_0 - eps, atol=1e-12)
    denoiser = Denoiser(network_of(kind, x_0, eps, (alpha, sigma), velocity), sch, kind)
    # one division by alpha or sigma, each at least 0.04, of rounding errors of numbers up to 10
    assert torch.allclose(denoiser.eps(x, t), eps, atol=1e-11)
    assert torch.allclose(denoiser.denoised(x, t), x_0, atol=1e-11)
    assert torch.allclose(denoiser.score(x, t), -eps / sigma, atol=1e-10)
    assert denoiser.evaluations == 3


FLOORED = torch.linspace(0.9999, 0.01, 1000, dtype=torch.float64)
FLOORED[-1] = 2**-24  # a table of zero terminal SNR, floored
CLOSED = {
    "VP": (schedule.VP(), (0.0, 1e-9, 1e-4, 0.3, 1.0)),
    "SubVP": (schedule.SubVP(), (0.0, 1e-9, 1e-4, 0.3, 1.0)),
    "VE": (schedule.VE(), (0.0, 1e-9, 1e-4, 0.3, 80.0, 1e4)),
    "EDM": (schedule.EDM(), (0.0, 1e-9, 1e-4, 0.3, 80.0, 1e4)),
    "RectifiedFlow": (schedule.RectifiedFlow(), (0.0, 1e-12, 1e-4, 0.3, 1 - 1e-4, 1 - 2**-40, 1.0)),
    "ReversedRectifiedFlow": (
        schedule.ReversedRectifiedFlow(),
        (0.0, 2**-40, 1e-4, 0.3, 1 - 1e-4, 1 - 1e-12, 1.0),
    ),
    "Cosine": (schedule.Cosine(), (0.0, 1e-9, 1e-4, 0.3, 1 - 1e-4, 1.0)),
    "GeometricVE": (schedule.GeometricVE(), (0.0, 0.3, 1.0)),
    "TabulatedVE": (schedule.TabulatedVE([0.01, 1.0, 80.0]), (0.0, 0.3, 2.0)),
    "Tabulated": (schedule.Tabulated(FLOORED), (0.0, 1e-9, 500.3, 998.0, 998.9999, 999.0)),
}


def rows(kind, alpha, sigma, rates):
    """What the network says, as coefficients of x_0 and eps."""
    return {
        "epsilon": (0.0, 1.0),
        "sample": (1.0, 0.0),
        "v_prediction": (-sigma, alpha),
        "flow": rates,
        "score": (0.0, -1 / sigma if sigma else -math.inf),
    }[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_every_prediction_type_over_the_closed_range(kind, name, dtype):
    """Against Cramer's rule in rationals, on the very x and output that the denoiser was given: the
    error is that of rounding the two terms of the sum.
    """
    sch, ends = CLOSED[name]
    truth = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in ends:
        alpha, sigma = (level.item() for level in sch(t))
        rates = [rate.item() for rate in sch.rates(t)]
        a, b = rows(kind, alpha, sigma, rates)
        x = (alpha * truth[0] + sigma * truth[1]).to(dtype)[None]
        out = (a * truth[0] + (b if math.isfinite(b) else 1.0) * truth[1]).to(dtype)[None]
        denoiser = Denoiser(lambda x, t, out=out: out, sch, kind)
        exact = {}  # name: (coefficients of x, of out) or None
        if math.isfinite(b):
            A, S, a, b = map(Fraction, (alpha, sigma, a, b))
            D = A * b - S * a
            exact["denoised"] = (b / D, -S / D) if D else None
            exact["eps"] = (-a / D, A / D) if D else None
        else:  # sigma = 0: x is alpha x_0
            exact["denoised"], exact["eps"] = (1 / Fraction(alpha), 0), None
        if kind == "sample":
            exact["denoised"] = (0, 1)
        if kind == "epsilon":
            exact["eps"] = (0, 1)
        if kind == "score" and sigma:
            exact["eps"] = (0, -sigma)
        for what, pair in exact.items():
            if pair is None:
                with pytest.raises(
                    ValueError, match=f"t: .* does not exist where .* at t = {t:g} of"
                ):
                    getattr(denoiser, what)(x, t)
                continue
            p, q = map(float, pair)
            got = getattr(denoiser, what)(x, t)
            assert got.dtype == dtype
            want = p * x.double() + q * out.double()
            scale = abs(p) * x.double().abs() + abs(q) * out.double().abs()
            # the two coefficients, two products, a sum, a product: 6 roundings of half a unit
            assert bool(
                ((got.double() - want).abs() <= 4 * torch.finfo(dtype).eps * scale).all()
            ), (what, t)


def test_rates_are_the_derivatives_of_the_levels():
    for sch, ends in CLOSED.values():
        t = torch.tensor([t for t in ends if t > 0], dtype=torch.float64).requires_grad_()
        for level, rate in zip(sch(t), sch.rates(t), strict=True):
            slope = torch.autograd.grad(level.sum() + 0 * t.sum(), t)[0]
            assert torch.allclose(rate, slope, rtol=1e-6, atol=1e-12)  # autograd's own cancellation


def test_only_what_is_asked_for_has_to_exist():
    x = torch.ones(2, 3)
    assert torch.equal(Denoiser(lambda x, t: x, schedule.VP(), "sample").denoised(x, 0.0), x)
    assert torch.equal(Denoiser(lambda x, t: x, schedule.RectifiedFlow()).eps(x, 0.0), x)
    for make in ("denoised", "both"):
        with pytest.raises(ValueError) as caught:
            getattr(Denoiser(lambda x, t: x, schedule.RectifiedFlow()), make)(
                x, torch.tensor([0.5, 0.0])
            )
        assert str(caught.value) == (
            "t: x_0 of an 'epsilon' network does not exist where alpha = 0, as at t = 0 of "
            "RectifiedFlow()"
        )
    for kind in PREDICTION_TYPES:
        with pytest.raises(
            ValueError, match="t: the score does not exist where sigma = 0, as at t = 0 of VP"
        ):
            Denoiser(lambda x, t: x, schedule.VP(), kind).score(x, 0.0)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_predictions_are_differentiable_mapped_and_compiled(kind):
    sch = schedule.RectifiedFlow()
    denoiser = Denoiser(lambda x, t: x.sin() * t.view(-1, *[1] * (x.ndim - 1)), sch, kind)
    x = torch.randn(
        4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    t = torch.tensor([0.2, 0.4, 0.6, 0.9], dtype=torch.float64, requires_grad=True)
    for method in (denoiser.eps, denoiser.denoised, denoiser.score):
        assert torch.autograd.gradcheck(method, (x, t))
        mapped = torch.vmap(lambda x, t, method=method: method(x[None], t[None])[0])(x, t)
        assert torch.allclose(mapped, method(x, t), rtol=1e-14)
        compiled = torch.compile(method, backend="eager")
        assert torch.allclose(compiled(x, t), method(x, t), rtol=1e-14)


def test_an_output_of_lower_precision_is_converted():
    """A network under autocast answers in bfloat16."""
    layer = torch.nn.Linear(3, 3)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(lambda x, t: layer(x), schedule.EDM(), "sample")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, eps = layer(x), denoiser.eps(x, 0.5)
    assert out.dtype == torch.bfloat16 and eps.dtype == torch.float32
    assert torch.equal(eps, (x - out.float()) * 2)


def test_v_prediction_is_ddim_s_velocity_on_variance_preserving_schedules():
    """Salimans & Ho 2022: eps = alpha v + sigma x, x_0 = alpha x - sigma v."""
    sch, t = schedule.VP(), torch.tensor([0.1, 0.7], dtype=torch.float64)
    x, v = torch.randn(2, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alpha, sigma = (level[:, None] for level in sch(t))
    eps, x_0 = Denoiser(lambda x, t: v, sch, "v_prediction").both(x, t)
    assert torch.allclose(eps, alpha * v + sigma * x, atol=1e-14)
    assert torch.allclose(x_0, alpha * x - sigma * v, atol=1e-14)


def test_exact_is_the_posterior_over_the_cloud():
    y = torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(2))
    cloud, sch = PointCloud(y), schedule.SubVP()
    x, t = y[:5] * 0.5, torch.linspace(0.2, 0.9, 5)
    at = DiffusionFisher(x, cloud, *sch(t.double()))  # levels in full precision
    denoiser = Denoiser.exact(cloud, sch)
    assert torch.equal(denoiser.denoised(x, t), at.denoised)
    assert torch.allclose(denoiser.eps(x, t), at.eps, atol=1e-5)
    assert torch.allclose(denoiser.score(x, t), at.score, rtol=1e-5, atol=1e-5)


def test_wrong_networks_are_named():
    x, t = torch.zeros(3, 2), torch.tensor([0.1, 0.2, 0.4])

    def error(network, kind=ValueError):
        with pytest.raises(kind) as caught:
            Denoiser(network, schedule.VE()).eps(x, t)
        return str(caught.value)

    assert error(lambda x, t: x[:, :1]) == "network: expected output of shape [3, 2], got [3, 1]"
    assert (
        error(lambda x, t: x.long(), TypeError)
        == "network: expected output of a floating dtype, got torch.int64"
    )
    assert error(lambda x, t: x.double() + 1e300) == (
        "network: returned NaN or inf for 3 of 3 samples, first for sample 0 at t = 0.1"
    )
    assert error(lambda x, t: x.to("meta")) == "network: expected output on cpu like x, got meta"
    spoilt = torch.zeros(3, 2)
    spoilt[2, 1] = math.nan
    assert (
        error(lambda x, t: spoilt)
        == "network: returned NaN or inf for 1 of 3 samples, first for sample 2 at t = 0.4"
    )


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ((1, schedule.VP()), TypeError, "network: expected a callable network(x, t), got int"),
        ((abs, None), TypeError, "schedule: expected a dfkernels.schedule, got NoneType"),
        (
            (abs, schedule.VP(), "eps"),
            ValueError,
            "prediction_type: expected 'epsilon' or 'sample' or 'v_prediction' or 'flow' or "
            "'score', got 'eps'",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, kind, message):
    with pytest.raises(kind) as caught:
        Denoiser(*arguments)
    assert str(caught.value) == message


def test_bad_times_are_named():
    denoiser = Denoiser(lambda x, t: x, schedule.VP())
    with pytest.raises(
        ValueError, match=r"t: expected a number, shape \[\] or \[3\], got shape \[2\]"
    ):
        denoiser.eps(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"t: expected values in \[0, 1\] for VP"):
        denoiser.eps(torch.zeros(3, 2), 1.5)


@pytest.mark.parametrize("sch", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("spacing", ["log", "edm", "time"])
@given(st.floats(0.02, 0.5), st.floats(1.1, 50), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_a_time_grid_falls_between_its_noise_levels(sch, spacing, low, ratio, steps):
    t = time_grid(sch, steps, (low, low * ratio), spacing)
    alpha, sigma = sch(t)
    s = sigma / alpha
    assert t.dtype == torch.float64 and t.shape == (steps + 1,)
    assert bool((s.diff() < 0).all())
    assert s[[0, -1]].tolist() == pytest.approx([low * ratio, low], rel=1e-9)
    even = {"log": s.log(), "edm": s ** (1 / 7), "time": t}[spacing].diff()
    assert torch.allclose(even, even.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: time_grid(schedule.VP(), 5, (1.0, 1.0)),
            "noise: expected 0 < noise[0] < noise[1] (levels sigma/alpha), got (1.0, 1.0)",
        ),
        (
            lambda: time_grid(schedule.VP(), 0, (0.1, 1.0)),
            "steps: expected an integer of at least 1, got 0",
        ),
        (
            lambda: time_grid(schedule.VP(), 5, (0.1, 1.0), "cosine"),
            "spacing: expected 'log' or 'edm' or 'time', got 'cosine'",
        ),
        (
            lambda: nodes(schedule.VE(), torch.tensor([1.0, 0.5, 0.0])),
            "t: expected sigma > 0 at every node, got sigma = 0 at t = 0 of VE(); stop short of "
            "it, e.g. with "
            "time_grid(schedule, steps, noise=(0.002, 80))",
        ),
        (
            lambda: nodes(schedule.RectifiedFlow(), torch.tensor([0.0, 0.5])),
            "t: expected alpha > 0 at every node, got alpha = 0 at t = 0 of RectifiedFlow(); "
            "stop short of it, "
            "e.g. with time_grid(schedule, steps, noise=(0.002, 80))",
        ),
        (
            lambda: nodes(schedule.EDM(), torch.tensor([0.1, 0.2])),
            "t: expected noise sigma/alpha that strictly falls from node to node, got 0.1 at t = "
            "0.1, then 0.2 "
            "at t = 0.2",
        ),
        (
            lambda: nodes(schedule.EDM(), torch.zeros(2, 2)),
            "t: expected real numbers of shape [M + 1], got torch.float32 [2, 2]",
        ),
    ],
)
def test_bad_grids_are_named(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


def test_a_range_that_the_schedule_does_not_reach_is_an_error():
    with pytest.raises(
        ValueError,
        match=r"^noise: expected levels in \[0, 152.* VP\(.* reaches, got \(0.1, 1e\+06\)$",
    ):
        time_grid(schedule.VP(), 5, (0.1, 1e6))
    table = schedule.Tabulated(torch.linspace(0.99, 0.01, 9))
    for spacing in ("log", "edm", "time"):
        with pytest.raises(ValueError, match=r"^noise: .*\[0.100504, 9.94987\], .*\(0.01, 5\)$"):
            time_grid(table, 5, (0.01, 5), spacing)


@pytest.mark.parametrize("kind", ["v_prediction", "flow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_alpha_whose_square_float32_does_not_have(kind, dtype):
    sch = schedule.VP(1.0, 200.0)  # alpha(1) = 1.5e-22
    alpha, sigma = sch(1.0)
    alpha_rate, sigma_rate = sch.rates(1.0)
    x0, eps = torch.tensor([[0.7, -1.3]], dtype=dtype), torch.tensor([[0.4, 1.9]], dtype=dtype)
    out = alpha * eps - sigma * x0 if kind == "v_prediction" else alpha_rate * x0 + sigma_rate * eps
    denoiser = Denoiser(lambda x, t: out.to(dtype), sch, kind)
    found = denoiser.both((alpha * x0 + sigma * eps).to(dtype), 1.0)
    torch.testing.assert_close(found, (eps, x0), rtol=1e-5, atol=1e-6)


class Conditional(torch.nn.Module):
    """eps = a x + shift[label], with what the calls passed."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("shift", torch.arange(3, dtype=torch.float64))

    def forward(self, x, t, label=None):
        shift = 0.0 if label is None else self.shift[label].view(-1, *[1] * (x.ndim - 1))
        return self.a * x + shift


def conditional():
    denoiser = Denoiser(Conditional(), schedule.EDM())
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return denoiser, x, torch.tensor([2, 0, 1])


def test_a_denoiser_is_a_module_with_its_network_s_parameters():
    network = Conditional().eval()
    denoiser = Denoiser(network, schedule.EDM())
    assert isinstance(denoiser, torch.nn.Module) and not denoiser.training
    assert [name for name, _ in denoiser.named_parameters()] == ["network.a"]
    assert next(denoiser.parameters()) is network.a
    assert list(denoiser.state_dict()) == ["network.a", "network.shift"]
    assert denoiser.train().network.training and not denoiser.eval().network.training
    assert denoiser.float() is denoiser and network.a.dtype == torch.float32
    other = Denoiser(Conditional(), schedule.EDM())
    other.load_state_dict(denoiser.state_dict())
    assert other.network.a == network.a
    assert list(Denoiser(torch.sin, schedule.EDM()).parameters()) == []
    assert list(Denoiser(torch.sin, schedule.EDM()).state_dict()) == []


def test_a_call_returns_the_posterior_mean_and_passes_conditions_on():
    denoiser, x, label = conditional()
    t = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    eps = 0.5 * x + label[:, None]
    mean = x - t[:, None] * eps
    assert torch.allclose(denoiser(x, t, label=label), mean)
    assert torch.allclose(denoiser.denoised(x, t, label=label), mean)
    assert torch.allclose(denoiser.eps(x, t, label=label), eps)
    assert torch.allclose(denoiser.score(x, t, label=label), -eps / t[:, None])
    assert all(
        torch.allclose(a, b)
        for a, b in zip(denoiser.both(x, t, label=label), (eps, mean), strict=True)
    )
    assert torch.allclose(denoiser(x, t), x - t[:, None] * 0.5 * x)
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        denoiser(x, t, labels=label)


def test_a_bound_denoiser_shares_all_but_its_conditions():
    denoiser, x, label = conditional()
    bound = denoiser.bind(label=label)
    assert torch.equal(bound.eps(x, 1.0), denoiser.eps(x, 1.0, label=label))
    assert torch.equal(bound.eps(x, 1.0, label=None), denoiser.eps(x, 1.0))
    assert denoiser.bind() is denoiser and denoiser.conditions == {}
    assert bound.network is denoiser.network and bound.evaluations == denoiser.evaluations == 4
    assert bound.float().network.a.dtype == denoiser.network.a.dtype == torch.float32
    denoiser.evaluations = 0
    assert bound.evaluations == 0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_copies_of_a_denoiser_share_nothing(again):
    denoiser, x, label = conditional()
    cloud = PointCloud(torch.randn(9, 2, dtype=torch.float64))
    for one in (denoiser.bind(label=label), Denoiser.exact(cloud, schedule.VP())):
        other = again(one)
        before = one.evaluations
        assert torch.equal(other.eps(x, 0.5), one.eps(x, 0.5))
        assert (one.evaluations, other.evaluations) == (before + 1, before + 1)
        for p in other.parameters():
            p.data.zero_()
        assert all(bool(p) for p in one.parameters())


def test_a_denoiser_says_what_it_is():
    denoiser, _, label = conditional()
    assert repr(denoiser.bind(label=label)) == (
        "Denoiser(\n  EDM(), 'epsilon', label\n  (network): Conditional()\n)"
    )
    assert repr(Denoiser(torch.sin, schedule.EDM(), "sample")) == "Denoiser(sin, EDM(), 'sample')"
    cloud = PointCloud(torch.zeros(2, 3))
    assert repr(Denoiser.exact(cloud, schedule.EDM())) == (
        f"Denoiser(\n  EDM(), 'sample'\n  (network): PosteriorMean({cloud!r})\n)"
    )


def test_an_exact_denoiser_moves_its_cloud_or_refuses_to():
    """`.to` reaches the cloud: other devices get a copy, a dtype leaves the storage as it is."""
    cloud = PointCloud((torch.arange(6).view(3, 2) * 40).to(torch.uint8), scale=0.1)
    denoiser = Denoiser.exact(cloud, schedule.EDM())
    assert denoiser.double().half().to("cpu").network.cloud is cloud
    with pytest.raises(ValueError, match="^y: expected a tensor with values, got .* on meta"):
        denoiser.to("meta")
    assert denoiser.network.cloud is cloud


def test_a_denoiser_is_compiled_once():
    """The count of evaluations must not become a constant of the graph."""
    torch._dynamo.reset()
    denoiser = Denoiser(Conditional(), schedule.EDM())
    x = torch.randn(3, 2, dtype=torch.float64)
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert torch.equal(compiled(x, 0.5), denoiser(x, 0.5))


def test_a_denoiser_under_functional_call_and_per_sample_gradients():
    denoiser, x, label = conditional()
    parameters = dict(denoiser.named_parameters())

    def loss(parameters, x, label):
        mean = torch.func.functional_call(
            denoiser, parameters, (x[None], 1.0), {"label": label[None]}
        )
        return mean.sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, label)
    assert torch.allclose(got["network.a"], -x.sum(1))
