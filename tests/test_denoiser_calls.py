"""Denoiser: what a network is given and what it may return, with a toy for each library's habit."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from tensors import normal

import dfkernels as df
from dfkernels import schedule
from dfkernels.methods._calls import call
from dfkernels.methods.denoiser import Denoiser


class Recorder(torch.nn.Module):
    """eps = a x, with what it was given."""

    def __init__(self, dtype):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False)
        self.a = torch.nn.Parameter(torch.tensor([[0.5]], dtype=dtype))
        self.given = []

    def forward(self, x, t):
        self.given.append((x.dtype, t.dtype, t.detach().clone()))
        return self.a * x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_network_computes_in_its_own_dtype_and_results_are_in_x_s(dtype, kind):
    network = Recorder(dtype)
    denoiser, x = Denoiser(network, schedule.EDM()), normal(3, 2, dtype=kind)
    mean, eps = denoiser(x, 2.0), denoiser.eps(x, 2.0)
    assert mean.dtype == eps.dtype == denoiser.score(x, 2.0).dtype == kind
    assert torch.equal(eps, x.to(dtype).to(kind) * 0.5)
    assert torch.equal(mean, x - 2 * eps)
    assert {given[0] for given in network.given} == {dtype}
    assert denoiser.rounding(x) == max(torch.finfo(dtype).eps, torch.finfo(kind).eps)


def test_a_timestep_is_not_rounded_to_half_precision():
    """999 is 1000 in bfloat16, and a network's frequencies would be another timestep's."""
    network = Recorder(torch.bfloat16)
    table = schedule.Tabulated(torch.linspace(0.9999, 0.01, 1000, dtype=torch.float64))
    Denoiser(network, table).eps(normal(2, 3), 999)
    assert network.given[0][1] == torch.float32 and network.given[0][2].tolist() == [999, 999]


def test_a_callable_is_given_x_s_dtype_and_may_answer_in_another():
    """EDM's networks compute in float32 and return it, whatever they are given."""
    seen = []

    def network(x, t):
        seen.append((x.dtype, t.dtype, t.shape))
        return x.float()

    for dtype in (torch.float32, torch.float64):
        x = normal(3, 2, dtype=dtype)
        for t in (0.1, torch.tensor(0.1, dtype=torch.float64), torch.full((3,), 0.1), 1):
            mean = Denoiser(network, schedule.EDM(), "sample")(x, t)
            assert mean.dtype == dtype and torch.equal(mean, x.float().to(dtype))
        assert seen == [(dtype, dtype, (3,))] * 4
        seen.clear()
    double = Denoiser(lambda x, t: x.double(), schedule.EDM())
    assert double.eps(x.float(), 0.5).dtype == torch.float32


def test_a_network_may_ask_for_x_and_the_time_uncast():
    """EDM's preconditioning around a network in bfloat16: c_skip x must not lose x's digits."""

    class Preconditioned(torch.nn.Module):
        full_precision = True

        def __init__(self):
            super().__init__()
            self.inner = Recorder(torch.bfloat16)

        def forward(self, x, sigma):
            assert x.dtype == sigma.dtype == torch.float64
            c = 1 / (1 + sigma[:, None] ** 2)
            return c * x + 0 * call(self.inner, x, sigma.log() / 4, {})

    x = normal(3, 2)
    denoiser = Denoiser(Preconditioned(), schedule.EDM(), "sample")
    assert torch.allclose(denoiser(x, 0.1), x / 1.01, rtol=1e-15)
    assert denoiser.network.inner.given[0][:2] == (torch.bfloat16, torch.float32)
    assert denoiser.rounding(x) == torch.finfo(torch.bfloat16).eps


def test_levels_are_computed_in_float64_and_rounded_last():
    sigma = Denoiser(torch.sin, schedule.EDM()).levels(torch.ones(3, 2), 1 / 3)[1]
    assert sigma.dtype == torch.float32
    assert sigma[0] == torch.tensor(1 / 3, dtype=torch.float64).float()
    table = schedule.Tabulated(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0))
    half = Recorder(torch.bfloat16)  # where 1 - alphas_cumprod of the first ten timesteps is 0
    x, eps = normal(1, 4), torch.tensor([[0.5, -1.0, 2.0, 0.25]], dtype=torch.float64)
    alpha, sigma = table(0)
    denoiser = Denoiser(lambda x, t: eps.bfloat16(), table)
    assert torch.allclose(denoiser(x, 0), (x - sigma * eps) / alpha, rtol=1e-14)
    assert torch.isfinite(Denoiser(half, table).score(x, 0)).all()


def test_a_clock_says_what_the_network_is_given():
    network = Recorder(torch.float32)
    x, t = normal(2, 3), torch.tensor([0.3, 1 / 3], dtype=torch.float64)
    for clock, want in (
        (lambda t: 1000 * t, (1000 * t).float()),
        (schedule.VP().sigma, schedule.VP().sigma(t).float()),
        (lambda t: (999 * t).round().long(), torch.tensor([300, 333])),
        (lambda t: t.half(), t.half()),
    ):
        denoiser = Denoiser(network, schedule.VP(), clock=clock)
        denoiser.bind().eps(x, t)
        assert torch.equal(network.given[-1][2], want) and network.given[-1][1] == want.dtype
    with pytest.raises(TypeError, match=r"^clock: expected a callable clock\(t\), got int$"):
        Denoiser(network, schedule.VP(), clock=1000)
    with pytest.raises(TypeError, match="^clock: expected a tensor, got float$"):
        Denoiser(network, schedule.VP(), clock=lambda t: 999.0).eps(x, t)


class Embeddings(torch.nn.Module):
    """A DDPM that knows its timesteps only: eps of x_0 = 0 by a table of sigma."""

    def __init__(self, table):
        super().__init__()
        self.embedding = torch.nn.Embedding.from_pretrained((1 - table).sqrt()[:, None])

    def forward(self, x, t):
        return x / self.embedding(t)


def test_a_network_with_a_table_of_timesteps_is_called_at_them_and_has_their_levels():
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    network, x = Embeddings(table), normal(3, 2)
    with pytest.raises(RuntimeError, match="indices"):  # torch's: no number of the table
        Denoiser(network, schedule.Tabulated(table)).eps(x, 500.0)
    discrete = schedule.Tabulated(table, discrete=True)
    denoiser = Denoiser(network, discrete)
    for t in (500, 499.7, torch.tensor([500.2, 500.4, 499.9])):
        assert torch.allclose(denoiser(x, t), torch.zeros_like(x), atol=1e-14)  # x_0 = 0
        assert torch.equal(denoiser.score(x, t), denoiser.score(x, 500))
        assert torch.equal(denoiser.levels(x, t)[1], discrete.sigma(500.0).expand(3))
    assert torch.allclose(torch.vmap(lambda x: denoiser(x[None], 3.1)[0])(x), 0 * x, atol=1e-14)
    times = df.time_grid(discrete, 10, (0.05, 50.0))
    assert torch.equal(times, times.round())
    path = df.sample(denoiser, x, times, "heun")  # x_0 = 0: x shrinks as sigma does
    shrunk = x * discrete.sigma(times[-1]) / discrete.sigma(times[0])
    assert torch.allclose(path.x[-1], shrunk, atol=1e-12)
    with pytest.raises(ValueError, match="^t: expected noise .* that strictly falls"):
        df.time_grid(discrete, 2000, (0.05, 50.0))


def test_an_exact_denoiser_follows_a_discrete_schedule():
    table = torch.linspace(0.999, 0.01, 50, dtype=torch.float64)
    cloud, x = df.PointCloud(normal(9, 2)), normal(3, 2, seed=1)
    discrete, smooth = (schedule.Tabulated(table, discrete=kind) for kind in (True, False))
    assert torch.equal(
        Denoiser.exact(cloud, discrete)(x, 30.4), Denoiser.exact(cloud, smooth)(x, 30.0)
    )


@pytest.mark.parametrize("method", df.methods.samplers.METHODS)
def test_every_sampler_runs_from_the_end_of_a_floored_zero_terminal_snr_table(method):
    """Where alpha is 0, O-BELM and DDIM would divide by it."""
    table = torch.linspace(0.9999, 0.0, 1000, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^alphas_cumprod: .*zero terminal SNR: cut it, .* floor"):
        schedule.Tabulated(table)
    floored = schedule.Tabulated(table.clamp_min(2**-24))
    alpha, sigma = floored(999.0)
    network = lambda x, t: floored.alpha(t)[:, None] * x  # v of x_0 = 0 is alpha eps, eps ~ x
    denoiser = Denoiser(network, floored, "v_prediction")
    path = df.sample(denoiser, normal(3, 2), torch.tensor([999.0, 700.0, 300.0, 9.0]), method)
    assert bool(path.x[-1].isfinite().all())
    assert alpha == pytest.approx(2**-12) and sigma == pytest.approx(1)


def test_the_likelihood_of_a_discrete_network_is_that_of_the_smooth_one_up_to_its_steps():
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x, found = normal(4, 2), []
    for discrete in (True, False):
        sch = schedule.Tabulated(table, discrete=discrete)
        network = lambda x, t, sch=sch: x * sch.sigma(t)[:, None]  # of x_0 ~ N(0, I)
        result = df.log_prob(
            Denoiser(network, sch), x, (0.1, 50.0), "divergence",
            method="rk4", steps=64, data_std=1.0,
        )  # fmt: skip
        found.append(result.log_prob)
    assert torch.allclose(*found, atol=0.02)


def test_a_network_on_a_grid_of_sigmas_gets_the_rounded_one():
    """iDDPM's networks as EDM calls them, D(x; sigma) = x/(1 + sigma^2), known on a grid only."""
    grid = torch.tensor([0.01, 0.1, 0.5, 2.0, 20.0], dtype=torch.float64)
    seen = []

    def network(x, sigma):
        seen.append(sigma)
        return x / (1 + sigma**2).view(-1, 1)

    sch = schedule.TabulatedVE(grid, discrete=True)
    denoiser, x = Denoiser(network, sch, "sample", clock=sch.sigma), normal(2, 3)
    s = torch.tensor(0.45, dtype=torch.float64)
    eps = denoiser.eps(x, sch.t_of_log_snr(-2 * s.log()))
    assert torch.allclose(seen[0], grid[2].expand(2), rtol=1e-14)
    assert torch.allclose(eps, 0.5 * x / (1 + 0.25))


@pytest.mark.parametrize("clock", [None, lambda t: 1000 * t], ids=["sigma", "timestep"])
def test_the_velocity_of_diffusers_flow_matching_has_the_sign_of_its_clock(clock):
    """v = eps - x_0 at t = sigma; the same network with t = 1 for the data has the other sign."""
    x_0, eps = normal(2, 4, 3)
    t = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    x = (1 - t[:, None]) * x_0 + t[:, None] * eps
    network = lambda x, time: eps - x_0
    denoiser = Denoiser(network, schedule.ReversedRectifiedFlow(), "flow", clock=clock)
    assert torch.allclose(denoiser(x, t), x_0) and torch.allclose(denoiser.eps(x, t), eps)
    negated = Denoiser(lambda x, t: -network(x, t), schedule.RectifiedFlow(), "flow")
    assert torch.allclose(negated(x, 1 - t), x_0)


def test_a_score_network_of_the_geometric_schedule_is_given_sigma():
    """score_sde's VESDE: model(x, sigma) returns the score of N(0, 1 + sigma^2) itself."""
    sch, x = schedule.GeometricVE(), normal(3, 2)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    sigma = sch.sigma(t)[:, None]
    denoiser = Denoiser(lambda x, s: -x / (1 + s[:, None] ** 2), sch, "score", clock=sch.sigma)
    assert torch.allclose(denoiser(x, t), x / (1 + sigma**2))
    assert torch.allclose(denoiser.score(x, t), -x / (1 + sigma**2))


class Output:
    def __init__(self, sample):
        self.sample = sample


OUTPUTS = {
    "object": lambda out: Output(out),
    "tuple": lambda out: (out, None),
    "list": lambda out: [out],
    "dict": lambda out: {"features": out + 1, "sample": out},
    "dict of one": lambda out: OrderedDict(prediction=out),
    "learned variance": lambda out: torch.cat([out, out + 1], 1),
    "object with a learned variance": lambda out: Output(torch.cat([out, out + 1], 1)),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("event", [(3,), (1, 2, 2)], ids=str)
def test_the_prediction_is_found_in_what_a_network_returns(kind, event):
    x = normal(2, *event)
    plain = Denoiser(lambda x, t: x.sin(), schedule.EDM())
    wrapped = Denoiser(lambda x, t: OUTPUTS[kind](x.sin()), schedule.EDM())
    assert torch.equal(wrapped(x, 0.5), plain(x, 0.5))
    assert torch.equal(torch.func.vjp(wrapped.eps, x, torch.tensor(0.5))[1](x)[0], x.cos() * x)
    if event == (3,):
        torch._dynamo.reset()
        compiled = torch.compile(wrapped, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, 0.5), plain(x, 0.5))


@pytest.mark.parametrize(
    "out, came",
    [
        (None, "NoneType"),
        (Output(torch.zeros), "Output"),
        ((), "an empty tuple"),
        (("x",), "tuple that starts with str"),
        ({"a": torch.zeros(2, 3), "b": None}, "dict with the keys ['a', 'b']"),
        ({}, "dict with the keys []"),
    ],
    ids=["none", "object", "tuple", "tuple of strings", "dict of two", "dict"],
)
def test_what_holds_no_prediction_is_named(out, came):
    with pytest.raises(TypeError) as caught:
        Denoiser(lambda x, t: out, schedule.EDM()).eps(torch.zeros(2, 3), 0.5)
    assert str(caught.value) == (
        "network: expected a tensor, an object with a tensor as its .sample, a tuple that starts "
        f"with one, or a dict with one as 'sample', got {came}"
    )


@pytest.mark.parametrize("shape", [(2, 9), (4, 3), (2, 3, 3)], ids=str)
def test_only_exactly_twice_the_channels_are_a_learned_variance(shape):
    with pytest.raises(ValueError, match=r"^network: expected output of shape \[2, 3\], got"):
        Denoiser(lambda x, t: x.new_zeros(shape), schedule.EDM()).eps(torch.zeros(2, 3), 0.5)


class Nonlinear(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.a = torch.nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x, t):
        return {"sample": (self.a * x).sin()}


def test_every_form_of_the_network_s_fisher_works_on_a_float32_network_in_float64():
    """Finite differences must take the step that the network's rounding allows, not x's."""
    denoiser = Denoiser(Nonlinear(torch.float32), schedule.EDM())
    x, v = normal(2, 3), normal(2, 3, seed=1)
    exact = x.cos() * v / 0.5
    for form, tolerance in (("jvp", 1e-6), ("vjp", 1e-6), ("finite-difference", 1e-3)):
        product = df.methods.endpoint.fisher(form, x, 0.5, denoiser) @ v
        assert product.dtype == torch.float64
        assert torch.allclose(product, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float32_or_half_network_samples_and_has_a_likelihood_in_float64(dtype):
    """The flow of a standard normal: eps = sigma x/(1 + sigma^2) by a network in another dtype."""

    class Gaussian(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1, dtype=dtype))

        def forward(self, x, t):
            assert x.dtype == dtype
            level = t.view(-1, 1)
            return (self.one * x * (level / (1 + level**2)).to(dtype)).float(), None

    denoiser = Denoiser(Gaussian(), schedule.EDM())
    x, times = normal(5, 3), df.time_grid(denoiser.schedule, 16, (0.1, 20.0))
    assert df.sample(denoiser, 20 * x, times, "heun").x[-1].dtype == torch.float64
    trace = lambda x, t: 3 / (1 + t**2).expand(len(x)).float()
    result = df.log_prob(denoiser, x, (0.1, 20.0), trace, method="rk4", steps=32, data_std=1.0)
    want = torch.distributions.Normal(0, torch.tensor(1.01).double().sqrt()).log_prob(x).sum(1)
    assert result.log_prob.dtype == torch.float64
    assert torch.allclose(result.log_prob, want, atol=1e-3 if dtype == torch.float32 else 0.3)
    hutchinson = df.log_prob(denoiser, x, (0.1, 20.0), "hutchinson", method="rk4", steps=4)
    assert hutchinson.log_prob.dtype == torch.float64


def test_a_trace_network_computes_in_its_own_dtype():
    class Trace(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def forward(self, x, t):
            return self.layer(x)[:, 0] + t

    trace = df.MatchedTrace(Trace(), Denoiser(lambda x, t: x, schedule.EDM()))
    assert trace(normal(2, 3), torch.tensor(0.5)).dtype == torch.float64


class Dropping(torch.nn.Module):
    """A layer of dropout as a module, as a rate (EDM's blocks), or batch normalisation."""

    def __init__(self, kind):
        super().__init__()
        self.block = {
            "module": lambda: torch.nn.Dropout(0.1),
            "rate": torch.nn.Identity,
            "batch norm": lambda: torch.nn.BatchNorm1d(3),
            "none": lambda: torch.nn.Dropout(0.0),
        }[kind]()
        if kind == "rate":
            self.block.dropout = 0.1

    def forward(self, x, t):
        return self.block(x)


TIMES = df.time_grid(schedule.EDM(), 2, (0.1, 2.0))
ENTRIES = {
    "sample": lambda d, x: df.sample(d, x, TIMES),
    "invert": lambda d, x: df.invert(d, x, TIMES),
    "log_prob": lambda d, x: df.log_prob(d, x, (0.1, 2.0), lambda x, t: x[:, 0], method="heun"),
    "fisher": lambda d, x: df.methods.endpoint.fisher("vjp", x, 0.5, d) @ x,
    "sample, guide": lambda d, x: df.guide(lambda x: x.sum(1), x, TIMES, d, steps=1),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_network_in_training_mode_with_dropout_is_named_once(entry, recwarn):
    denoiser, x = Denoiser(Dropping("module").float(), schedule.EDM()), normal(4, 3).float()
    for _ in range(2):
        ENTRIES[entry](denoiser.bind(), x)
    messages = [str(w.message) for w in recwarn if "training mode" in str(w.message)]
    assert messages == [
        f"{entry.partition(',')[0]}: the network is in training mode with dropout or batch "
        "normalisation, which makes it random (first of 1 layers: block): call denoiser.eval() "
        "first"
    ]


@pytest.mark.parametrize("kind, warned", [("rate", 1), ("batch norm", 1), ("none", 0)])
def test_what_counts_as_random(kind, warned, recwarn):
    denoiser, x = Denoiser(Dropping(kind), schedule.EDM()), normal(4, 3).float()
    df.sample(denoiser.eval(), x, TIMES)
    assert not [w for w in recwarn if "training mode" in str(w.message)]
    df.sample(denoiser.train(), x, TIMES)
    assert len([w for w in recwarn if "training mode" in str(w.message)]) == warned
