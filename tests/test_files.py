"""Files that people have, and files that somebody damaged: read, or refused by name."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import zipfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from dfkernels._io import arrays, tensor_files
from dfkernels._io.files import FileError

ATOMS = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_safetensors(path, header, payload):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + payload)


# ---- what is read


# g: long double
DTYPES = "<f8 >f8 <f4 >f4 <f2 >f2 i1 u1 <i2 >i2 <u2 >u2 <i4 >i4 <u4 >u4 <i8 >i8 <u8 >u8 g"


@pytest.mark.parametrize("code", DTYPES.split())
def test_numpy_files_of_every_real_dtype(code):
    """Either byte order, Fortran order too, alone and in an archive."""
    a = np.asfortranarray(ATOMS.astype(code))
    np.save("a.npy", a)
    np.savez("a.npz", a=a)
    np.savez_compressed("b.npz", a=a, b=a + 1)
    for name in ("a.npy", "a.npz", "a.npz:a", "b.npz:a"):
        t = arrays.load(name)
        assert t.double().tolist() == ATOMS.tolist() and t.dtype not in (
            torch.bool,
            torch.complex64,
        )


@pytest.mark.parametrize("name", ["A.NPY", "A.Npz", "A.PT", "A.pTh", "A.SafeTensors"])
def test_capital_extensions(name):
    if name.lower().endswith("npy"):
        with open(name, "wb") as file:
            np.save(file, ATOMS)
    elif name.lower().endswith("npz"):
        with open(name, "wb") as file:
            np.savez(file, a=ATOMS)
    elif name.lower().endswith("safetensors"):
        tensor_files.save(Path(name), {"a": torch.from_numpy(ATOMS)}, {})
    else:
        torch.save(torch.from_numpy(ATOMS), name)
    assert arrays.load(name).tolist() == ATOMS.tolist()


def test_checkpoints():
    """Numbers and texts among the tensors, parameters, nested dicts, keys that are no strings; no
    grad asked for."""
    w = torch.from_numpy(ATOMS)
    held = {
        "model": {"w": torch.nn.Parameter(w), "more": {"b": w + 1}},
        "epoch": 3,
        "by": "me",
        7: w + 2,
    }
    torch.save(held, "c.pt")
    for key, plus in (("model.w", 0), ("model.more.b", 1), ("7", 2)):
        t = arrays.load(f"c.pt:{key}")
        assert t.tolist() == (ATOMS + plus).tolist() and not t.requires_grad
    torch.save({"y": w.clone().requires_grad_(), "epoch": 3}, "one.pt")
    assert not arrays.load("one.pt").requires_grad
    torch.save({"a": {"b": w}, "a.b": w}, "twice.pt")
    with pytest.raises(FileError, match=r"^twice\.pt: holds two tensors named a\.b: "):
        arrays.load("twice.pt:a.b")


def test_names_with_colons_and_names_that_are_not_utf8():
    os.mkdir("a:b.npz")
    np.savez("a:b.npz/c:1.npz", **{"k:1": ATOMS, "j": ATOMS + 1})
    assert arrays.load("a:b.npz/c:1.npz:k:1").tolist() == ATOMS.tolist()
    np.save("d:1.npy", ATOMS)
    assert arrays.load("d:1.npy").tolist() == ATOMS.tolist()
    name = os.fsdecode(b"\xff\xfe")
    np.save(f"{name}.npy", ATOMS)
    with open(f"{name}.pt", "wb") as file:
        torch.save(torch.from_numpy(ATOMS), file)
    for suffix in ("npy", "pt"):
        assert arrays.load(f"{name}.{suffix}").tolist() == ATOMS.tolist()


@pytest.mark.parametrize("suffix", ["npy", "safetensors", "pt"])
def test_large_files_stay_on_disk(suffix):
    """What is written into the file after loading shows in the tensor: it is a map of the file, no
    copy."""
    a = np.full((1000, 1000), 1.5, np.float32)
    if suffix == "npy":
        np.save("a.npy", a)
    elif suffix == "pt":
        torch.save(torch.from_numpy(a), "a.pt")
    else:
        tensor_files.save(Path("a.safetensors"), {"a": torch.from_numpy(a)}, {})
    t = arrays.load(f"a.{suffix}")
    data = Path(f"a.{suffix}").read_bytes()
    with open(f"a.{suffix}", "r+b") as file:
        file.seek(data.rindex(a[0, :2].tobytes()) - 4)
        file.write(np.float32(9).tobytes())
    assert (t == 9).sum() == 1


def test_safetensors_need_no_alignment():
    header = {
        "__metadata__": {"a": "b"},
        "y": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]},
    }
    payload = b"\0" + np.array([1, 2, 3], "<f4").tobytes()
    for pad in range(8):
        other = {"p" * (pad + 1): {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}
        write_safetensors("odd.safetensors", header | other, payload)
        assert arrays.load("odd.safetensors:y").tolist() == [1, 2, 3]


def test_torch_files_of_the_old_format():
    torch.save(torch.ones(2), "old.pt", _use_new_zipfile_serialization=False)
    assert arrays.load("old.pt").tolist() == [1, 1]


def test_loading_does_not_depend_on_global_state(monkeypatch):
    np.savez("a.npz", a=ATOMS)
    torch.save(torch.from_numpy(ATOMS), "a.pt")
    tensor_files.save(
        Path("a.safetensors"), {"a": torch.from_numpy(ATOMS), "none": torch.ones(0)}, {}
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            for name in ("a.npz", "a.pt", "a.safetensors:a", "a.safetensors:none"):
                t = arrays.load(name)
                assert t.dtype == torch.float32 and t.device.type == "cpu"
    finally:
        torch.set_default_dtype(before)


# ---- what is refused


def unusual(kind):
    t = torch.from_numpy(ATOMS)
    if kind == "quantized":
        return torch._empty_affine_quantized([4, 3], scale=0.1, zero_point=0, dtype=torch.qint8)
    make = {
        "sparse": t.to_sparse, "csr": t.to_sparse_csr, "meta": lambda: t.to("meta"), "bool": t.bool,
        "complex": lambda: torch.complex(t, t),
        "nested": lambda: torch.nested.nested_tensor([t[:2], t[:3]]),
        "jagged": lambda: torch.nested.nested_tensor([t[:2], t[:3]], layout=torch.jagged),
    }  # fmt: skip
    return make[kind]()


# torch warns that quantized, sparse CSR and nested tensors are no final interfaces
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "way_out"),
    [
        ("sparse", "got layout torch.sparse_coo: save t.to_dense()"),
        ("csr", "got layout torch.sparse_csr: save t.to_dense()"),
        ("meta", "got a meta tensor, which has no values: save it from the device that has them"),
        ("nested", "got a nested tensor: save it padded, t.to_padded_tensor(value)"),
        ("jagged", "got a nested tensor: save it padded, t.to_padded_tensor(value)"),
        ("quantized", "got dtype torch.qint8: save t.dequantize()"),
        ("complex", "got dtype torch.complex64: save its real part, t.real"),
        ("bool", "got dtype torch.bool: save it as numbers, t.to(torch.uint8)"),
    ],
)
def test_tensors_that_are_no_dense_numbers_say_the_way_out(kind, way_out):
    torch.save({"a": unusual(kind), "b": 1}, "u.pt")
    with pytest.raises(FileError) as error:
        arrays.load("u.pt:a")
    assert str(error.value) == f"u.pt:a: expected a dense array of real numbers, {way_out}"


@pytest.mark.parametrize(
    ("a", "got"),
    [
        (ATOMS > 1, 'dtype bool: save it as numbers, a.astype("uint8")'),
        (ATOMS.astype("c16"), "dtype complex128: save its real part, a.real"),
        (np.zeros(3, [("a", "f4")]), "dtype [('a', '<f4')]: save one of its fields"),
        (np.array([b"x"]), "dtype |S1"),
        (np.array(["x"]), "dtype <U1"),
        (np.array([0], "M8[s]"), "dtype datetime64[s]"),
    ],
)
def test_numpy_arrays_that_are_no_numbers(a, got):
    np.save("a.npy", a)
    with pytest.raises(FileError) as error:
        arrays.load("a.npy")
    assert str(error.value) == f"a.npy: expected a dense array of real numbers, got {got}"


def test_a_wrong_key_lists_the_keys():
    np.savez("a.npz", a=ATOMS, b=ATOMS)
    np.savez("many.npz", **{f"k{i}": ATOMS[:1] for i in range(20)})
    np.save("a.npy", ATOMS)
    torch.save({"epoch": 3}, "none.pt")
    for name, message in (
        ("a.npz", "a.npz: holds 2 arrays (a, b): name one as a.npz:KEY"),
        ("a.npz:c", "a.npz: holds 2 arrays (a, b), none of them named c"),
        ("a.npy:a", "a.npy: holds one array, which has no name: leave out :a"),
        ("none.pt", "none.pt: holds no arrays"),
        ("nowhere.npz:a", "nowhere.npz: no such file"),
    ):
        with pytest.raises(FileError) as error:
            arrays.load(name)
        assert str(error.value) == message
    with pytest.raises(
        FileError, match=r"^many\.npz: holds 20 arrays \(k0, .*, k11, \.\.\.\): name one"
    ):
        arrays.load("many.npz")


def test_what_is_no_regular_file():
    os.mkdir("d.npy")
    os.mkfifo("f.npy")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("s.npy")
    os.symlink("l.npy", "l.npy")
    for name, message in (
        ("d.npy", "d.npy: expected a regular file, got a directory"),
        (
            "f.npy",
            "f.npy: expected a regular file, got a FIFO: save what comes out of it as a file",
        ),
        (
            "s.npy",
            "s.npy: expected a regular file, got a socket: save what comes out of it as a file",
        ),
        ("l.npy", "l.npy: cannot read: Too many levels of symbolic links"),
        ("x" * 300 + ".npy", "x" * 300 + ".npy: cannot read: File name too long"),
        ("d.npy/x.npy", "d.npy/x.npy: no such file"),
    ):
        with pytest.raises(FileError) as error:
            arrays.load(name)
        assert str(error.value) == message


def test_a_file_without_permission(monkeypatch):
    np.save("a.npy", ATOMS)

    def refuse(path, *args):
        raise PermissionError(errno.EACCES, "Permission denied")  # root may read everything

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(FileError, match=r"^a\.npy: cannot read: Permission denied$"):
        arrays.load("a.npy")


GOOD = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"y": GOOD | {"data_offsets": [-48, 0]}}, "invalid value: integer `-48`"),
        ({"y": GOOD | {"data_offsets": [48, 0]}}, "invalid offset for tensor `y`"),
        ({"y": GOOD | {"data_offsets": [0, 44]}}, "invalid shape, data type, or offset"),
        ({"y": GOOD | {"data_offsets": [1, 49]}}, "invalid offset for tensor `y`"),
        ({"y": GOOD | {"data_offsets": [0, 96], "shape": [8, 3]}}, "incomplete metadata"),
        ({"y": GOOD | {"shape": [-4, -3]}}, "invalid value: integer `-4`"),
        ({"y": GOOD | {"shape": [2**62, 2**62]}}, "overflow computing buffer size"),
        ({"y": GOOD | {"shape": [2**64, 0]}}, "invalid type: floating point"),
        ({"y": GOOD | {"shape": [4.0, 3]}}, "invalid type: floating point `4.0`"),
        ({"y": GOOD | {"shape": [True, 12]}}, "invalid type: boolean"),
        ({"y": GOOD | {"shape": "12"}}, "invalid type: string"),
        ({"y": GOOD | {"dtype": 4}}, "invalid JSON in header"),
        ({"y": GOOD | {"dtype": "F128"}}, "unknown variant `F128`"),
        (
            {"y": GOOD | {"dtype": "F4", "shape": [96]}},
            "tensor y has dtype F4, expected one of F64",
        ),
        ({"y": [4, 3]}, "invalid type: integer `4`"),
        ({"y": GOOD, "z": GOOD}, "invalid offset for tensor"),
        ({"y": GOOD, "__metadata__": 3}, "invalid type: integer `3`, expected a map"),
        ([1, 2], "invalid type: sequence"),
        (b'{"y": 1, "y": 2}', "invalid type: integer `1`"),
        (b"[" * 100_000, "invalid type: sequence"),
        (b'{"\xff": 1}', "invalid UTF-8 in header"),
        (b"{" + b"9" * 10_000, "truncated or unreadable"),
    ],
)
def test_safetensors_headers_that_lie(header, message):
    write_safetensors("l.safetensors", header, bytes(48))
    for read in (
        lambda: arrays.load("l.safetensors:y"),
        lambda: tensor_files.read(Path("l.safetensors")),
    ):
        with pytest.raises(FileError, match=message) as error:
            read()
        assert str(error.value).startswith("l.safetensors: ") and "\n" not in str(error.value)


def test_a_safetensors_header_longer_than_its_file():
    for length in (1 << 60, (1 << 64) - 1, 3):
        Path("h.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(FileError, match="header too large|invalid header length"):
            arrays.load("h.safetensors")


def test_a_tensor_of_an_unknown_dtype_does_not_hide_the_others():
    other = {"dtype": "F4", "shape": [2], "data_offsets": [48, 49]}
    write_safetensors("o.safetensors", {"y": GOOD, "z": other}, ATOMS.tobytes() + b"\0")
    assert arrays.load("o.safetensors:y").tolist() == ATOMS.tolist()


# Anything JSON, and above all what looks like a header.
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
number = st.integers(-2, 60) | st.sampled_from([2**31, 2**62, 2**64])
entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F64", "F32", "BF16", "I64", "BOOL", "C64", "F8_E4M3", "F4"])
        | json_values,
        "shape": st.lists(number, max_size=3) | json_values,
        "data_offsets": st.lists(number, min_size=2, max_size=2) | json_values,
    }
)
names = st.sampled_from(["y", "z", "", "__metadata__", "a\nb", "\ud800"])
few = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def loads_or_refuses(name):
    """A tensor of real numbers whose every value can be read, or a FileError that names the file,
    on one line."""
    try:
        t = arrays.load(name)
    except FileError as error:
        refusal = str(error)
    else:
        assert t.layout == torch.strided and not t.is_complex()
        t.to(torch.float64).sum()
        return
    assert refusal.startswith(name.split(":")[0]) and "\n" not in refusal


@few
@given(st.dictionaries(names, entry | json_values, max_size=3) | json_values)
def test_any_safetensors_header(header):
    write_safetensors("any.safetensors", header, bytes(range(48)))
    loads_or_refuses("any.safetensors")
    loads_or_refuses("any.safetensors:y")


def npy(header, payload):
    text = repr(header).encode() if not isinstance(header, bytes) else header
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n" + payload


descr = st.sampled_from(
    ["<f4", ">f8", "|u1", "<i8", "|b1", "<c8", "|O", "<U3", "|V4", [("a", "<f4")]]
)
shape = st.lists(number, max_size=3).map(tuple) | st.text(max_size=2) | st.none() | st.integers()
headers = st.fixed_dictionaries(
    {"descr": descr | st.text(max_size=3), "fortran_order": st.booleans(), "shape": shape}
) | st.binary(max_size=40)


@pytest.mark.filterwarnings("ignore")  # NumPy warns of headers that Python 2 may have written
@few
@given(headers, st.integers(0, 60))
def test_any_npy_header(header, size):
    Path("any.npy").write_bytes(npy(header, bytes(size)))
    loads_or_refuses("any.npy")


@pytest.mark.filterwarnings("ignore")  # NumPy warns of headers that Python 2 may have written
@few
@given(headers, st.integers(0, 60))
def test_any_member_of_an_npz_archive(header, size):
    with zipfile.ZipFile("any.npz", "w") as archive:
        archive.writestr("a.npy", npy(header, bytes(size)))
        archive.writestr("readme.txt", "no array")
    loads_or_refuses("any.npz")
    loads_or_refuses("any.npz:readme.txt")


@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors", "pt"])
def test_any_file_cut_or_damaged(suffix):
    """Cut anywhere, one byte changed anywhere: read or refused, nothing else."""
    path = Path(f"d.{suffix}")
    if suffix == "npy":
        np.save(path, ATOMS)
    elif suffix == "npz":
        np.savez_compressed(path, a=ATOMS)
    elif suffix == "pt":
        torch.save({"a": torch.from_numpy(ATOMS)}, path)
    else:
        tensor_files.save(path, {"a": torch.from_numpy(ATOMS)}, {})
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    for at in sorted({0, 1, 7, 9, len(whole) - 1, *draw.integers(0, len(whole), 25).tolist()}):
        path.write_bytes(whole[:at])
        loads_or_refuses(path.name)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ draw.integers(1, 256)]) + whole[at + 1 :])
        loads_or_refuses(path.name)
