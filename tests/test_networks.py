"""The ready networks: a Gaussian's exact answer at the start, shapes, seeds, levels."""

from __future__ import annotations

import math

import pytest
import torch
from tensors import column
from torch import nn

from dfkernels import schedule
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.networks import ImageNet, Preconditioned, VectorNet

SCHEDULES = [
    schedule.VP(),
    schedule.SubVP(),
    schedule.VE(),
    schedule.EDM(),
    schedule.RectifiedFlow(),
]
BODIES = {
    "vector": (lambda output: VectorNet(5, output=output, width=16), (5,)),
    "waves": (lambda output: VectorNet(2, output=output, width=16, octaves=4), (2,)),
    "image": (lambda output: ImageNet(3, (7, 4), output=output, width=8), (3, 7, 4)),
    "deep": (lambda output: ImageNet(2, (9, 8), output=output, width=8, resolutions=4), (2, 9, 8)),
    "grey": (lambda output: ImageNet(1, 6, output=output, width=8), (6, 6)),
}


def at(sch, event, n=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(n, *event, dtype=dtype, generator=generator)
    t = sch.t_of_log_snr(torch.linspace(-6, 6, n, dtype=torch.float64)).to(dtype)
    return x, t, *(level.to(dtype) for level in sch(t))


@pytest.mark.parametrize("sch", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("body, event", BODIES.values(), ids=BODIES)
def test_an_untrained_network_is_exact_for_gaussian_data(sch, body, event):
    x, t, alpha, sigma = at(sch, event)
    mean, std, d = 0.3, 1.7, x[0].numel()
    v = alpha**2 * std**2 + sigma**2
    away = x - column(alpha, x) * mean
    ybar = mean + column(alpha * std**2 / v, x) * away

    def predict(output, predicts):
        net = Preconditioned(body(output), sch, predicts=predicts, mean=mean, std=std)
        return net.double()(x, t)

    # closed forms of a Gaussian, in float64: only rounding remains
    eps = column(sigma / v, x) * away
    assert torch.allclose(predict("event", "epsilon"), eps, atol=1e-13)
    assert torch.allclose(predict("scalar", "residual"), alpha**2 * std**2 / v, atol=1e-13)
    power = eps.flatten(1).square().sum(1) / d + alpha**2 * std**2 / v
    assert torch.allclose(predict("scalar", "noise"), power, rtol=1e-12)
    second = ybar.flatten(1).square().sum(1) / d + std**2 * sigma**2 / v
    assert torch.allclose(predict("scalar", "paper"), second, rtol=1e-12)


def test_the_paper_s_form_can_start_from_a_denoiser_of_any_data():
    """|ybar|^2/d + std^2 sigma^2/v: of the Gaussian's posterior only the variance is left."""
    sch, std = schedule.VP(), 1.7
    x, t, alpha, sigma = at(sch, (2, 3))
    denoiser = Denoiser(lambda x, t: x.sin(), sch, "sample")
    body = VectorNet(6, output="scalar", width=8).double()
    flat = nn.Sequential()
    flat.forward = lambda z, level: body(z.flatten(1), level)
    net = Preconditioned(flat, sch, predicts="paper", std=std, denoiser=denoiser)
    k2 = (std * sigma) ** 2 / (alpha**2 * std**2 + sigma**2)
    skip = x.sin().square().flatten(1).mean(1)
    assert torch.allclose(net(x, t), skip + k2, rtol=1e-12)
    torch.nn.init.ones_(body.head.bias)
    assert torch.allclose(net(x, t), skip + k2 * (math.log1p(math.e) / math.log(2)), rtol=1e-12)
    with pytest.raises(
        ValueError, match="^denoiser: expected None with predicts='noise', got Denoiser$"
    ):
        Preconditioned(body, sch, predicts="noise", denoiser=denoiser)


@pytest.mark.parametrize("predicts", ["epsilon", "residual", "noise", "paper"])
def test_one_unit_of_the_body_is_one_standard_deviation_of_the_target(predicts):
    """Up to the term r^4 of a variance 4 r^2 |mean|^2/d^2 + 2 r^4/d; softplus(1)/ln 2 for the
    residual."""
    sch, mean, std, d = schedule.VP(), 0.3, 1.7, 5
    x, t, alpha, sigma = at(sch, (d,))
    output = "event" if predicts == "epsilon" else "scalar"
    body = VectorNet(d, output=output, width=8)
    net = Preconditioned(body, sch, predicts=predicts, mean=mean, std=std).double()
    zero = net(x, t)
    torch.nn.init.ones_(body.head.bias)
    v = alpha**2 * std**2 + sigma**2
    k2 = alpha**2 * std**2 / v  # the variance of eps given x
    if predicts == "epsilon":
        expected = k2.sqrt()[:, None].expand(-1, d)
    elif predicts == "residual":
        expected = k2 * (math.log1p(math.e) / math.log(2) - 1)
    else:
        r2 = k2 if predicts == "noise" else k2 * (sigma / alpha) ** 2
        expected = 2 * (r2 * zero / d).sqrt()
    assert torch.allclose(net(x, t) - zero, expected, rtol=1e-9)


@pytest.mark.parametrize("body, event", BODIES.values(), ids=BODIES)
def test_every_body_keeps_the_dtype_and_sees_the_level(body, event):
    x, t, *_ = at(schedule.VP(), event, dtype=torch.float32)
    for output, shape in (("event", x.shape), ("scalar", x.shape[:1])):
        net = body(output)
        for p in net.head.parameters():
            torch.nn.init.constant_(p, 0.1)  # 0 at the start
        low, high = net(x, torch.full_like(t, -2)), net(x, torch.full_like(t, 2))
        assert low.shape == shape
        assert low.dtype == torch.float32
        assert (low - high).abs().max() > 1e-3


@pytest.mark.parametrize(
    "make", [lambda seed: VectorNet(3, seed=seed), lambda seed: ImageNet(1, 4, seed=seed)]
)
def test_weights_come_from_the_seed_alone(make):
    before = torch.get_rng_state()
    first, again, other = (list(make(seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_high_octaves_fade_with_the_noise():
    """At level 2, noise of standard deviation 0.99 in units of z leaves nothing of waves shorter
    than 1."""
    net = VectorNet(1, width=8, octaves=8).double()
    seen = []
    net.layers[0].register_forward_hook(lambda module, given, out: seen.append(given[0]))
    for level in (-6.0, 2.0):
        net(torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([level], dtype=torch.float64))
    sine, cosine = seen[0][0, 1:9], seen[0][0, 9:]
    assert torch.allclose((sine**2 + cosine**2)[:6], torch.ones(6, dtype=torch.float64), atol=1e-2)
    sine, cosine = seen[1][0, 1:9], seen[1][0, 9:]
    assert (sine**2 + cosine**2)[3:].max() < 1e-15


def test_resolutions_halve_the_image_and_double_the_width():
    """By hooks on the layers that go down; and every layer is used."""
    sizes = []
    for output in ("event", "scalar"):
        net = ImageNet(4, 32, output=output, width=8, resolutions=4)
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
                module.register_forward_hook(lambda m, given, out: sizes.append(out.shape[1:]))
        torch.nn.init.ones_(net.head.weight)
        x = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
        net(x, torch.zeros(2)).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
    assert sizes == 2 * [(16, 16, 16), (32, 8, 8), (64, 4, 4)]


def test_two_resolutions_have_the_weights_that_they_had():
    """Names and initial values, which checkpoints and results of earlier runs rest on."""
    names = list(dict(ImageNet(1, 4, width=8).named_parameters()))
    assert names[:3] == ["position", "first.weight", "first.bias"]
    blocks = [name.removesuffix(".norm.weight") for name in names if name.endswith("norm.weight")]
    assert blocks == ["fine", "coarse.0", "coarse.1", "last"]
    assert {"down.weight", "up.weight", "head.weight"} < set(names)
    net = ImageNet(1, 4, width=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in net.modules():  # in the order in which they were made
            if module is not net.head and isinstance(module, (nn.Conv2d, nn.Linear)):
                before = module.weight.clone()
                module.reset_parameters()
                assert torch.equal(module.weight, before)


def test_under_autocast_scales_and_shifts_keep_their_precision():
    """bfloat16 would round the level's code, and what it scales by, to 8 bits."""
    net = ImageNet(1, 4, width=8)
    seen = []
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, given, out: seen.append(out))
    x, level = torch.ones(2, 4, 4), torch.tensor([-3.3, 1.7])
    net(x, level)
    exact, seen[:] = list(seen), []
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, level)
    assert len(seen) == len(exact) == 4 and all(map(torch.equal, seen, exact))
    assert out.dtype == torch.bfloat16  # the convolutions' is autocast's


def test_wrong_arguments():
    net = Preconditioned(VectorNet(3), schedule.VP())
    with pytest.raises(ValueError, match=r"^x: expected shape \[B, 3\], got \[2, 4\]$"):
        net(torch.zeros(2, 4), torch.full((2,), 0.5))
    with pytest.raises(ValueError, match=r"^x: expected shape \[B, 1, 4, 4\], got \[2, 5, 5\]$"):
        ImageNet(1, 4)(torch.zeros(2, 5, 5), torch.zeros(2))
    with pytest.raises(
        ValueError, match="^size: expected at least 8 pixels a side with resolutions=4, got 7$"
    ):
        ImageNet(1, 7, resolutions=4)
    with pytest.raises(ValueError, match="^resolutions: expected an integer of at least 2, got 1$"):
        ImageNet(1, 7, resolutions=1)
    with pytest.raises(ValueError, match="^output: expected 'event' or 'scalar', got 'vector'$"):
        VectorNet(3, output="vector")
    with pytest.raises(
        ValueError,
        match="^predicts: expected 'epsilon' or 'residual' or 'noise' or 'paper', got 'x'$",
    ):
        Preconditioned(VectorNet(3), schedule.VP(), predicts="x")
    with pytest.raises(ValueError, match="^std: expected a number > 0, got 0$"):
        Preconditioned(VectorNet(3), schedule.VP(), std=0)
