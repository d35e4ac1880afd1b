"""Every tensor of an index is checked before a kernel reads it: given to the op, in C++ and in
PyTorch, and in a file. A tensor of another layout in memory gives the same atoms.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from test_certified import gaussian, queries

import dfkernels as df
from dfkernels._io import tensor_files
from dfkernels._io.files import FileError
from dfkernels._torch import native
from dfkernels.certified import select_atoms
from dfkernels.certified.index import FIELDS, CloudIndex
from dfkernels.certified.index_file import FORMAT
from dfkernels.certified.pytorch import search_in_pytorch

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
N, D = 300, 160
PATHS = {"PyTorch": search_in_pytorch} | ({"compiled": select_atoms.op} if native.available else {})


@pytest.fixture(scope="module")
def y():
    return gaussian(N, D)


@pytest.fixture(scope="module")
def index(y):
    return df.PointCloud(y).index()


GAP = math.log(N / 1e-6)


def found(path, y, index, gap=GAP, k=1, **changed):
    x = queries(y, 0.1, "noisy", B=3)
    level = x.new_ones(3)
    return PATHS[path](x, y, level, 0.1 * level, None, 1.0, 0.0, *index._replace(**changed), gap, k)


def wrong_shapes(t):
    """One too few, one too many, another dimension, none."""
    yield t[:-1]
    yield torch.cat([t, t[:1]])
    yield t[None]
    yield t.reshape(-1)[0]
    if t.ndim > 1:
        yield t[:, :-1]
        yield t.flatten()


def other_memory(t):
    """The same numbers, not in a row."""
    yield torch.stack([t, t], -1)[..., 0]
    if t.ndim > 1:
        yield t.transpose(0, -1).contiguous().transpose(0, -1)


def test_the_table_is_of_the_index(index):
    assert tuple(FIELDS) == CloudIndex._fields
    assert [t.dtype for t in index] == [field.dtype for field in FIELDS.values()]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FIELDS)
def test_another_dtype_is_refused(name, path, y, index):
    for dtype in DTYPES:
        if dtype != FIELDS[name].dtype:
            with pytest.raises(RuntimeError, match=f"{name}: expected .*, got "):
                found(path, y, index, **{name: getattr(index, name).to(dtype)})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FIELDS)
def test_another_shape_is_refused(name, path, y, index):
    for t in wrong_shapes(getattr(index, name)):
        with pytest.raises(RuntimeError, match=r"\w+: expected .*, got "):
            found(path, y, index, **{name: t})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FIELDS)
def test_another_layout_in_memory_is_the_same_index(name, path, y, index):
    right = found(path, y, index)
    for t in other_memory(getattr(index, name)):
        assert torch.equal(t, getattr(index, name))
        again = found(path, y, index, **{name: t})
        assert all(torch.equal(a, b) for a, b in zip(right, again, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "name", [n for n, field in FIELDS.items() if field.dtype.is_floating_point]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_a_number_that_no_index_has_is_refused(name, value, path, y, index):
    if value == -1.0 and FIELDS[name].minimum is None:
        return
    for at in (0, -1):
        t = getattr(index, name).clone()
        t.view(-1)[at] = value
        with pytest.raises(RuntimeError, match=f"{name}: expected .*, got "):
            found(path, y, index, **{name: t})


@pytest.mark.parametrize("path", PATHS)
def test_other_numbers_that_no_index_has(path, y, index):
    scales = torch.zeros_like(index.axis_scale)
    axes = torch.zeros(33, D)
    limits = index.limits.clone()
    limits[4] = N + 1
    for name, t in (
        ("axis_scale", scales),
        ("basis", axes),
        ("basis", axes[:0]),
        ("limits", limits),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: expected "):
            found(path, y, index, **{name: t})
    for name, value in (
        ("gap", -1.0),
        ("gap", math.nan),
        ("gap", math.inf),
        ("k", 0),
        ("k", N + 1),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: expected "):
            found(path, y, index, **{name: value})


@pytest.mark.parametrize("path", PATHS)
def test_tensors_that_are_not_dense_or_elsewhere(path, y, index):
    for t in (index.basis.to_sparse(), index.basis.to("meta")):
        with pytest.raises((RuntimeError, TypeError, ValueError), match="basis: expected "):
            found(path, y, index, basis=t)


def written(path: Path, index: dict, of: str) -> None:
    tensor_files.save(path, index, {"format": FORMAT, "cloud": of})


def of_file(path: Path) -> str:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["cloud"]


@pytest.mark.parametrize("name", FIELDS)
def test_a_file_with_a_wrong_tensor_is_refused(name, tmp_path, y):
    """With the right checksum and the right cloud."""
    path = tmp_path / "a.safetensors"
    right = df.PointCloud(y).index(path)._asdict()
    of, t = of_file(path), right[name]
    wrong = [t.to(dtype) for dtype in DTYPES if dtype != t.dtype] + list(wrong_shapes(t))
    if t.is_floating_point():
        wrong += [torch.where(t == t.view(-1)[-1], value, t) for value in (math.nan, math.inf)]
        wrong += [] if FIELDS[name].minimum is None else [t - 2 * t.max() - 1]
    for one in wrong:
        written(path, right | {name: one}, of)
        with pytest.raises(
            FileError, match="a.safetensors: .*: expected .*: remove it and index anew"
        ):
            df.PointCloud(y).index(path)
    written(path, {n: one for n, one in right.items() if n != name}, of)
    with pytest.raises(
        FileError, match="a.safetensors: expected tensors .*: remove it and index anew"
    ):
        df.PointCloud(y).index(path)
    written(path, right, of)
    assert torch.equal(getattr(df.PointCloud(y).index(path), name), t)
