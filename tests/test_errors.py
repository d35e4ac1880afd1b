"""Bad arguments: exact messages, in one style; and never a NaN without a word."""

from __future__ import annotations

import re

import pytest
import torch
from torch.func import vmap

from dfkernels import ops
from tools.op_table import DATA_OPS, TABLE

x, y, v = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 3)
nan, inf = float("nan"), float("inf")


def _with(t, index, value):
    t = t.clone()
    t[index] = value
    return t


BAD_POINTS = {
    "x list": (dict(x=[1.0]), TypeError, "x: expected a tensor, got list"),
    "x half": (
        dict(x=x.half()),
        TypeError,
        "x: expected float32 or float64, got float16: .float() converts it",
    ),
    "x integer": (
        dict(x=x.long()),
        TypeError,
        "x: expected float32 or float64, got int64: .float() converts it",
    ),
    "x scalar": (dict(x=torch.tensor(1.0)), ValueError, "x: expected shape [B, ...], got []"),
    "x empty event": (
        dict(x=x[:, :0], y=y[:, :0]),
        ValueError,
        "x: expected at least one number per query, got shape [2, 0]",
    ),
    "y list": (dict(y=[[1.0]]), TypeError, "y: expected a tensor, got list"),
    "y double": (
        dict(y=y.double()),
        TypeError,
        "y: expected float32 or narrower to go with float32 x, got float64: convert x or y",
    ),
    "y integer": (
        dict(y=y.long()),
        TypeError,
        "y: expected float64, float32, float16, bfloat16 or uint8, got int64: .float() converts it",
    ),
    "y shape": (
        dict(y=y[:, :2]),
        ValueError,
        "y: expected shape [N, 3] to go with x of shape [2, 3], got [5, 2]",
    ),
    "y empty": (dict(y=y[:0]), ValueError, "y: expected at least one atom, got shape [0, 3]"),
    "y device": (dict(y=y.to("meta")), ValueError, "y: expected device cpu like x, got meta"),
    "alpha string": (dict(alpha="1"), TypeError, "alpha: expected a number or a tensor, got str"),
    "alpha bool": (dict(alpha=True), TypeError, "alpha: expected a number or a tensor, got bool"),
    "alpha nan": (dict(alpha=nan), ValueError, "alpha: expected a finite value, got nan"),
    "alpha shape": (
        dict(alpha=torch.ones(3)),
        ValueError,
        "alpha: expected a number, shape [] or [2], got shape [3]",
    ),
    "alpha complex": (
        dict(alpha=torch.ones(2) * 1j),
        TypeError,
        "alpha: expected a real number or tensor, got complex64",
    ),
    "alpha tensor inf": (
        dict(alpha=torch.tensor([1.0, inf])),
        ValueError,
        "alpha: expected finite values, got inf at index [1]",
    ),
    "sigma zero": (dict(sigma=0.0), ValueError, "sigma: expected a finite value > 0, got 0.0"),
    "sigma negative": (dict(sigma=-1), ValueError, "sigma: expected a finite value > 0, got -1.0"),
    "sigma inf": (dict(sigma=inf), ValueError, "sigma: expected a finite value > 0, got inf"),
    "sigma tensor zero": (
        dict(sigma=torch.tensor([1.0, 0.0])),
        ValueError,
        "sigma: expected finite values > 0, got 0.0 at index [1]",
    ),
    "sigma tensor negative": (
        dict(sigma=torch.tensor([-0.5, 1.0])),
        ValueError,
        "sigma: expected finite values > 0, got -0.5 at index [0]",
    ),
    "sigma tensor nan": (
        dict(sigma=torch.tensor([nan, 1.0])),
        ValueError,
        "sigma: expected finite values > 0, got nan at index [0]",
    ),
    "log_prior shape": (
        dict(log_prior=torch.zeros(4)),
        ValueError,
        "log_prior: expected shape [5], one entry per atom, got [4]",
    ),
    "log_prior dtype": (
        dict(log_prior=torch.zeros(5, dtype=torch.long)),
        TypeError,
        "log_prior: expected a floating dtype, got int64",
    ),
    "log_prior list": (
        dict(log_prior=[0.0] * 5),
        TypeError,
        "log_prior: expected a tensor, got list",
    ),
    "log_prior masked": (
        dict(log_prior=torch.full((5,), -inf)),
        ValueError,
        "log_prior: expected at least one finite value, got all -inf",
    ),
    "log_prior nan": (
        dict(log_prior=_with(torch.zeros(5), 3, nan)),
        ValueError,
        "log_prior: expected values < inf and not nan, got nan at index [3]",
    ),
    "log_prior inf": (
        dict(log_prior=_with(torch.zeros(5), 3, inf)),
        ValueError,
        "log_prior: expected values < inf and not nan, got inf at index [3]",
    ),
    "scale string": (dict(scale="2"), TypeError, "scale: expected a number, got str"),
    "offset nan": (dict(offset=nan), ValueError, "offset: expected a finite value, got nan"),
    "x nan": (
        dict(x=_with(x, (1, 2), nan)),
        ValueError,
        "x: expected finite values, got nan at index [1, 2]",
    ),
    "x inf": (
        dict(x=_with(x, (0, 1), inf)),
        ValueError,
        "x: expected finite values, got inf at index [0, 1]",
    ),
    "y nan": (
        dict(y=_with(y, (3, 0), nan)),
        ValueError,
        "y: expected finite values, got nan at index [3, 0]",
    ),
    "y -inf": (
        dict(y=_with(y, (4, 2), -inf)),
        ValueError,
        "y: expected finite values, got -inf at index [4, 2]",
    ),
    "y half nan": (
        dict(y=_with(y.half(), (3, 0), nan)),
        ValueError,
        "y: expected finite values, got nan at index [3, 0]",
    ),
}


def _data_op(op, change):
    args = dict(x=x, y=y, alpha=0.9, sigma=0.5) | change
    positional = [args.pop("x"), args.pop("y")]
    if "v" in TABLE[op].arguments:
        positional.append(v[:, :0] if getattr(positional[0], "shape", None) == (2, 0) else v)
    return getattr(ops, op)(*positional, args.pop("alpha"), args.pop("sigma"), **args)


@pytest.mark.parametrize("op", DATA_OPS)
@pytest.mark.parametrize("name", BAD_POINTS)
def test_data_ops(op, name):
    change, kind, message = BAD_POINTS[name]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        _data_op(op, change)


@pytest.mark.parametrize("name", ["x nan", "y nan", "sigma tensor zero", "log_prior masked"])
def test_values_are_looked_at_when_autograd_is_on(name):
    change, kind, message = BAD_POINTS[name]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        _data_op(
            "posterior",
            {"x": x.clone().requires_grad_(), "y": y.clone().requires_grad_()}
            | {k: t.requires_grad_() for k, t in change.items()},
        )


def test_index_is_that_of_the_callers_shape():
    images = torch.zeros(5, 2, 2, 3)
    images[4, 1, 0, 2] = nan
    with pytest.raises(
        ValueError, match=r"^y: expected finite values, got nan at index \[4, 1, 0, 2\]$"
    ):
        ops.posterior(torch.zeros(1, 2, 2, 3), images, 1.0, 1.0)


def test_a_masked_atom_may_hold_anything():
    """It is not looked at, neither for a result nor for an error's cause."""
    far = _with(y, (4, 1), nan)
    prior = _with(torch.zeros(5), 4, -inf)
    assert bool(torch.isfinite(ops.posterior(x, far, 1.0, 1.0, prior).log_prob).all())
    with pytest.raises(ValueError, match=r"^y: expected finite values, got nan at index \[2, 0\]$"):
        ops.posterior(x, _with(far, (2, 0), nan), 1.0, 1.0, prior)
    with pytest.raises(
        ValueError, match=r"^sigma: expected finite values > 0, got 0.0 at index \[1\]$"
    ):
        ops.posterior(x, far, 1.0, torch.tensor([1.0, 0.0]), prior)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (torch.zeros(2, 4), ValueError, "v: expected shape [2, 3] or [2, K, 3], got [2, 4]"),
        (torch.zeros(3, 1, 3), ValueError, "v: expected shape [2, 3] or [2, K, 3], got [3, 1, 3]"),
        (
            torch.zeros(2, 3).double(),
            TypeError,
            "v: expected float32 like x, got float64: .to(torch.float32) converts it",
        ),
        (None, TypeError, "v: expected a tensor, got NoneType"),
        (
            _with(torch.zeros(2, 3), (1, 0), nan),
            ValueError,
            "v: expected finite values, got nan at index [1, 0]",
        ),
        (
            _with(torch.zeros(2, 4, 3), (1, 3, 0), inf),
            ValueError,
            "v: expected finite values, got inf at index [1, 3, 0]",
        ),
    ],
)
def test_fisher_matvec(change, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        ops.fisher_matvec(x, y, change, 0.9, 0.5)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (dict(x0=[1.0]), TypeError, "x0: expected a tensor, got list"),
        (
            dict(x0=x.half()),
            TypeError,
            "x0: expected float32 or float64, got float16: .float() converts it",
        ),
        (dict(mean=x[:1]), ValueError, "mean: expected shape [2, 3] like x0, got [1, 3]"),
        (
            dict(mean=x.double()),
            TypeError,
            "mean: expected float32 like x0, got float64: .to(torch.float32) converts it",
        ),
        (dict(v=x.to("meta")), ValueError, "v: expected device cpu like x0, got meta"),
        (dict(v=x[:, :2]), ValueError, "v: expected shape [2, 3] or [2, K, 3], got [2, 2]"),
        (dict(form="exact"), ValueError, "form: expected 'paper' or 'centred', got 'exact'"),
        (dict(sigma=0), ValueError, "sigma: expected a finite value > 0, got 0.0"),
        (
            dict(sigma=torch.tensor([1.0, -1.0])),
            ValueError,
            "sigma: expected finite values > 0, got -1.0 at index [1]",
        ),
        (
            dict(mean=_with(x, (0, 2), nan)),
            ValueError,
            "mean: expected finite values, got nan at index [0, 2]",
        ),
        (
            dict(v=_with(x, (0, 2), inf)),
            ValueError,
            "v: expected finite values, got inf at index [0, 2]",
        ),
        (
            dict(x0=_with(x, (1, 0), -inf)),
            ValueError,
            "x0: expected finite values, got -inf at index [1, 0]",
        ),
        (
            dict(alpha=torch.tensor([nan, 1.0])),
            ValueError,
            "alpha: expected finite values, got nan at index [0]",
        ),
        (
            dict(x0=x.to_sparse()),
            TypeError,
            "x0: expected a dense tensor, got torch.sparse_coo: to_dense() makes one of it",
        ),
    ],
)
@pytest.mark.parametrize("form", ["paper", "centred"])
def test_endpoint_matvec(form, change, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        ops.endpoint_matvec(**dict(v=v, x0=x, mean=x, alpha=0.9, sigma=0.5, form=form) | change)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (
            dict(m=torch.zeros(3)),
            ValueError,
            "m: expected shape [2], one entry per sample, got [3]",
        ),
        (
            dict(m=torch.zeros(2).double()),
            TypeError,
            "m: expected float32 like eps, got float64: .to(torch.float32) converts it",
        ),
        (
            dict(eps=x.long()),
            TypeError,
            "eps: expected float32 or float64, got int64: .float() converts it",
        ),
        (dict(form="centred"), ValueError, "form: expected 'residual' or 'paper', got 'centred'"),
        (dict(form="paper"), ValueError, "x: expected a tensor with form='paper', got None"),
        (dict(x=x), ValueError, "x: expected None with form='residual', got a tensor"),
        (
            dict(x=x[:, :2], form="paper"),
            ValueError,
            "x: expected shape [2, 3] like eps, got [2, 2]",
        ),
        (
            dict(sigma=torch.zeros(2)),
            ValueError,
            "sigma: expected finite values > 0, got 0.0 at index [0]",
        ),
        (
            dict(m=torch.tensor([0.0, nan])),
            ValueError,
            "m: expected finite values, got nan at index [1]",
        ),
        (
            dict(x=_with(x, (1, 1), nan), form="paper"),
            ValueError,
            "x: expected finite values, got nan at index [1, 1]",
        ),
        (
            dict(eps=_with(x, (1, 1), nan), x=x, form="paper"),
            ValueError,
            "eps: expected finite values, got nan at index [1, 1]",
        ),
        (
            dict(alpha=torch.tensor([nan, 1.0])),
            ValueError,
            "alpha: expected finite values, got nan at index [0]",
        ),
        (
            dict(sigma=torch.tensor([1.0, inf])),
            ValueError,
            "sigma: expected finite values > 0, got inf at index [1]",
        ),
    ],
)
def test_matched_trace(change, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        ops.matched_trace(**dict(m=torch.zeros(2), eps=x, alpha=0.9, sigma=0.5) | change)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.posterior(x + 1e30, y, 0.9, 0.5),
        lambda: ops.posterior(x, y, 1e30, 0.5, scale=1e10, offset=1.0),
        lambda: ops.fisher_matvec(x + 1e30, y, v, 0.9, 0.5),
        lambda: ops.fisher_diagonal(x + 1e30, y, 0.9, 0.5),
        lambda: ops.fisher_dense(x + 1e30, y, 0.9, 0.5),
        lambda: ops.endpoint_matvec(v + 1e30, x + 1e30, x, 0.9, 0.5),
        lambda: ops.endpoint_matvec(v + 1e30, x + 1e30, x, 0.9, 0.5, form="centred"),
        lambda: ops.matched_trace(x[:, 0], x + 1e38, 0.9, 10.0, x=x, form="paper"),
        lambda: ops.matched_trace(x[:, 0] + 1e38, x, 0.9, 1e-3),
        lambda: ops.endpoint_matvec(v + 1e18, x + 1e18, x + 9e17, 0.9, 1e-3),
    ],
)
def test_finite_arguments_that_overflow(call):
    """No argument is at fault alone: the kernel's words, without its file and line."""
    with pytest.raises(ValueError, match=r"^[a-z0-9_, ]+: expected [^/]*, got [^/]*(inf|overflow)"):
        call()


def test_a_query_whose_square_overflows_float64():
    """No tile has a largest logit: a sweep that looked for its atoms read where there are none."""
    wide = torch.randn(40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for op in (ops.posterior, ops.fisher_diagonal, ops.fisher_dense):
        for far in (1e155, 1e200):
            with pytest.raises(ValueError, match="^[a-z, ]+: expected .*overflow"):
                op(wide[:2] + far, wide, 1.0, 1.0)


def test_a_number_beyond_the_dtype():
    with pytest.raises(
        ValueError, match=r"^alpha: expected a finite value in float32, got 1e\+50$"
    ):
        ops.posterior(x, y, 1e50, 0.5)


def test_vmap_checks_shapes_and_values():
    with pytest.raises(
        ValueError,
        match=r"^y: expected shape \[N, 3\] to go with x of shape \[2, 3\], got \[5, 2\]$",
    ):
        vmap(lambda a: ops.posterior(a, y[:, :2], 1.0, 1.0))(x.expand(4, 2, 3))
    with pytest.raises(
        ValueError, match=r"^x: expected finite values, got nan at index \[0, 0, 0\]$"
    ):
        vmap(lambda a: ops.posterior(a, y, 1.0, 1.0))(torch.full((4, 2, 3), nan))
