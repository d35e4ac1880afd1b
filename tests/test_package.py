"""The build (as units: no environment is made here), the compiled part and the metadata."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

import dfkernels
from dfkernels import _constants
from dfkernels._torch import native as _native

ROOT = Path(__file__).resolve().parent.parent
needs_native = pytest.mark.skipif(
    not _native.available, reason=f"no compiled part: {_native.reason}"
)


@pytest.fixture
def native(monkeypatch):
    """_build/native.py as the build imports it."""
    monkeypatch.syspath_prepend(str(ROOT / "_build"))
    yield importlib.import_module("native")
    sys.modules.pop("native")


@pytest.fixture
def backend(native):
    yield importlib.import_module("backend")
    sys.modules.pop("backend")


def python(code: str, **env: str) -> str:
    """The standard output of a fresh interpreter."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def fake_torch(path: Path, version: str, headers: bool = True) -> Path:
    (path / "torch/include/torch/csrc/stable").mkdir(parents=True)
    (path / "torch/version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ncuda = None\n"
    )
    if headers:
        (path / "torch/include/torch/csrc/stable/library.h").touch()
    return path


# --- metadata


def test_one_version():
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M).group(1)
    assert (dfkernels.__version__, newest) == (declared, declared)


def test_torch_is_pinned_for_development_only():
    """And the Triton that torch's CUDA builds of this version require."""
    text = (ROOT / "requirements-dev.txt").read_text()
    assert re.findall(r"^(?:torch|triton)==[\d.]+", text, re.M) == [
        "torch==2.13.0",
        "triton==3.7.1",
    ]
    assert '"torch>=2.10"' in (ROOT / "pyproject.toml").read_text()


def test_ci_runs_the_documented_command():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines[-2:] == ["make check < /dev/null", "exec make test < /dev/null"]


@pytest.fixture
def suite():
    """tests/__main__.py, which `make test` runs."""
    spec = importlib.util.spec_from_file_location("suite", ROOT / "tests" / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_test_takes_every_instruction_set_of_this_cpu(suite, monkeypatch):
    """The best one (or the caller's), the lesser ones, and none of it; the files are there."""
    monkeypatch.delenv("DFKERNELS_ISA", raising=False)
    info = {"isa_levels": ["base", "v3", "v4"], "isa": "v3"}
    monkeypatch.setattr(_native, "info", lambda: info)
    found = suite.passes()
    assert [(environment, chosen) for _, environment, chosen in found] == [
        ({}, ()),
        ({"DFKERNELS_ISA": "base"}, (*suite.QUICK, *suite.KERNELS)),
        ({"DFKERNELS_NATIVE": "0"}, (*suite.QUICK, *suite.CORE)),
    ]
    assert all((ROOT / name).is_file() for name in (*suite.KERNELS, *suite.CORE))
    monkeypatch.setenv("DFKERNELS_ISA", "v3")
    assert [environment for _, environment, _ in suite.passes()] == [{}, {"DFKERNELS_NATIVE": "0"}]
    monkeypatch.setattr(_native, "info", dict)
    assert [environment for _, environment, _ in suite.passes()] == [{}]


def test_global_state_that_a_test_leaves_changed_is_seen_and_restored():
    from torch_state import restore, state

    before = state()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(before["threads"] + 1)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(False)
    leaked = {name for name, value in state().items() if value != before[name]}
    restore(before)
    assert leaked == {
        *("default dtype", "default device", "threads", "grad mode"),
        *("deterministic", "deterministic, warn only"),
    }
    assert state() == before


# --- the build


def test_find_torch_takes_the_first_that_is_new_enough_and_has_headers(native, tmp_path):
    old = fake_torch(tmp_path / "old", "2.9.1")
    bare = fake_torch(tmp_path / "bare", "2.13.0", headers=False)
    good = fake_torch(tmp_path / "good", "2.10.0+cpu")
    paths = [tmp_path / "absent", old, bare, good]
    assert native.find_torch(paths) == (good / "torch", "2.10.0+cpu")
    assert native.find_torch(paths[:-1]) is None


def test_find_torch_finds_this_environments(native):
    torch_dir, version = native.find_torch()
    assert (torch_dir, version) == (Path(torch.__file__).parent, str(torch.__version__))


@pytest.mark.parametrize(
    "name", ["get_requires_for_build_wheel", "get_requires_for_build_editable"]
)
def test_the_backend_asks_for_torch_only_without_one(backend, native, monkeypatch, tmp_path, name):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(native, "compiler", lambda: ["c++"])
    monkeypatch.setattr(backend, "_wheel", lambda settings: ["from setuptools"])
    monkeypatch.setattr(backend, "_editable", lambda settings: ["from setuptools"])
    requires = getattr(backend, name)
    monkeypatch.setattr(
        native, "environment_paths", lambda: [fake_torch(tmp_path / "new", "2.12.0")]
    )
    assert requires() == ["from setuptools"]
    monkeypatch.setattr(
        native, "environment_paths", lambda: [fake_torch(tmp_path / "old", "2.9.0")]
    )
    assert requires() == ["from setuptools", "torch>=2.10"]
    monkeypatch.setattr(native, "environment_paths", list)
    assert requires() == ["from setuptools", "torch>=2.10"]

    def no_compiler():
        raise native.NoNative("none")

    monkeypatch.setattr(native, "compiler", no_compiler)
    assert requires() == ["from setuptools"]  # nothing would be compiled: no torch is fetched


def test_the_environment_is_seen_through_isolation(native):
    """pip's isolation edits sys.path only."""
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; "
        f"sys.path.append({str(ROOT / '_build')!r}); import native; print(native.find_torch()[0])"
    )
    assert python(code) == str(Path(torch.__file__).parent)


def test_compiler_says_why_there_is_none(native, monkeypatch, tmp_path):
    monkeypatch.setattr(native.sys, "platform", "linux")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        native.NoNative, match=r"^no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\) on PATH$"
    ):
        native.compiler()
    monkeypatch.setenv("CXX", "g++-99 -m64")
    with pytest.raises(native.NoNative, match=r"^CXX=g\+\+-99 -m64: no such program$"):
        native.compiler()


def test_ninja_text_compiles_the_arithmetic_once_per_instruction_set(native, monkeypatch, tmp_path):
    for name in ("simd/kernels.cpp", "ops/posterior.cpp", "host/module.cpp"):
        path = tmp_path / "a b$c" / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(native, "ROOT", tmp_path / "a b$c")
    monkeypatch.setitem(
        sys.modules, "pybind11", types.SimpleNamespace(get_include=lambda: "/pybind11")
    )
    monkeypatch.setattr(native, "isa_levels", lambda cxx: ["base", "v3", "v4"])
    lines = native.ninja_text(["c++"], Path("/t/torch"), "2.13.0", "_C.so").splitlines()
    extra = {
        line.split()[1][:-1]: lines[i + 1].split("=", 1)[1].strip()
        for i, line in enumerate(lines)
        if line.startswith("build ") and ": cxx " in line
    }
    assert extra["simd/kernels-base.o"] == "-DDFK_ISA=base"
    assert extra["simd/kernels-v3.o"] == "-DDFK_ISA=v3 -march=x86-64-v3"
    assert extra["simd/kernels-v4.o"] == "-DDFK_ISA=v4 -march=x86-64-v4 -mprefer-vector-width=512"
    assert extra["ops/posterior.o"] == "-isystem /t/torch/include"
    assert (
        "build _C.so: link host/module.o ops/posterior.o"
        " simd/kernels-base.o simd/kernels-v3.o simd/kernels-v4.o" in lines
    )
    assert f"build ops/posterior.o: cxx {tmp_path}/a$ b$$c/csrc/ops/posterior.cpp" in lines
    command = next(line for line in lines if line.startswith("  command"))
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in command and "-ffast-math" not in command
    # a binary runs beyond the machine that built it
    assert not [flag for flag in native.FLAGS if flag.startswith("-march")]


def test_constants_reach_cpp(native, tmp_path):
    """Each constant of Python stands in the header; what did not change is not written again."""
    values = {k: v for k, v in vars(_constants).items() if k.isupper()}
    native.write_headers(tmp_path)
    written = (tmp_path / "constants.h").read_text()
    found = dict(re.findall(r"^inline constexpr int64_t (\w+) = (\d+);", written, re.M))
    assert found == {k.lower(): str(v) for k, v in values.items()} and values
    before = (tmp_path / "constants.h").stat().st_mtime_ns
    native.write_headers(tmp_path)
    assert (tmp_path / "constants.h").stat().st_mtime_ns == before


def test_a_pybind11_that_torch_carries_is_never_used(native, tmp_path):
    """Torch 2.11's pybind11.h stops with #error under TORCH_TARGET_VERSION, and its directory used
    to come first. Here a torch whose every pybind11 header does so, with the compiler's own word on
    what it includes.
    """
    for header in ("pybind11.h", "stl.h", "detail/common.h", "pytypes.h", "cast.h"):
        path = tmp_path / "torch/include/pybind11" / header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#error the pybind11 that torch carries\n")
    try:
        text = native.ninja_text(native.compiler(), tmp_path / "torch", "2.11.0", "_C.so")
    except native.NoNative as why:
        pytest.skip(str(why))
    (rule,) = re.findall(r"^rule cxx\n  command = (.*) \$extra ", text, re.M)
    (extra,) = re.findall(r"^build host/module\.o: .*\n  extra = (.*)$", text, re.M)
    command = f"{rule} {extra}".replace("$$", "$")
    assert str(tmp_path) not in command and f"{tmp_path}/torch/include" in text
    binds = [path.name for path in (ROOT / "csrc").rglob("*.*") if "<pybind11/" in path.read_text()]
    assert binds == ["module.cpp"]
    includes = [*shlex.split(command), "-M", ROOT / "csrc/host/module.cpp"]
    run = subprocess.run(includes, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "/pybind11/pybind11.h" in run.stdout and "/torch/" not in run.stdout


def test_other_machines_compile_base_only(native, monkeypatch):
    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    assert native.isa_levels(["c++"]) == ["base"]


@pytest.mark.parametrize("required", ["0", "1"])
def test_installing_without_a_compiler(tmp_path, required):
    """The reason goes where dfkernels/_torch/native.py reads it; DFKERNELS_REQUIRE_NATIVE=1 makes
    it an error."""
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path],
        env={**os.environ, "CXX": "no-such-compiler", "DFKERNELS_REQUIRE_NATIVE": required},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    why = "this is" if sys.platform != "linux" else "CXX=no-such-compiler: no such program"
    note = tmp_path / "dfkernels/_no_native.txt"
    if required == "1":
        assert run.returncode == 1 and not note.exists()
        assert "DFKERNELS_REQUIRE_NATIVE=1 and the compiled part cannot be built: " in run.stderr
        assert why in run.stderr
    else:
        assert run.returncode == 0 and why in note.read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, without the compiled part, which takes minutes to build."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    if not names:
        pytest.skip("no git checkout")
    for name in filter(lambda name: (ROOT / name).is_file(), names):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"),
            *("--no-index", "-w", str(folder), str(folder / "source")),
        ],
        env={**os.environ, "CXX": "no-such-compiler", "DFKERNELS_REQUIRE_NATIVE": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dfkernels"}
    assert "dfkernels/py.typed" in names and "dfkernels/_no_native.txt" in names
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "dfkernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    templates = {str(p.relative_to(ROOT)) for p in (ROOT / "dfkernels").rglob("*.html")}
    assert templates and {name for name in names if name.endswith(".html")} == templates
    required = re.findall(r"^Requires-Dist: ([a-z]+)(?!.*extra)", text, re.M)
    assert required == ["torch", "numpy", "safetensors", "tqdm"]
    assert "Project-URL: Repository, https://github.com/dfkernels/dfkernels" in text


@pytest.mark.slow
def test_the_installed_wheel_computes(wheel, tmp_path):
    """Beside the torch that is there, with nothing of the checkout on the path."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(tmp_path / "site"), str(wheel)], check=True, capture_output=True)
    code = """
import sys
# An editable installation of the checkout would lend its compiled part.
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
import dfkernels, torch
x, y = torch.tensor([[0.5, 0.0]]), torch.eye(2)
print(dfkernels.__file__)
print(dfkernels.ops.posterior(x, y, 1.0, 0.5).mean.tolist())
print(dfkernels._torch.native.reason)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    file, mean, reason = run.stdout.splitlines()
    assert Path(file) == tmp_path / "site" / "dfkernels" / "__init__.py"
    first = 1 / (1 + math.exp(-2.0))  # the two logits are 2 apart
    assert json.loads(mean)[0] == pytest.approx([first, 1 - first], rel=1e-6)
    assert "no-such-compiler" in reason


# --- the compiled part


@pytest.mark.slow
@needs_native
def test_loading():
    """torch comes first, whose library the loader takes; and the floating-point mode stays as it
    was:
    -ffast-math's start-up code would flush denormals to zero in the whole process.
    """
    code = (
        "import sys, dfkernels._torch.native; names = list(sys.modules); import torch;"
        " print(names.index('torch') < names.index('dfkernels._C'), (torch.tensor(1e-40) *"
        " 0.5).item() > 0)"
    )
    assert python(code) == "True True"


@pytest.mark.slow
def test_the_compiled_part_can_be_switched_off():
    off = (
        "import sys; from dfkernels._torch import native as n; "
        "print(n.available, n.reason, n.info(), 'dfkernels._C' in sys.modules)"
    )
    assert python(off, DFKERNELS_NATIVE="0") == "False DFKERNELS_NATIVE=0 {} False"


@pytest.mark.slow
def test_import_needs_nothing_beyond_torch_and_numpy():
    heavy = [
        "matplotlib",
        "sklearn",
        "PIL",
        "safetensors",
        "scipy",
        "pandas",
        "triton",
        "torch._dynamo",
        "torch._inductor",
    ]
    loaded = f"print([m for m in {heavy} if m in sys.modules])"
    alone, with_us = python(f"import sys, torch; {loaded}; import dfkernels; {loaded}").splitlines()
    assert alone == with_us


def test_load_errors_become_the_reason(monkeypatch, tmp_path):
    monkeypatch.delenv("DFKERNELS_NATIVE", raising=False)
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_torch" / "native.py"))

    def fails(error):
        def import_module(name):
            raise error

        return types.SimpleNamespace(import_module=import_module)

    monkeypatch.setattr(
        _native, "importlib", fails(ImportError("undefined symbol: aoti_torch_new"))
    )
    assert _native._load() == (None, "dfkernels._C does not load: undefined symbol: aoti_torch_new")
    monkeypatch.setattr(
        _native, "importlib", fails(ModuleNotFoundError("No module named 'dfkernels._C'"))
    )
    assert _native._load() == (
        None,
        "dfkernels._C is not there for this Python: install the package (pip install .)",
    )
    (tmp_path / "_no_native.txt").write_text("no C++ compiler (c++, g++, clang++) on PATH\n")
    assert _native._load() == (
        None,
        "not built at installation: no C++ compiler (c++, g++, clang++) on PATH",
    )


@needs_native
def test_info():
    info = _native.info()
    assert set(info) == {
        "compiler",
        "flags",
        "isa_levels",
        "isa",
        "built_with_torch",
        "target_torch",
    }
    assert info["target_torch"] == "2.10"
    assert re.fullmatch(r"(gcc|clang) \d+\.\d+.*", info["compiler"])
    assert info["isa"] in info["isa_levels"] and info["isa_levels"][0] == "base"
    assert "-ffast-math" not in info["flags"] and "-march" not in info["flags"]


def torch_cxx_symbols(library: Path | str) -> list[str]:
    """Undefined C++ symbols of torch in a shared library; the stable ABI has C names only."""
    run = subprocess.run(
        ["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    assert len(run.stdout.splitlines()) > 50
    return [
        line for line in run.stdout.splitlines() if re.search(r"\b(c10|at|torch|caffe2)::", line)
    ]


@needs_native
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_only_the_stable_abi_of_torch_is_used():
    assert torch_cxx_symbols(_native.module.__file__) == []
    # the check sees them
    assert len(torch_cxx_symbols(Path(torch.__file__).parent / "lib/libtorch_python.so")) > 1000


@needs_native
def test_probes():
    c = _native.module
    assert 0.01 < c.read_bandwidth(threads=1, bytes=1 << 22, repeats=2) < 1e4
    for call, message in [
        (
            lambda: c.read_bandwidth(threads=0, bytes=1 << 22),
            "read_bandwidth: threads must be at least 1",
        ),
        (
            lambda: c.read_bandwidth(threads=1, bytes=100),
            "read_bandwidth: bytes must be at least 65536 per thread",
        ),
        (
            lambda: c.read_bandwidth(threads=1, bytes=1 << 22, repeats=0),
            "read_bandwidth: repeats must be at least 1",
        ),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()


def test_no_compilation_or_download_at_import():
    """The words do not occur in the package outside Triton kernels' own files."""
    banned = {"subprocess", "urllib", "requests", "cpp_extension", "load_inline", "socket", "http"}
    for path in (ROOT / "dfkernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            assert not banned & {part for name in names for part in name.split(".")}, path
