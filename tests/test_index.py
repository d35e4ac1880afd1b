"""PointCloud.index: size, files that are damaged, of another cloud or of another format; top_k
through it."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from test_certified import gaussian, no_cloud_is_small, queries  # noqa: F401

import dfkernels as df
from dfkernels._io import files, tensor_files
from dfkernels.certified.index import has_fine_level
from dfkernels.certified.index_file import FORMAT
from dfkernels.certified.reference import logits


def cloud(N=700, d=200, seed=0, **more):
    return df.PointCloud(gaussian(N, d, seed), **more)


@pytest.mark.parametrize(
    "storage, most",
    [(torch.float32, 0.33), (torch.float64, 0.17), (torch.bfloat16, 0.66), (torch.uint8, 1.3)],
)
@pytest.mark.parametrize("d", [32, 64, 784, 3072])
def test_size(storage, most, d):
    """At most 1.3 times the cloud, far less for wide storage."""
    y = (30 * gaussian(2000, d) + 128).clamp(0, 255).to(storage)
    found = df.PointCloud(y).index()
    wide = d >= 784  # for narrow rows the norms and scales weigh more
    assert found.nbytes <= (most if wide else 1.3) * y.numel() * y.element_size()


@pytest.mark.parametrize(
    "storage, d, axes, fine",
    [
        (torch.float32, 3072, 32, True),
        (torch.uint8, 3072, 32, True),
        (torch.float32, 64, 16, False),
        (torch.uint8, 200, 32, False),
        (torch.bfloat16, 200, 32, True),
    ],
)
def test_levels(storage, d, axes, fine):
    found = df.PointCloud((30 * gaussian(1000, d) + 128).clamp(0, 255).to(storage)).index()
    assert len(found.basis) == axes and (len(found.fine_codes) > 0) == fine == has_fine_level(
        d, storage.itemsize
    )
    assert len(found.remainder_norm) == len(found.axis_error) == len(found.code_scale) == 1 + fine


def test_built_once_and_kept():
    c = cloud()
    assert c.index() is c.index()
    again = cloud().index()
    assert all(torch.equal(a, b) for a, b in zip(c.index(), again, strict=True))


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "cloud.index.safetensors"
    first = cloud(log_prior=torch.zeros(700)).index(path)
    written = path.read_bytes()
    c = cloud()  # log_prior is no part of an index
    second = c.index(str(path))
    assert path.read_bytes() == written and c.index() is second
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second, strict=True))
    x = queries(c.y, 0.1, "noisy")
    direct = cloud()
    direct.index()
    for a, b in ((c, direct), (direct, c)):
        F, G = (df.DiffusionFisher(x, one, 1.0, 0.1, tolerance=1e-6) for one in (a, b))
        assert torch.equal(F.denoised, G.denoised) and torch.equal(F.dropped_mass, G.dropped_mass)


def test_an_index_that_is_there_is_written_not_built_anew(tmp_path):
    c = cloud()
    built = c.index(seed=3)
    c.index(tmp_path / "a.safetensors")
    found = cloud().index(tmp_path / "a.safetensors")
    assert torch.equal(found.basis, built.basis)


@pytest.mark.slow
def test_is_memory_mapped(tmp_path):
    path = tmp_path / "a.safetensors"
    cloud(500, 800).index(path)
    code = (
        "import sys, torch, dfkernels as df; from test_certified import gaussian;"
        "c = df.PointCloud(gaussian(500, 800)); c.index(sys.argv[1]);"
        "print(sum(sys.argv[1] in line for line in open('/proc/self/maps')))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True
    )
    assert int(done.stdout) >= 4, done.stderr


@pytest.mark.parametrize("what", ["y", "N", "scale", "offset", "dtype"])
def test_of_another_cloud(tmp_path, what):
    path = tmp_path / "a.safetensors"
    cloud().index(path)
    y = gaussian(700, 200)
    other = {
        "y": lambda: df.PointCloud(
            y.index_put((torch.tensor([650]), torch.tensor([3])), torch.tensor(0.5))
        ),
        "N": lambda: df.PointCloud(y[:-1]),
        "scale": lambda: df.PointCloud(y, scale=2.0),
        "offset": lambda: df.PointCloud(y, offset=1e-9),
        "dtype": lambda: df.PointCloud(y.double()),
    }[what]()
    with pytest.raises(
        files.FileError, match=r"a.safetensors: the index of another cloud: expected \[.*remove it"
    ):
        other.index(path)
    with pytest.raises(ValueError, match="call cloud.index"):  # nothing was kept
        df.DiffusionFisher(torch.zeros(1, 200, dtype=other.dtype), other, 1.0, 0.1, tolerance=1e-6)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_truncated(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    cloud().index(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(files.FileError, match="a.safetensors: truncated or unreadable"):
        cloud().index(path)


@pytest.mark.parametrize("at", [0.2, 0.6, 0.999])
def test_one_byte_is_another(tmp_path, at):
    path = tmp_path / "a.safetensors"
    cloud().index(path)
    damaged = bytearray(path.read_bytes())
    damaged[int(at * len(damaged))] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(
        files.FileError, match=r"a.safetensors: damaged: the checksum of \w+ is \d+, not \d+"
    ):
        cloud().index(path)


def test_of_another_version_or_kind(tmp_path):
    path = tmp_path / "a.safetensors"
    of_cloud = cloud().index()._asdict()
    for metadata in ({"format": "dfkernels index 3", "cloud": "x"}, {"cloud": "x"}):
        tensor_files.save(path, of_cloud, metadata)
        with pytest.raises(
            files.FileError,
            match="expected 'dfkernels index 4', got '(dfkernels index 3|another).*: remove it and",
        ):
            cloud().index(path)
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(files.FileError, match="truncated or unreadable"):
        cloud().index(path)


def test_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(files.FileError, match="cannot write: No such file or directory"):
        cloud().index(tmp_path / "no" / "a.safetensors")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(files.FileError, match="cannot write: No space left on device"):
        cloud().index(tmp_path / "b.safetensors")
    assert list(tmp_path.iterdir()) == []


def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_file_is_ordinary_safetensors(tmp_path):
    """Another reader finds the same tensors; each is aligned to its dtype."""
    from safetensors.torch import load_file

    path = tmp_path / "a.safetensors"
    found = cloud().index(path)
    other = load_file(path)
    assert all(torch.equal(other[name], t) for name, t in found._asdict().items())
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__")["format"] == FORMAT
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % other[name].dtype.itemsize == 0


def test_small_atoms_need_no_index():
    with pytest.raises(
        ValueError,
        match=r"index: expected atoms of at least 32 bytes, got 8 \(d = 2, torch.float32\)",
    ):
        df.PointCloud(torch.zeros(10, 2)).index()


def test_a_cast_cloud_has_no_index():
    c = cloud()
    c.index()
    with pytest.raises(ValueError, match="call cloud.index"):
        df.DiffusionFisher(
            torch.zeros(1, 200).double(), c.to(torch.float64), 1.0, 0.1, tolerance=1e-6
        )


@pytest.mark.parametrize("sigma", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_top_k(sigma, k, masked):
    prior = torch.linspace(0, 3, 700)
    prior[::4] = -math.inf
    c = cloud(log_prior=prior if masked else None)
    c.index()
    x = queries(c.y, sigma, "noisy")
    dense, found = (df.top_k(x, c, 0.9, sigma, k, tolerance=t) for t in (None, 1e-6))
    level = lambda a: torch.full((len(x),), a, dtype=x.dtype)
    all_logits = logits(x, c.y, level(0.9), level(sigma), c.log_prior, c.scale, c.offset)
    order = all_logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    weights = all_logits.softmax(1).gather(1, order)
    assert torch.equal(dense.index, order) and torch.equal(found.index, order)
    assert found.weight.dtype == torch.float32 and found.index.shape == found.weight.shape == (
        len(x),
        k,
    )
    assert float((dense.weight - weights).abs().max()) <= 2e-7
    assert float((found.weight - dense.weight).abs().max()) <= 1e-6


def test_top_k_of_duplicates_takes_the_earlier_ones():
    y = gaussian(50, 40)[torch.arange(200) % 50]
    c = df.PointCloud(y)
    c.index()
    for tolerance in (None, 1e-3):
        found = df.top_k(y[60:63], c, 1.0, 0.01, 4, tolerance=tolerance)
        assert found.index.tolist() == [[10 + i, 60 + i, 110 + i, 160 + i] for i in range(3)]
        assert torch.allclose(found.weight, torch.full((3, 4), 0.25))


def test_top_k_refuses():
    c = cloud(50, 40)
    for wrong in (0, 51, 2.0, True):
        with pytest.raises((ValueError, TypeError), match="^k: expected an integer"):
            df.top_k(torch.zeros(1, 40), c, 1.0, 0.1, wrong)
    assert df.top_k(torch.zeros(0, 40), c, 1.0, 0.1, 3).index.shape == (0, 3)
    assert df.top_k(torch.zeros(2, 40), c, 1.0, 0.1, 50).weight.sum(1).tolist() == pytest.approx(
        [1, 1]
    )
