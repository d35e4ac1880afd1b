"""The heaviest atoms of clouds in many files, and draws from them: those of all atoms in memory."""

from __future__ import annotations

import pytest
import torch
from shards import write_shards
from tensors import rng

import dfkernels as df
from dfkernels import PointCloud, ShardedCloud
from dfkernels.methods.sharded import _draw

SIZES = (130, 1, 200, 64, 33)
SIGMAS = torch.tensor([0.05, 0.4, 0.7, 2.0, 4.0, 60.0])


Y = torch.randn(sum(SIZES), 4, 5, generator=rng(0))
Y[300] = Y[7]  # equal atoms in two files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = write_shards(tmp_path_factory.mktemp("shards"), Y.split(SIZES))
    ShardedCloud(made).index()
    return made


def queries(dtype=torch.float32):
    noise = torch.randn(6, 4, 5, generator=rng(1))
    return (Y[[7, 0, 427, 131, 329, 200]] + SIGMAS[:, None, None] * noise).to(dtype)


CASES = [(torch.float32, 3000), (torch.float32, 1 << 30), (torch.float64, 20_000)]


@pytest.mark.parametrize("dtype, memory", CASES)
def test_top_k_is_that_of_all_atoms_in_memory(folder, dtype, memory):
    cloud, whole, x = ShardedCloud(folder, memory=memory), PointCloud(Y), queries(dtype)
    for k in (1, 5, 428):
        found, expected = df.top_k(x, cloud, 1.0, SIGMAS, k), df.top_k(x, whole, 1.0, SIGMAS, k)
        assert torch.equal(found.index, expected.index)
        torch.testing.assert_close(found.weight, expected.weight, rtol=4e-6, atol=1e-12)
    found = df.top_k(x, cloud, 1.0, SIGMAS, 5, tolerance=1e-4)
    expected = df.top_k(x, whole, 1.0, SIGMAS, 5)
    assert torch.equal(found.index, expected.index) and found.weight.dtype == dtype
    torch.testing.assert_close(found.weight, expected.weight, rtol=2e-4, atol=1e-12)
    assert found.index[0, :2].tolist() == [7, 300]  # the equal ones


def test_the_heaviest_are_those_of_a_float64_search(folder):
    sigma = torch.logspace(-2, 2, 6, dtype=torch.float64)
    x = queries(torch.float64)
    logits = (
        -((x[:, None] - 0.8 * Y.double()) / sigma[:, None, None, None]).square().sum((2, 3)) / 2
    )
    expected = logits.softmax(1).topk(4, 1)
    found = df.top_k(x, ShardedCloud(folder, memory=3000), 0.8, sigma, 4)
    torch.testing.assert_close(found.weight, expected.values, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("dtype, memory", CASES)
def test_draws_are_those_of_all_atoms_in_memory(folder, dtype, memory, monkeypatch):
    """Blocks of 64 atoms are shared by files, and cut by what is read at once."""
    cloud, whole, x = ShardedCloud(folder, memory=memory), PointCloud(Y), queries(dtype)
    for seed in range(6):
        monkeypatch.setattr(_draw, "_PAIRS", 64 * 6 * (1 + seed % 3))
        found, expected = (law.draw(x, 1.0, SIGMAS, seed=seed) for law in (cloud, whole))
        assert torch.equal(found.index, expected.index)
        assert torch.equal(found.x_0, expected.x_0) and found.x_0.dtype == dtype


def test_draws_follow_the_weights(folder):
    cloud, x = ShardedCloud(folder), queries()[3:4].expand(2000, 4, 5).contiguous()
    rows = cloud.draw(x, 1.0, 1.5, seed=3).index
    found = rows.bincount(minlength=len(Y)).double() / len(x)
    logits = -((x[0] - Y) / 1.5).square().sum((1, 2)) / 2
    w = logits.double().softmax(0)
    error = (w * (1 - w) / len(x)).sqrt()
    assert bool(((found - w).abs() < 5 * error + 1e-3).all()) and 0.01 < w.max() < 0.9


def test_numbers_for_each_channel(tmp_path):
    y = (40 * Y + 128).clamp(0, 255).to(torch.uint8)
    scale, offset = [0.02, 0.03, 0.01, 0.02], [-1.0, 0.0, 0.5, 1.0]
    folder = write_shards(tmp_path, y.split(SIZES), scale=scale, offset=offset)
    cloud = ShardedCloud(folder, memory=5000)
    values = y.double() * torch.tensor(scale).double()[:, None]
    values += torch.tensor(offset).double()[:, None]
    x = values[[3, 200]] + 0.1 * torch.randn(2, 4, 5, generator=rng(2))
    whole = PointCloud(values)
    a, b = (df.top_k(x, law, 1.0, 0.3, 6) for law in (cloud, whole))
    assert torch.equal(a.index, b.index)
    torch.testing.assert_close(a.weight, b.weight)
    for seed in range(5):
        found, expected = (law.draw(x, 1.0, 1.0, seed=seed) for law in (cloud, whole))
        assert torch.equal(found.index, expected.index)
        torch.testing.assert_close(found.x_0, expected.x_0)


def test_empty_batches_extremes_and_bad_arguments(folder):
    cloud = ShardedCloud(folder)
    x = queries()
    assert df.top_k(x[:0], cloud, 1.0, 1.0, 3).index.shape == (0, 3)
    assert cloud.draw(x[:0], 1.0, 1.0, seed=0).x_0.shape == (0, 4, 5)
    assert cloud.draw(x, 0.0, 1e30, seed=0).index.shape == (6,)  # all weigh the same
    assert cloud.draw(1e4 * x, 1.0, 1e-3, seed=0).index.shape == (6,)
    bad = (
        (lambda: cloud.draw(x, 1.0, 0.0, seed=0), "sigma: expected a finite value > 0, got 0.0"),
        (
            lambda: cloud.draw(x[..., :2], 1.0, 1.0, seed=0),
            "x: expected shape [B, 4, 5] to match the cloud, got [6, 4, 2]",
        ),
        (
            lambda: cloud.draw(x + torch.inf, 1.0, 1.0, seed=0),
            "x: expected finite values, got inf at index [0, 0, 0]",
        ),
        (
            lambda: cloud.draw(x, 1.0, 1.0, seed=-1),
            f"seed: expected an integer from 0 to {2**63 - 1}, got -1",
        ),
        (
            lambda: df.top_k(x, cloud, 1.0, 1.0, 429),
            "k: expected an integer from 1 to 428, got 429",
        ),
    )
    for call, message in bad:
        with pytest.raises(ValueError) as raised:
            call()
        assert str(raised.value) == message
