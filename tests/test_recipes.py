"""The recipe of docs/guide/recipes.md that needs no other library; tests/ecosystem/test_clusters.py
runs the others."""

from __future__ import annotations

import pytest
import torch
from recipes import MOMENTS, recipes, total_of


def test_the_page_has_short_recipes():
    lines = {name: len([ln for ln in code.splitlines() if ln]) for name, code in recipes().items()}
    names = ["processes.py", "with_joblib.py", "with_ray.py", "with_dask.py", "with_spark.py"]
    assert list(lines) == names and max(lines.values()) <= 18


@pytest.mark.slow
def test_processes_give_the_bits_of_one_process(tmp_path):
    found, whole = total_of("processes.py", tmp_path)
    assert all(torch.equal(getattr(found, m), getattr(whole, m)) for m in MOMENTS)
    assert found.posterior().log_prob.shape == (4,)
