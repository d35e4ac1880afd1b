"""21cmPSDenoiser: a trained network with its weights, adapted as score_sde's, beside its own
sampler."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from documents import GUIDES, blocks, promised, run

from experiments import __main__ as program

pytest.importorskip("psdenoiser")

from experiments import public

PAGE = next(page for page in GUIDES if page.name == "public-network.md")


def test_the_guide_runs_and_prints_what_it_says():
    given: dict = {}
    found = blocks(PAGE.read_text(), "py")
    assert len(found) >= 3
    for code in found:
        assert run(code, PAGE.name, given) == promised(code)


def test_samples_are_those_of_the_package_s_own_sampler():
    """From the same noise; Heun's error is that of its steps, theirs some 1e-4 (rtol 1e-5)."""
    found = public.network()
    gaps, evaluations = public.compared(found, (5, 20), torch.Generator().manual_seed(0))
    assert evaluations > 100 and gaps[20] < 1e-3 and gaps[20] < gaps[5] / 3


def test_the_adapted_network_is_called_as_the_package_calls_it():
    """score = -out/std at 999 t, by its own get_score_fn."""
    found = public.network()
    sde = public.vp(found.library)
    score = found.library.get_score_fn(sde, found.package.model, continuous=True)
    x = torch.randn(2, *public.SHAPE, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.05, 0.6])
    with torch.no_grad():
        theirs = score(x, t, x_cdn=found.condition.expand_as(x))
        ours = found.denoiser.score(x, t)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_quick_run_of_the_experiment(tmp_path):
    assert program.main(["public", "--quick", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "public.md").read_text()
    assert "nothing can be said of memorisation" in text and "nats" in text
    assert (tmp_path / "public.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
