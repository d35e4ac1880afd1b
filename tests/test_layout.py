"""CONTRIBUTING.md's layout: imports run one way, files stay short, one file talks to
torch.library."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tools.op_table import TABLE

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dfkernels"
FILES = sorted(PACKAGE.rglob("*.py"))
TEXTS = {".py", ".md", ".rst", ".h", ".cpp", ".toml", ".txt"}

# A module imports from lower layers and from its own group only. schedule and ops share a layer:
# neither knows the other, nor the objects above, since ops take numbers and tensors.
LAYERS = [
    {"_constants", "_torch", "_io", "_page"},
    {"schedule", "ops", "linalg"},
    {"certified"},
    {"_atoms", "_components", "_fisher_operator", "_fitted", "law"},
    {"cloud", "mixture"},
    {"partial"},
    {"_merge"},
    {"fisher"},
    {"_top_k"},
    {"methods"},
    {"adapt"},
    {"cli"},
    {"__main__"},
]
LAYER = {group: level for level, groups in enumerate(LAYERS) for group in groups}


def module_name(path: Path) -> list[str]:
    parts = ["dfkernels", *path.relative_to(PACKAGE).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported_groups(source: str, module: list[str], is_package: bool) -> set[str]:
    """First components below dfkernels of everything imported anywhere in `source`, lazy imports
    included."""
    groups = set()
    for node in ast.walk(ast.parse(source)):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                package = module if is_package else module[:-1]
                base = package[: len(package) - node.level + 1] + base
            targets = [[*base, alias.name] for alias in node.names]
        groups |= {t[1] for t in targets if t[0] == "dfkernels" and len(t) > 1}
    return groups


def violations(group: str, imported: set[str]) -> list[str]:
    """What `group` may not import; a name that is no module counts: import it from where it is
    defined."""
    level = LAYER[group]
    return sorted(
        i for i in imported - {group, "__version__"} if LAYER.get(i, len(LAYERS)) >= max(level, 1)
    )


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p != PACKAGE / "__init__.py"],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_imports_run_one_way(path):
    module = module_name(path)
    imported = imported_groups(path.read_text(), module, path.name == "__init__.py")
    assert violations(module[1], imported) == []


def test_the_check_sees_every_form_of_import():
    source = """
import dfkernels.cloud
from dfkernels import fisher, ops
from .. import cli
def f():
    from ..schedule import VP
    from . import reference
    from ..._torch.library import define
"""
    module = ["dfkernels", "ops", "posterior", "triton"]
    assert imported_groups(source, module, False) == {"cloud", "fisher", "ops", "_torch"}
    assert violations("ops", {"cloud", "schedule", "fisher", "cli", "_torch", "ops"}) == [
        "cli",
        "cloud",
        "fisher",
        "schedule",
    ]
    assert violations("methods", {"ops", "schedule", "cloud", "fisher", "_torch", "methods"}) == []
    assert violations("_torch", {"ops"}) == ["ops"]


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Those of `modules`, as dotted names, that the file imports anywhere, lazily or not."""
    here = module_name(path)
    package = here if path.name == "__init__.py" else here[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            for alias in node.names:
                module = ".".join([*base, alias.name])
                found.add(module if module in modules else ".".join(base))
    return found & modules


def test_no_modules_import_each_other_in_a_circle():
    names = {path: ".".join(module_name(path)) for path in FILES}
    modules = set(names.values()) - {"dfkernels"}  # whose version its modules may ask for
    graph = {
        names[path]: imported_modules(path, modules) - {names[path]}
        for path in FILES
        if names[path] in modules
    }
    while graph:
        leaves = {module for module, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"circle among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in leaves}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_op_talks_to_torch_library(path):
    uses = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if (
            isinstance(node, ast.Attribute)
            and node.attr in ("library", "_library")
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        )
        or (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[:2] in (["torch", "library"], ["torch", "_library"])
        )
        or (
            isinstance(node, ast.Import)
            and any(
                a.name.split(".")[:2] in (["torch", "library"], ["torch", "_library"])
                for a in node.names
            )
        )
    ]
    assert uses == [] or path.name == "library.py"


def dotted(node: ast.AST) -> str:
    """torch.linalg.norm as text; "" for what is no chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (start := dotted(node.value)):
        return f"{start}.{node.attr}"
    return ""


def private_torch_names(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Attribute):
            names = [dotted(node)]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            private = [p for p in parts[1:] if p.startswith("_") and not p.startswith("__")]
            if private and parts[0] in ("torch", "forward_ad") and parts[1] != "ops":
                found.append(f"{node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_of_torch_are_in_one_file(path):
    assert private_torch_names(path.read_text()) == [] or path.name == "private.py"


def marked_lines(source: str) -> set[int]:
    """Of an example, those that a check has to find: they end in "# found"."""
    return {i for i, line in enumerate(source.split("\n"), 1) if line.endswith("# found")}


def lines(found: list[str]) -> set[int]:
    """Their numbers, of "NUMBER: what was found"."""
    return {int(text.partition(":")[0]) for text in found}


def test_the_check_sees_private_names():
    source = """
import torch
from torch.autograd import forward_ad
from torch._guards import detect_fake_mode  # found
import torch._dynamo  # found
from torch.autograd.function import _SingleLevelFunction  # found
torch._C._functorch.is_batchedtensor(t)  # found
forward_ad._current_level  # found
torch.__version__
self._torch
"""
    assert lines(private_torch_names(source)) == marked_lines(source)


# Calls that make a tensor in the default dtype or on the default device unless both are given.
FACTORY_NAMES = (
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace",
    "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor",
    "tensor", "zeros", "tril_indices", "triu_indices", "hann_window", "Tensor", "FloatTensor",
    "DoubleTensor", "LongTensor", "fft.fftfreq", "fft.rfftfreq", "sparse_coo_tensor",
    "sparse_csr_tensor",
)  # fmt: skip
FACTORIES = {f"torch.{name}" for name in FACTORY_NAMES}


def tensors_made_by_default(source: str) -> list[str]:
    found = []
    tree = ast.parse(source)
    literals = {  # name = {"dtype": ..., "device": ...} or dict(dtype=..., device=...)
        target.id: _literal_keys(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        name = dotted(node.func if isinstance(node, ast.Call) else node)
        if isinstance(node, ast.Call) and name in FACTORIES:
            given = set()
            for keyword in node.keywords:
                unpacked = keyword.value
                if keyword.arg:
                    given.add(keyword.arg)
                elif isinstance(unpacked, ast.Name):
                    given |= literals.get(unpacked.id, set())
                else:
                    given |= _literal_keys(unpacked)
            if not {"dtype", "device"} <= given:
                found.append(f"{node.lineno}: {name}")
        elif name in (
            "torch.get_default_dtype",
            "torch.get_default_device",
            "torch.set_default_dtype",
        ):
            found.append(f"{node.lineno}: {name}")
    return sorted(set(found))


def _literal_keys(node) -> set[str]:
    if isinstance(node, ast.Dict):
        return {key.value for key in node.keys if isinstance(key, ast.Constant)}
    if isinstance(node, ast.Call) and dotted(node.func) == "dict":
        return {keyword.arg for keyword in node.keywords if keyword.arg}
    return set()


@pytest.mark.parametrize(
    "path",
    # the experiments are programs, whose process is their own
    [p for p in FILES if "experiments" not in p.parts],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_no_tensor_is_made_in_the_default_dtype_or_on_the_default_device(path):
    """They are the user's, and may change between two calls: every tensor of ours says its dtype
    and device."""
    assert tensors_made_by_default(path.read_text()) == []


def test_the_check_sees_defaults():
    source = """
torch.zeros(2)  # found
torch.arange(3, device=d)  # found
torch.full((2,), 1.0, dtype=t)  # found
torch.fft.fftfreq(3)  # found
a.to(torch.get_default_dtype())  # found
like = {"dtype": t, "device": d}
torch.eye(3, **like)
torch.ones(1, dtype=t, device=d)
torch.Generator(device=d)
x.new_zeros(3)
torch.rand(2, **other)  # found
torch.tensor(1.0, **dict(dtype=t, device=d))
torch.as_tensor(a, dtype=t)  # found
"""
    assert lines(tensors_made_by_default(source)) == marked_lines(source)


def long_functions(source: str) -> dict[str, int]:
    """Lines of code, without the docstring, of functions that have more than 60; kernels 120."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body
            if ast.get_docstring(node) is not None and len(body) > 1:
                body = body[1:]
            kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
            lines = node.end_lineno - body[0].lineno + 1
            if lines > (120 if kernel else 60):
                found[node.name] = lines
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_stay_short(path):
    assert long_functions(path.read_text()) == {}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    assert path.read_text().count("\n") <= 400


def test_an_op_has_its_twin_and_its_kernel():
    """One stem in ops/ and csrc/, and a Triton kernel."""
    ops = [p.parent.name for p in (PACKAGE / "ops").glob("*/reference.py")]
    assert sorted(ops) == sorted(TABLE)
    assert [op for op in ops if not (PACKAGE / "ops" / op / "__init__.py").exists()] == []
    compiled = {p.stem for p in (ROOT / "csrc").rglob("*.cpp")}
    assert [op for op in ops if op not in compiled] == []
    without = [op for op in ops if not (PACKAGE / "ops" / op / "triton.py").exists()]
    in_pytorch = {"draw", "average", "mixture_posterior", "mixture_matvec", "mixture_diagonal"}
    assert set(without) <= in_pytorch  # on CUDA


@pytest.mark.parametrize("path", ["Makefile", "tests/__main__.py"])
def test_the_test_files_that_are_named_exist(path):
    named = set(re.findall(r"tests/[\w/]+\.py", (ROOT / path).read_text()))
    assert named and sorted(n for n in named if not (ROOT / n).is_file()) == []


def test_no_merge_was_left_unfinished():
    """A conflict in a document breaks nothing else."""
    folders = ["dfkernels", "csrc", "tests", "bench", "docs", "experiments", "examples", "tools"]
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    texts = [p for p in [*files, *ROOT.glob("*.*")] if p.suffix in TEXTS]
    marked = re.compile(r"^(<{7}|>{7}) ", re.MULTILINE)
    assert texts and [p for p in texts if marked.search(p.read_text())] == []
