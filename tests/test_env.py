"""`python -m dfkernels env` says what is loaded, what is not, and why."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from needs import needs_native

import dfkernels
from dfkernels._torch import backend, native
from dfkernels.cli import env


def run_env(**variables: str) -> dict[str, str]:
    """Rows of the printed table, in a fresh process."""
    run = subprocess.run(
        [sys.executable, "-m", "dfkernels", "env"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    return dict(line.strip().split("  ", 1) for line in run.stdout.splitlines())


def test_environment_is_plain_and_true():
    found = env.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["dfkernels"] == dfkernels.__version__
    assert (found["python"], found["torch"]) == (platform.python_version(), str(torch.__version__))
    assert found["threads"] == torch.get_num_threads()
    assert len(found["cuda"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert (
        found["native"]["available"] == native.available
        and found["native"]["reason"] == native.reason
    )
    assert found["backends"] == backend.reasons()


def test_a_missing_distribution_is_said():
    assert env._version("no-such-distribution-as-this") == "not installed"


def test_table_says_why_not():
    found = {
        **env.environment(),
        "cuda": ["H, capability 9.0, 80 GiB"],
        "native": {"available": False, "reason": "no C++ compiler"},
        "backends": {"native-cpu": "no C++ compiler", "pytorch": ""},
    }
    lines = env.table(found).splitlines()
    assert lines[-4:] == [
        "cuda:0              H, capability 9.0, 80 GiB",
        "native              not loaded: no C++ compiler",
        "backend native-cpu  cannot run: no C++ compiler",
        "backend pytorch     can run",
    ]


@pytest.mark.slow
def test_the_command_without_the_compiled_part():
    rows = {key: value.strip() for key, value in run_env(DFKERNELS_NATIVE="0").items()}
    assert rows["native"] == "not loaded: DFKERNELS_NATIVE=0"
    assert rows["backend native-cpu"] == "cannot run: DFKERNELS_NATIVE=0"
    assert rows["backend pytorch"] == "can run"
    assert rows["torch"] == str(torch.__version__)


@needs_native
@pytest.mark.parametrize("isa", native.info().get("isa_levels", [])[:1])
def test_the_instruction_set_can_be_chosen(isa):
    rows = {key: value.strip() for key, value in run_env(DFKERNELS_ISA=isa).items()}
    assert rows["instruction set"] == f"{isa} (of {', '.join(native.info()['isa_levels'])})"


@needs_native
def test_an_instruction_set_that_is_not_there():
    rows = {key: value.strip() for key, value in run_env(DFKERNELS_ISA="v9").items()}
    assert rows["instruction set"].startswith(
        "none: DFKERNELS_ISA is 'v9', which is none of the instruction sets that were compiled and"
        " that this CPU has: base"
    )
