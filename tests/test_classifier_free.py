"""Classifier-free guidance: one network made of two evaluations of another."""

from __future__ import annotations

import pytest
import torch
from tensors import normal

import dfkernels as df
from dfkernels import schedule
from dfkernels.methods.classifier_free import ClassifierFreeGuidance
from dfkernels.methods.denoiser import PREDICTION_TYPES, Denoiser
from dfkernels.methods.endpoint import fisher

SCH = schedule.VP()


class Conditional(torch.nn.Module):
    """sin(w_label x) + shift t, with twice the channels; label len(w) - 1 is "no label"."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.5, 1.0, 2.0, -1.0], dtype=dtype))
        self.batches = []

    def forward(self, x, t, label, shift=0.0):
        self.batches.append(len(x))
        out = (self.w[label][:, None] * x).sin() + torch.as_tensor(shift).view(-1, 1) * t[:, None]
        return torch.cat([out, 0 * out], 1)


LABEL = torch.tensor([0, 2, 1])


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_every_prediction_is_the_combination_of_two(kind):
    network, x, t = Conditional(), normal(3, 2), torch.tensor([0.1, 0.5, 0.9])
    plain = Denoiser(network, SCH, kind)
    guided = Denoiser(ClassifierFreeGuidance(network, 3.0, {"label": 3}), SCH, kind)
    for name in ("denoised", "eps", "score"):
        with_label = getattr(plain, name)(x, t, label=LABEL)
        without = getattr(plain, name)(x, t, label=torch.full_like(LABEL, 3))
        found = getattr(guided, name)(x, t, label=LABEL)
        assert torch.allclose(found, without + 3 * (with_label - without), atol=1e-10)
    assert [name for name, _ in guided.named_parameters()] == ["network.network.w"]
    assert not guided.eval().network.network.training
    assert repr(guided.network).startswith("ClassifierFreeGuidance(\n  scale=3, null=['label']")


@pytest.mark.parametrize(
    "null, given, batches",
    [
        (3, {}, [6]),
        (torch.tensor([3]), {}, [6]),
        (torch.tensor([3, 3, 3]), {"shift": 0.5}, [6]),
        (3, {"shift": torch.tensor([0.1, 0.2, 0.3])}, [3, 3]),  # whose batch nobody knows
    ],
    ids=["number", "row", "rows", "shared tensor"],
)
def test_both_evaluations_are_one_call_where_all_is_known_to_be_a_batch(null, given, batches):
    network, x, t = Conditional(), normal(3, 2), torch.tensor([0.1, 0.5, 0.9]).double()
    guided = ClassifierFreeGuidance(network, 2.0, {"label": null})
    out = guided(x, t, label=LABEL, **given)
    assert network.batches == batches
    w = network.w.detach()
    shift = torch.as_tensor(given.get("shift", 0.0)).view(-1, 1) * t[:, None]
    want = shift + 2 * (w[LABEL][:, None] * x).sin() - (w[3] * x).sin()
    assert torch.allclose(out, want, atol=1e-7)  # a shift of float32
    denoiser = Denoiser(guided, SCH)
    denoiser.eps(x, t, label=LABEL, **given)
    assert denoiser.evaluations == 1


@pytest.mark.parametrize("scale", [0, 1.0])
def test_a_scale_of_0_or_1_needs_one_evaluation(scale):
    network, x, t = Conditional(), normal(3, 2), torch.full((3,), 0.5)
    out = ClassifierFreeGuidance(network, scale, {"label": 3})(x, t, label=LABEL)
    label = LABEL if scale else torch.full_like(LABEL, 3)
    assert network.batches == [3] and torch.equal(out, network(x, t, label)[:, :2])


def test_a_condition_that_is_shared_by_the_batch_is_not_stacked():
    network, x, t = Conditional(), normal(3, 2), torch.full((3,), 0.5)
    guided = ClassifierFreeGuidance(network, 2.0, {"label": 3})
    found = guided(x, t, label=torch.tensor([2]))
    assert network.batches == [3, 3]
    assert torch.equal(found, guided(x, t, label=torch.tensor([2, 2, 2])))


def test_the_null_may_be_what_only_the_network_understands():
    network = lambda x, t, text=None: x if text is None else 2 * x
    guided = ClassifierFreeGuidance(network, 5.0, {"text": None})
    x = normal(3, 2)
    assert torch.allclose(guided(x, torch.ones(3), text=normal(3, 7)), 6 * x)


def test_the_jacobian_is_the_combination_under_every_transform():
    network, x, v = Conditional(), normal(3, 2), normal(3, 4, 2, seed=1)
    denoiser = Denoiser(ClassifierFreeGuidance(network, 3.0, {"label": 3}), SCH)
    sigma = SCH.sigma(0.4)
    w = network.w.detach()
    slopes = [(a * x).cos() * a for a in (w[LABEL][:, None], w[3])]
    want = (slopes[1] + 3 * (slopes[0] - slopes[1]))[:, None] * v / sigma
    for form in ("jvp", "vjp"):
        found = fisher(form, x, 0.4, denoiser, label=LABEL) @ v  # on 4 copies of each query
        assert torch.allclose(found, want)
    mapped = torch.vmap(lambda x, label: denoiser(x[None], 0.4, label=label[None])[0])(x, LABEL)
    assert torch.allclose(mapped, denoiser(x, 0.4, label=LABEL))
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, 0.4, label=LABEL), denoiser(x, 0.4, label=LABEL))


def test_the_difference_is_formed_in_x_s_dtype_around_a_half_precision_network():
    x, t = normal(3, 2), torch.full((3,), 0.5, dtype=torch.float64)
    network = Conditional(torch.bfloat16)
    out = ClassifierFreeGuidance(network, 7.5, {"label": 3})(x, t, label=LABEL)
    one, other = (
        network(x.bfloat16(), t.float(), a)[:, :2].double() for a in (LABEL, 0 * LABEL + 3)
    )
    assert out.dtype == torch.float64
    assert torch.equal(out, other + 7.5 * (one - other))


def test_a_guided_flow_is_sampled():
    denoiser = Denoiser(ClassifierFreeGuidance(Conditional(), 2.0, {"label": 3}), SCH).eval()
    path = df.sample(denoiser, normal(3, 2), df.time_grid(SCH, 4, (0.1, 10.0)), label=LABEL)
    assert bool(path.x[-1].isfinite().all())


def test_bad_guidance_is_named():
    def error(kind, call):
        with pytest.raises(kind) as caught:
            call()
        return str(caught.value)

    guided = ClassifierFreeGuidance(Conditional(), 2.0, {"label": 3})
    assert error(ValueError, lambda: guided(normal(3, 2), torch.ones(3), labels=LABEL)) == (
        "conditions: expected label=..., as null has it, got ['labels']"
    )
    assert error(TypeError, lambda: ClassifierFreeGuidance(1, 2.0, {"label": 3})) == (
        "network: expected a callable network(x, t), got int"
    )
    for null in ({}, None, 3):
        assert error(TypeError, lambda null=null: ClassifierFreeGuidance(abs, 2.0, null)) == (
            f"null: expected a dict of keyword arguments, got {null!r}"
        )
