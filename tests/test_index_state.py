"""An index has the same bits and finds the same atoms whatever torch is set to where it is built or
used."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from test_certified import gaussian, queries
from torch_state import default_dtype, deterministic

from dfkernels._io import tensor_files
from dfkernels._torch import native
from dfkernels.certified import index_file, select_atoms
from dfkernels.certified.build import build_index
from dfkernels.certified.pytorch import search_in_pytorch

N, D = 300, 160
PATHS = {"PyTorch": search_in_pytorch} | ({"compiled": select_atoms.op} if native.available else {})


STATES = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    **{f"default {dtype}": lambda dtype=dtype: default_dtype(dtype)
       for dtype in (torch.float64, torch.float16, torch.bfloat16)},
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "deterministic": deterministic,
}  # fmt: skip


def same(a, b):
    return all(s.dtype == t.dtype and torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.fixture(scope="module", params=[torch.float32, torch.uint8], ids=str)
def y(request):
    return (30 * gaussian(N, D) + 128).clamp(0, 255).to(request.param)


@pytest.mark.parametrize("state", STATES)
def test_built_and_used_under_another_state(state, y):
    mask = torch.arange(N) % 5 == 0
    right = build_index(y, 0.5, 0.25, 0, mask)
    with STATES[state]():
        built = build_index(y, 0.5, 0.25, 0, mask)
    assert same(right, built)
    assert not any(t.is_inference() or t.requires_grad for t in built)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("state", STATES)
def test_queries_under_another_state(state, path):
    y = gaussian(N, D)
    x, alpha, sigma = queries(y, 0.1, "noisy", B=3), torch.ones(3), torch.full((3,), 0.1)
    args = (x, y, alpha, sigma, None, 1.0, 0.0, *build_index(y, 1.0, 0.0), math.log(N / 1e-6), 1)
    right = PATHS[path](*args)
    assert bool((right[1] > 0).all())
    with STATES[state]():
        again = PATHS[path](*args)
    assert same(right, again)


@pytest.mark.parametrize(
    "state", ["inference mode", "default torch.float64", "default device", "autocast to bfloat16"]
)
def test_saved_and_loaded_under_another_state(state, tmp_path):
    y = gaussian(N, D)
    right, of = build_index(y, 1.0, 0.0), index_file.fingerprint(y, 1.0, 0.0)
    index_file.save_index(tmp_path / "a.safetensors", right, of)
    with STATES[state]():
        index_file.save_index(tmp_path / "b.safetensors", right, of)
        loaded = index_file.load_index(tmp_path / "a.safetensors", of)
    first, second = (tensor_files.read(tmp_path / f"{n}.safetensors") for n in "ab")
    assert first[1] == second[1] and first[0].keys() == second[0].keys()
    assert same(first[0].values(), second[0].values())
    assert same(right, loaded) and not any(t.is_inference() for t in loaded)


def test_built_in_inference_mode_and_used_outside():
    """Copied, pickled, and part of something that is differentiated."""
    with torch.inference_mode():
        y = gaussian(N, D) + 0
        built = build_index(y, 1.0, 0.0)
    assert same(built, copy.deepcopy(built)) and same(built, pickle.loads(pickle.dumps(built)))
    w = torch.ones(D, requires_grad=True)
    ((built.centre * w).sum() ** 2).backward()
    assert torch.isfinite(w.grad).all()


def test_atoms_that_require_grad():
    y = gaussian(N, D).requires_grad_()
    assert same(build_index(y, 1.0, 0.0), build_index(y.detach(), 1.0, 0.0))
