"""DiffusionFisher against a dense float64 Hessian by autograd, torch.linalg, and closed forms."""

from __future__ import annotations

import math
import re

import pytest
import torch

from dfkernels import DiffusionFisher, FisherOperator, PointCloud, ops
from dfkernels.linalg import operator


def problem(dtype=torch.float64, n=40, event=(2, 3), batch=4, sigma=(0.6, 1.0, 2.0, 5.0), seed=0):
    """A small cloud with weights and queries near it, alpha and sigma differing per query."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randn(n, *event, generator=draw, dtype=torch.float64)
    alpha = torch.linspace(1, 0.5, batch, dtype=torch.float64)
    sigma = torch.tensor(sigma[:batch], dtype=torch.float64)
    ones = (-1,) + (1,) * len(event)
    x = alpha.view(ones) * y[:batch] + sigma.view(ones) * torch.randn(
        batch, *event, generator=draw, dtype=torch.float64
    )
    prior = torch.randn(n, generator=draw, dtype=torch.float64)
    return x.to(dtype), PointCloud(y.to(dtype), prior.to(dtype)), alpha.to(dtype), sigma.to(dtype)


def log_prob(x, cloud, alpha, sigma):
    """log q of one flat query, for autograd."""
    u = (x - alpha * cloud.y.flatten(1)) / sigma
    logits = torch.log_softmax(cloud.log_prior, 0) - u.square().sum(1) / 2
    return (
        torch.logsumexp(logits, 0) - x.numel() / 2 * math.log(2 * math.pi) - x.numel() * sigma.log()
    )


@pytest.fixture
def fisher():
    return DiffusionFisher(*problem())


def test_everything_against_autograd(fisher):
    x, cloud, alpha, sigma = problem()
    for b in range(len(x)):
        args = x[b].flatten(), cloud, alpha[b], sigma[b]
        torch.testing.assert_close(fisher.log_prob[b], log_prob(*args), rtol=1e-12, atol=0)
        score = torch.func.grad(log_prob)(*args)
        torch.testing.assert_close(fisher.score[b].flatten(), score, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            fisher.eps[b].flatten(), -sigma[b] * score, rtol=1e-10, atol=1e-12
        )
        dense = -torch.func.hessian(log_prob)(*args)
        torch.testing.assert_close(fisher.to_dense()[b], dense, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(fisher.trace()[b], dense.trace(), rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(
            fisher.diagonal()[b].flatten(), dense.diagonal(), rtol=1e-9, atol=1e-11
        )
    p = ops.posterior(x, cloud.y, alpha, sigma, torch.log_softmax(cloud.log_prior, 0))
    torch.testing.assert_close(
        (fisher.denoised, fisher.ess), (p.mean, p.ess), rtol=1e-13, atol=1e-14
    )


def test_matmul_of_one_and_of_many_vectors(fisher):
    draw = torch.Generator().manual_seed(3)
    many = torch.randn(4, 5, 2, 3, generator=draw, dtype=torch.float64)
    expected = torch.einsum("bij,bkj->bki", fisher.to_dense(), many.flatten(2)).view(4, 5, 2, 3)
    torch.testing.assert_close(fisher @ many, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(fisher.T @ many[:, 0], expected[:, 0], rtol=1e-11, atol=1e-12)


def test_computes_once(fisher, monkeypatch):
    calls = []
    for name in ("posterior", "fisher_diagonal", "fisher_dense"):
        real = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, _real=real, _name=name, **k: calls.append(_name) or _real(*a, **k)
        )
    for _ in range(2):
        _ = fisher.log_prob, fisher.denoised, fisher.score, fisher.eps, fisher.ess
        fisher.trace(), fisher.diagonal(), fisher.to_dense()
    assert calls == ["posterior", "fisher_diagonal", "fisher_dense"]


def test_uint8_atoms_and_a_float_sigma():
    draw = torch.Generator().manual_seed(5)
    raw = torch.randint(0, 256, (30, 4), generator=draw, dtype=torch.uint8)
    x = torch.randn(3, 4, generator=draw)
    stored = DiffusionFisher(x, PointCloud(raw, scale=2 / 255, offset=-1), 0.8, 0.5)
    plain = DiffusionFisher(x.double(), PointCloud(raw.double() * (2 / 255) - 1), 0.8, 0.5)
    torch.testing.assert_close(stored.to_dense().double(), plain.to_dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stored.score.double(), plain.score, rtol=1e-5, atol=1e-5)


def test_looks_like_an_operator(fisher):
    assert (
        fisher.shape == (4, 6, 6)
        and fisher.T is fisher
        and fisher.dtype == torch.float64
        and fisher.d == 6
    )
    assert (
        repr(fisher) == "DiffusionFisher(shape=(4, 6, 6), torch.float64, cpu, "
        "PointCloud(N=40, event_shape=(2, 3), torch.float64, cpu, log_prior=[N]))"
    )


# ---- solve


def enough(fisher):
    """The damping that always suffices, and a little."""
    return ((fisher.d - 1) / fisher.sigma**2 - fisher.trace()).clamp_min(0) * 1.01 + 0.01


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_solve_against_dense(dtype, tol):
    fisher = DiffusionFisher(*problem(dtype))
    b = torch.randn(4, 3, 2, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)
    damping = enough(fisher)
    matrix = fisher.to_dense().double() + damping[:, None, None] * torch.eye(6)
    expected = torch.linalg.solve(matrix, b.flatten(2).double().mT).mT.reshape(b.shape)
    solution = fisher.solve_ex(b, damping)
    torch.testing.assert_close(
        solution.x.double(), expected, rtol=tol, atol=tol * float(expected.abs().max())
    )
    assert solution.iterations.shape == solution.residual.shape == (4, 3)
    # exact in d = 6 steps, but for rounding
    assert solution.iterations.min() >= 1 and solution.iterations.max() <= 12
    assert solution.residual.max() <= torch.finfo(dtype).eps ** (2 / 3)
    torch.testing.assert_close(fisher.solve(b[:, 0], damping), solution.x[:, 0], rtol=tol, atol=tol)


def test_gaussian_data_solve_is_the_covariance():
    """A cloud of 2 atoms far from the query: F = I/sigma^2, so the solution is sigma^2 b, in one
    step."""
    y = torch.tensor([[0.0, 0.0], [50.0, 0.0]], dtype=torch.float64)
    fisher = DiffusionFisher(torch.zeros(1, 2, dtype=torch.float64), PointCloud(y), 1.0, 0.5)
    solution = fisher.solve_ex(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    assert solution.x.tolist() == [[0.25, -0.5]] and solution.iterations.tolist() == [1]
    zero = fisher.solve_ex(torch.zeros(1, 2, dtype=torch.float64))
    assert (
        zero.x.tolist() == [[0.0, 0.0]]
        and zero.iterations.tolist() == [0]
        and zero.residual.tolist() == [0.0]
    )


def two_atoms(distance=2.0, sigma=0.5):
    """Half way between two atoms: F = diag(1/s^2 - (distance/2)^2/s^4, 1/s^2), indefinite if
    distance > 2 s.
    """
    y = torch.tensor([[-distance / 2, 0.0], [distance / 2, 0.0]], dtype=torch.float64)
    return DiffusionFisher(torch.zeros(1, 2, dtype=torch.float64), PointCloud(y), 1.0, sigma)


def test_negative_curvature_names_the_damping_that_suffices():
    fisher = two_atoms()  # F = diag(4 - 16, 4)
    b = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError) as error:
        fisher.solve(b, damping=3.0)
    assert (
        str(error.value)
        == "damping: F + damping I is not positive definite at query 0 (damping = 3); "
        "more than 12 is necessary, more than (d - 1)/sigma^2 - tr F = 12 is always enough"
    )
    assert fisher.solve(b, damping=12.5)[0, 0] == pytest.approx(2.0, rel=1e-10)


def test_solve_says_when_it_did_not_converge():
    fisher = DiffusionFisher(*problem(n=200, event=(30,), sigma=(3.0, 3.0, 3.0, 3.0)))
    b = torch.randn(4, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with pytest.raises(
        RuntimeError,
        match=r"^solve: \|b - A x\|/\|b\| = \d\.\d\de-\d\d after 2 iterations, tol = 1\.00e-12$",
    ):
        fisher.solve(b, enough(fisher), tol=1e-12, max_iter=2)
    assert fisher.solve_ex(b, enough(fisher), tol=1e-12, max_iter=2).residual.min() > 1e-12


def test_solve_is_differentiable_twice():
    """Implicit derivatives in b, damping, x and sigma against those of the dense solve."""
    x, cloud, alpha, sigma = problem(batch=2)
    x, sigma, damping = (
        x.requires_grad_(),
        sigma.requires_grad_(),
        torch.tensor([8.0, 9.0], dtype=torch.float64),
    )
    damping = damping.requires_grad_()
    b = torch.randn(
        2, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).requires_grad_()
    inputs = (x, sigma, damping, b)

    def cg(x, sigma, damping, b):
        return DiffusionFisher(x, cloud, alpha, sigma).solve(b, damping, tol=1e-13)

    def dense(x, sigma, damping, b):
        matrix = DiffusionFisher(x, cloud, alpha, sigma).to_dense() + damping[
            :, None, None
        ] * torch.eye(6)
        return torch.linalg.solve(matrix, b.flatten(1)).view(b.shape)

    weights = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    results = []
    for solve in (cg, dense):
        first = torch.autograd.grad((solve(*inputs) * weights).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append((*first, *second))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_levels_can_be_mapped():
    """The constructor looks at no value of a tensor."""
    x, cloud, alpha, _ = problem()
    levels = torch.tensor([0.5, 0.9], dtype=x.dtype)
    got = torch.func.vmap(lambda sigma: DiffusionFisher(x, cloud, alpha, sigma).trace())(levels)
    expected = torch.stack(
        [DiffusionFisher(x, cloud, alpha, float(sigma)).trace() for sigma in levels]
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_forward_mode_raises():
    x, cloud, alpha, sigma = problem()
    for name, call in (("solve", lambda f: f.solve(x, 9.0)), ("eigsh", lambda f: f.eigsh(1)[0])):
        with pytest.raises(NotImplementedError, match=f"^{name} has no forward-mode derivative$"):
            torch.func.jvp(lambda x: call(DiffusionFisher(x, cloud, alpha, sigma)), (x,), (x,))  # noqa: B023


# ---- eigenpairs


def check_pairs(fisher, values, vectors, dense, tol):
    scale = dense.abs().amax((1, 2))[:, None]
    flat = vectors.flatten(2)
    residual = torch.einsum("bij,bkj->bki", dense, flat) - values[..., None] * flat
    assert float((residual.norm(dim=-1) / scale).max()) < tol
    gram = flat @ flat.mT - torch.eye(flat.shape[1])
    assert float(gram.abs().max()) < tol
    pivot = flat.gather(-1, flat.abs().argmax(-1, keepdim=True))
    assert bool((pivot > 0).all())


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_eigsh_small_against_dense(k, largest):
    fisher = DiffusionFisher(*problem())
    values, vectors = fisher.eigsh(k, largest)
    expected = torch.linalg.eigvalsh(fisher.to_dense())
    expected = expected.flip(-1)[:, :k] if largest else expected[:, :k]
    assert vectors.shape == (4, k, 2, 3)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
    check_pairs(fisher, values, vectors, fisher.to_dense(), 1e-10)


def wide(dtype):
    """d = 600, 80 atoms in a cloud with a decaying spectrum: beyond the dense path."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(80, 20, 30, generator=draw, dtype=torch.float64) * torch.logspace(
        0.5, -2, 30, dtype=torch.float64
    )
    x = y[:2] + 4 * torch.randn(2, 20, 30, generator=draw, dtype=torch.float64)
    return DiffusionFisher(
        x.to(dtype), PointCloud(y.to(dtype)), 1.0, torch.tensor([4.0, 12.0], dtype=dtype)
    )


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-7), (torch.float32, 1e-4)])
def test_lanczos_against_dense(dtype, tol, largest):
    fisher = wide(dtype)
    values, vectors = fisher.eigsh(4, largest)
    dense = wide(torch.float64).to_dense()
    expected = torch.linalg.eigvalsh(dense)
    expected = expected.flip(-1)[:, :4] if largest else expected[:, :4]
    assert ("_dense", False) not in vars(fisher).get("_results", {})  # never formed
    torch.testing.assert_close(values.double(), expected, rtol=tol, atol=tol / 16)
    check_pairs(fisher, values.double(), vectors.double(), dense, 10 * tol)


def test_lanczos_repeats_its_bits_and_follows_its_generator():
    fisher = wide(torch.float64)
    first, again = fisher.eigsh(2, largest=False), fisher.eigsh(2, largest=False)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    other = fisher.eigsh(2, largest=False, generator=torch.Generator().manual_seed(9))
    assert not torch.equal(first[1], other[1])
    torch.testing.assert_close(first[1], other[1], rtol=0, atol=1e-3)  # tol over the relative gap


def test_lanczos_on_a_multiple_of_the_identity():
    """One atom: every direction is an eigenvector, residuals are zero from the start."""
    fisher = DiffusionFisher(torch.ones(1, 600), PointCloud(torch.zeros(1, 600)), 1.0, 2.0)
    values, vectors = fisher.eigsh(3)
    torch.testing.assert_close(values, torch.full((1, 3), 0.25), rtol=1e-5, atol=0)
    torch.testing.assert_close(vectors[0] @ vectors[0].T, torch.eye(3), rtol=0, atol=1e-5)


def test_lanczos_says_when_it_did_not_converge():
    with pytest.raises(
        RuntimeError,
        match=(
            r"^eigsh: \|F v - l v\| = \d\.\d\de-\d\d \|F\| after 1 passes, tol = 1\.00e-14; raise"
        ),
    ):
        wide(torch.float64).eigsh(2, tol=1e-14, max_iter=1)


def test_posterior_covariance_is_read_from_the_eigenpairs():
    """Two atoms at +-1 on an axis, sigma = 0.5: C = diag(1, 0); lambda_min = 4 - 16 and its vector
    is the axis.
    """
    values, vectors = two_atoms().eigsh(1, largest=False)
    assert values[0, 0] == pytest.approx(-12, rel=1e-12)
    assert 0.25 * (1 - 0.25 * values[0, 0]) == pytest.approx(1, rel=1e-12)
    assert vectors[0, 0].abs().tolist() == pytest.approx([1, 0], abs=1e-12)


# ---- errors


def one(**change):
    args = {
        "x": torch.zeros(2, 3),
        "cloud": PointCloud(torch.randn(5, 3, generator=torch.Generator().manual_seed(0))),
    }
    args |= {"alpha": 1.0, "sigma": 1.0} | change
    return DiffusionFisher(**args)


def test_lanczos_keeps_its_dtype_inside_autocast():
    values, vectors = wide(torch.float32).eigsh(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = wide(torch.float32).eigsh(2)
    assert torch.equal(again[0], values) and torch.equal(again[1], vectors)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: one(cloud=torch.zeros(5, 3)), TypeError,
         "cloud: expected a PointCloud, a ShardedCloud or a GaussianMixture, got Tensor; wrap it: "
         "PointCloud(y)"),
        (lambda: one(x=torch.zeros(2, 3).half()), TypeError,
         "x: expected float32 or float64, got float16: .float() converts it"),
        (lambda: one(x=[1.0]), TypeError, "x: expected a tensor, got list"),
        (lambda: one(x=torch.zeros(2, 4)), ValueError,
         "x: expected shape [B, 3] to match the cloud, got [2, 4]"),
        (lambda: one(alpha=torch.ones(3)), ValueError,
         "alpha: expected a number, shape [] or [2], got shape [3]"),
        (lambda: one(sigma=torch.ones(2, 1)), ValueError,
         "sigma: expected a number, shape [] or [2], got shape [2, 1]: .flatten() makes it "
         "[2]"),
        (lambda: one(sigma=torch.tensor([1.0, 0.0])).score, ValueError,
         "sigma: expected finite values > 0, got 0.0 at index [1]"),
        (lambda: one(sigma=-2), ValueError, "sigma: expected a finite value > 0, got -2.0"),
        (lambda: one(alpha="1"), TypeError, "alpha: expected a number or a tensor, got str"),
        (lambda: one() @ [1.0], TypeError, "v: expected a tensor, got list"),
        (lambda: one().solve([1.0]), TypeError, "b: expected a tensor, got list"),
        (lambda: one().solve(torch.full((2, 3), float("nan"))), ValueError,
         "b: expected finite values, got nan at index [0, 0]"),
        (lambda: one().solve(torch.zeros(2, 4)), ValueError,
         "b: expected shape [2, 3] or [2, K, 3], got [2, 4]"),
        (lambda: one().solve(torch.zeros(2, 3).double()), TypeError,
         "b: expected float32 like x, got float64: .to(torch.float32) converts it"),
        (lambda: one().solve(torch.zeros(2, 3), -1.0), ValueError,
         "damping: expected finite values >= 0, got -1"),
        (lambda: one().solve(torch.zeros(2, 3), torch.tensor([1.0, float("inf")])), ValueError,
         "damping: expected finite values >= 0, got inf"),
        (lambda: one().solve(torch.zeros(2, 3), tol=0.0), ValueError,
         "tol: expected a number in (0, 1), got 0.0"),
        (lambda: one().solve(torch.zeros(2, 3), max_iter=0), ValueError,
         "max_iter: expected an integer of at least 1, got 0"),
        (lambda: one().eigsh(4), ValueError, "k: expected an integer from 1 to 3, got 4"),
        (lambda: one().eigsh(0), ValueError, "k: expected an integer from 1 to 3, got 0"),
        (lambda: one().eigsh(1, tol=2.0), ValueError, "tol: expected a number in (0, 1), got 2.0"),
    ],
)  # fmt: skip
def test_errors(call, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()


def test_no_queries():
    fisher = DiffusionFisher(torch.zeros(0, 3), PointCloud(torch.ones(4, 3)), 1.0, 1.0)
    assert (
        fisher.log_prob.shape == (0,)
        and fisher.score.shape == (0, 3)
        and fisher.solve(torch.zeros(0, 3)).shape == (0, 3)
    )
    assert fisher.eigsh(2)[1].shape == (0, 2, 3)


# ---- FisherOperator: all of the above from the product alone


class Product(FisherOperator):
    """matrix + slope x x^T, by its product only."""

    def __init__(self, x, matrix, slope=0.0):
        super().__init__(x, 1.0, 0.5)
        self.matrix, self.slope = matrix, slope

    def parameters(self):
        return (self.x,)

    def rebuild(self, x):
        return Product(x, self.matrix, self.slope)

    def apply(self, v):
        x = self.x.reshape(len(self.x), 1, self.d)
        return v @ self.matrix.mT + self.slope * (v * x).sum(-1, keepdim=True) * x


def product(d=7, event=(7,), batch=3, seed=0, slope=0.0):
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(batch, d, d, generator=draw, dtype=torch.float64)
    x = torch.randn(batch, *event, generator=draw, dtype=torch.float64)
    return Product(x, root @ root.mT / d + 0.1 * torch.eye(d), slope)


@pytest.mark.parametrize("block", [1, 3 * 7 * 2, 1 << 22], ids=["one column", "two columns", "all"])
@pytest.mark.parametrize("event", [(7,), (1, 7, 1)], ids=str)
def test_trace_diagonal_and_dense_follow_from_the_product(event, block, monkeypatch):
    monkeypatch.setattr(operator, "_BLOCK", block)
    fisher = product(event=event)
    torch.testing.assert_close(fisher.to_dense(), fisher.matrix, rtol=1e-14, atol=1e-14)
    diagonal = fisher.matrix.diagonal(0, 1, 2).reshape(3, *event)
    torch.testing.assert_close(fisher.diagonal(), diagonal, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        fisher.trace(), fisher.matrix.diagonal(0, 1, 2).sum(1), rtol=1e-14, atol=0
    )
    assert fisher.shape == (3, 7, 7) and fisher.d == 7 and fisher.T is fisher
    assert repr(fisher) == "Product(shape=(3, 7, 7), torch.float64, cpu)"


def test_columns_keep_their_place_when_the_matrix_is_not_symmetric():
    fisher = product()
    fisher.matrix = torch.arange(3 * 49, dtype=torch.float64).reshape(3, 7, 7)
    assert torch.equal(fisher.to_dense(), fisher.matrix)


def test_solve_and_its_derivative_follow_from_the_product():
    fisher = product(slope=0.3)
    x = fisher.x.clone().requires_grad_()
    b = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = Product(x, fisher.matrix, 0.3).solve(b, 0.5, tol=1e-13)
    dense = fisher.matrix + 0.3 * x[:, :, None] * x[:, None] + 0.5 * torch.eye(7)
    expected = torch.linalg.solve(dense, b.mT).mT
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    weights = torch.randn(b.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = [torch.autograd.grad((s * weights).sum(), x)[0] for s in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


def test_solve_claims_no_sufficient_damping_for_an_unknown_operator():
    fisher = product()
    fisher.matrix = -torch.eye(7, dtype=torch.float64).expand(3, 7, 7)
    message = (
        "damping: F + damping I is not positive definite at query 0 (damping = 0); more than 1 is"
        " necessary"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fisher.solve(torch.ones(3, 7, dtype=torch.float64))


def test_lanczos_follows_from_the_product():
    fisher = product(d=560, event=(560,), batch=2)
    values, vectors = fisher.eigsh(2)
    torch.testing.assert_close(
        values, torch.linalg.eigvalsh(fisher.matrix).flip(-1)[:, :2], rtol=1e-8, atol=0
    )
    check_pairs(fisher, values, vectors, fisher.matrix, 1e-6)


def test_the_exact_fisher_is_an_operator(fisher):
    assert isinstance(fisher, FisherOperator)
    base = (
        FisherOperator.to_dense(fisher),
        FisherOperator.diagonal(fisher),
        FisherOperator.trace(fisher),
    )
    for got, expected in zip(
        base, (fisher.to_dense(), fisher.diagonal(), fisher.trace()), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


# ---- units


@pytest.mark.parametrize("power", [-40, -25, -10, 0, 10, 25, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve_is_the_same_in_all_units(power, dtype):
    """x, y and sigma times s, b times 1/s, damping times 1/s^2: float32 squares of the numbers
    under- and overflow."""
    s = 2.0**power
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(200, 20, generator=draw)
    x = y[:4] + 0.3 * torch.randn(4, 20, generator=draw)
    b = torch.randn(4, 2, 20, generator=draw) * torch.tensor([1.0, 1e-3])[:, None]

    def solution(s):
        fisher = DiffusionFisher((x * s).to(dtype), PointCloud((y * s).to(dtype)), 1.0, 2 * s)
        return fisher.solve_ex((b / s).to(dtype), 10 / s**2)

    at = solution(s)
    assert at.residual.max() <= torch.finfo(dtype).eps ** (2 / 3)
    dense = DiffusionFisher(x.double(), PointCloud(y), 1.0, 2.0).to_dense() + 10 * torch.eye(20)
    true = torch.linalg.solve(dense, b.double().mT).mT
    error = (at.x.double() / s - true).norm(dim=-1) / true.norm(dim=-1)
    assert float(error.max()) < 10 * torch.finfo(dtype).eps ** (2 / 3)  # tol times the condition


@pytest.mark.parametrize("power", [-40, 40])
@pytest.mark.parametrize("size", [40, 560], ids=["dense", "Lanczos"])
def test_eigsh_is_the_same_in_all_units(power, size):
    s = 2.0**power
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(60, size, generator=draw) * torch.logspace(1, -2, size)
    x = y[:2] + 4 * torch.randn(2, size, generator=draw)

    def pairs(s):
        return DiffusionFisher(x * s, PointCloud(y * s), 1.0, 4 * s).eigsh(2, largest=False)

    (values, vectors), (one, same) = pairs(s), pairs(1.0)
    torch.testing.assert_close(values * s * s, one, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vectors, same, rtol=0, atol=1e-3)


@pytest.mark.parametrize("power", [-40, 40])
def test_the_damping_that_suffices_is_named_in_the_callers_units(power):
    s = 2.0**power
    y = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]) * s
    fisher = DiffusionFisher(torch.zeros(1, 2), PointCloud(y), 1.0, 0.5 * s)  # diag(-12, 4)/s^2
    with pytest.raises(ValueError) as error:
        fisher.solve(torch.tensor([[1.0, 0.0]]), 3 / s**2)
    enough = f"{12 / s**2:.4g}"
    assert str(error.value).endswith(
        f"(damping = {3 / s**2:g}); more than {enough} is necessary, "
        f"more than (d - 1)/sigma^2 - tr F = {enough} is always enough"
    )


def test_a_backward_pass_of_solve_is_the_same_in_all_units():
    draw = torch.Generator().manual_seed(0)
    y, weights = torch.randn(50, 6, generator=draw), torch.randn(3, 6, generator=draw)
    grads = []
    for s in (2.0**-30, 1.0, 2.0**30):
        x = (y[:3] * s).requires_grad_()
        solution = DiffusionFisher(x, PointCloud(y * s), 1.0, 2 * s).solve(weights / s, 10 / s**2)
        grads.append(torch.autograd.grad((solution / s * weights).sum(), x)[0] * s)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(grads[2], grads[1], rtol=1e-5, atol=1e-8)
