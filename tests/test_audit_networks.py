"""Audits of networks and data as they come: with attention, in half precision, of bytes."""

from __future__ import annotations

import math

import pytest
import torch
from tensors import normal
from test_audit import EDM, HELD_OUT, TRAIN, D, OfTheLaw, audit, data, finding
from torch import nn

import dfkernels as df
from dfkernels import schedule


class Attention(nn.Module):
    """A network with attention, which has no derivative in forward mode."""

    def __init__(self):
        super().__init__()
        self.law = OfTheLaw()
        self.heads = nn.MultiheadAttention(2, 1, batch_first=True, dtype=torch.float64).eval()

    def forward(self, x, t):
        tokens = x.view(-1, D // 2, 2)
        mixed = self.heads(tokens, tokens, tokens, need_weights=False)[0]
        return self.law(x, t) + 1e-3 * mixed.reshape(x.shape)


def test_a_network_with_attention_is_audited():
    report = audit(Attention(), levels=2, points=8, samples=0)
    assert report.ok and 0 < report.levels[0].jacobian.asymmetry.value < 0.1


def test_a_discrete_schedule_has_fewer_levels_than_asked_for():
    table = torch.cumprod(1 - torch.linspace(0.01, 0.3, 40, dtype=torch.float64), 0)
    sch = schedule.Tabulated(table, discrete=True)
    seen = []

    def network(x, t):
        seen.append(t.dtype)
        return OfTheLaw(sch)(x, t)

    report = audit(network, sch=sch, noise=(0.11, 0.3), levels=30, points=8, samples=8)
    t = [level.t for level in report.levels]
    assert t == [float(int(at)) for at in t] and len(set(t)) == len(t) < 30
    assert set(seen) == {torch.int64}


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, D).bfloat16().requires_grad_(False)
        self.law = OfTheLaw()

    def forward(self, x, t):
        return self.law(x.double(), t.double()).bfloat16() + 0 * self.inner(x)


def test_half_precision_is_said_to_be_coarse():
    single = df.PointCloud(TRAIN.y.float()), df.PointCloud(HELD_OUT.y.float())
    report = audit(Half(), train=single[0], held_out=single[1], levels=2, points=4, samples=4)
    (found,) = (one for one in report.findings if one.name == "limits")
    assert "half precision (rounding 0.008)" in found.text
    assert finding(report, "gradient").status == "good", report
    assert finding(report, "eigenvalues").status == "good", report
    assert "1.5 is allowed" in finding(report, "eigenvalues").text


def test_images_in_bytes_are_audited():
    y = (torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 255).byte()
    train, held_out = (df.PointCloud(part, scale=2 / 255, offset=-1) for part in (y[:40], y[40:]))
    report = df.audit(
        df.Denoiser.exact(train, EDM), train, held_out, levels=2, points=4, samples=4, width=2 / 255
    )
    assert report.settings.event_shape == (1, 4, 4)
    assert report.samples.samples.shape == (4, 1, 4, 4)
    assert report.likelihood.train_bits.value < report.likelihood.held_out_bits.value


def test_data_that_no_check_fits_are_audited_without():
    """Four points whose ESS never rises before the schedule ends."""
    cloud = df.PointCloud(2 * normal(8, D, seed=4))
    table = schedule.Tabulated(torch.linspace(0.999, 0.5, 100, dtype=torch.float64))
    report = df.audit(df.Denoiser.exact(cloud, table), cloud, None, levels=2, points=4, samples=4)
    assert report.check is None
    assert finding(report, "convention").status == "unknown"
    assert "The network's conventions cannot be checked: schedule: " in report.verdict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": None, "held_out": None}, "train, held_out: expected data of at least one kind"),
        ({"train": TRAIN.y}, "train: expected a PointCloud, a ShardedCloud or None, got Tensor"),
        ({"held_out": df.PointCloud(data(3))}, "held_out: expected at least 4 points, got 3"),
        ({"held_out": df.PointCloud(normal(9, 2))}, r"held_out: expected points of shape \[6\]"),
        ({"train": df.PointCloud(torch.ones(9, D))}, "expected points that differ"),
        ({"noise": (3.0, 1.0)}, "noise: expected 0 < noise"),
        ({"noise": (1.0, 9.0), "sch": schedule.VP(0.1, 2.0)}, "noise: expected levels in"),
        ({"levels": 1}, "levels: expected"),
        ({"queries": 3}, "queries: expected"),
        ({"samples": -1}, "samples: expected"),
        ({"samples": 1}, "samples: expected 0 or at least 4, got 1"),
        ({"points": 3}, "points: expected 0 or at least 4, got 3"),
        ({"width": 0.0}, "width: expected"),
        ({"network": lambda x, t: x * math.nan}, "network: returned NaN or inf"),
        ({"network": lambda x, t: x[:, :2]}, "network: expected output of shape"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split(":")[0].replace(",", ""),
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        audit(**{"network": OfTheLaw(change.get("sch", EDM)), "points": 0, "samples": 0, **change})


def test_a_denoiser_is_needed():
    with pytest.raises(TypeError, match="denoiser: expected a Denoiser, got function"):
        df.audit(lambda x, t: x, TRAIN, HELD_OUT)
