"""Where a method makes the right argument of the wrong one, the error names it, and it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dfkernels as df
from dfkernels import ops
from dfkernels.methods.convention.report import Explanation
from dfkernels.methods.convention.verdict import verdict_of

GENERATOR = torch.Generator().manual_seed(0)
Y = torch.randn(20, 1, 2, 2, generator=GENERATOR)
X = torch.randn(3, 1, 2, 2, generator=GENERATOR)
SIGMA, VALUES = torch.tensor([0.5, 1.0, 2.0]), torch.arange(20) % 3
CLOUD = df.PointCloud(Y)
MIXTURE = df.GaussianMixture(Y, variance=0.5)
IDEAL = df.Denoiser.exact(CLOUD, df.schedule.EDM())
FISHER = df.DiffusionFisher(X, CLOUD, 1.0, SIGMA)
CALLS = {
    "half queries": (lambda x: ops.posterior(x, Y, 1.0, 0.5).mean, X.half()),
    "integer queries": (lambda x: ops.log_prob(x, Y, 1.0, 0.5), X.long()),
    "queries under autocast": (lambda x: IDEAL(x, 0.5), X.bfloat16()),
    "integer atoms": (lambda y: ops.posterior(X, y, 1.0, 0.5).mean, Y.long()),
    "a cloud of integers": (lambda y: df.PointCloud(y).y, Y.long()),
    "a cloud of a NumPy array of integers": (lambda y: df.PointCloud(y).y, Y.long().numpy()),
    "labels": (lambda v: ops.average(X, Y, v, 1.0, 0.5).average, VALUES),
    "labels, true or false": (lambda v: ops.average(X, Y, v, 1.0, 0.5).average, VALUES > 0),
    "vectors in float64": (lambda x: FISHER @ x, X.double()),
    "levels as factors of images": (
        lambda sigma: ops.posterior(X, Y, 1.0, sigma).mean,
        SIGMA.view(-1, 1, 1, 1),
    ),
    "times as factors of images": (lambda t: IDEAL(X, t), SIGMA.view(-1, 1, 1, 1)),
    "one query for an operator": (lambda x: ops.posterior(x, Y, 1.0, 0.5).mean, X[0]),
    "one query for a cloud": (lambda x: df.DiffusionFisher(x, CLOUD, 1.0, 0.5).score, X[0]),
    "one query for a mixture": (lambda x: df.DiffusionFisher(x, MIXTURE, 1.0, 0.5).score, X[0]),
    "one query for a denoiser": (lambda x: IDEAL(x, 0.5), X[0]),
}


@pytest.mark.parametrize("case", CALLS)
def test_the_way_out_leads_out(case):
    call, wrong = CALLS[case]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(wrong)
    way_out = str(caught.value).rpartition("got ")[2].partition(": ")[2].split(" ")[0]
    assert way_out[:1] in (".", "["), caught.value
    right = eval(f"wrong{way_out}", {"wrong": wrong, "torch": torch})
    assert torch.as_tensor(call(right)).isfinite().all()


def test_what_has_no_way_out_names_none():
    for wrong, message in (
        (torch.ones(3, 2), "sigma: expected a number, shape [] or [3], got shape [3, 2]"),
        (torch.ones(2, 1), "sigma: expected a number, shape [] or [3], got shape [2, 1]"),
    ):
        with pytest.raises(ValueError) as caught:
            ops.posterior(X, Y, 1.0, wrong)
        assert str(caught.value) == message
    with pytest.raises(TypeError) as caught:
        ops.posterior(X, Y * 1j, 1.0, 0.5)
    assert str(caught.value) == (
        "y: expected float64, float32, float16, bfloat16 or uint8, got complex64"
    )
    with pytest.raises(ValueError) as caught:
        df.DiffusionFisher(X[0, 0], CLOUD, 1.0, 0.5)
    assert str(caught.value) == "x: expected shape [B, 1, 2, 2] to match the cloud, got [2, 2]"


def test_the_message_for_one_query():
    with pytest.raises(ValueError) as caught:
        ops.posterior(X[0], Y, 1.0, 0.5)
    assert str(caught.value) == (
        "x: expected shape [B, 1, 2, 2] to go with y of shape [20, 1, 2, 2], got [1, 2, 2]: [None] "
        "makes a batch of one"
    )


def test_a_data_set_has_no_posterior_mean_without_noise():
    for schedule, t in ((df.schedule.VP(), 0.0), (df.schedule.RectifiedFlow(), torch.ones(3))):
        with pytest.raises(ValueError) as caught:
            df.Denoiser.exact(CLOUD, schedule)(X, t)
        assert str(caught.value) == (
            "t: the posterior mean of a data set does not exist where sigma = 0, as at t = "
            f"{float(np.max(np.asarray(t))):g} of {schedule!r}"
        )


def test_a_data_set_has_no_conditions():
    with pytest.raises(ValueError) as caught:
        df.sample(IDEAL, X, torch.tensor([2.0, 1.0]), label=3, mask=None)
    assert str(caught.value) == (
        "conditions: expected none for a data set, got label, mask: make the cloud of those atoms "
        "alone that have it (log_prior: -inf for the others)"
    )


class Joined(torch.nn.Module):
    """x and t side by side, as t was in float32 alone."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x, t):
        return self.layer(torch.cat([x, t[:, None]], 1))


def test_a_network_in_half_precision_is_told_of_its_time():
    x, network = torch.randn(3, 2, generator=GENERATOR), Joined()
    said = r"\(a network in half precision is given t in float32: beside x it is t.to\(x.dtype\)\)$"
    with pytest.raises(RuntimeError, match=said):
        df.Denoiser(network.bfloat16(), df.schedule.VP(), "epsilon")(x, 0.5)
    said = r"\(a function hides the dtype .*: df.methods.Called shows them\)$"
    with pytest.raises(RuntimeError, match=said):
        df.Denoiser(lambda x, t: network(x, t), df.schedule.VP(), "epsilon")(x, 0.5)


def test_a_verdict_offers_no_change_that_makes_the_error_larger():
    start = Explanation("", "", (2.0, 1.0), 4.0)
    better, worse = (
        Explanation("prediction type", "prediction_type='flow'", (error, 1.0), 2 * error)
        for error in (1.5, 2.5)
    )
    tried = "None of 2 changes of sign, prediction type, scale, clock and data explains it"
    said = verdict_of("unknown", start, [better, worse], 0.0)
    assert f"{tried}; with prediction_type='flow' it is 1.5. Was" in said
    said = verdict_of("unknown", start, [worse, worse], 0.0)
    assert f"{tried} or makes it smaller. Was" in said
