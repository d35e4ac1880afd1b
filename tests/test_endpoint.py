"""Every form of F against the dense matrix it stands for, closed forms, and the corrected Prop.
8."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkernels import DiffusionFisher, FisherOperator, PointCloud, schedule
from dfkernels.methods import endpoint, traces
from dfkernels.methods.adjoint import adjoint
from dfkernels.methods.denoiser import PREDICTION_TYPES, Denoiser
from dfkernels.methods.endpoint import FORMS, fisher
from dfkernels.methods.grid import time_grid
from dfkernels.methods.samplers import sample
from dfkernels.methods.trace_matching import MatchedTrace

VP = schedule.VP()
EVENTS = [(), (5,), (2, 3), (1, 3, 3)]
NETWORK = ("jvp", "finite-difference", "vjp")


class Problem:
    """A cloud, its ideal denoiser, and three queries at three times."""

    def __init__(self, event=(2, 3), dtype=torch.float64, atoms=20):
        draw = torch.Generator().manual_seed(0)
        self.cloud = PointCloud(
            torch.randn(atoms, *event, generator=draw, dtype=torch.float64).to(dtype)
        )
        self.denoiser = Denoiser.exact(self.cloud, VP)
        self.x = torch.randn(3, *event, generator=draw, dtype=torch.float64).to(dtype)
        self.t = torch.tensor([0.3, 0.45, 0.7], dtype=torch.float64)
        self.x0 = self.cloud.y[:3]
        self.levels = tuple(level.to(dtype) for level in VP(self.t))

    def trace(self, x, t):
        return DiffusionFisher(x, self.cloud, *VP(torch.as_tensor(t, dtype=torch.float64))).trace()

    def fisher(self, form, x=None, t=None, denoiser=None, **given):
        given = {"x0": self.x0, "cloud": self.cloud, "trace": self.trace} | given
        x, t = self.x if x is None else x, self.t if t is None else t
        return fisher(form, x, t, denoiser or self.denoiser, **given)

    def dense(self, form):
        """The matrix that the form stands for, from its formula."""
        exact = DiffusionFisher(self.x, self.cloud, *self.levels)
        alpha, sigma = (level[:, None, None] for level in self.levels)
        eye = torch.eye(exact.d, dtype=self.x.dtype)
        if form == "isotropic":
            return exact.trace()[:, None, None] / exact.d * eye
        if form not in ("paper", "centred"):
            return exact.to_dense()
        x0, mean = (a.reshape(3, exact.d, 1) for a in (self.x0, exact.denoised))
        r = x0 - mean
        c = r @ r.mT if form == "centred" else x0 @ x0.mT - mean @ mean.mT
        return eye / sigma**2 - alpha**2 / sigma**4 * c


def tolerance(form, dtype):
    """Central differences lose a third of the digits, and an eighth of what is left in the sums."""
    if form == "finite-difference":
        return 1e-8 if dtype == torch.float64 else 1e-2
    return 1e-11 if dtype == torch.float64 else 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("event", EVENTS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_products_trace_diagonal_and_dense(form, event, dtype):
    problem = Problem(event, dtype)
    f = problem.fisher(form, **({"trace": None} if form == "centred" else {}))
    dense, tol = problem.dense(form), tolerance(form, dtype)
    d = dense.shape[1]

    def close(got, expected):
        assert got.dtype == dtype
        assert float((got - expected).abs().max()) <= tol * float(dense.abs().max()) * d

    v = torch.randn(
        3, 4, *event, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(dtype)
    expected = (v.reshape(3, 4, d) @ dense.mT).reshape(v.shape)
    close(f @ v, expected)
    close(f @ v[:, 0], expected[:, 0])
    close(f.to_dense(), dense)
    close(f.trace(), dense.diagonal(0, 1, 2).sum(1))
    close(f.diagonal(), dense.diagonal(0, 1, 2).reshape(3, *event))
    assert (
        isinstance(f, FisherOperator)
        and f.shape == (3, d, d)
        and (f @ v[:, :0]).shape == (3, 0, *event)
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_time_is_a_number_or_one_per_query(form):
    problem = Problem()
    v = torch.randn(3, 2, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = problem.fisher(form) @ v
    for i, t in enumerate(problem.t.tolist()):
        for same in (t, torch.tensor(t, dtype=torch.float64)):
            torch.testing.assert_close((problem.fisher(form, t=same) @ v)[i], expected[i])


@pytest.mark.parametrize("form", FORMS)
def test_expanded_arguments(form):
    """torch.func.jvp refuses tensors that share memory with themselves."""
    problem = Problem()
    x, t = problem.x[:1].expand(3, 2, 3), problem.t[:1].expand(3)
    v = torch.ones(1, dtype=torch.float64).expand(3, 2, 3)
    got = problem.fisher(form, x, t) @ v
    torch.testing.assert_close(
        got, problem.fisher(form, x.clone(), t.clone()) @ v.clone(), rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("form", NETWORK)
def test_the_networks_own_fisher_for_every_prediction_type(form, kind):
    problem = Problem()

    def network(x, t):
        eps, mean = problem.denoiser.both(x, t)
        alpha, sigma = (level.view(-1, 1, 1) for level in VP(t))
        f, g2 = (rate.view(-1, 1, 1) for rate in (VP.f(t), VP.g2(t)))
        return {
            "epsilon": eps,
            "sample": mean,
            "v_prediction": alpha * eps - sigma * mean,
            "flow": f * x + g2 * eps / (2 * sigma),
            "score": -eps / sigma,
        }[kind]

    got = problem.fisher(form, denoiser=Denoiser(network, VP, kind)).to_dense()
    torch.testing.assert_close(got, problem.dense(form), rtol=1e-7, atol=1e-7)


def gaussian(covariance):
    """The ideal eps of N(0, covariance): sigma (alpha^2 S + sigma^2 I)^{-1} x, flat events."""

    def eps(x, t):
        alpha, sigma = (level[:, None, None] for level in VP(t))
        eye = torch.eye(len(covariance), dtype=x.dtype)
        return (
            sigma
            * torch.linalg.solve(alpha**2 * covariance.to(x.dtype) + sigma**2 * eye, x[..., None])
        ).squeeze(-1)

    return Denoiser(eps, VP)


def spd(d, seed=0):
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / d + 0.1 * torch.eye(d)


@pytest.mark.parametrize("form", NETWORK)
def test_gaussian_data(form):
    covariance, problem = spd(5), Problem((5,))
    f = fisher(form, problem.x, problem.t, gaussian(covariance))
    alpha, sigma = (level[:, None, None] for level in problem.levels)
    expected = torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(5))
    torch.testing.assert_close(f.to_dense(), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(f.solve(problem.x), torch.einsum(
        "bij,bj->bi", torch.linalg.inv(expected), problem.x), rtol=1e-6, atol=1e-6)  # fmt: skip


def test_isotropic_is_exact_on_isotropic_gaussians():
    problem = Problem((5,))
    alpha, sigma = problem.levels
    f = fisher("isotropic", problem.x, problem.t, problem.denoiser,
               trace=lambda x, t: 5 / (alpha**2 * 0.3 + sigma**2))  # fmt: skip
    exact = fisher("vjp", problem.x, problem.t, gaussian(0.3 * torch.eye(5, dtype=torch.float64)))
    torch.testing.assert_close(f.to_dense(), exact.to_dense(), rtol=1e-13, atol=1e-13)


# ---- derivatives


@pytest.mark.parametrize("form", ["paper", "centred", "isotropic", "exact", "jvp", "vjp"])
def test_the_product_is_differentiable(form):
    problem = Problem((3,), atoms=6)

    def product(x, v, x0):
        return problem.fisher(form, x, x0=x0) @ v

    v = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = [a.clone().requires_grad_() for a in (problem.x, v, problem.x0)]
    assert torch.autograd.gradcheck(product, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_recorded_under_no_grad(form):
    problem = Problem()
    weight = torch.eye(6, dtype=torch.float64, requires_grad=True)

    def network(x, t):
        return problem.denoiser.eps((x.flatten(1) @ weight).view(x.shape), t)

    f = problem.fisher(form, denoiser=Denoiser(network, VP))
    with torch.no_grad():
        assert not (f @ problem.x).requires_grad
    if form in NETWORK:
        assert (f @ problem.x).grad_fn is not None  # for who trains on it
        weight.requires_grad_(False)
        assert not (f @ problem.x).requires_grad


def test_calls_of_the_network():
    problem = Problem()
    calls = {}
    for form in FORMS:
        for many in (1, 5):
            before = problem.denoiser.evaluations
            problem.fisher(form) @ problem.x[:, None].expand(-1, many, -1, -1).contiguous()
            calls[form, many] = problem.denoiser.evaluations - before
    per_form = {form: (calls[form, 1], calls[form, 5]) for form in FORMS}
    assert per_form == {"paper": (1, 1), "centred": (1, 1), "isotropic": (0, 0), "exact": (0, 0),
                        "jvp": (1, 1),
                        "finite-difference": (2, 2), "vjp": (1, 1)}  # fmt: skip
    before = problem.denoiser.evaluations
    mean = problem.denoiser.denoised(problem.x, problem.t)
    given = problem.fisher("paper", mean=mean)
    assert problem.denoiser.evaluations == before + 1
    torch.testing.assert_close(
        given @ problem.x, problem.fisher("paper") @ problem.x, rtol=0, atol=0
    )


# ---- solve and eigenpairs


@pytest.mark.parametrize("form", FORMS)
def test_solve_against_dense_and_its_derivatives(form):
    """CG needs a step for each eigenvalue that differs: 3 for two rank-one terms, 2 for one, 1 for
    none."""
    problem = Problem((5,), atoms=8)
    given = {"trace": None} if form == "centred" else {}
    x, x0 = problem.x.clone().requires_grad_(), problem.x0.clone().requires_grad_()
    f = problem.fisher(form, x, x0=x0, **given)
    dense = f.to_dense()
    lowest = torch.linalg.eigvalsh(dense.detach())[:, 0]
    damping = (0.5 - lowest).clamp_min(0)
    b = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tol = 1e-8 if form == "finite-difference" else 1e-12
    solution = f.solve_ex(b, damping, tol=tol)
    expected = torch.linalg.solve(dense + damping[:, None, None] * torch.eye(5), b.mT).mT
    torch.testing.assert_close(solution.x, expected, rtol=1e-6, atol=1e-6)
    assert int(solution.iterations.max()) <= {"paper": 3, "centred": 2, "isotropic": 1}.get(
        form, 10
    )
    weights = torch.randn(b.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = (x, x0) if form in ("paper", "centred") else (x,)
    if form != "finite-difference":
        systems = (solution.x, expected)
        got, right = (
            torch.autograd.grad((s * weights).sum(), wanted, retain_graph=True) for s in systems
        )
        torch.testing.assert_close(got, right, rtol=1e-7, atol=1e-8)


def test_centred_solve_is_the_levenberg_marquardt_step():
    """(a I - b r r^T)^{-1} v = v/a + b <r, v> r/(a (a - b |r|^2)), a = 1/sigma^2 + damping, b =
    alpha^2/sigma^4.
    """
    problem = Problem((5,))
    f = problem.fisher("centred", trace=None)
    alpha, sigma = problem.levels
    r = f.x0 - f.mean
    b = alpha**2 / sigma**4
    damping = b * r.square().sum(1)
    a = 1 / sigma**2 + damping
    v = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inner = b * (r * v).sum(1) / (a * (a - b * r.square().sum(1)))
    torch.testing.assert_close(
        f.solve(v, damping), v / a[:, None] + inner[:, None] * r, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("form", FORMS)
def test_eigenpairs_against_dense(form):
    problem = Problem((5,))
    f = problem.fisher(form)
    values, vectors = f.eigsh(2, largest=False)
    dense = f.to_dense()
    dense = (dense + dense.mT) / 2
    torch.testing.assert_close(values, torch.linalg.eigvalsh(dense)[:, :2], rtol=1e-9, atol=1e-9)
    image = torch.einsum("bij,bkj->bki", dense, vectors)
    torch.testing.assert_close(image, values[..., None] * vectors, rtol=1e-7, atol=1e-7)


def skewed(d, size):
    """eps = A x with A = I + size K, K antisymmetric: a network whose J is not symmetric."""
    half = (
        torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / d**0.5
    )
    matrix = torch.eye(d, dtype=torch.float64) + size * (half - half.T)
    return matrix, Denoiser(lambda x, t: x @ matrix.T, schedule.EDM())


def test_a_network_whose_jacobian_is_not_symmetric():
    matrix, denoiser = skewed(5, 0.5)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    jvp, vjp = (fisher(form, x, 0.5, denoiser) for form in ("jvp", "vjp"))
    torch.testing.assert_close(jvp.to_dense(), (2 * matrix).expand(2, 5, 5), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        vjp.to_dense(), (2 * matrix.T).expand(2, 5, 5), rtol=1e-13, atol=1e-13
    )
    assert torch.equal(jvp.T @ x, vjp @ x) and torch.equal(vjp.T @ x, jvp @ x)
    torch.testing.assert_close(vjp.eigsh(2)[0], torch.full((2, 2), 2.0, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"^solve: \|b - A x\|/\|b\| = \d\.\d\de[+-]\d\d after"):
        vjp.solve(x)


def test_lanczos_on_a_nearly_symmetric_network():
    for size, works in ((1e-9, True), (1e-2, False)):
        _, denoiser = skewed(530, size)
        f = fisher("jvp", torch.zeros(1, 530, dtype=torch.float64), 0.5, denoiser)
        if works:
            assert f.eigsh(1)[0].item() == pytest.approx(2, abs=1e-7)
        else:
            with pytest.raises(RuntimeError, match=r"^eigsh: \|F v - l v\| = "):
                f.eigsh(1, max_iter=12)


# ---- the cap


def test_the_cap_keeps_the_trace_of_the_covariance():
    """|r|^2 <= tr C: then tr F >= the given trace, with equality where the cap binds; else nothing
    moves."""
    problem = Problem()
    capped, plain = problem.fisher("centred"), problem.fisher("centred", trace=None)
    given = problem.trace(problem.x, problem.t)
    binds = plain.trace() < given
    assert binds.tolist() == [True, True, False]
    torch.testing.assert_close(capped.trace()[binds], given[binds], rtol=1e-10, atol=0)
    torch.testing.assert_close(capped.x0[~binds], plain.x0[~binds], rtol=1e-15, atol=1e-15)
    r, whole = (f.x0 - f.mean for f in (capped, plain))
    torch.testing.assert_close(
        torch.cosine_similarity(r.flatten(1), whole.flatten(1), 1), torch.ones(3).double()
    )


def test_a_trace_above_its_bound_leaves_no_covariance():
    """tr F > d/sigma^2 would mean tr C < 0: F = I/sigma^2."""
    problem = Problem()
    sigma = problem.levels[1]
    f = problem.fisher("centred", trace=lambda x, t: 7 / sigma**2)
    torch.testing.assert_close(f.to_dense(), torch.eye(6) / sigma.view(-1, 1, 1) ** 2)


# ---- Prop. 8


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 8),
    st.floats(-1.5, 1.5),
    st.floats(-3, 1),
)
def test_corrected_prop_8_holds(seed, d, n, log_sigma, log_error):
    draw = torch.Generator().manual_seed(seed)
    y = torch.randn(n, d, generator=draw, dtype=torch.float64)
    x = torch.randn(1, d, generator=draw, dtype=torch.float64)
    delta = 10**log_error * torch.nn.functional.normalize(
        torch.randn(1, d, generator=draw).double()
    )
    alpha, sigma = 0.8, 10**log_sigma
    exact = DiffusionFisher(x, PointCloud(y), alpha, sigma)
    denoiser = Denoiser(lambda x, t: exact.eps + delta, Constant(alpha, sigma))
    f = fisher("paper", x, 0.0, denoiser, x0=y[:1])
    error = torch.linalg.matrix_norm(f.to_dense() - exact.to_dense()).item()
    assert error <= endpoint.bound(alpha, sigma, 10**log_error, y.norm(dim=1).max().item()) * (
        1 + 1e-9
    )


class Constant(schedule.Schedule):
    def __init__(self, alpha, sigma):
        self.levels = alpha, sigma

    def _alpha(self, t):
        return torch.full_like(t, self.levels[0])

    def _sigma(self, t):
        return torch.full_like(t, self.levels[1])


def test_printed_prop_8_is_exceeded_by_two_atoms():
    """At (1, 0) and (0, 1), half way between them, sigma = 0.05: |F - F_paper| =
    sqrt(1/2)/sigma^4."""
    y = torch.eye(2, dtype=torch.float64)
    x, sigma = torch.full((1, 2), 0.5, dtype=torch.float64), 0.05
    cloud = PointCloud(y)
    f = fisher("paper", x, sigma, Denoiser.exact(cloud, schedule.EDM()), x0=y[:1])
    error = torch.linalg.matrix_norm(
        f.to_dense() - DiffusionFisher(x, cloud, 1.0, sigma).to_dense()
    ).item()
    printed, right = 1.6e4, endpoint.bound(1.0, sigma, 0.0, 1.0)
    assert error == pytest.approx(math.sqrt(0.5) / sigma**4, rel=1e-9)  # 1.13e5
    assert right == pytest.approx(2 / sigma**4) and printed < error / 7 and error < right


# ---- how far each form can be trusted: the table of the docstring


class Diagonal:
    def __init__(self, diagonal):
        self.diagonal = diagonal

    def __matmul__(self, v):
        return self.diagonal * v

    def trace(self):
        return self.diagonal.sum(1)


def toy(law, d, paths, draw):
    """(F(x, t), eps(x, t), samples): 16 atoms, 8 Gaussians of deviation 0.3, or one anisotropic
    Gaussian."""
    noise = torch.randn(paths, d, generator=draw, dtype=torch.float64)
    if law == "gaussian":
        variance = torch.logspace(0, -4, d, dtype=torch.float64)
        f = lambda x, t: Diagonal((1 / (variance + t**2)).expand(x.shape))
        return f, lambda x, t: t[:, None] * (f(x, t[:1]) @ x), variance.sqrt() * noise
    atoms = torch.randn(16 if law == "atoms" else 8, d, generator=draw, dtype=torch.float64)
    spread = 0.0 if law == "atoms" else 0.3
    f = lambda x, t: DiffusionFisher(x, PointCloud(atoms), 1.0, (t**2 + spread**2).sqrt())
    centres = atoms[torch.randint(len(atoms), (paths,), generator=draw)]
    return f, lambda x, t: -t[:, None] * f(x, t).score, centres + spread * noise


@pytest.mark.parametrize(
    ("law", "d", "cosines", "lengths"),
    [
        ("atoms", 2, (0.82, 0.98, 0.96), (4, 0.4, 0.9)),
        ("atoms", 8, (0.82, 0.99, 0.95), (2, 0.8, 0.9)),
        ("mixture", 8, (0.26, 0.90, 0.98), (7e19, 0.007, 1)),
        ("mixture", 64, (0.09, 0.08, 1.00), (3e75, 12, 1)),
        ("gaussian", 8, (0.42, 0.61, 0.67), (1e20, 0.008, 0.3)),
        ("gaussian", 64, (0.14, 0.00, 0.66), (7e69, 10, 0.3)),
    ],
)
def test_cosines_to_the_true_adjoint(law, d, cosines, lengths):
    found = {form: ([], []) for form in ("paper", "centred", "isotropic")}
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        f, eps, y = toy(law, d, 64, draw)
        denoiser = Denoiser(eps, schedule.EDM())
        x = y + 2.3 * torch.randn(64, d, generator=draw, dtype=torch.float64)
        path = sample(denoiser, x, time_grid(denoiser.schedule, 100, (0.002, 2.3)))
        end = torch.randn(64, d, generator=draw, dtype=torch.float64)
        truth = adjoint(path, end, denoiser, f).x[0]
        for form, (cosine, length) in found.items():
            trace = (lambda x, t: f(x, t).trace()) if form == "isotropic" else None  # noqa: B023
            lam = adjoint(path, end, denoiser, form, trace=trace).x[0]
            cosine.append(torch.cosine_similarity(lam, truth, 1))
            length.append((lam.norm(dim=1) / truth.norm(dim=1)).log10())
    for (got, size), cosine, length in zip(found.values(), cosines, lengths, strict=True):
        assert torch.cat(got).median() == pytest.approx(cosine, abs=0.06)
        digits = math.log10(length)
        assert torch.cat(size).median() == pytest.approx(digits, abs=0.15 + 0.02 * abs(digits))


# ---- errors


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda p: p.fisher("exakt"),
            ValueError,
            "form: expected " + " or ".join(map(repr, FORMS)) + ", got 'exakt'",
        ),
        (
            lambda p: p.fisher("paper", x0=None),
            ValueError,
            "x0: expected the end of the path, shape [3, 2, 3], for form 'paper', got None",
        ),
        (
            lambda p: p.fisher("centred", x0=p.x0[:2]),
            ValueError,
            "x0: expected shape [3, 2, 3] like x, got [2, 2, 3]",
        ),
        (
            lambda p: p.fisher("centred", x0=p.x0.float()),
            TypeError,
            "x0: expected float64 like x, got float32: .to(torch.float64) converts it",
        ),
        (
            lambda p: p.fisher("paper", mean=p.x0[:, 0]),
            ValueError,
            "mean: expected shape [3, 2, 3] like x, got [3, 3]",
        ),
        (
            lambda p: p.fisher("exact", cloud=None),
            ValueError,
            "cloud: expected a PointCloud for form 'exact', got None",
        ),
        (
            lambda p: p.fisher("exact", cloud=p.x),
            TypeError,
            "cloud: expected a PointCloud, a ShardedCloud or a GaussianMixture, got Tensor; wrap "
            "it: PointCloud(y)",
        ),
        (
            lambda p: p.fisher("isotropic", trace=None),
            ValueError,
            (
                "trace: expected trace(x, t) -> tr F [B], e.g. a MatchedTrace, for form"
                " 'isotropic', got None"
            ),
        ),
        (
            lambda p: p.fisher("isotropic", trace=lambda x, t: x),
            ValueError,
            "trace: expected output of shape [3], got [3, 2, 3]",
        ),
        (
            lambda p: p.fisher("centred", trace=lambda x, t: x[:, 0, 0] / 0),
            ValueError,
            "trace: returned NaN or inf for 3 of 3 samples, first for sample 0 at t = 0.3",
        ),
        (
            lambda p: fisher("vjp", p.x, p.t, p.cloud),
            TypeError,
            "denoiser: expected a Denoiser, got PointCloud; wrap it: Denoiser.exact(cloud, "
            "schedule)",
        ),
        (
            lambda p: p.fisher("vjp", x=p.x.half()),
            TypeError,
            "x: expected float32 or float64, got float16: .float() converts it",
        ),
        (
            lambda p: p.fisher("vjp", t=p.t[:2]),
            ValueError,
            "t: expected a number, shape [] or [3], got shape [2]",
        ),
        *(
            (
                lambda p, form=form: p.fisher(form) @ p.x[:, 0],
                ValueError,
                "v: expected shape [3, 2, 3] or [3, K, 2, 3], got [3, 3]",
            )
            for form in FORMS
            if form != "paper"
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call(Problem())


def test_every_form_works_without_queries():
    problem = Problem()
    for form, shape in itertools.product(FORMS, [(0, 2, 3), (0, 4, 2, 3)]):
        f = fisher(form, problem.x[:0], problem.t[:0], problem.denoiser, x0=problem.x0[:0],
                   cloud=problem.cloud, trace=lambda x, t: x.new_empty(len(x)))  # fmt: skip
        assert (f @ torch.empty(shape, dtype=torch.float64)).shape == shape


@pytest.mark.parametrize("form", ["isotropic", "centred"])
def test_a_trace_of_another_schedule_is_refused(form):
    own, other = schedule.Cosine(), schedule.VP()
    cloud, x = PointCloud(torch.zeros(2, 3)), torch.ones(2, 3)
    denoiser, t = Denoiser.exact(cloud, own), torch.tensor([0.5, 1.0])
    for trace, what in (
        (traces.exact(cloud, other), r"exact\(cloud, schedule\)"),
        (MatchedTrace(lambda x, t: 0 * t, Denoiser.exact(cloud, other)), "a MatchedTrace"),
    ):
        message = rf"^trace: expected {what} of the denoiser's schedule, Cosine.* got one of VP\("
        with pytest.raises(ValueError, match=message):
            fisher(form, x, t, denoiser, x0=x, trace=trace)
    same = traces.exact(cloud, schedule.Cosine())  # at alpha = 0 too
    assert fisher("isotropic", x, t, denoiser, trace=same).trace().tolist() == pytest.approx(
        (3 / denoiser.levels(x, t)[1] ** 2).tolist()
    )
