"""The recipes of docs/guide/recipes.md for joblib, Ray, Dask and Spark, as scripts."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from recipes import MOMENTS, total_of

NEEDS = {"joblib": "joblib", "ray": "ray", "dask": "distributed", "spark": "pyspark"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_a_recipe_gives_what_one_process_gives(name, tmp_path):
    """Trees merge in another order: up to a few roundings in float64, of numbers that cancel by a
    factor of ten at most."""
    if find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    if name == "spark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    found, whole = total_of(f"with_{name}.py", tmp_path)
    for moment in MOMENTS:
        one, other = getattr(found, moment), getattr(whole, moment)
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)
