"""Networks with attention and with checkpointed activations: the derivatives that PyTorch has are
right, and for the others the error names the argument and what to write instead.
"""

from __future__ import annotations

import pytest
import torch
from tensors import normal
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import dfkernels as df
from dfkernels.methods.endpoint import fisher

pytestmark = pytest.mark.filterwarnings("ignore:log_prob. the estimated error")
EDM = df.schedule.EDM()
FORWARD = r'attention.*\(attention, SDPA\).* no forward-mode derivative .*take {}="vjp"$'


def attention(x, t):
    """eps in [B, 3, 2], from one head over 3 tokens."""
    q = x[:, None]  # [B, heads, tokens, E]: on any other shape PyTorch's attention is not fused
    return x / (1 + t[:, None, None]) + scaled_dot_product_attention(q, 2 * q, q.sin())[:, 0] / 4


def by_hand(x, t):
    """The same of plain operations, which have all derivatives."""
    weights = (x @ (2 * x).mT / 2**0.5).softmax(-1)
    return x / (1 + t[:, None, None]) + weights @ x.sin() / 4


def energy(x, t):
    """A network that is itself a gradient."""
    return torch.func.grad(lambda x: (x * attention(x, t)).sum())(x)


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True, dtype=torch.float64)

    def forward(self, x, t):
        return self.attention(x, x, x, need_weights=False)[0]


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x, t):
        return checkpoint(torch.sin, x, use_reentrant=self.reentrant)


class Rounded(torch.autograd.Function):
    """No function of torch.func either, but none that checkpointing calls."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def hutchinson(mode, probes=2):
    return df.Hutchinson(torch.Generator().manual_seed(0), probes, mode=mode)


def log_prob(network, trace, x):
    denoiser = df.Denoiser(network, EDM)
    return df.log_prob(denoiser, x, (0.5, 2.0), trace, method="heun", steps=2).log_prob


def product(network, form, x):
    return fisher(form, x, 1.0, df.Denoiser(network, EDM)) @ x


CALLS = {
    "Hutchinson": ("mode", lambda network, mode, x: log_prob(network, hutchinson(mode), x)),
    "Hutchinson, one probe": (
        "mode",
        lambda network, mode, x: log_prob(network, hutchinson(mode, 1), x),
    ),
    "Divergence": (
        "mode",
        lambda network, mode, x: log_prob(network, df.Divergence(mode=mode), x),
    ),
    "fisher": ("form", product),
}
calls = pytest.mark.parametrize(("argument", "call"), CALLS.values(), ids=list(CALLS))
# torch says so where a fused attention's backward pass is not batched
unbatched = pytest.mark.filterwarnings("ignore:There is a performance drop")


@unbatched
@calls
def test_reverse_mode_goes_through_attention(argument, call):
    x = normal(2, 3, 2)
    with torch.no_grad():
        found, expected = call(attention, "vjp", x), call(by_hand, "vjp", x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert call(MultiHead().eval(), "vjp", x).isfinite().all()


@calls
@pytest.mark.parametrize("multi_head", [False, True], ids=["SDPA", "MultiheadAttention"])
def test_forward_mode_names_attention_and_the_way_out(multi_head, argument, call):
    network = MultiHead().eval() if multi_head else attention
    with torch.no_grad(), pytest.raises(NotImplementedError, match=FORWARD.format(argument)) as e:
        call(network, "jvp", normal(2, 3, 2))
    assert str(e.value).startswith(f'{argument}="jvp": the network calls ')
    assert "forward AD" in str(e.value.__cause__)


def test_the_transpose_of_reverse_mode_names_attention_too():
    x = normal(2, 3, 2)
    with pytest.raises(NotImplementedError, match=FORWARD.format("form")):
        fisher("vjp", x, 1.0, df.Denoiser(attention, EDM)).T @ x


@calls
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_refused_by_name_where_it_cannot_work(reentrant, mode, argument, call):
    network, x = Checkpointed(reentrant), normal(2, 3, 2)
    plain = lambda x, t: x.sin()
    with torch.no_grad():
        if mode == "jvp" and not reentrant:  # forward mode saves nothing
            torch.testing.assert_close(call(network, mode, x), call(plain, mode, x))
            return
        with pytest.raises(NotImplementedError, match="switch gradient checkpointing off") as e:
            call(network, mode, x)
    assert str(e.value).startswith(f'{argument}="{mode}": the network checkpoints its activations')
    assert isinstance(e.value.__cause__, RuntimeError)


@unbatched
@pytest.mark.parametrize("trace", [hutchinson("vjp"), "divergence"], ids=["hutchinson", "exact"])
def test_a_likelihood_has_derivatives_through_attention_in_the_math_backend(trace):
    def gradient(network, *backends):
        x = normal(2, 3, 2).requires_grad_()
        if isinstance(trace, df.Hutchinson):
            trace.generator.manual_seed(0)
        with sdpa_kernel([*backends, SDPBackend.MATH]):
            found = log_prob(network, trace, x)
        return torch.autograd.grad(found.sum(), x)[0]

    found, expected = gradient(attention), gradient(by_hand)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="scaled_dot_product.* is not implemented"):
        gradient(attention, SDPBackend.FLASH_ATTENTION)


@unbatched
@calls
def test_a_network_that_is_a_gradient_is_told_of_the_math_backend(argument, call):
    x = normal(2, 3, 2)
    with pytest.raises(NotImplementedError, match=rf'{argument}="vjp": .*SDPA.*SDPBackend.MATH'):
        call(energy, "vjp", x)
    with sdpa_kernel(SDPBackend.MATH):
        assert call(energy, "vjp", x).isfinite().all()


@calls
def test_errors_of_the_network_s_own_stay_what_they_are(argument, call):
    def broken(x, t):
        raise RuntimeError("out of cheese")

    x = normal(2, 3, 2)
    with pytest.raises(RuntimeError, match="^network: .* it raised RuntimeError: out of cheese$"):
        call(broken, "vjp", x)
    with pytest.raises(RuntimeError, match="^network: .* In order to use an autograd.Function"):
        call(lambda x, t: Rounded.apply(x), "vjp", x)
    inner = lambda x, t: checkpoint(lambda x: Rounded.apply(x), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="^network: .* In order to use an autograd.Function"):
        call(inner, "jvp", x)
