"""Breaks the code, one place at a time, and reports whether the tests notice: `make mutants`.

A mutant is a piece of the package's text, another text for it, and the tests that should fail then.
The package and the tests are copied to a temporary folder, where they are changed; the checkout
never is. Exit status 1 if a mutant survives, if its text is not found exactly once, or if its tests
fail without it.

    python tests/mutants.py [WORD ...]    only mutants whose name contains one of the words
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import hypothesis  # noqa: F401
import pytest
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """`old` occurs once in the Python files of the package; `tests` is what pytest is given."""

    name: str
    old: str
    new: str
    tests: str


ROUNDING = "tests/test_certified_rounding.py"
SHARP = "tests/test_certified_sharp.py"
FIELDS = "tests/test_index_fields.py"
STATE = "tests/test_index_state.py"
MASKED = "tests/test_certified_masked.py"
GRADCHECK = "tests/test_gradcheck.py::test_first_derivatives"

MUTANTS = [
    # the formulas of the results' bounds
    Mutant(
        "fisher_error: alpha/sigma^2, not its square",
        "size = (ratio * self._radius) ** 2",
        "size = ratio * self._radius**2",
        SHARP,
    ),
    Mutant(
        "fisher_error: R, not R^2",
        "size = (ratio * self._radius) ** 2",
        "size = ratio**2 * self._radius",
        SHARP,
    ),
    Mutant(
        "mean_error: no radius",
        ".norm(dim=1) + found.named_limits.radius",
        ".norm(dim=1)",
        SHARP,
    ),
    # rounding, where an index is built
    Mutant(
        "index: no allowance for rounding",
        "self.sums_in_double = double_sums(d, K)",
        "self.sums_in_double = 0.0",
        ROUNDING,
    ),
    Mutant(
        "index: none in the coarse remainder_norm",
        "left = left + sums * (square + code_square)\n",
        "left = left\n",
        ROUNDING,
    ),
    Mutant(
        "index: none in the coarse axis_error",
        "(h - code).norm(dim=1) * FEW_ROUNDINGS + sums * square.sqrt()",
        "(h - code).norm(dim=1) * FEW_ROUNDINGS",
        ROUNDING,
    ),
    Mutant(
        "index: none in the fine remainder_norm",
        "remainder.norm(dim=1) * FEW_ROUNDINGS + sums * square.sqrt()",
        "remainder.norm(dim=1) * FEW_ROUNDINGS",
        ROUNDING,
    ),
    Mutant("index: none in the fine axis_error", " + 4 * sums * square.sqrt())", ")", ROUNDING),
    Mutant(
        "index: no skew",
        "skew = torch.linalg.matrix_norm(V @ V.T - torch.eye(K, **_F64))",
        "skew = torch.zeros((), **_F64)",
        ROUNDING,
    ),
    Mutant(
        "index: not rounded up",
        "return torch.nextafter(t.float(), torch.full_like(t, math.inf, dtype=torch.float32))",
        "return t.float()",
        ROUNDING,
    ),
    Mutant(
        "index: the largest |y| without the centre",
        "coordinate_norm = radius + 2 * centre.norm()",
        "coordinate_norm = radius",
        ROUNDING,
    ),
    # rounding, in the bounds of a query
    Mutant(
        "bounds: no error of coordinates", "COORDINATES = 2.0**-48", "COORDINATES = 0.0", ROUNDING
    ),
    Mutant(
        "bounds: exact logits without rounding",
        "return 4 * UNIT * (d + 8)",
        "return 0.0",
        ROUNDING,
    ),
    Mutant("bounds: |t| not rounded", " + STORED_NORM * sizes", "", ROUNDING),
    Mutant(
        "bounds: sums in double do not round",
        "return double_sums(self.x.shape[1], K)",
        "return 0.0",
        ROUNDING,
    ),
    Mutant(
        "bounds: query_remainder without rounding",
        " + skew * a_square + sums * (z_square + a_square)",
        " + skew * a_square",
        ROUNDING,
    ),
    Mutant(
        "bounds: code_error without skew",
        "skew * on_axes + sums * self.z_norm)",
        "sums * self.z_norm)",
        ROUNDING,
    ),
    Mutant(
        "bounds: the fine code_error like the coarse one",
        "code_error = 4 * self._double_sums",
        "code_error = self._double_sums",
        ROUNDING,
    ),
    # the search
    Mutant(
        "search: no gap",
        "return self.kth_logit - self.gap - self.coordinate_error",
        "return self.kth_logit - self.coordinate_error",
        SHARP,
    ),
    Mutant(
        "search: the lightest go twice over",
        "* (1 - 1e-6) - self.dropped_weight()[:, None]",
        "* 2",
        SHARP,
    ),
    Mutant(
        "search: what is dropped is not added up",
        "for upper in self.dropped)",
        "for upper in self.dropped[:1])",
        SHARP,
    ),
    Mutant("search: remote atoms count once", " + count * (1 + 1e-9)", "", MASKED),
    Mutant(
        "search: remote atoms are forgotten",
        "self.has_unknown_atom | remote_atoms_matter | ",
        "self.has_unknown_atom | ",
        MASKED,
    ),
    Mutant(
        "search: unknown atoms are forgotten", "return self.has_unknown_atom | ", "return ", MASKED
    ),
    Mutant(
        "index: masked atoms are part of it",
        "self.known = known & ~distance.isnan()",
        "self.known = torch.ones_like(known)",
        MASKED,
    ),
    Mutant(
        "index: remote atoms are part of it",
        "self.remote = self._remote(distance) & self.known",
        "self.remote = torch.zeros_like(self.known)",
        MASKED,
    ),
    # what an index is made of
    Mutant("fields: dtypes unchecked", "if t.dtype != FIELDS[name].dtype:", "if False:", FIELDS),
    Mutant("fields: shapes unchecked", "if list(t.shape) != expected:", "if False:", FIELDS),
    Mutant(
        "fields: values unchecked in a file",
        "        check_values(index)\n    except",
        "        pass\n    except",
        FIELDS,
    ),
    Mutant(
        "fields: values unchecked in the op",
        "    check_values(index)\n    x = sought.x",
        "    x = sought.x",
        FIELDS,
    ),
    Mutant(
        "fields: layout unchecked in a file",
        '        check_layout(index, shape_of(cloud), torch.device("cpu"))\n',
        "",
        FIELDS,
    ),
    Mutant(
        "index: the default dtype",
        '_F32 = {"dtype": torch.float32, "device": "cpu"}',
        '_F32 = {"device": "cpu"}',
        STATE,
    ),
    Mutant(
        "index: the default device",
        '_F32 = {"dtype": torch.float32, "device": "cpu"}',
        '_F32 = {"dtype": torch.float32}',
        STATE,
    ),
    Mutant("index: autocast", ', torch.autocast("cpu", enabled=False):', ":", STATE),
    Mutant(
        "index: inference mode",
        "with torch.inference_mode(False), torch.no_grad()",
        "with torch.no_grad()",
        STATE,
    ),
    # first derivatives
    Mutant(
        "derivatives: those in stored atoms without their scale",
        'grads["y"] *= stored.scale',
        "pass",
        f"{GRADCHECK}[posterior-affine]",
    ),
    Mutant(
        "derivatives: kernels with another shift",
        'shift = z["shift"] - half_square(x, alpha, sigma, reference)',
        'shift = z["shift"]',
        f"{GRADCHECK}[fisher_matvec-plain]",
    ),
    Mutant(
        "derivatives: tiles without the lists",
        "    if a.atoms is not None and a.counts is not None:",
        "    if False:",
        f"{GRADCHECK}[fisher_dense-lists]",
    ),
    # elsewhere
    Mutant(
        "solve: no restart",
        "todo = (residual > tol) & (residual < before / 2)",
        "todo = torch.zeros_like(todo)",
        "tests/test_sharp_solve.py",
    ),
    Mutant(
        "t_of_log_snr: wide ends",
        "* torch.finfo(t.dtype).eps * max(hi, 1.0)",
        "* 1e5 * torch.finfo(t.dtype).eps * max(hi, 1.0)",
        "tests/test_sharp_schedule.py",
    ),
    # parts of a data set, and a law known by a sampler
    Mutant(
        "merge: the distance of the parts' means left out of V",
        "average(a.variance, b.variance, (flat * flat).sum(1))",
        "average(a.variance, b.variance)",
        "tests/test_partial.py",
    ),
    Mutant(
        "merge: Q with the parts' shares unsquared",
        "p**2 * a.weight_square + q**2 * b.weight_square",
        "p * a.weight_square + q * b.weight_square",
        "tests/test_partial.py",
    ),
    Mutant(
        "Partial: a log mass in float32",
        "log_mass=log_density_in_double(z, found[0]) + log_weight",
        "log_mass=log_density_in_double(z, found[0]).float().double() + log_weight",
        "tests/test_partial.py",
    ),
    Mutant(
        "ShardedCloud: trusts a file whose time is another one",
        "seen[0] == self.manifest.shards[i].mtime_ns",
        "True",
        "tests/test_sharded.py",
    ),
    Mutant(
        "ShardedCloud: a gradient that takes the shares' changes for none",
        "share = torch.exp(part.log_mass - total.log_mass)",
        "share = torch.exp(part.log_mass.detach() - total.log_mass)",
        "tests/test_sharded_law.py",
    ),
    Mutant(
        "ShardedCloud: a gradient of Q without its normalisation",
        "share**2 * part.weight_square - 2 * total.weight_square * share",
        "share**2 * part.weight_square",
        "tests/test_sharded_law.py",
    ),
    Mutant(
        "monte_carlo: errors of groups instead of those of their mean",
        "(spread(name) * (G - 1) / G).sqrt()",
        "(spread(name) / (G - 1)).sqrt()",
        "tests/test_monte_carlo.py",
    ),
    # random samplers
    Mutant(
        "metropolis: the proposals' ratio upside down",
        "return there.log_prob - here.log_prob + back",
        "return there.log_prob - here.log_prob - back",
        "tests/test_langevin.py",
    ),
    Mutant(
        "damped: eigenvalues without their modulus",
        "return 1 / (values.abs() + self.damping)",
        "return 1 / (values + self.damping)",
        "tests/test_langevin.py",
    ),
    Mutant(
        "ancestral: the covariance grows with s, not with its square",
        "rest * (s / s_to) ** 2",
        "rest * (s / s_to)",
        "tests/test_ancestral.py",
    ),
    Mutant(
        "functions of a matrix: an exhausted space is left with zeros",
        "middle = torch.where(last.any(-1), middle, diagonal[0])",
        "pass",
        "tests/test_linalg.py -k functions_of",
    ),
]


def place(mutant: Mutant) -> Path:
    """The file that holds the text, relative to the root. Raises ValueError unless there is one
    place."""
    files = [p for p in sorted((ROOT / "dfkernels").rglob("*.py")) if mutant.old in p.read_text()]
    count = sum(p.read_text().count(mutant.old) for p in files)
    if count != 1:
        raise ValueError(
            f"{mutant.name}: expected its text once in dfkernels/, got {count} times:"
            f" {mutant.old!r}"
        )
    return files[0].relative_to(ROOT)


def copied(folder: Path) -> None:
    """What the tests need of the checkout."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("csrc", "dfkernels", "tests", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)


def passes(folder: Path, tests: str) -> bool:
    """Whether these tests pass there, in a fork of this process, which has imported torch once for
    all. Raises RuntimeError where pytest finds none.
    """
    log = folder / "log.txt"
    child = os.fork()
    if child == 0:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        sys.dont_write_bytecode = True
        ours = {str(ROOT), str(ROOT / "tests")}
        sys.path = [str(folder), str(folder / "tests"), *(p for p in sys.path if p not in ours)]
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests.split()])))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1, 2):  # 2: the broken package cannot be imported
        raise RuntimeError(f"pytest {tests}: status {code}\n{log.read_text()[-2000:]}")
    return code == 0


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    places = [place(m) for m in chosen]
    survived = []
    with tempfile.TemporaryDirectory(prefix="dfkernels-mutants-") as name:
        folder = Path(name)
        copied(folder)
        for tests in dict.fromkeys(m.tests for m in chosen):
            if not passes(folder, tests):
                raise RuntimeError(f"{tests}: fails without any mutant")
            print(f"        passes   {tests} without any mutant", flush=True)
        for i, (mutant, path) in enumerate(zip(chosen, places, strict=True), 1):
            text = (folder / path).read_text()
            (folder / path).write_text(text.replace(mutant.old, mutant.new))
            caught = not passes(folder, mutant.tests)
            (folder / path).write_text(text)
            survived += [] if caught else [mutant.name]
            print(
                f"{i:3}/{len(chosen)} {'caught' if caught else 'SURVIVED':8} {mutant.name}"
                f" ({path})",
                flush=True,
            )
    print(
        f"{len(chosen) - len(survived)} of {len(chosen)} mutants caught"
        + "".join(f"\n  survived: {s}" for s in survived)
    )
    return int(bool(survived))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
