"""CONTRIBUTING.md's layout: imports run one way, files stay short, one file talks to torch.library."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dfkernels"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports from lower layers and from its own group only. schedule and ops share a layer: neither knows
# the other, nor the objects above, since ops take numbers and tensors.
LAYERS = [
    {"_check", "_files", "_progress", "_native", "_backend", "_object", "_op", "_operator"},
    {"schedule", "ops"},
    {"index", "_heaviest"},
    {"cloud"},
    {"fisher"},
    {"top_k"},
    {"methods", "env"},
    {"experiments"},
    {"cli"},
    {"__main__"},
]
LAYER = {group: level for level, groups in enumerate(LAYERS) for group in groups}


def module_name(path: Path) -> list[str]:
    parts = ["dfkernels", *path.relative_to(PACKAGE).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported_groups(source: str, module: list[str], is_package: bool) -> set[str]:
    """First components below dfkernels of everything imported anywhere in `source`, lazy imports included."""
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
            targets = [base + [alias.name] for alias in node.names]
        groups |= {t[1] for t in targets if t[0] == "dfkernels" and len(t) > 1}
    return groups


def violations(group: str, imported: set[str]) -> list[str]:
    """What `group` may not import; a name that is no module counts: import it from where it is defined."""
    level = LAYER[group]
    return sorted(i for i in imported - {group, "__version__"} if LAYER.get(i, len(LAYERS)) >= max(level, 1))


@pytest.mark.parametrize(
    "path", [p for p in FILES if p != PACKAGE / "__init__.py"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_run_one_way(path):
    module = module_name(path)
    imported = imported_groups(path.read_text(), module, path.name == "__init__.py")
    assert violations(module[1], imported) == []


def test_the_check_sees_every_form_of_import():
    source = (
        "import dfkernels.cloud\nfrom dfkernels import fisher, ops\nfrom .. import cli\n"
        "def f():\n    from ..schedule import VP\n    from . import reference\n    from .._op import define"
    )
    module = ["dfkernels", "ops", "posterior"]
    assert imported_groups(source, module, False) == {"cloud", "fisher", "ops", "schedule", "cli", "_op"}
    assert violations("ops", {"cloud", "schedule", "fisher", "cli", "_op", "ops"}) == [
        "cli",
        "cloud",
        "fisher",
        "schedule",
    ]
    assert violations("methods", {"ops", "schedule", "cloud", "fisher", "_check", "methods"}) == []
    assert violations("_check", {"ops"}) == ["ops"]


def test_private_modules_have_no_cycle():
    """The lowest layer may import within itself, but not in a circle."""
    graph = {
        group: imported_groups((PACKAGE / f"{group}.py").read_text(), ["dfkernels", group], False) & LAYERS[0]
        for group in LAYERS[0]
        if (PACKAGE / f"{group}.py").exists()
    }
    while graph:
        leaves = {group for group, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"cycle among {sorted(graph)}"
        graph = {group: needs for group, needs in graph.items() if group not in leaves}


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
                a.name.split(".")[:2] in (["torch", "library"], ["torch", "_library"]) for a in node.names
            )
        )
    ]
    assert uses == [] or path.name == "_op.py"


@pytest.mark.parametrize(
    "limit, paths",
    [
        (200, sorted((PACKAGE / "ops").rglob("*.py"))),
        (400, [p for p in FILES if "ops" not in p.parts]),
        (400, sorted(p for pattern in ("*.cpp", "*.h", "*.cu") for p in (ROOT / "csrc").rglob(pattern))),
    ],
    ids=["ops", "package", "csrc"],
)
def test_files_stay_short(limit, paths):
    assert {
        str(p.relative_to(ROOT)): n for p in paths if (n := len(p.read_text().splitlines())) > limit
    } == {}


def test_an_op_has_its_twin_and_its_kernel():
    """One stem in ops/ and csrc/, and a Triton kernel."""
    ops = [p.parent.name for p in (PACKAGE / "ops").glob("*/__init__.py")]
    assert sorted(ops) == [
        "endpoint_matvec",
        "fisher_dense",
        "fisher_diagonal",
        "fisher_matvec",
        "kept_atoms",
        "matched_trace",
        "posterior",
        "transport_chain",
    ]
    assert [op for op in ops if not (PACKAGE / "ops" / op / "reference.py").exists()] == []
    assert [op for op in ops if not (ROOT / "csrc" / f"{op}_cpu.cpp").exists()] == []
    assert [op for op in ops if not (PACKAGE / "ops" / op / "triton.py").exists()] == []
