"""Ancestral steps with four covariances against sums over the atoms; schedules, networks, bad
input."""

from __future__ import annotations

import pytest
import torch
from tensors import normal, rng

import dfkernels as df
from dfkernels.methods import ancestral
from dfkernels.methods.ancestral import COVARIANCES

f64 = torch.float64
SCH = df.schedule.VP()
T = df.time_grid(SCH, 3, (0.3, 5.0))


def exact(N=6, d=3, schedule=SCH, scale=1.0):
    cloud = df.PointCloud(scale * normal(N, d), normal(N, seed=50))
    return df.Denoiser.exact(cloud, schedule)


def moments(denoiser, x, t, to):
    """Mean and covariance of x_s given x_t, of the mixture over atoms, summed one by one."""
    data = denoiser.network.cloud
    (alpha, sigma), (alpha_to, sigma_to) = denoiser.schedule(t), denoiser.schedule(to)
    s, s_to = sigma / alpha, sigma_to / alpha_to
    logits = data.log_prior - ((x[:, None] / alpha - data.y) / s).square().sum(2) / 2
    w, r = logits.softmax(1), (s_to / s) ** 2
    centres = r * x[:, None] / alpha + (1 - r) * data.y
    mean = (w[..., None] * centres).sum(1)
    off = centres - mean[:, None]
    own = s_to**2 * (1 - r) * torch.eye(x.shape[1], dtype=x.dtype)
    return (
        alpha_to * mean,
        alpha_to**2 * torch.einsum("bn,bni,bnj->bij", w, off, off),
        (alpha_to**2 * own),
    )


class Fixed:
    """In the place of the noise: a given tensor."""

    def __init__(self, monkeypatch, xi):
        monkeypatch.setattr(ancestral, "normal", lambda x, generator: xi)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("i", [0, 2])
def test_a_step_has_the_mean_and_covariance_of_the_mixture(covariance, i, monkeypatch):
    denoiser, x, t = exact(), normal(4, 3, seed=1), T[i : i + 2]
    mean, spread, own = moments(denoiser, x, *t)

    def step(xi):
        Fixed(monkeypatch, xi)
        return ancestral.sample(denoiser, x, t, covariance, generator=rng()).x[-1]

    middle = step(torch.zeros_like(x))
    torch.testing.assert_close(middle, mean, rtol=0, atol=1e-12)
    root = torch.stack([step(e.expand(4, 3)) - middle for e in torch.eye(3, dtype=f64)], 2)
    eye = torch.eye(3, dtype=f64)
    want = (
        own
        + {
            "none": torch.zeros_like(spread),
            "isotropic": spread.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * eye,
            "diagonal": spread * eye,
            "full": spread,
        }[covariance]
    )
    torch.testing.assert_close(root @ root.mT, want, rtol=1e-10, atol=1e-13)


def test_three_lanczos_steps_take_the_directions_that_matter():
    """Three directions of 40 carry the spread, at about one strength."""
    y = normal(400, 40) * torch.cat([torch.tensor([3.0, 2.9, 2.8]), torch.full((37,), 0.01)])
    denoiser = df.Denoiser.exact(df.PointCloud(y.double()), SCH)
    x, t = normal(2, 40, seed=1), T[:2]
    run = lambda k: ancestral.sample(denoiser, x, t, "full", generator=rng(), lanczos=k).x[-1]
    best = run(40)
    error = [((run(k) - best).norm() / (best - x).norm()).item() for k in (1, 3, 6)]
    assert error[0] > 0.03 and error[1] < 0.03 and error[2] < 1e-3


def test_schedules_agree_on_equal_levels():
    """x/alpha depends on the levels alone."""
    edm = df.schedule.EDM()
    x = normal(4, 3, seed=1)
    for covariance in COVARIANCES:
        ends = []
        for schedule in (SCH, edm):
            t = df.time_grid(schedule, 3, (0.3, 5.0))
            denoiser = exact(schedule=schedule)
            start = schedule.alpha(t[0]) * x
            path = ancestral.sample(denoiser, start, t, covariance, generator=rng())
            ends.append(path.x[-1] / schedule.alpha(t[-1]))
        torch.testing.assert_close(*ends, rtol=0, atol=1e-10)


def test_one_atom_is_sampled_exactly():
    """C = 0: in one step or in many the law is alpha y + sigma xi, with any covariance."""
    y = torch.tensor([[1.0, -2.0]], dtype=f64)
    denoiser, n = df.Denoiser.exact(df.PointCloud(y), SCH), 20_000
    (alpha, sigma), (alpha_to, sigma_to) = SCH(T[0]), SCH(T[-1])
    x = alpha * y + sigma * normal(n, 2, seed=1)
    for covariance in COVARIANCES:
        for t in (T, T[[0, -1]]):
            end = ancestral.sample(denoiser, x, t, covariance, generator=rng()).x[-1]
            off = (end - alpha_to * y) / sigma_to
            # five standard errors of means of xi and xi^2
            assert (off.mean(0).abs() < 5 / n**0.5).all()
            assert ((off.square().mean(0) - 1).abs() < 5 * (2 / n) ** 0.5).all()


@pytest.mark.parametrize("mode, tol", [("jvp", 1e-9), ("vjp", 1e-9), ("finite-difference", 1e-5)])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_network_is_sampled_as_the_data_set_that_it_is(covariance, mode, tol):
    denoiser, x = exact(), normal(4, 3, seed=1)
    data = denoiser.network.cloud
    network = df.Denoiser(
        lambda x, t: df.ops.posterior(x, data.y, *SCH(t), data._log_pi(x.dtype)).mean, SCH, "sample"
    )
    one, two = (
        ancestral.sample(d, x, T, covariance, generator=rng(), mode=mode).x[-1]
        for d in (denoiser, network)
    )
    torch.testing.assert_close(one, two, rtol=0, atol=tol)


def test_negative_variances_of_a_network_count_as_none():
    """A network that shrinks away from its data: d mean/dx < 0, so that C has no root."""
    network = df.Denoiser(lambda x, t: -x, SCH, "sample")
    x = normal(4, 3, seed=1)
    ends = [ancestral.sample(network, x, T, c, generator=rng()).x[-1] for c in COVARIANCES]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0])


def test_events_conditions_and_what_is_kept():
    y, seen = normal(7, 2, 2, seed=3, dtype=torch.float32), []
    denoiser = df.Denoiser.exact(df.PointCloud(y), SCH)
    x = normal(3, 2, 4, seed=1, dtype=torch.float32)[..., ::2].requires_grad_()
    for covariance in COVARIANCES:
        path = ancestral.sample(denoiser, x, T, covariance, generator=rng())
        assert [s.shape for s in path.x] == [x.shape] * 4 and torch.equal(path.t, T)
        assert path.x[-1].dtype == torch.float32 and not path.x[-1].requires_grad
        last = ancestral.sample(
            denoiser,
            x,
            T,
            covariance,
            generator=rng(),
            keep=2,
            callback=lambda *at: seen.append(at),
        )
        assert torch.equal(last.t, T[-2:])
        assert all(torch.equal(a, b) for a, b in zip(last.x, path.x[-2:], strict=True))
    assert seen == [(1, 3), (2, 3), (3, 3)] * 4
    alone = ancestral.sample(denoiser, x, T[:1], generator=rng())
    assert torch.equal(alone.x[0], x) and len(alone.x) == 1
    shifted = df.Denoiser(lambda x, t, shift: x * 0 + shift, SCH, "sample")
    two = [
        ancestral.sample(shifted, x, T, "none", generator=rng(), shift=shift).x[-1]
        for shift in (0.0, 1.0)
    ]
    assert (two[1] - two[0]).min() > 0.5


X = normal(2, 3, seed=1)
BASE = dict(denoiser=exact(), x=X, t=T, generator=rng())


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(denoiser=3), TypeError, "denoiser: expected a Denoiser, got int"),
        (
            dict(x=X.half()),
            TypeError,
            r"x: expected float32 or float64, got float16: .float\(\) converts it",
        ),
        (dict(x=X[:, :2]), ValueError, r"x: expected shape \[B, 3\] to match the cloud, got"),
        (dict(t=T.flip(0)), ValueError, "t: expected noise sigma/alpha that strictly falls"),
        (dict(t=0.5), TypeError, "t: expected a tensor, got float"),
        (
            dict(covariance="dense"),
            ValueError,
            "covariance: expected 'none' or 'isotropic' or 'diagonal' or 'full', got 'dense'",
        ),
        (dict(generator=None), TypeError, "generator: expected a torch.Generator, got NoneType"),
        (dict(lanczos=0), ValueError, "lanczos: expected an integer of at least 1, got 0"),
        (
            dict(covariance="diagonal", lanczos=3),
            ValueError,
            "lanczos: expected None with covariance='diagonal', which takes no Lanczos, got 3",
        ),
        (dict(mode="forward"), ValueError, "mode: expected 'jvp' or 'vjp' or 'finite-difference'"),
        (dict(keep=0), ValueError, "keep: expected an integer of at least 1, got 0"),
        (dict(label=1), ValueError, "conditions: expected none for a data set, got label"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ancestral.sample(**(BASE | change))
