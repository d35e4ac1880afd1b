"""First and second derivatives of every op in every floating argument, reverse and forward, against
finite differences.
"""

from __future__ import annotations

import pytest
from cases import ALL, floats
from torch.autograd import gradcheck, gradgradcheck


def _function(case, without=()):
    names = [k for k in floats(case) if k not in without]

    def f(*tensors):
        return case.run(dict(zip(names, tensors, strict=True)))

    return f, tuple(case.tensors[k].detach().clone().requires_grad_() for k in names)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_first_derivatives(case):
    f, inputs = _function(case)
    assert gradcheck(
        f, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_second_derivatives(case):
    f, inputs = _function(case, without=case.unused)
    assert gradgradcheck(
        f, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True
    )
