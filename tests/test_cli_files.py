"""The files that the command line is given: what is wrong with one is said with its name, and
numbers of any dtype are read."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import check, here, refused  # noqa: F401

from dfkernels import cli, ops
from dfkernels._io import files
from dfkernels.cli import inputs, posterior

pytestmark = pytest.mark.usefixtures("here")


def write_safetensors(path, header, payload):
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + payload)


class Evil:
    """Unpickling it would create the file `owned`."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def corrupt(name):
    """One bad file per kind."""
    if name == "short.npy":
        data = Path("y.npy").read_bytes()
        Path(name).write_bytes(data[:-10])
    elif name == "head.npy":
        Path(name).write_bytes(b"\x93NUMPY\x01")
    elif name == "text.npy":
        Path(name).write_text("not an array")
    elif name == "empty.npy":
        Path(name).touch()
    elif name == "object.npy":
        np.save(name, np.array([Evil()]), allow_pickle=True)
    elif name == "evil.pt":
        torch.save(Evil(), name)
    elif name == "list.pt":
        torch.save([1, 2], name)
    elif name == "two.pt":
        torch.save({"a": torch.ones(3), "b": torch.ones(3)}, name)
    elif name == "short.pt":
        torch.save(torch.ones(1000), name)
        data = Path(name).read_bytes()
        Path(name).write_bytes(data[: len(data) // 2])
    elif name == "short.safetensors":
        write_safetensors(
            name,
            {"y": {"dtype": "F32", "shape": [50, 2, 3], "data_offsets": [0, 1200]}},
            b"\0" * 100,
        )
    elif name == "lie.safetensors":
        write_safetensors(
            name,
            {"y": {"dtype": "F32", "shape": [50, 2, 3], "data_offsets": [0, 100]}},
            b"\0" * 100,
        )
    elif name == "head.safetensors":
        Path(name).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    elif name == "json.safetensors":
        Path(name).write_bytes(struct.pack("<Q", 2) + b"!!")
    elif name == "nan.npy":
        y = np.load("y.npy")
        y[4, 1, 2] = np.nan
        np.save(name, y)
    elif name == "integer.npy":
        np.save(name, np.full((50, 2, 3), 1 << 40))
    elif name == "wide.npy":
        np.save(name, np.full((50, 2, 3), 1e300))
    elif name == "none.npy":
        np.save(name, np.zeros((0, 2, 3)))
    elif name == "number.npy":
        np.save(name, 3.0)
    elif name == "complex.npy":
        np.save(name, np.zeros((50, 2, 3), np.complex64))


BAD = [
    ("missing.npy", "missing.npy: no such file"),
    ("data.csv", "data.csv: expected one of .npy, .npz, .safetensors, .pt, .pth, got .csv"),
    ("short.npy", "short.npy: truncated or unreadable: mmap length is greater than file size"),
    ("head.npy", "head.npy: truncated or unreadable: "),
    ("text.npy", "text.npy: truncated or unreadable: "),
    ("empty.npy", "empty.npy: truncated or unreadable: "),
    ("object.npy", "object.npy: truncated or unreadable: "),
    (
        "evil.pt",
        "evil.pt: holds more than tensors, numbers and texts, or is damaged: save the tensor alone",
    ),
    ("list.pt", "list.pt: expected a tensor or a dict of tensors"),
    ("two.pt", "two.pt: holds 2 arrays (a, b): name one as two.pt:KEY"),
    ("two.pt:c", "two.pt: holds 2 arrays (a, b), none of them named c"),
    ("short.pt", "short.pt: truncated or unreadable: "),
    *(
        (
            f"{name}.safetensors",
            f"{name}.safetensors: truncated or unreadable: Error while deserializing header: {why}",
        )
        for name, why in (
            ("short", "incomplete metadata, file not fully covered"),
            ("lie", "invalid shape, data type, or offset for tensor"),
            ("head", "header too large"),
            ("json", "invalid JSON in header: expected"),
        )
    ),
    ("nan.npy", "nan.npy: y: expected finite values, got nan at index [4, 1, 2]"),
    (
        "integer.npy",
        (
            "integer.npy: expected numbers that float32 can hold, got 1099511627776 at index [0, 0,"
            " 0]; --dtype float64 computes with more digits"
        ),
    ),
    (
        "wide.npy",
        (
            "wide.npy: expected numbers that float32 can hold, got 1e+300 at index [0, 0, 0];"
            " --dtype float64 computes with more digits"
        ),
    ),
    (
        "none.npy",
        "none.npy: expected shape [N, *E] with N >= 1 and no empty dimension, got [0, 2, 3]",
    ),
    ("number.npy", "number.npy: expected shape [N, *E] with N >= 1 and no empty dimension, got []"),
    (
        "complex.npy",
        (
            "complex.npy: expected a dense array of real numbers, got dtype complex64: save its"
            " real part, a.real"
        ),
    ),
    ("w.npy", "x.npy: expected shape [B] with B >= 1 to match w.npy, got [7, 2, 3]"),
]


@pytest.mark.parametrize(("name", "message"), BAD, ids=[name for name, _ in BAD])
def test_bad_data_file(capsys, name, message):
    corrupt(name.split(":")[0])
    assert cli.main(["posterior", name, "x.npy", "--sigma", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dfkernels posterior: error: {message}") and error.count("\n") == 1
    assert not os.path.exists("out.npz") and not os.path.exists("owned")


def test_bad_values_in_queries_name_the_row_of_the_file(capsys):
    x = np.load("x.npy")
    for name, row, value, got in (("inf.npy", 5, np.inf, "inf"), ("nan.npy", 6, np.nan, "nan")):
        np.save(name, np.where(np.arange(7)[:, None, None] == row, value, x))
        error = refused(capsys, f"y.npy {name} --sigma 1 --chunk 4")
        assert (
            error == f"{name}, row {row}: expected finite values, got {got} at index [{row}, 0, 0]"
        )
    x[6] = 1e30  # finite, and too far from every atom
    np.save("far.npy", x)
    error = refused(capsys, "y.npy far.npy --sigma 1 --chunk 4")
    assert re.match("far.npy, rows 4 to 6: (x|result): expected ", error)
    np.save("wide.npy", np.full_like(x, 1e300))
    assert refused(capsys, "y.npy wide.npy --sigma 1 --chunk 4").startswith(
        "wide.npy: expected numbers that float32 can hold, got "
    )


def test_the_error_names_the_file_at_fault(capsys, monkeypatch):
    """Each of three files in turn, with the other two as they should be."""
    np.save("short.npy", np.zeros(49))
    error = refused(capsys, "y.npy x.npy --sigma 1 --log-prior short.npy")
    assert error == "short.npy: expected shape [50], one log weight per atom of y.npy, got [49]"
    for value in (np.nan, np.inf, -np.inf):
        np.save("weights.npy", np.full(50, value))
        error = refused(capsys, "y.npy x.npy --sigma 1 --log-prior weights.npy")
        assert error.startswith("weights.npy: log_prior: expected ")
    np.save("none.npy", np.zeros((0, 2, 3)))
    error = refused(capsys, "y.npy none.npy --sigma 1 --log-prior w.npy")
    assert error == "none.npy: expected shape [B, 2, 3] with B >= 1 to match y.npy, got [0, 2, 3]"
    bad = np.load("y.npy")
    bad[3] = np.nan
    np.save("nan.npy", bad)
    error = refused(capsys, "nan.npy x.npy --sigma 1 --log-prior w.npy")
    assert error.startswith("nan.npy: y: expected finite values, got nan at index [3, 0, 0]")
    assert refused(capsys, "y.npy x.npy --sigma 1 --alpha 1e300").startswith(
        "alpha: expected a finite value"
    )
    error = refused(capsys, "y.npy x.npy --sigma 1e-50")
    assert error == "sigma: expected a number that is > 0 in float32 too, got 1e-50"

    def fail(*args):
        raise ValueError("DFKERNELS_ISA: expected base or v3, got 'v9'")

    monkeypatch.setattr(posterior, "posterior_sums", fail)
    assert (
        refused(capsys, "y.npy x.npy --sigma 1") == "DFKERNELS_ISA: expected base or v3, got 'v9'"
    )


@pytest.mark.parametrize(
    "stored", [np.array([[1.0], [2.0], [1e300]]), np.array([[1], [2], [1 << 60]])]
)
def test_what_float32_lacks_does_not_matter_in_masked_atoms(stored):
    """The masked atom's number becomes whatever it may; the others' are still looked at."""
    atoms = torch.from_numpy(stored)
    masked = torch.tensor([False, False, True])
    assert inputs.converted("y.npy", atoms, torch.float32, masked=masked)[:2].tolist() == [
        [1],
        [2],
    ]
    with pytest.raises(
        files.FileError, match=r"^y\.npy: expected numbers that float32 can hold, .* \[2, 0\]"
    ):
        inputs.converted("y.npy", atoms, torch.float32, masked=masked.roll(1))


@pytest.mark.parametrize("code", ["i1", ">i2", "u2", "u4", "<i8", ">u8", ">f8", "f2"])
def test_numbers_of_any_dtype_in_any_role(code):
    """Integers of every width, halves and the other byte order: as atoms, as queries and as log
    weights."""
    draw = np.random.default_rng(1)
    y, x, w = (draw.integers(0, 5, shape).astype(code) for shape in ((50, 3), (4, 3), (50,)))
    for name, a in (("iy.npy", y), ("ix.npy", x), ("iw.npy", w)):
        np.save(name, a)
    assert (
        cli.main(["posterior", "iy.npy", "ix.npy", "--sigma", "0.9", "--log-prior", "iw.npy"]) == 0
    )
    y, x, w = (torch.from_numpy(a.astype("f4")) for a in (y, x, w))
    check("out.npz", ops.posterior(x, y, 1.0, 0.9, w), x, 1.0, 0.9)


def test_integers_that_float32_lacks_are_exact_in_float64(capsys):
    y = np.array([[0], [(1 << 24) + 1], [(1 << 25) + 1]])
    np.save("big.npy", y)
    error = refused(capsys, "big.npy big.npy --sigma 1")
    assert error.startswith(
        "big.npy: expected numbers that float32 can hold, got 16777217 at index [1, 0]"
    )
    assert (
        cli.main(["posterior", "big.npy", "big.npy", "--sigma", "0.1", "--dtype", "float64"]) == 0
    )
    assert np.load("out.npz")["mean"].tolist() == y.tolist()
