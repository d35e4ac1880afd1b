"""The adjoint against autograd through the solver and closed forms; guidance against descent by
hand."""

from __future__ import annotations

import math
import re

import pytest
import torch
from tensors import normal

from dfkernels import DiffusionFisher, PointCloud, schedule
from dfkernels.methods.adjoint import adjoint, guide
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.endpoint import FORMS, fisher
from dfkernels.methods.grid import Trajectory, nodes, time_grid
from dfkernels.methods.samplers import sample

VP = schedule.VP()
SCHEDULES = [VP, schedule.SubVP(), schedule.VE(), schedule.EDM(), schedule.RectifiedFlow()]


def network(channels, sch, kind="epsilon"):
    """A small convolutional network with weights of its own, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = torch.nn.Sequential(
            torch.nn.Conv2d(channels, 8, 3, padding=1), torch.nn.SiLU(),
            torch.nn.Conv2d(8, channels, 3, padding=1),
        ).double()  # fmt: skip
    return Denoiser(lambda x, t: 0.5 * x + body(x * (1 + t.view(-1, 1, 1, 1))), sch, kind)


def through_the_solver(denoiser, x, t, loss, method="ddim"):
    x = x.clone().requires_grad_()
    trajectory = sample(denoiser, x, t, method)
    trajectory = Trajectory(trajectory.t, trajectory.x)
    states = list(trajectory.x)
    gradients = torch.autograd.grad(loss(states[-1]).sum(), states)
    return trajectory, gradients


def quartic(x):
    return (x**4 + x).reshape(len(x), -1).sum(1)


def gradient_of(loss, x):
    return torch.func.grad(lambda x: loss(x).sum())(x.detach())


# ---- against autograd


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sch", SCHEDULES, ids=lambda s: type(s).__name__)
def test_vjp_equals_autograd_through_the_solver_at_every_node(sch, kind):
    denoiser, t = network(2, sch, kind), time_grid(sch, 7, (0.05, 5.0))
    trajectory, expected = through_the_solver(denoiser, normal(3, 2, 4, 5), t, quartic)
    got = adjoint(trajectory, gradient_of(quartic, trajectory.x[-1]), denoiser)
    assert torch.equal(got.t, trajectory.t) and len(got.x) == 8
    for a, b in zip(got.x, expected, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13 * float(b.abs().max()))


@pytest.mark.parametrize("event", [(), (3,), (2, 3), (1, 2, 2)], ids=str)
def test_the_ideal_denoiser(event):
    """Exact, vjp, jvp and finite differences all give autograd's gradient, F being symmetric."""
    cloud = PointCloud(normal(12, *event, seed=1))
    denoiser, t = Denoiser.exact(cloud, VP), time_grid(VP, 6, (0.1, 5.0))
    trajectory, expected = through_the_solver(denoiser, normal(4, *event), t, quartic)
    end = gradient_of(quartic, trajectory.x[-1])
    for form, tol in (
        ("exact", 1e-11),
        ("vjp", 1e-11),
        ("jvp", 1e-11),
        ("finite-difference", 1e-7),
    ):
        got = adjoint(trajectory, end, denoiser, form, cloud=cloud).x[0]
        torch.testing.assert_close(
            got, expected[0], rtol=tol, atol=tol * float(expected[0].abs().max())
        )


def test_float32():
    cloud = PointCloud(normal(30, 5, seed=1))
    denoiser, t = Denoiser.exact(cloud, VP), time_grid(VP, 12, (0.1, 5.0))
    trajectory, expected = through_the_solver(denoiser, normal(8, 5), t, quartic)
    narrow = PointCloud(cloud.y.float())
    single = Trajectory(trajectory.t, [x.detach().float() for x in trajectory.x])
    end = gradient_of(quartic, trajectory.x[-1]).float()
    for form, tol in (("exact", 1e-4), ("vjp", 1e-4), ("finite-difference", 1e-2)):
        got = adjoint(single, end, Denoiser.exact(narrow, VP), form, cloud=narrow).x[0]
        assert got.dtype == torch.float32
        assert float((got - expected[0]).norm() / expected[0].norm()) < tol


def test_an_operator_of_ones_own():
    cloud = PointCloud(normal(12, 3, seed=1))
    denoiser = Denoiser.exact(cloud, VP)
    trajectory, expected = through_the_solver(
        denoiser, normal(4, 3), time_grid(VP, 6, (0.1, 5.0)), quartic
    )
    own = lambda x, t: DiffusionFisher(x, cloud, *VP(t))
    got = adjoint(trajectory, gradient_of(quartic, trajectory.x[-1]), denoiser, own)
    torch.testing.assert_close(got.x[0], expected[0], rtol=1e-11, atol=1e-12)


# ---- eq. 18 and its order


def gaussian(sch, variance):
    def eps(x, t):
        alpha, sigma = (level[:, None] for level in sch(t))
        return sigma * x / (alpha**2 * variance + sigma**2)

    return Denoiser(eps, sch)


@pytest.mark.parametrize("sch", SCHEDULES, ids=lambda s: type(s).__name__)
def test_order_of_the_adjoint_equation_on_gaussian_data(sch):
    """dx_0/dx_T = sqrt((alpha_0^2 S + sigma_0^2)/(alpha_T^2 S + sigma_T^2)): error O(1/M), or
    O(1/M^2)."""
    variance = torch.tensor([0.01, 1.0, 4.0], dtype=torch.float64)
    denoiser, end = gaussian(sch, variance), normal(2, 3)
    slopes = {}
    for order in (1, 2):
        errors = []
        for steps in (30, 60):
            t = time_grid(sch, steps, (0.05, 5.0))
            path = nodes(sch, t)
            spread = (path.alpha[:, None] ** 2 * variance + path.sigma[:, None] ** 2).sqrt()
            # an exact solution: x is proportional to its spread
            states = [row.expand(2, 3) for row in spread]
            got = adjoint(Trajectory(t, states), end, denoiser, "jvp", order=order).x[0]
            errors.append(float((got - spread[-1] / spread[0] * end).abs().max()))
        slopes[order] = math.log2(errors[0] / errors[1])
    assert slopes[1] == pytest.approx(1, abs=0.1) and slopes[2] == pytest.approx(2, abs=0.1)


def test_order_two_follows_a_heun_path():
    cloud = PointCloud(normal(12, 3, seed=1))
    denoiser, errors = Denoiser.exact(cloud, VP), {1: [], 2: []}
    for steps in (40, 80):
        t = time_grid(VP, steps, (0.5, 5.0))
        trajectory, expected = through_the_solver(denoiser, normal(4, 3), t, quartic, "heun")
        for order, row in errors.items():
            end = gradient_of(quartic, trajectory.x[-1])
            got = adjoint(trajectory, end, denoiser, "exact", order=order, cloud=cloud).x[0]
            row.append(float((got - expected[0]).norm() / expected[0].norm()))
    assert math.log2(errors[1][0] / errors[1][1]) == pytest.approx(1, abs=0.25)
    assert math.log2(errors[2][0] / errors[2][1]) == pytest.approx(2, abs=0.25)
    assert errors[2][1] < 2e-3


# ---- the endpoint forms


@pytest.mark.parametrize("form", ["paper", "centred", "isotropic"])
def test_endpoint_forms_call_no_network_and_equal_the_step_by_hand(form):
    cloud = PointCloud(normal(12, 2, 3, seed=1))
    denoiser, t = Denoiser.exact(cloud, VP), time_grid(VP, 5, (0.1, 5.0))
    trajectory, end = sample(denoiser, normal(4, 2, 3), t), normal(4, 2, 3, seed=3)
    trace = lambda x, t: DiffusionFisher(x, cloud, *VP(torch.as_tensor(t))).trace()
    before = denoiser.evaluations
    got = adjoint(trajectory, end, denoiser, form, trace=trace if form == "isotropic" else None)
    assert denoiser.evaluations == before
    path = nodes(VP, t)
    eps = denoiser.eps(trajectory.x[-2], t[-2])
    # the last step, extended to sigma = 0
    x0 = (trajectory.x[-1] - path.sigma[-1] * eps) / path.alpha[-1]
    lam = end
    for i in reversed(range(5)):
        f = fisher(form, trajectory.x[i], t[i], denoiser, x0=x0,
                   trace=trace if form == "isotropic" else None)  # fmt: skip
        ratio = path.alpha[i + 1] / path.alpha[i]
        slope = (path.sigma[i + 1] - path.sigma[i] * ratio) * path.sigma[i]
        lam = ratio * lam + slope * (f @ lam)
        torch.testing.assert_close(got.x[i], lam, rtol=1e-8, atol=1e-9 * float(lam.abs().max()))


def test_normalise_keeps_directions_where_a_form_overflows():
    """Smooth data of d = 64: the paper's form grows past float32."""
    denoiser = gaussian(schedule.EDM(), torch.full((64,), 0.1))
    x = 3 * normal(2, 64, dtype=torch.float32)
    trajectory = sample(denoiser, x, time_grid(schedule.EDM(), 100, (0.002, 3.0)))
    end = normal(2, 64, seed=3, dtype=torch.float32)
    with pytest.raises(
        RuntimeError,
        match=r"^adjoint: form 'paper' overflows at t = [\d.]+: it is unstable on this path$",
    ):
        adjoint(trajectory, end, denoiser, "paper")
    lam = adjoint(trajectory, end, denoiser, "paper", normalise=True).x
    assert all(float(a.abs().amax(1).sub(1).abs().max()) < 1e-6 for a in lam[:-1])
    true = adjoint(trajectory, end, denoiser, "vjp").x[0]
    unit = adjoint(trajectory, end, denoiser, "vjp", normalise=True).x[0]
    torch.testing.assert_close(unit, true / true.abs().amax(1, keepdim=True), rtol=1e-5, atol=1e-6)


# ---- guidance


def test_descent_on_gaussian_data_is_descent_by_hand():
    """x_0 = c x with c = the closed Jacobian of the solver, so that each step is x - lr c (c x -
    target)."""
    denoiser, target = gaussian(VP, 1.0), normal(4, 3, seed=2)
    t = time_grid(VP, 10, (0.1, 5.0))
    scale = float(sample(denoiser, torch.ones(1, 3, dtype=torch.float64), t).x[-1][0, 0])
    x = normal(4, 3)
    loss = lambda x_0: (x_0 - target).square().sum(1) / 2
    plain = guide(loss, x, t, denoiser, steps=3, lr=0.5, normalise=False)
    unit = guide(loss, x, t, denoiser, steps=3, lr=0.05)
    for result, lr, normalised in ((plain, 0.5, False), (unit, 0.05, True)):
        by_hand = [x]
        for _ in range(3):
            now = by_hand[-1]
            lam = scale * (scale * now - target)
            length = (
                now.norm(dim=1, keepdim=True) / lam.norm(dim=1, keepdim=True) if normalised else 1.0
            )
            by_hand.append(now - lr * length * lam)
        losses = torch.stack([loss(scale * state) for state in by_hand])
        torch.testing.assert_close(result.losses, losses, rtol=1e-10, atol=1e-12)
        best = losses.argmin(0)
        expected = torch.stack(by_hand)[best, torch.arange(4)]
        torch.testing.assert_close(result.x, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(result.x0, scale * expected, rtol=1e-10, atol=1e-12)
        assert result.evaluations == 4 * 10 + 3 * 10


@pytest.mark.parametrize("form", FORMS)
def test_the_best_step_is_returned(form):
    cloud = PointCloud(normal(20, 2, 3, seed=1))
    denoiser, t = Denoiser.exact(cloud, VP), time_grid(VP, 8, (0.3, 5.0))
    loss = lambda x_0: (x_0 - cloud.y[:4]).square().sum((1, 2))
    trace = lambda x, t: DiffusionFisher(x, cloud, *VP(torch.as_tensor(t))).trace()
    done = []
    result = guide(
        loss,
        normal(4, 2, 3),
        t,
        denoiser,
        form,
        steps=6,
        lr=0.1,
        cloud=cloud,
        trace=trace,
        callback=lambda i, n: done.append((i, n)),
    )
    assert done == [(i, 6) for i in range(1, 7)]
    assert result.losses.shape == (7, 4)
    torch.testing.assert_close(loss(result.x0), result.losses.amin(0), rtol=0, atol=0)
    again = sample(denoiser, result.x, t).x[-1]
    torch.testing.assert_close(again, result.x0, rtol=1e-12, atol=1e-13)
    extra = {"vjp": 8, "jvp": 8, "finite-difference": 16}.get(form, 0)
    assert result.evaluations == 7 * 8 + 6 * extra
    if form in ("exact", "vjp", "jvp", "finite-difference"):
        assert bool((result.losses[-1] < result.losses[0]).all())


def test_no_steps_only_sample():
    denoiser, t = gaussian(VP, 1.0), time_grid(VP, 4, (0.1, 5.0))
    x = normal(2, 3)
    result = guide(quartic, x, t, denoiser, steps=0)
    assert torch.equal(result.x, x) and result.losses.shape == (1, 2) and result.evaluations == 4
    assert torch.equal(result.x0, sample(denoiser, x, t).x[-1])


def test_a_zero_gradient_moves_nothing():
    denoiser, t = gaussian(VP, 1.0), time_grid(VP, 4, (0.1, 5.0))
    x = normal(2, 3)
    result = guide(lambda x_0: 0 * x_0.sum(1), x, t, denoiser, steps=2)
    assert torch.equal(result.x, x)


def test_heun_and_order_two():
    denoiser, t = gaussian(VP, 1.0), time_grid(VP, 10, (0.1, 5.0))
    result = guide(quartic, normal(2, 3), t, denoiser, "jvp", steps=1, method="heun", order=2)
    assert result.evaluations == 2 * 20 + 2 * 10


# ---- errors


def path():
    denoiser, t = gaussian(VP, 1.0), time_grid(VP, 4, (0.1, 5.0))
    return denoiser, sample(denoiser, normal(2, 3), t)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda d, p: adjoint(Trajectory(p.t, p.x[1:]), p.x[-1], d),
            ValueError,
            "trajectory: expected a state for each of its 5 times, got 4: sample with keep=None",
        ),
        (
            lambda d, p: adjoint(p, p.x[-1][:1], d),
            ValueError,
            "gradient: expected shape [2, 3] like x, got [1, 3]",
        ),
        (
            lambda d, p: adjoint(p, p.x[-1] / 0, d),
            ValueError,
            "gradient: expected finite values, got inf at index [0, 0]",
        ),
        (
            lambda d, p: adjoint(p, p.x[-1], d, order=3),
            ValueError,
            "order: expected an integer from 1 to 2, got 3",
        ),
        (
            lambda d, p: adjoint(p, p.x[-1], d, "adjoint"),
            ValueError,
            "form: expected " + " or ".join(map(repr, FORMS)) + ", got 'adjoint'",
        ),
        (
            lambda d, p: adjoint(p, p.x[-1], d, "exact"),
            ValueError,
            "cloud: expected a PointCloud for form 'exact', got None",
        ),
        (
            lambda d, p: guide(quartic, p.x[0], p.t, d, steps=-1),
            ValueError,
            "steps: expected an integer of at least 0, got -1",
        ),
        (
            lambda d, p: guide(quartic, p.x[0], p.t, d, lr="0.1"),
            TypeError,
            "lr: expected a number, got str",
        ),
        (
            lambda d, p: guide(lambda x: x.sum(), p.x[0], p.t, d),
            ValueError,
            "loss: expected shape [2], one number per sample, got []",
        ),
        (
            lambda d, p: guide(lambda x: x.sum(1).log(), -p.x[0].abs(), p.t, d),
            ValueError,
            "loss: expected finite values, got nan at index [0]",
        ),
        (
            lambda d, p: guide(lambda x: 1.0, p.x[0], p.t, d),
            TypeError,
            "loss: expected a tensor, got float",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call(*path())


# ---- the experiment


def test_the_experiment_judges_the_state_that_is_best_by_the_guide_so_far():
    from dfkernels.methods.adjoint import Guided
    from experiments.reproduce.adjoint_study import Outcome

    losses = torch.tensor([[3.0, 1.0], [2.0, 4.0], [5.0, 0.5]])
    verdicts = [torch.tensor(v) for v in ([0.0, 10.0], [1.0, 11.0], [2.0, 12.0])]
    nothing = torch.zeros(2)
    outcome = Outcome(nothing, nothing, 0, 0.0, Guided(nothing, nothing, losses, 0), [], verdicts)
    assert outcome.best.tolist() == [[0, 10], [1, 10], [1, 12]]
