"""The digits that the experiments share: a fixed split, dequantisation inside the bins, evenly
spaced reports."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sklearn")

from experiments.reproduce import digits, section


def test_the_split_is_a_partition_of_all_images():
    from sklearn.datasets import load_digits

    data, source = digits.load(), load_digits()
    assert data.train.shape == (1500, 1, 8, 8) and data.held.shape == (297, 1, 8, 8)
    assert data.train.dtype == torch.float32 and data.train_labels.dtype == torch.int64
    rows = torch.cat([data.train, data.held])
    levels = ((rows + 1) / digits.WIDTH - 0.5).round().long().flatten(1)
    labels = torch.cat([data.train_labels, data.held_labels])
    found = sorted((*x, y) for x, y in zip(levels.tolist(), labels.tolist(), strict=True))
    assert found == sorted(
        (*map(int, x), int(y)) for x, y in zip(source.data, source.target, strict=True)
    )
    assert torch.equal(digits.load.__wrapped__().held, data.held)  # the split is fixed


def test_dequantised_images_stay_in_their_bins_and_have_the_stated_deviation():
    data = digits.load()
    x = digits.dequantised(data.train, torch.Generator().manual_seed(0))
    assert x.min() >= -1 and x.max() <= 1
    centred = (x - data.train) / digits.WIDTH
    # 0.29/sqrt(96000) = 9e-4
    assert centred.abs().max() <= 0.5 + 1e-5 and abs(centred.mean()) < 2e-3
    assert x.std().item() == pytest.approx(data.std, rel=1e-3)


@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 50))
def test_every_stage_is_reported_once_and_in_order(stages, total, start):
    """A run resumed at `start`, or from a finished checkpoint, reports what went before at once."""
    names, told = [f"stage {i}" for i in range(stages)], []
    at = section.progress(names, told.append)
    for done in range(min(start, total), total + 1):
        at(done, total)
        assert len(told) == stages * done // total
    assert told == names
