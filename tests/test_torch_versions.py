"""A torch whose private names have moved: one error that says what to do, and no other way to find
out."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from dfkernels._torch import private

ROOT = Path(__file__).resolve().parent.parent


def load():
    return runpy.run_path(private.__file__)


@pytest.mark.parametrize(
    "owner, name",
    [
        (torch._C, "_after_autograd_keyset"),
        (torch._C, "_AutoDispatchBelowAutograd"),
        (torch._C._functorch, "get_unwrapped"),
        (torch._functorch.utils, "enable_single_level_autograd_function"),
        (torch.autograd.function, "_SingleLevelFunction"),
        (torch.autograd.forward_ad, "_current_level"),
        (torch, "_add_batch_dim"),
        (torch._guards, "detect_fake_mode"),
    ],
)
def test_a_missing_private_name(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with pytest.raises(ImportError) as raised:
        load()
    message = str(raised.value)
    assert (
        "torch 2.10 to 2.14" in message
        and "2.99.0" in message
        and name in message
        and "Install" in message
    )


def test_this_torch_is_known():
    load()
    first, last = (tuple(map(int, version.split("."))) for version in private.KNOWN)
    assert first <= tuple(map(int, re.match(r"(\d+)\.(\d+)", torch.__version__).groups())) <= last


def test_the_first_version_is_the_one_that_is_required():
    assert f'"torch>={private.KNOWN[0]}' in (ROOT / "pyproject.toml").read_text()
