"""Adapters, against stand-ins that have the attributes of the libraries and nothing else; the
libraries themselves are met in tests/ecosystem.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensors import column, normal

import dfkernels as df
from dfkernels import adapt, schedule
from dfkernels.adapt._levels import Levels

CLOUD = df.PointCloud(normal(7, 1, 2, 2, seed=5))
X = normal(3, 1, 2, 2)


def scheduler(kind, **given):
    """An object of a class of that name, with a config and attributes."""
    config = {key: given.pop(key) for key in list(given) if key in CONFIG}
    made = type(kind, (), {})()
    made.config = SimpleNamespace(**config)
    for name, value in given.items():
        setattr(made, name, value)
    return made


CONFIG = (
    "prediction_type",
    "use_flow_sigmas",
    "invert_sigmas",
    "num_train_timesteps",
    "sigma_data",
    "timestep_type",
    "variance_type",
)
TABLE = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 50, dtype=torch.float64), 0)


def table(prediction="epsilon", **given):
    return scheduler("DDPM", prediction_type=prediction, **{"alphas_cumprod": TABLE, **given})


# what they predict at alpha, sigma, from the exact mean and noise
PREDICTIONS = {
    "epsilon": lambda x0, eps, alpha, sigma: eps,
    "sample": lambda x0, eps, alpha, sigma: x0,
    "original_sample": lambda x0, eps, alpha, sigma: x0,
    "v_prediction": lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    "flow_prediction": lambda x0, eps, alpha, sigma: eps - x0,
}


def exact(x, alpha, sigma):
    mean = df.ops.posterior(x, CLOUD.y, alpha, sigma).mean
    return mean, (x - alpha * mean) / sigma


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "original_sample", "v_prediction"])
def test_a_table_s_model_predicts_what_the_configuration_says(prediction):
    found = adapt.as_diffusers(CLOUD, table(prediction))
    for t in (0, 20, 49):
        alpha, sigma = TABLE[t] ** 0.5, (1 - TABLE[t]) ** 0.5
        wanted = PREDICTIONS[prediction](*exact(X, alpha, sigma), alpha, sigma)
        assert torch.allclose(found(X, t).sample, wanted, rtol=1e-12)
        for form in (torch.tensor(t), torch.tensor([float(t)]), torch.full((3, 1, 1, 1), t)):
            assert torch.equal(found(X, form)[0], found(X, t, return_dict=False)[0])
    mixed = found(X, torch.tensor([3, 20, 49])).sample
    assert torch.equal(mixed[1:2], found(X[1:2], 20).sample)
    back = adapt.from_diffusers(found, table(prediction))
    assert torch.allclose(back(X, 20), exact(X, *back.schedule(20))[0], rtol=1e-10)


def test_the_level_of_a_step_is_the_scheduler_s_sigma_at_it():
    """A rounded timestep stands for several levels: that of the current step counts."""
    sigmas, steps = torch.tensor([3.0, 0.31, 0.3, 0.0]), torch.tensor([40, 7, 7])
    made = table(sigmas=sigmas, timesteps=steps, step_index=None)
    found = adapt.as_diffusers(CLOUD, made)
    for step, t, s in ((None, 40, 3.0), (1, 7, 0.31), (2, 7, 0.3), (None, 7, 0.31)):
        made.step_index = step
        s = torch.tensor(s).double()
        alpha = 1 / (1 + s * s).sqrt()
        assert torch.allclose(found(X, t).sample, exact(X, alpha, s * alpha)[1], rtol=1e-12)
    # a timestep that no step has is the table's: training asks for all of them
    wanted = exact(X, TABLE[9] ** 0.5, (1 - TABLE[9]) ** 0.5)[1]
    assert torch.allclose(found(X, 9).sample, wanted, rtol=1e-12)
    both = found(X, torch.tensor([40.0, 9.0, 7.0])).sample
    assert torch.equal(both[1:2], found(X[1:2], 9).sample)
    with pytest.raises(ValueError, match=r"^timestep: expected times in \[0, 49\], got 50$"):
        found(X, 50)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_flow_s_sign_and_clock(backwards):
    made = scheduler(
        "FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, invert_sigmas=backwards
    )
    found = adapt.as_diffusers(CLOUD, made)
    for t in (100.0, 750.0):
        sigma = torch.tensor(1 - t / 1000 if backwards else t / 1000, dtype=torch.float64)
        x0, eps = exact(X, 1 - sigma, sigma)
        assert torch.allclose(found(X, t).sample, x0 - eps if backwards else eps - x0, rtol=1e-12)
    seen = []

    def model(x, timestep, **conditions):
        seen.append((timestep, conditions))
        return found(x, timestep)

    back = adapt.from_diffusers(model, made, clock=lambda s: 1000 * s).bind(text="a")
    assert back.schedule == (
        schedule.RectifiedFlow() if backwards else schedule.ReversedRectifiedFlow()
    )
    assert torch.allclose(back(X, 0.3), exact(X, *back.schedule(0.3))[0], rtol=1e-10)
    assert seen[0][0].tolist() == [300, 300, 300] and seen[0][1] == {"text": "a"}


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "flow_prediction"])
def test_flow_sigmas_of_a_multistep_solver(prediction):
    made = table(prediction, use_flow_sigmas=True, num_train_timesteps=1000)
    sigma = torch.tensor(0.4, dtype=torch.float64)
    wanted = PREDICTIONS[prediction](*exact(X, 1 - sigma, sigma), 1 - sigma, sigma)
    found = adapt.as_diffusers(CLOUD, made)
    assert torch.allclose(found(X, 400).sample, wanted, rtol=1e-12)
    back = adapt.from_diffusers(found, made, clock=lambda s: 1000 * s)
    assert torch.allclose(back(X, 0.4), exact(X, 0.6, 0.4)[0], rtol=1e-10)


@pytest.mark.parametrize("kind", ["EDM", "Cosine"])
@pytest.mark.parametrize("prediction, sign", [("epsilon", 1), ("v_prediction", -1)])
def test_preconditioning(kind, prediction, sign):
    d, s = 0.5, torch.tensor([0.2, 1.0, 30.0]).double()
    made = scheduler(kind, prediction_type=prediction, sigma_data=d, precondition_outputs=None)
    noise = torch.atan(s) * 2 / math.pi if kind == "Cosine" else s.log() / 4
    scale = column((s**2 + d**2).sqrt(), X)
    x0 = df.ops.posterior(X, CLOUD.y, 1.0, s).mean
    skip, out = d**2 / scale**2, sign * column(s, X) * d / scale
    found = adapt.as_diffusers(CLOUD, made)
    answer = found(X / scale, noise).sample
    assert torch.allclose(skip * X + out * answer, x0, rtol=1e-9)
    back = adapt.from_diffusers(found, made)
    assert back.schedule == schedule.EDM() and torch.allclose(back(X, s), x0, rtol=1e-9)


def test_preconditioning_keeps_x_around_a_network_of_half_precision():
    """The network's rounding, some 4e-3 of F, is multiplied by c_out, and x is not rounded."""

    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))

        def forward(self, x, timestep):
            assert x.dtype == torch.bfloat16 and timestep.dtype == torch.float32
            return SimpleNamespace(sample=x.sin())

    made = scheduler("EDM", prediction_type="epsilon", sigma_data=0.5, precondition_outputs=None)
    s, x = 1e-3, normal(5, 4)
    found = adapt.from_diffusers(Half(), made)(x, s)
    assert 1e-6 < (found - x).abs().max() < 1.1e-3  # c_out |F|; bfloat16's x is off by 4e-3


def test_a_variance_exploding_scheduler_s_model_returns_the_score():
    made, s = scheduler("ScoreSdeVeScheduler"), torch.tensor([0.1, 1.0, 20.0]).double()
    found = adapt.as_diffusers(CLOUD, made)
    eps = exact(X[1:2], torch.tensor(1.0), s[1])[1]
    assert torch.allclose(found(X, s).sample[1:2], -eps / s[1], rtol=1e-12)
    back = adapt.from_diffusers(found, made)
    assert torch.allclose(back.eps(X, s)[1:2], eps, rtol=1e-12)


def test_a_table_that_ends_without_signal_gets_a_floor():
    ending = torch.cat([TABLE, torch.zeros(1, dtype=torch.float64)])
    v = adapt.from_diffusers(lambda x, t: x, table("v_prediction", alphas_cumprod=ending))
    alpha = v.schedule.alpha(torch.tensor([49, 50]))
    assert torch.allclose(alpha[0], TABLE[-1] ** 0.5) and torch.allclose(
        alpha[1].log2(), -12 + 0 * alpha[1]
    )
    with pytest.raises(
        ValueError, match="^scheduler: .* 'epsilon' with a table that ends without signal"
    ):
        adapt.from_diffusers(lambda x, t: x, table(alphas_cumprod=ending))
    # as a model the data set answers at alpha = 0 too: with its mean
    found = adapt.as_diffusers(CLOUD, table("sample", alphas_cumprod=ending))(X, 50).sample
    assert torch.allclose(found, CLOUD.y.mean(0).expand(3, 1, 2, 2), rtol=1e-12)


def test_a_floor_above_the_entry_before_it_is_lowered():
    """diffusers' samplers in sigma/alpha put 2^-24 after entries that may be less."""
    floor = torch.tensor([2.0**-24], dtype=torch.float64)
    for before, wanted in ((4.2e-9, 4.2e-9 / 4), (2.0**-24, 2.0**-26), (2.0**-23, 2.0**-24)):
        ending = torch.cat([TABLE, before + 0 * floor, floor])
        made = adapt.from_diffusers(abs, table("v_prediction", alphas_cumprod=ending))
        assert made.schedule.alpha(51).item() == pytest.approx(wanted**0.5, rel=1e-12)
    rising = torch.cat([TABLE, 2 * TABLE[-1:]])
    with pytest.raises(ValueError, match="^alphas_cumprod: expected strictly decreasing"):
        adapt.from_diffusers(abs, table("v_prediction", alphas_cumprod=rising))


def test_a_table_of_a_flow_model_s_configuration_is_no_noise_table():
    """from_config keeps the `shift` that it does not know, and predicts the noise by default."""
    for flow in ({}, {"use_flow_sigmas": True}):
        made = table(**flow)
        made.config.shift, made.config._use_default_values = 3.0, ["prediction_type"]
        with pytest.raises(ValueError, match="^scheduler: .* DDPM .* 'epsilon'.*use_flow_sigmas="):
            adapt.from_diffusers(abs, made, clock=abs)
        made.config._use_default_values = []
        adapt.from_diffusers(abs, made, clock=abs)


@pytest.mark.parametrize("wrapper", ["compile", "DataParallel"])
def test_a_wrapped_model_is_called_by_the_name_of_its_time(wrapper):
    """torch.compile and the parallel wrappers have *args and **kwargs for a signature."""

    class Second(torch.nn.Module):
        def forward(self, x, encoder_hidden_states, timestep):  # as in diffusers' transformers
            return 0 * x + timestep.view(-1, 1, 1, 1)

    inner = Second()
    model = torch.nn.DataParallel(inner) if wrapper == "DataParallel" else torch.nn.Module()
    if wrapper == "compile":
        model._orig_mod, model.forward = inner, lambda *args, **kwargs: inner(*args, **kwargs)
    found = adapt.from_diffusers(model, table("sample")).bind(encoder_hidden_states=None)
    assert torch.equal(found(X, 20), torch.full_like(X, 20))


def test_what_is_no_network_is_refused_by_name():
    flow = scheduler("FlowMatchEulerDiscreteScheduler")
    for name, adapter in (
        ("model", lambda: adapt.from_diffusers(object(), table())),
        ("model", lambda: adapt.from_diffusers(object(), flow, clock=abs)),
        ("velocity", lambda: adapt.from_flow_matching(object(), flow_scheduler)),
        ("network", lambda: adapt.from_torchcfm(object())),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected a callable, got object$"):
            adapter()


def test_discrete_models_are_given_integers_and_their_level():
    seen = []
    model = lambda x, t: seen.append(t) or x.sin()
    denoiser = adapt.from_diffusers(model, table(), discrete=True)
    assert torch.equal(denoiser(X, 20.3), denoiser(X, 20))
    assert seen[0].dtype == torch.int64 and seen[0].tolist() == [20] * 3
    flow = scheduler("FlowMatchEulerDiscreteScheduler")
    with pytest.raises(ValueError, match="^discrete: expected False with FlowMatchEuler"):
        adapt.from_diffusers(model, flow, clock=lambda s: s, discrete=True)


@pytest.mark.parametrize(
    "made, message",
    [
        (
            scheduler("IPNDMScheduler"),
            "^scheduler: expected a scheduler with .*, got IPNDMScheduler$",
        ),
        (object(), "^scheduler: expected a scheduler with .*, got object$"),
        (
            table("noise"),
            "^scheduler: expected prediction_type epsilon or .*, got 'noise' of DDPM$",
        ),
        (table("flow_prediction"), "got 'flow_prediction' of DDPM$"),
        (table("v_prediction", use_flow_sigmas=True), "got 'v_prediction' of DDPM$"),
    ],
    ids=["IPNDM", "object", "noise", "flow", "flow v"],
)
def test_a_scheduler_that_is_not_known_is_named(made, message):
    for adapter in (
        lambda: adapt.as_diffusers(CLOUD, made),
        lambda: adapt.from_diffusers(abs, made),
    ):
        with pytest.raises(ValueError, match=message):
            adapter()


def test_clocks_that_nobody_can_guess_are_asked_for():
    flow = scheduler("FlowMatchEulerDiscreteScheduler")
    with pytest.raises(
        ValueError, match="^clock: expected what the model is given for sigma .*None$"
    ):
        adapt.from_diffusers(abs, flow)
    edm = scheduler("EDM", prediction_type="epsilon", sigma_data=0.5, precondition_outputs=None)
    with pytest.raises(ValueError, match="^clock: expected None with EDM"):
        adapt.from_diffusers(abs, edm, clock=torch.log)


NETWORKS = {
    "edm": lambda cloud: (adapt.as_edm(cloud), lambda net, x: net(x, 0.7)),
    "azula": lambda cloud: (
        adapt.as_azula(cloud, schedule.VP()),
        lambda net, x: net(x, torch.tensor(0.3)).mean,
    ),
    "diffusers": lambda cloud: (
        adapt.as_diffusers(cloud, table()),
        lambda net, x: net(x, 20).sample,
    ),
    "velocity": lambda cloud: (
        adapt.as_velocity(cloud, flow_scheduler),
        lambda net, x: net(x=x, t=torch.tensor(0.6)),
    ),
    "torchcfm": lambda cloud: (
        adapt.as_torchcfm(cloud, 0.1),
        lambda net, x: net(torch.tensor(0.6), x),
    ),
}


def flow_scheduler(t):
    return SimpleNamespace(alpha_t=t, sigma_t=1 - t)


@pytest.mark.parametrize("kind", NETWORKS)
def test_exact_networks_are_modules_of_any_dtype(kind):
    net, ask = NETWORKS[kind](CLOUD)
    wanted = ask(net, X)
    assert wanted.dtype == torch.float64 and list(net.parameters()) == []
    assert ask(net.half().eval(), X).equal(wanted)  # a cast leaves the atoms alone
    assert ask(net, X.float()).dtype == torch.float32
    assert torch.allclose(ask(net, X.float()).double(), wanted, atol=1e-5)
    narrow, ask = NETWORKS[kind](CLOUD.to(torch.float32))
    for dtype, size in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)):
        found = ask(narrow, X.to(dtype))
        assert found.dtype == dtype and torch.allclose(
            found.double(), wanted, atol=5 * size, rtol=size
        )
    x = X.clone().requires_grad_()
    assert torch.autograd.grad(ask(net, x).sum(), x)[0].isfinite().all()
    assert "PointCloud(N=7" in repr(net)
    with pytest.raises(
        TypeError,
        match="^cloud: expected a PointCloud, a ShardedCloud or a GaussianMixture, got Tensor",
    ):
        NETWORKS[kind](CLOUD.y)
    with pytest.raises(ValueError, match="^x: |shape"):
        ask(net, normal(3, 5))
    meta, _ = NETWORKS[kind](CLOUD)
    assert meta.to("cpu").cloud is CLOUD


def test_edm_s_network():
    net = adapt.as_edm(CLOUD)
    s = torch.tensor([0.1, 1.0, 30.0]).double()
    wanted = df.ops.posterior(X, CLOUD.y, 1.0, s).mean
    assert torch.equal(net(X, s.view(3, 1, 1, 1), None, force_fp32=True), wanted)
    assert torch.equal(net(X, s[1])[1], net(X, 1.0)[1])
    assert (net.sigma_min, net.sigma_max, net.label_dim) == (0, math.inf, 0)
    assert torch.equal(net.round_sigma(s), s) and net.round_sigma(0.5) == 0.5
    with pytest.raises(ValueError, match="^class_labels: expected None"):
        net(X, s, torch.eye(3))
    with pytest.raises(ValueError, match=r"^sigma: expected one number or 3, got shape \[2\]$"):
        net(X, s[:2])
    with pytest.raises(ValueError, match=r"^sigma: expected finite values > 0, got 0\.0 at index"):
        net(X, 0.0)
    back = adapt.from_edm(net)
    assert back.schedule == schedule.EDM() and torch.equal(back(X, s), wanted)


def test_an_exact_edm_network_has_what_its_documentation_promises():
    net = adapt.as_edm(CLOUD)
    promised = re.findall(r"`([a-z_]+)`", type(net).__doc__.split("attributes", 1)[1])
    assert "round_sigma" in promised and all(hasattr(net, name) for name in promised)


def test_an_edm_network_s_range_labels_and_dtype():
    seen = []

    class Net:
        sigma_min, sigma_max = 0.02, 100.0

        def __call__(self, x, sigma, class_labels=None):
            seen.append((x.dtype, sigma, class_labels))
            return x.float() / 2  # EDM's compute and return float32 whatever they are given

    denoiser = adapt.from_edm(Net(), torch.eye(4)[[1]])
    assert torch.allclose(denoiser(X, 3.0), X / 2, atol=1e-6) and denoiser(X, 3.0).dtype == X.dtype
    assert seen[0][1].tolist() == [3.0] * 3 and seen[0][2].tolist() == [[0, 1, 0, 0]]
    assert df.time_grid(denoiser.schedule, 5, (0.02, 100.0))[-1] == 0.02
    for sigma in (0.01, 200.0):
        with pytest.raises(ValueError, match=r"^t: expected values in \[0.02, 100\] for RangedEDM"):
            denoiser(X, sigma)
    assert adapt.from_k_diffusion(Net()).schedule.t_range == (0.02, 100.0)
    assert adapt.from_k_diffusion(lambda x, s: x).schedule == schedule.EDM()


def test_azula_s_convention():
    given = lambda t: (torch.cos(1.5 * t), (1 - torch.cos(1.5 * t) ** 2 + 1e-6).sqrt())
    net = adapt.as_azula(CLOUD, given)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert net.schedule is given
    wanted = df.ops.posterior(X, CLOUD.y, *given(t)).mean
    assert torch.allclose(net(X, t).mean, wanted, rtol=1e-12)
    back = adapt.from_azula(net)
    assert back.schedule.t_range == (0, 1) and torch.allclose(back(X, t), wanted, rtol=1e-12)
    with pytest.raises(TypeError, match="^denoiser: expected a callable .*, got function$"):
        adapt.from_azula(lambda x, t: x)
    with pytest.raises(TypeError, match="^schedule: expected a callable .*, got float$"):
        adapt.as_azula(CLOUD, 1.0)


def test_flow_matching_s_order_sign_and_names():
    velocity = adapt.as_velocity(CLOUD, SimpleNamespace(scheduler=flow_scheduler))
    for t in (torch.tensor(0.3), torch.full((3,), 0.3)):
        x0, eps = exact(X, t.max().double(), 1 - t.max().double())
        assert torch.allclose(velocity(x=X, t=t), x0 - eps, rtol=1e-12)  # towards the data
    first = adapt.as_torchcfm(CLOUD)
    assert torch.allclose(first(torch.tensor(0.3), X), velocity(X, 0.3), rtol=1e-6)
    seen = []

    def model(*, t, x, label):  # by name, in any order
        seen.append((t.shape, label))
        return velocity(x, t)

    back = adapt.from_flow_matching(model, flow_scheduler)
    assert torch.allclose(back(X, 0.3, label=1), exact(X, 0.3, 0.7)[0], rtol=1e-10)
    assert seen == [((3,), 1)]
    back = adapt.from_torchcfm(first)
    assert back.schedule == schedule.RectifiedFlow()
    assert torch.allclose(back(X, 0.3), exact(X, 0.3, 0.7)[0], rtol=1e-10)
    with pytest.raises(ValueError, match="^t: expected times with noise, got 1, where sigma = 0"):
        first(torch.tensor(1.0), X)
    with pytest.raises(TypeError, match="^path: expected a path with a `scheduler`.*got str$"):
        adapt.from_flow_matching(model, "CondOT")
    with pytest.raises(
        ValueError, match="^path: expected a flow matcher or its sigma >= 0, got -1$"
    ):
        adapt.from_torchcfm(model, -1)
    coupled = type("ExactOptimalTransport", (), {"ot_sampler": None})()
    with pytest.raises(
        ValueError, match="^path: .* got ExactOptimalTransport, which couples them$"
    ):
        adapt.from_torchcfm(model, coupled)


@pytest.mark.parametrize("kind", ["manifold", "posterior_to_velocity"])
def test_geodesic_and_discrete_paths_are_refused(kind):
    path = type("Bent", (), {"scheduler": staticmethod(flow_scheduler), kind: None})()
    with pytest.raises(TypeError, match="^path: expected an affine path, .* got Bent$"):
        adapt.from_flow_matching(abs, path)
    with pytest.raises(TypeError, match="^path: expected an affine path, .* got Bent$"):
        adapt.as_velocity(CLOUD, path)


@pytest.mark.parametrize("width", [0, 0.3])
def test_a_flow_matcher_s_noise_is_that_of_its_width_too(width):
    class Matcher:
        """torchcfm's ConditionalFlowMatcher: a mean and a width."""

        def compute_mu_t(self, x0, x1, t):
            return t.reshape(-1, 1) * x1 + (1 - t.reshape(-1, 1)) * x0

        def compute_sigma_t(self, t):
            return width

    found = adapt.as_torchcfm(CLOUD, Matcher())
    for t in (0.0, 0.6, torch.tensor([0.1, 0.5, 0.9])):
        known = adapt.as_torchcfm(CLOUD, width)
        assert torch.allclose(found(t, X), known(t, X), rtol=1e-10)
    rate = adapt.from_torchcfm(found, Matcher()).schedule.rates(1.0)[1]
    assert rate == (0 if width else -1)  # a square root has no derivative at 0
    sigma = (0.4**2 + width**2) ** 0.5
    x0, eps = exact(X, 0.6, sigma)
    assert torch.allclose(found(0.6, X), x0 - 0.4 / sigma * eps, rtol=1e-10)


def test_the_wrapper_of_one_time_is_called_through_its_model():
    """torch_wrapper repeats its t for every sample: given [B], it would make B^2 of them."""
    made = type("torch_wrapper", (), {"__call__": None, "model": lambda self, x: x[:, 1:]})()
    found = adapt.from_torchcfm(made)
    x = normal(5, 2)
    assert torch.equal(
        found.network(x, torch.full((5,), 0.5).double())[:, 1], torch.full((5,), 0.5).double()
    )


class SDE:
    """score_sde's classes: levels of VPSDE, subVPSDE or VESDE."""

    def __init__(self, kind, N=1000):
        self.kind, self.N = kind, N
        if kind == "VE":
            self.sigma_min, self.sigma_max = 0.01, 50
            self.discrete_sigmas = torch.logspace(-2, math.log10(50), N)
        else:
            self.beta_0, self.beta_1 = 0.1, 20
            self.alphas_cumprod = torch.cumprod(1 - torch.linspace(0.1, 20, N) / N, 0)

    def marginal_prob(self, x, t):
        if self.kind == "VE":
            return x, self.sigma_min * (self.sigma_max / self.sigma_min) ** t
        log_mean = -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        kept = torch.exp(2 * log_mean)
        alpha = torch.exp(log_mean)[:, None, None, None]
        return alpha * x, 1 - kept if self.kind == "subVP" else torch.sqrt(1 - kept)


@pytest.mark.parametrize(
    "kind, wanted",
    [("VP", schedule.VP()), ("subVP", schedule.SubVP()), ("VE", schedule.GeometricVE(0.01, 50))],
)
def test_score_sde_s_labels_and_scales(kind, wanted):
    sde, seen = SDE(kind), []

    def model(x, labels):
        """The exact answer, as a perfectly trained network of the repository gives it."""
        seen.append(labels)
        t = torch.tensor([0.3], dtype=torch.float64)
        alpha, sigma = sde.marginal_prob(torch.ones(1, 1, 1, 1).double(), t)
        eps = exact(x, alpha.flatten()[0], sigma[0])[1]
        return -eps / sigma if kind == "VE" else eps

    denoiser = adapt.from_score_sde(model, sde)
    assert denoiser.schedule == wanted
    alpha, sigma = wanted(0.3)
    assert torch.allclose(denoiser(X, 0.3), exact(X, alpha, sigma)[0], rtol=1e-5)
    label = sigma if kind == "VE" else 999 * 0.3
    assert torch.allclose(seen[0], torch.full((3,), float(label)).to(seen[0]))


def gaussian(kind):
    """The denoiser of a perfectly trained network of score_sde for x_0 ~ N(0, 0.49), and its
    schedule.
    """
    sde = SDE(kind)

    def model(x, labels):
        if kind == "VE":
            return -x / (0.49 + column(labels, x) ** 2)
        alpha, sigma = sde.marginal_prob(torch.ones(len(x), 1, 1, 1).to(x), labels / 999)
        return column(sigma, x) * x / (alpha**2 * 0.49 + column(sigma, x) ** 2)

    return adapt.from_score_sde(model, sde)


@pytest.mark.parametrize("kind", ["VP", "subVP", "VE"])
@pytest.mark.covers("score_sde", "likelihood")
def test_the_likelihood_of_a_network_of_score_sde(kind):
    denoiser = gaussian(kind)
    alpha, sigma = denoiser.schedule(denoiser.schedule.t_of_log_snr(-2 * math.log(0.1)))
    x = alpha * X
    found = df.log_prob(denoiser, x, (0.1, 45.0), "divergence", data_std=0.7).log_prob
    scale = (0.49 * alpha**2 + sigma**2).sqrt()
    wanted = torch.distributions.Normal(torch.zeros_like(scale), scale).log_prob(x)
    assert torch.allclose(found, wanted.flatten(1).sum(1), atol=1e-3)


@pytest.mark.parametrize("kind", ["VP", "subVP", "VE"])
@pytest.mark.covers("score_sde", "sample")
def test_a_sample_of_a_network_of_score_sde(kind):
    """The flow of a Gaussian scales x by the ratio of standard deviations."""
    denoiser = gaussian(kind)
    t = df.time_grid(denoiser.schedule, 120, (0.1, 45.0))
    alpha, sigma = denoiser.schedule(t[[0, -1]])
    scale = (0.49 * alpha**2 + sigma**2).sqrt()
    end = df.sample(denoiser, scale[0] * X, t, method="heun").x[-1]
    assert torch.allclose(end, scale[1] * X, rtol=1e-3)


@pytest.mark.parametrize("kind", ["VP", "VE"])
def test_score_sde_trained_on_discrete_steps(kind):
    sde, seen = SDE(kind), []
    denoiser = adapt.from_score_sde(lambda x, t: seen.append(t) or x, sde, continuous=False)
    eps = denoiser.eps(X, 300.2)
    if kind == "VP":  # labels t (N - 1) of sqrt(1 - alphas_cumprod)[label]
        assert seen[0].tolist() == [300] * 3 and seen[0].is_floating_point()
        assert torch.equal(eps, X)
        assert torch.allclose(denoiser.schedule.alpha(300) ** 2, sde.alphas_cumprod[300].double())
    else:  # labels count from the largest noise
        assert seen[0].tolist() == [699] * 3 and seen[0].dtype == torch.int64
        assert torch.allclose(eps, -sde.discrete_sigmas[300].double() * X)


def test_an_sde_with_other_levels_is_refused():
    sde = SDE("VP")
    sde.beta_1 = 10
    levels = sde.marginal_prob(
        torch.ones(3, 1, 1, 1).double(), torch.tensor([0.25, 0.5, 1.0]).double()
    )
    sde.marginal_prob = lambda x, t: (2 * levels[0], levels[1])
    with pytest.raises(
        ValueError, match="^sde: expected the levels of VPSDE, .*got SDE with alpha"
    ):
        adapt.from_score_sde(abs, sde)
    with pytest.raises(TypeError, match="^sde: expected an SDE with marginal_prob, got int$"):
        adapt.from_score_sde(abs, 1)


def test_the_table_in_the_guide_is_of_the_pinned_libraries():
    """`make ecosystem` writes it; every adapter is named in the guide."""
    root = Path(__file__).resolve().parent
    pins = (root / "ecosystem" / "requirements.txt").read_text()
    page = (root.parent / "docs" / "guide" / "adapters.md").read_text()
    for name in ("diffusers", "azula", "flow_matching", "torchcfm", "k-diffusion"):
        (pin,) = re.findall(rf"^{name}==(.*)$", pins, re.M)
        assert re.search(
            rf"^\| {name} {re.escape(pin)} \|( \d+ tests? \|){{5}}$",
            page,
            re.M,
        )
    assert [name for name in adapt.__all__ if f"`{name}(" not in page] == []


SCHEDULES = [
    schedule.VP(),
    schedule.SubVP(),
    schedule.Cosine(),
    schedule.GeometricVE(),
    schedule.RectifiedFlow(),
    schedule.ReversedRectifiedFlow(),
]


@pytest.mark.parametrize("known", SCHEDULES, ids=lambda s: type(s).__name__)
def test_a_schedule_of_levels_alone_is_the_schedule(known):
    """Derivatives by differentiation, the inverse by bisection."""
    made = Levels(known, known.t_range, "theirs")
    low, high = known.t_range
    t = torch.tensor([1e-4, 0.2, 0.77, 0.999], dtype=torch.float64) * (high - low) + low
    for name in ("alpha", "sigma", "f", "g2", "log_snr"):
        found, wanted = (getattr(s, name)(t) for s in (made, known))
        assert torch.allclose(found, wanted, rtol=1e-7, atol=1e-12), name
    for found, wanted in zip(made.rates(t), known.rates(t), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-7)
    lam = known.log_snr(t)
    assert torch.allclose(made.t_of_log_snr(lam), t, rtol=1e-7)
    assert torch.equal(torch.isfinite(made.f(t.float())), torch.ones(4, dtype=torch.bool))
    lam.requires_grad_()
    slopes = [torch.autograd.grad(s.t_of_log_snr(lam).sum(), lam)[0] for s in (made, known)]
    assert torch.allclose(*slopes, rtol=1e-6)
    with torch.inference_mode():
        made.g2(t)
    assert repr(made) == "theirs"
    if known.t_range[0] == 0 and type(known).__name__ == "RectifiedFlow":
        with pytest.raises(ValueError, match=r"^t: expected values in \(0, 1\] for theirs, got 0$"):
            made.f(0.0)


def test_levels_that_are_none_are_refused():
    with pytest.raises(
        ValueError, match="^schedule: expected levels that are finite and at least 0"
    ):
        Levels(lambda t: (t, -t), (0.0, 1.0), "theirs")
    with pytest.raises(ValueError, match="^schedule: expected another sigma/alpha at either end"):
        Levels(lambda t: (1 + 0 * t, 1 + 0 * t), (0.0, 1.0), "theirs")
    made = Levels(lambda t: (1 - t / 2, 0.1 + t), (0.0, 1.0), "theirs")
    with pytest.raises(ValueError, match=r"^log_snr: expected values in \[.*\] for theirs$"):
        made.t_of_log_snr(10.0)
