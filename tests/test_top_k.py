"""top_k without a tolerance: the same atoms as if the float64 logits of all were sorted, and
weights as accurate."""

from __future__ import annotations

import math

import pytest
import torch

import dfkernels as df
from dfkernels.certified import heaviest
from dfkernels.ops.common.moments import load


def everything(x, cloud, alpha, sigma):
    """Logits [B, N] by differences in float64; a masked atom's is -inf."""
    y = load(cloud.y.reshape(len(cloud), -1), torch.float64, cloud.scale, cloud.offset)
    prior = torch.zeros(len(cloud)) if cloud.log_prior is None else cloud.log_prior
    log_pi = prior.double() - prior.double().logsumexp(0)
    level = lambda a: torch.as_tensor(a, dtype=x.dtype).double().expand(len(x))
    rows = [
        log_pi - (((q - a * y) / s) ** 2).sum(1) / 2
        for q, a, s in zip(x.double().flatten(1), level(alpha), level(sigma), strict=True)
    ]
    return torch.stack(rows).masked_fill(log_pi == -math.inf, -math.inf)


def check(x, cloud, alpha, sigma, k):
    logits = everything(x, cloud, alpha, sigma)
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    weights = (logits.gather(1, order) - logits.logsumexp(1, keepdim=True)).exp()
    found = df.top_k(x, cloud, alpha, sigma, k)
    assert torch.equal(found.index, order)
    # float64 rounds |u|^2/2, the sum of its d squares, alpha y inside u, and log weights with their
    # common constant; where it adds up a density also d log sigma, which cancels; x's dtype rounds
    # the weights twice
    cancels = cloud.d * torch.as_tensor(sigma).double().log().abs().reshape(-1, 1)
    sizes = logits.gather(1, order).abs().nan_to_num(posinf=0)
    y = load(cloud.y.flatten(1), torch.float64, cloud.scale, cloud.offset).nan_to_num(0, 0, 0)
    level = lambda a: torch.as_tensor(a).double().abs().reshape(-1, 1)
    moved = (2 * sizes).sqrt() * level(alpha) * y.norm(dim=1).max() / level(sigma)
    constant = 0 if cloud.log_prior is None else float(cloud.log_prior.max().abs())
    sizes = sizes + cloud.d + cancels + moved + constant
    bound = (2**-50 * sizes + 4 * torch.finfo(x.dtype).eps) * weights + torch.finfo(x.dtype).tiny
    assert found.weight.dtype == x.dtype and bool(
        ((found.weight.double() - weights).abs() <= bound).all()
    )


@pytest.fixture(params=[None, (200, 300, 50)], ids=["blocks as they are", "small blocks"])
def blocks(request, monkeypatch):
    if request.param:
        for name, value in zip(
            ("_BLOCK_NUMBERS", "_ESTIMATES", "_PAIRS"), request.param, strict=True
        ):
            monkeypatch.setattr(heaviest, name, value)


def test_devices_take_larger_blocks():
    """A block is a handful of launches, whatever its size."""
    most = [heaviest._most(1 << 17, torch.device(name)) for name in ("cpu", "cuda")]
    assert most == [1 << 17, 1 << 24]


def gaussian(N, d, seed=0):
    return torch.randn(N, d, generator=torch.Generator().manual_seed(seed))


def clouds():
    y, prior = gaussian(301, 12), 3 * gaussian(301, 1, 1)[:, 0]
    masked = prior.double() + 1e4
    masked[::3] = -math.inf
    poisoned = y.clone()
    poisoned[::6], poisoned[3::6] = math.nan, math.inf
    far = torch.cat([y[:100] * 1e-3 + 1e3, y[100:200] - 1e3, y[200:] * 1e-3 + 1e3])
    raw = torch.randint(
        0, 256, (301, 12), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )
    return {
        "plain": df.PointCloud(y),
        "weights": df.PointCloud(y, prior),
        "masked": df.PointCloud(poisoned, masked),
        "few unmasked": df.PointCloud(y, torch.where(torch.arange(301) % 100 == 7, 0.0, -math.inf)),
        "duplicates": df.PointCloud(y[torch.arange(301) % 5]),
        "one atom, many times": df.PointCloud(y[:1].expand(301, 12)),
        "far clusters": df.PointCloud(far),
        "an outlier": df.PointCloud(torch.cat([y[:300], torch.full((1, 12), 1e18)])),
        "offset": df.PointCloud(y + 1e4),
        "uint8": df.PointCloud(raw, scale=2 / 255, offset=-1),
        "float16": df.PointCloud(y.half(), prior, scale=0.3, offset=7),
        "bfloat16": df.PointCloud(y.bfloat16()),
        "float64": df.PointCloud(y.double(), prior),
        "images": df.PointCloud(y.view(301, 2, 3, 2)),
        "a single atom": df.PointCloud(y[:1]),
    }  # fmt: skip


CLOUDS = clouds()


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("sigma", [1e-3, 0.3, 3.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_as_if_all_were_evaluated(name, sigma, dtype, blocks):
    cloud = CLOUDS[name]
    if cloud.dtype == torch.float64 and dtype == torch.float32:
        dtype = torch.float64
    at = [7 % len(cloud), 107 % len(cloud)]  # unmasked in every cloud
    y = load(cloud.y[at], torch.float64, cloud.scale, cloud.offset)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = torch.cat([0.9 * y, 0.9 * y + sigma * noise, noise]).to(dtype)
    for k in sorted({1, min(5, len(cloud)), len(cloud)}):
        check(x, cloud, 0.9, sigma, k)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1e-30])
def test_any_alpha(alpha, blocks):
    for name in ("plain", "masked", "weights"):
        check(gaussian(3, 12, 5), CLOUDS[name], alpha, 0.7, 4)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_any_units(scale, blocks):
    """float32 squares of such numbers under- and overflow."""
    y = gaussian(301, 12) * scale
    x = y[:4] + 0.5 * scale * gaussian(4, 12, 6)
    check(x, df.PointCloud(y), 1.0, 0.5 * scale, 3)
    check(x.double(), df.PointCloud(y.double()), 1.0, 0.5 * scale, 3)


def test_estimates_that_overflow_are_evaluated():
    """|x|^2 and |y|^2 overflow float64, but not |x - y|/sigma."""
    y = 1e160 * (1 + 1e-3 * gaussian(301, 12).double())
    check(y[:3] + 1e157, df.PointCloud(y), 1.0, torch.full((3,), 1e157, dtype=torch.float64), 3)
    tiny = 1e-170 * gaussian(301, 12).double()  # squares underflow
    check(tiny[:3], df.PointCloud(tiny), 1.0, torch.full((3,), 1e-170, dtype=torch.float64), 3)


def test_mixed_levels(blocks):
    sigma = torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e6])
    check(gaussian(5, 12, 7), CLOUDS["weights"], torch.tensor([1.0, 0.9, 0.5, 0.1, 0.0]), sigma, 6)


@pytest.mark.parametrize("name", ["plain", "weights", "far clusters", "offset", "uint8", "float16"])
@pytest.mark.parametrize("sigma", [1e-2, 1.0, 100.0])
def test_estimates_lie_within_their_bound(name, sigma):
    cloud = CLOUDS[name]
    x = load(cloud.y[:4], torch.float64, cloud.scale, cloud.offset) + gaussian(4, 12, 8)
    level = torch.full((4,), sigma, dtype=torch.float64)
    search = heaviest._Search(
        x, level * 0 + 0.9, level, cloud._atoms(), cloud._distances(), 3, torch.ones_like(level)
    )
    estimate, delta = search._estimate(slice(0, len(cloud)))
    error = (estimate + search.shared - everything(x, cloud, 0.9, level)).abs().amax(1)
    assert bool((error <= delta[:, 0]).all())
    # errors add up like a random walk, of at most d + 16 = 28 steps, and the largest atom stands
    # for all
    assert float((error / delta[:, 0]).max()) > 1e-4


def test_few_atoms_are_evaluated(monkeypatch):
    pairs = []
    real = heaviest.logits
    monkeypatch.setattr(heaviest, "logits", lambda *a: pairs.append(len(a[-1])) or real(*a))
    y = gaussian(20000, 40)
    cloud, x = df.PointCloud(y), y[:8] + 0.3 * gaussian(8, 40, 1)
    for sigma in (0.05, 0.3, 1.0, 10.0):
        pairs.clear()
        df.top_k(x, cloud, 1.0, sigma, 3)
        assert sum(pairs) < 8 * 60, sigma


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.tensor([[0.0, math.nan, 0.0]])},
            r"^x: expected finite values, got nan at index \[0, 1\]$",
        ),
        (
            {"sigma": torch.tensor([0.0])},
            r"^sigma: expected finite values > 0, got 0.0 at index \[0\]$",
        ),
        ({"alpha": torch.tensor(math.inf)}, "^alpha: expected finite values, got inf at index"),
        (
            {"x": torch.full((1, 3), 1e200, dtype=torch.float64)},
            "^x, alpha, sigma: expected distances that",
        ),
        ({"k": 2.5}, "^k: expected an integer, got float"),
        ({"k": 6}, "^k: expected an integer from 1 to 5, got 6"),
    ],
)
def test_errors(change, message):
    args = {
        "x": torch.zeros(1, 3),
        "cloud": df.PointCloud(gaussian(5, 3)),
        "alpha": 1.0,
        "sigma": 1.0,
        "k": 2,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        df.top_k(**(args | change))


def test_results_are_new_each_time():
    cloud = CLOUDS["plain"]
    first = df.top_k(cloud.y[:2], cloud, 1.0, 1.0, 3)
    again = df.top_k(cloud.y[:2], cloud, 1.0, 1.0, 3)
    first.index.zero_(), first.weight.zero_()
    assert torch.equal(df.top_k(cloud.y[:2], cloud, 1.0, 1.0, 3).weight, again.weight)


@pytest.mark.parametrize("N", [1, 3])
def test_queries_on_atoms_far_from_the_origin(N):
    """x - alpha y is nothing but the rounding of alpha y, which no distance shows."""
    y = 1e25 * gaussian(1, 12).double().expand(N, 12).contiguous()
    x = 0.7 * y[:1]
    assert bool((df.top_k(x, df.PointCloud(y), 0.7, 1e-3, 1).weight <= 1 + 1e-9).all())
    check(x, df.PointCloud(y), 0.7, 1e-3, N)
