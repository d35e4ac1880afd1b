"""GaussianMixture as an object: what it checks, copies, stores and refuses, under any state of
torch."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle

import pytest
import torch
from tensors import normal
from test_gaussian_mixture import (
    EVENT,
    FACTOR,
    MEANS,
    POSITIVE,
    PRIOR,
    WIDTHS,
    D,
    N,
)
from test_global_state import STATES

import dfkernels as df


def test_it_is_checked_once():
    def error(**given):
        with pytest.raises((TypeError, ValueError)) as found:
            made(**given)
        return str(found.value)

    made = lambda means=MEANS, **given: df.GaussianMixture(means, **given)
    assert error() == "variance, covariance: expected one of the two, got none"
    assert error(variance=1.0, covariance=FACTOR).endswith("expected one of the two, got both")
    assert error(variance=-0.1) == "variance: expected a finite value >= 0, got -0.1"
    assert error(variance=math.nan) == "variance: expected a finite value, got nan"
    assert error(variance="wide").startswith("variance: expected a number, got str")
    bad = POSITIVE.clone()
    bad[2, 1, 0] = -1
    assert (
        error(variance=bad) == "variance: expected finite values >= 0, got -1.0 at index [2, 1, 0]"
    )
    assert error(variance=torch.ones(3)) == (
        "variance: expected a number or shape [7] or [1, 2, 3] or [7, 2, 3], got [3]"
    )
    assert error(variance=torch.ones(7, dtype=torch.int64)).startswith(
        "variance: expected a floating dtype, got torch.int64"
    )
    assert error(covariance=torch.eye(3)) == (
        "covariance: expected shape [6, 6], one matrix for all components, got [3, 3]"
    )
    assert error(covariance=FACTOR).startswith("covariance: expected a symmetric matrix, got ")
    assert error(covariance=-torch.eye(6)) == (
        "covariance: expected a positive semidefinite matrix, got an eigenvalue -1"
    )
    assert error(means=MEANS * math.nan, variance=1.0).startswith("means: expected finite values")
    assert error(means=[1.0], variance=1.0).startswith("means: expected a torch.Tensor or numpy")
    assert error(variance=1.0, log_prior=torch.zeros(3)).startswith("log_prior: expected shape [7]")


def test_it_is_immutable_and_watched():
    variance = POSITIVE.clone()
    mixture = df.GaussianMixture(MEANS, variance=variance)
    with pytest.raises(AttributeError, match="^GaussianMixture is immutable: cannot set means"):
        mixture.means = MEANS
    F = df.DiffusionFisher(MEANS[:1], mixture, 1.0, 1.0)
    F.score.zero_()
    assert F.score.abs().max() > 0  # what one gets is a copy
    variance[0] = 7
    with pytest.raises(RuntimeError, match="^variance: changed in place since this Gauss"):
        F.trace()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_copies_and_casts(width):
    mixture = df.GaussianMixture(MEANS, log_prior=PRIOR, **width)
    x = normal(2, *EVENT, seed=25)
    expected = df.DiffusionFisher(x, mixture, 1.0, 0.5).log_prob
    for other in (copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture)), copy.copy(mixture)):
        assert torch.equal(df.DiffusionFisher(x, other, 1.0, 0.5).log_prob, expected)
        assert other._fingerprint() == mixture._fingerprint()
    assert mixture.to(torch.float64) is mixture
    with pytest.raises(TypeError, match=r"^x: expected float64 .* mixture.to\(torch.float32\)"):
        df.DiffusionFisher(x.float(), mixture, 1.0, 0.5).trace()
    assert (
        repr(mixture)
        == "GaussianMixture(N=7, event_shape=(2, 3), torch.float64, cpu, log_prior=[N])"
    )


def test_stored_bytes_and_masked_components():
    y = torch.randint(256, (N, *EVENT), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    stored = df.GaussianMixture(y, variance=0.2, scale=2 / 255, offset=-1)
    plain = df.GaussianMixture(y.double() * (2 / 255) - 1, variance=0.2)
    x = normal(2, *EVENT, seed=26)
    covered = df.GaussianMixture(y, covariance=0.2 * torch.eye(D), scale=2 / 255, offset=-1)
    for law in (stored, covered):
        torch.testing.assert_close(
            df.DiffusionFisher(x, law, 0.9, 0.3).score,
            df.DiffusionFisher(x, plain, 0.9, 0.3).score,
            rtol=1e-5,
            atol=1e-5,  # a covariance turns bytes in float32
        )
    holes, prior = MEANS.clone(), torch.zeros(N, dtype=torch.float64)
    holes[2], prior[2] = math.nan, -math.inf
    keep = [0, 1, 3, 4, 5, 6]
    without = df.GaussianMixture(MEANS[keep], variance=POSITIVE[keep])
    masked = df.GaussianMixture(holes, variance=POSITIVE, log_prior=prior)
    for name in ("log_prob", "score", "denoised"):
        torch.testing.assert_close(
            getattr(df.DiffusionFisher(x, masked, 0.9, 0.3), name),
            getattr(df.DiffusionFisher(x, without, 0.9, 0.3), name),
        )
    assert 2 not in masked.draw(x.repeat(50, 1, 1), 1.0, 5.0, seed=0).index
    assert df.top_k(x, masked, 1.0, 5.0, N).index[:, -1].tolist() == [2, 2]


def test_no_queries_and_one_number():
    mixture = df.GaussianMixture(MEANS, variance=POSITIVE)
    none = df.DiffusionFisher(MEANS[:0], mixture, 1.0, 1.0)
    assert none.score.shape == (0, *EVENT) and none.to_dense().shape == (0, D, D)
    assert mixture.draw(MEANS[:0], 1.0, 1.0, seed=0).x_0.shape == (0, *EVENT)
    single = df.GaussianMixture(torch.zeros(1, dtype=torch.float64), variance=3.0)
    F = df.DiffusionFisher(torch.ones(2, dtype=torch.float64), single, 1.0, 1.0)
    assert F.trace().tolist() == [0.25, 0.25] and F.score.tolist() == [-0.25, -0.25]


@pytest.mark.parametrize("width", [{"variance": 3.0}, {"covariance": 3 * torch.eye(1)}])
def test_numbers_as_events(width):
    y, x = normal(N, seed=40), normal(2, seed=41)
    numbers, vectors = df.GaussianMixture(y, **width), df.GaussianMixture(y[:, None], **width)
    one, other = (
        df.DiffusionFisher(x, numbers, 1, 1),
        df.DiffusionFisher(x[:, None], vectors, 1, 1),
    )
    torch.testing.assert_close(one.score, other.score[:, 0])
    torch.testing.assert_close(one.to_dense(), other.to_dense())
    found = df.top_k(x, numbers, 1, 1, 2)
    assert torch.equal(found.index, df.top_k(x[:, None], vectors, 1, 1, 2).index)
    points = df.top_k(x, df.PointCloud(y), 1, 1, 2)
    assert torch.equal(points.index, df.top_k(x[:, None], df.PointCloud(y[:, None]), 1, 1, 2).index)
    assert numbers.draw(x, 1, 1, seed=0).x_0.shape == (2,)


def test_draws_ask_for_a_generator_and_chains_for_no_graph():
    mixture, schedule = df.GaussianMixture(MEANS, variance=0.1), df.schedule.EDM()
    with pytest.raises(TypeError, match="^generator: expected a torch.Generator, got NoneType"):
        mixture.sample(2, None)
    with pytest.raises(ValueError, match="^count: expected an integer of at least 0, got -1"):
        mixture.sample(-1, torch.Generator())
    x, t = MEANS.clone().requires_grad_(), df.time_grid(schedule, 2, (0.1, 5.0))
    with pytest.raises(NotImplementedError, match="x requires grad: detach it"):
        df.transport_test(mixture, schedule, t, x=x)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("width", [WIDTHS["diagonals"], WIDTHS["full"]], ids=["axes", "full"])
def test_global_state_changes_nothing(name, width):
    means, x = MEANS.float(), normal(3, *EVENT, seed=50).float()

    def results():
        mixture = df.GaussianMixture(means, **width)
        fisher = mixture.fisher_matvec(x, x, 1.0, 0.5), mixture.fisher_diagonal(x, 1.0, 0.5)
        return *mixture.posterior(x, 1.0, 0.5), *fisher, mixture.draw(x, 1.0, 0.5, seed=0).x_0

    want = results()
    with STATES[name]():
        found = results()
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_the_mode_in_which_backward_is_called_changes_no_gradient():
    """The product with the covariance's axes was once derived in bfloat16 inside autocast."""
    mixture, x = df.GaussianMixture(MEANS.float(), **WIDTHS["full"]), normal(3, *EVENT, seed=52)
    x = x.float().requires_grad_()

    def gradients(state):
        p = mixture.posterior(x, 1.0, 0.5)
        product = mixture.fisher_matvec(x, x.detach(), 1.0, 0.5)
        with state:
            (g,) = torch.autograd.grad(p.mean.sin().sum() + product.sum(), x, create_graph=True)
            return g.detach(), torch.autograd.grad(g.square().sum(), x)[0]

    want = gradients(contextlib.nullcontext())
    for name in ("autocast bfloat16", "autocast float16"):
        for a, b in zip(gradients(STATES[name]()), want, strict=True):
            assert torch.equal(a, b)


def test_forward_mode_and_vmap_pass_through_the_axes():
    mixture, x = df.GaussianMixture(MEANS, **WIDTHS["full"]), normal(3, *EVENT, seed=53)
    v = normal(3, *EVENT, seed=54)
    log_prob = lambda x: mixture.posterior(x[None], 1.0, 0.5).log_prob[0]
    score = torch.vmap(torch.func.grad(log_prob))(x)
    torch.testing.assert_close(score, mixture.posterior(x, 1.0, 0.5).score)
    change = torch.func.jvp(lambda x: mixture.posterior(x, 1.0, 0.5).score, (x,), (v,))[1]
    torch.testing.assert_close(change, -mixture.fisher_matvec(x, v, 1.0, 0.5))


@pytest.mark.parametrize("width", [{"variance": 0.1}, {"covariance": torch.eye(D)}])
def test_queries_of_another_shape_or_kind_are_refused(width):
    """With a covariance too, for which they are flattened: [2, 3] is not [3, 2]."""
    mixture, x = df.GaussianMixture(MEANS, **width), normal(4, *EVENT, seed=51)
    flat = r"x: expected shape \[B, 2, 3\] to match the mixture, got \[4, 3, 2\]"
    for call in (
        lambda x: mixture.posterior(x, 1.0, 1.0),
        lambda x: mixture.fisher_matvec(x, x, 1.0, 1.0),
        lambda x: mixture.fisher_diagonal(x, 1.0, 1.0),
    ):
        with pytest.raises(ValueError, match=flat):
            call(x.mT)
        with pytest.raises(TypeError, match="x: expected a tensor, got ndarray"):
            call(x.numpy())
    with pytest.raises(ValueError, match=r"v: expected shape \[4, 2, 3\] or .*, got \[4, 3, 2\]"):
        mixture.fisher_matvec(x, x.mT, 1.0, 1.0)
