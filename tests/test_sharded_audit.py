"""An audit against training data in many files says what it says of the same data in memory."""

from __future__ import annotations

import json

import pytest
import torch
from shards import write_shards

import dfkernels as df
from dfkernels import ShardedCloud, cli
from dfkernels.methods.sharded._files import Files

FEW = {"levels": 2, "queries": 8, "points": 0, "samples": 8}


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator) * torch.tensor([0.4, 0.7, 1, 1, 1.2, 1.4])


def write(folder, y):
    return write_shards(folder, y.split(130))


def leaves(value):
    """All numbers and texts of a report."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


def test_an_audit_of_files_is_that_of_the_data_in_memory(tmp_path, monkeypatch):
    train, held_out = data(400, 1), data(300, 2)
    network = df.Denoiser.exact(df.PointCloud(train), df.schedule.VP())
    passes, blocks = [], Files.blocks
    monkeypatch.setattr(Files, "blocks", lambda *args: passes.append(1) or blocks(*args))
    cloud = ShardedCloud(write(tmp_path / "train", train), memory=24 * 200)
    found = df.audit(network, cloud, df.PointCloud(held_out), **FEW)
    expected = df.audit(network, df.PointCloud(train), df.PointCloud(held_out), **FEW)
    assert [f.status for f in found.findings] == [f.status for f in expected.findings]
    pairs = zip(*(list(leaves(json.loads(r.to_json()))) for r in (found, expected)), strict=True)
    for a, b in pairs:
        assert a == b or isinstance(a, str) or a == pytest.approx(b, rel=1e-3, abs=1e-4)
    assert len(passes) <= 50


@pytest.mark.slow
def test_the_command_takes_a_folder(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train", data(200, 1))
    (tmp_path / "net.py").write_text(
        "import dfkernels as df\n"
        "def net():\n"
        "    return df.Denoiser.exact(df.ShardedCloud('train'), df.schedule.VP())\n"
    )
    sizes = [word for name, n in FEW.items() for word in (f"--{name}", str(n))]
    assert cli.main(["audit", "net.py:net", "--train", "train", *sizes]) == 0
    assert "written: audit/audit.html" in capsys.readouterr().out
    assert 200 in leaves(json.loads((tmp_path / "audit" / "audit.json").read_text()))


def test_atoms_by_their_numbers():
    y = torch.arange(12, dtype=torch.uint8).view(6, 2)
    cloud = df.PointCloud(y, scale=0.5, offset=-1.0)
    found = cloud.rows(torch.tensor([5, 0, 5]))
    assert found.dtype == torch.float64 and found.tolist() == [[4, 4.5], [-1, -0.5], [4, 4.5]]
    for numbers, message in (
        (torch.tensor([6]), "numbers: expected atoms from 0 to 5, got 6"),
        (torch.tensor([[1]]), "numbers: expected an int64 tensor [n], got torch.int64 [1, 1]"),
    ):
        with pytest.raises((TypeError, ValueError)) as raised:
            cloud.rows(numbers)
        assert str(raised.value) == message
