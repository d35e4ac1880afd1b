"""Linear operators, conjugate gradients and Lanczos, on their own, against NumPy and SciPy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from tensors import normal

import dfkernels as df
from dfkernels.linalg.cg import NotPositiveDefinite, conjugate_gradients, power_of_two
from dfkernels.linalg.function import function_product
from dfkernels.linalg.lanczos import lanczos, orthonormal


def symmetric(spectrum, seed=0):
    """[B, d, d] with these eigenvalues [B, d] and random axes."""
    axes = torch.linalg.qr(normal(*spectrum.shape, spectrum.shape[-1], seed=seed)).Q
    return axes * spectrum[:, None] @ axes.mT


class Matrix(df.LinearOperator):
    """Only what the base class asks for."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device

    def apply(self, v):
        return v @ self.matrix.mT


class Scaled(Matrix):
    """s M, differentiable in s [B]."""

    def __init__(self, matrix, s):
        super().__init__(matrix)
        self.s = s

    def apply(self, v):
        return self.s[:, None, None] * super().apply(v)

    def parameters(self):
        return (self.s,)

    def rebuild(self, s):
        return Scaled(self.matrix, s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 7, 40])
def test_a_subclass_that_defines_its_products_gets_the_rest(dtype, d):
    matrix = symmetric(torch.linspace(0.5, 3, d).expand(2, d).double()).to(dtype)
    operator, exact = Matrix(matrix), matrix.double().numpy()
    tol = {"rtol": 1e3 * torch.finfo(dtype).eps, "atol": 1e3 * torch.finfo(dtype).eps}
    v = normal(2, 3, d, dtype=dtype)
    assert torch.equal(operator @ v, v @ matrix.mT)
    assert torch.equal(operator @ v[:, 0], (v[:, :1] @ matrix.mT)[:, 0])
    torch.testing.assert_close(operator.to_dense(), matrix, **tol)
    torch.testing.assert_close(operator.diagonal(), matrix.diagonal(0, 1, 2), **tol)
    torch.testing.assert_close(operator.trace(), matrix.diagonal(0, 1, 2).sum(1), **tol)
    for b in (v, v[:, 0]):
        solution = operator.solve(b, 0.25, tol=1e-6).double().numpy()
        rows = b.reshape(2, -1, d).double().numpy()
        expected = np.linalg.solve(exact + 0.25 * np.eye(d), rows.swapaxes(1, 2)).swapaxes(1, 2)
        np.testing.assert_allclose(solution.reshape(expected.shape), expected, 1e-4, 1e-5)
    values, vectors = operator.eigsh(1)
    np.testing.assert_allclose(values[:, 0].double(), np.linalg.eigvalsh(exact)[:, -1], 1e-5)
    assert vectors.shape == (2, 1, d) and operator.T is operator and operator.d == d
    assert repr(operator) == f"Matrix(shape=(2, {d}, {d}), {dtype}, cpu)"


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_eigenpairs_of_a_wide_operator_are_scipy_s(largest, scale):
    d = 600
    spectrum = torch.cat([torch.linspace(0, 1, d - 4), torch.tensor([-3.0, -2.0, 4.0, 6.0])])
    matrix = symmetric(spectrum.double()[None] * scale)
    values, vectors = Matrix(matrix).eigsh(2, largest)
    which = "LA" if largest else "SA"
    expected = np.sort(eigsh(matrix[0].numpy() / scale, 2, which=which)[0])
    expected = (expected[::-1] if largest else expected) * scale
    np.testing.assert_allclose(values[0], expected, 1e-7)
    residual = vectors @ matrix - values[..., None] * vectors
    assert (residual.norm(dim=-1) <= 1e-7 * values.abs()).all()
    torch.testing.assert_close(vectors[0] @ vectors[0].T, torch.eye(2).double())


def test_solve_is_differentiable_in_what_a_subclass_names():
    matrix, b = symmetric(torch.linspace(1, 2, 5).expand(3, 5).double()), normal(3, 5)
    s = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    damping = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    solve = lambda b, damping, s: Scaled(matrix, s).solve(b, damping, tol=1e-14)
    assert torch.autograd.gradcheck(solve, (b.requires_grad_(), damping, s))
    unnamed = Matrix(matrix.requires_grad_()).solve(b, 0.1)
    assert torch.autograd.grad(unnamed.sum(), matrix, allow_unused=True) == (None,)
    assert torch.autograd.grad(Matrix(matrix).solve(b, 0.1).sum(), b)[0].shape == b.shape


def test_what_a_subclass_lacks_is_named():
    with pytest.raises(TypeError, match="abstract method '?apply"):
        df.LinearOperator()

    class Half(Matrix):
        def parameters(self):
            return (self.matrix,)

    matrix = torch.eye(2).double()[None].requires_grad_()
    solution = Half(matrix).solve(torch.ones(1, 2).double())
    with pytest.raises(NotImplementedError, match=r"^Half has parameters\(\) but no rebuild\(\)$"):
        solution.sum().backward()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda m: m @ torch.ones(2, 4),
            TypeError,
            "v: expected float64 like the operator, got float32: .to(torch.float64) converts it",
        ),
        (
            lambda m: m.solve(torch.ones(2, 3, dtype=torch.float64)),
            ValueError,
            "b: expected shape [2, 4] or [2, K, 4], got [2, 3]",
        ),
        (lambda m: m.eigsh(5), ValueError, "k: expected an integer from 1 to 4, got 5"),
        (
            lambda m: m.solve(torch.ones(2, 4, dtype=torch.float64), -1.0),
            ValueError,
            "damping: expected finite values >= 0, got -1",
        ),
        (
            lambda m: m.solve(torch.tensor([[1.0] * 4, [0, 1, 0, 0]], dtype=torch.float64), 0.5),
            ValueError,
            "damping: A + damping I is not positive definite at element 1 (damping = 0.5); "
            "more than 3 is necessary",
        ),
    ],
)
def test_errors(call, kind, message):
    diagonal = torch.tensor([[1.0, 2, 3, 4], [1, -3, 1, 1]], dtype=torch.float64)
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call(Matrix(torch.diag_embed(diagonal)))


# ---- the free functions


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_cg_solves_systems_of_any_size(size):
    """The squares of b under- and overflow."""
    matrix = symmetric(torch.rand(4, 30, generator=torch.Generator().manual_seed(1)).double() + 0.1)
    b, shift = normal(4, 2, 30) * size, torch.tensor([0.0, 0.1, 1.0, 10.0]).double()
    found = conjugate_gradients(lambda v: v @ matrix, b, shift, tol=1e-12, max_iter=100)
    shifted = matrix + shift[:, None, None] * torch.eye(30)
    expected = np.linalg.solve(shifted.numpy(), (b / size).mT.numpy()).swapaxes(1, 2)
    np.testing.assert_allclose(found.x.numpy() / size, expected, 1e-9)
    left = (b / size - found.x / size @ shifted).norm(dim=-1) / (b / size).norm(dim=-1)
    torch.testing.assert_close(found.residual, left, rtol=1e-2, atol=1e-15)
    assert (found.residual <= 1e-12).all() and (found.iterations > 1).all()


def test_cg_takes_as_many_steps_as_there_are_eigenvalues():
    spectrum = torch.tensor([[1.0, 2, 5] * 10, [3.0] * 30], dtype=torch.float64)
    matrix, b = symmetric(spectrum), normal(2, 1, 30)
    found = conjugate_gradients(lambda v: v @ matrix, b, torch.zeros(2), tol=1e-10, max_iter=50)
    assert found.iterations.tolist() == [[3], [1]]
    stopped = conjugate_gradients(lambda v: v @ matrix, b, torch.zeros(2), tol=1e-10, max_iter=2)
    assert stopped.residual[0, 0] > 1e-3 and stopped.iterations.tolist() == [[2], [1]]


def test_cg_says_where_a_matrix_is_not_positive_definite():
    spectrum = torch.tensor([[1.0, 2.0], [-1.0, -1.0]], dtype=torch.float64)
    matrix = symmetric(spectrum)
    with pytest.raises(NotPositiveDefinite) as caught:
        conjugate_gradients(
            lambda v: v @ matrix, normal(2, 3, 2), torch.zeros(2), tol=1e-6, max_iter=9
        )
    assert (caught.value.batch, caught.value.column) == (1, 0)
    assert caught.value.curvature == pytest.approx(-1)


@pytest.mark.parametrize("largest", [True, False])
def test_lanczos_restarts_and_converges_to_scipy_s(largest):
    spectrum = torch.linspace(-1, 1, 200).double() ** 3
    matrix = symmetric(spectrum[None].expand(2, -1))
    values, vectors = lanczos(
        lambda v: v @ matrix, normal(2, 5, 200), 3, largest=largest, tol=1e-9, max_iter=200, rows=20
    )
    expected = spectrum.sort(descending=largest).values[:3]
    torch.testing.assert_close(values, expected.expand(2, -1), rtol=1e-8, atol=0)
    residual = (vectors @ matrix - values[..., None] * vectors).norm(dim=-1)
    assert (residual <= 1e-8).all()
    with pytest.raises(RuntimeError, match=r"^eigsh: .* after 2 passes, tol = 1\.00e-09"):
        lanczos(
            lambda v: v @ matrix,
            normal(2, 5, 200),
            3,
            largest=largest,
            tol=1e-9,
            max_iter=2,
            rows=20,
        )


def test_orthonormal_rows_where_the_rank_is_short():
    basis = orthonormal(normal(2, 3, 8))
    v = torch.cat([basis[:, :1], normal(2, 2, 8, seed=1)], 1)  # one row inside the basis' span
    both = torch.cat([basis, orthonormal(v, basis)], 1)
    torch.testing.assert_close(both @ both.mT, torch.eye(6).double().expand(2, -1, -1))


def test_powers_of_two():
    t = torch.tensor([0.0, 1.0, 1.5, 2.0, 0.3, 1e-300, 1e300], dtype=torch.float64)
    p = power_of_two(t)
    assert p[:5].tolist() == [1, 1, 1, 2, 0.25]
    assert bool((torch.frexp(p).mantissa == 0.5).all()) and bool((p[1:] <= t[1:]).all())


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("d", [1, 2, 12])
def test_functions_of_a_matrix(dtype, tol, d):
    """Against the spectrum; spaces that are exhausted early (few eigenvalues, an eigenvector, a
    vector 0), huge and tiny vectors, and a function that differs from vector to vector."""
    spectrum = normal(4, d, seed=1).exp()
    spectrum[1], spectrum[2, : d // 2], spectrum[2, d // 2 :] = 0.5, 1.0, 3.0
    matrix = symmetric(spectrum, seed=2)
    v = normal(4, 3, d, seed=3)
    v[0, 0], v[0, 1], v[3, 0], v[3, 1] = 0, matrix[0] @ v[0, 2], 1e30 * v[3, 0], 1e-30 * v[3, 1]
    v[0, 2] = torch.linalg.eigh(matrix[0]).eigenvectors[:, -1]
    values, axes = torch.linalg.eigh(matrix)

    def f(a):
        return torch.stack([a[:, 0].sqrt(), 1 / a[:, 1], a[:, 2].cos()], 1)

    weights = f(values[:, None].expand(4, 3, d))
    want = torch.einsum("bij,bkj,blj,bkl->bki", axes, weights, axes, v)
    rows = matrix.to(dtype)
    found = function_product(lambda u: u @ rows, v.to(dtype), f, d + 2)
    assert found.dtype == dtype
    size = (v.abs().amax(-1, keepdim=True) * weights.abs().amax(-1, keepdim=True)).clamp_min(1e-300)
    assert ((found - want) / size).abs().max() < tol


def test_few_steps_are_exact_for_polynomials_and_converge_for_roots():
    matrix = symmetric(torch.linspace(1, 9, 60, dtype=torch.float64)[None])
    v = normal(1, 1, 60, seed=1)
    calls = []

    def apply(u):
        calls.append(u.shape)
        return u @ matrix

    cube = function_product(apply, v, lambda a: a**3 - a, 4)
    torch.testing.assert_close(cube, v @ (matrix @ matrix @ matrix - matrix), rtol=1e-10, atol=1e-9)
    assert calls == [(1, 1, 60)] * 4
    values, axes = torch.linalg.eigh(matrix)
    root = v @ (axes * values.sqrt()[:, None]) @ axes.mT
    error = [(function_product(apply, v, torch.sqrt, k) - root).norm().item() for k in (2, 6, 12)]
    assert error[1] < error[0] / 50 and error[2] < error[1] / 50
    draw = function_product(apply, torch.zeros(0, 2, 60, dtype=torch.float64), torch.sqrt, 3)
    assert draw.shape == (0, 2, 60)
