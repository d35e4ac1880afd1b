from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


# Files whose tests look at one long run: side by side, they stay in one process, which makes that run once.
ONE_RUN = ("test_demo", "test_reproduce", "test_bench_certified")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """The slow ones first: side by side, none of them is left over when everything else is done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.path.stem in ONE_RUN:
                item.add_marker(pytest.mark.xdist_group(item.path.stem))


def _state() -> dict[str, object]:
    """What torch keeps for the whole process, and a test may change only for itself."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic, warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill uninitialized memory": torch.utils.deterministic.fill_uninitialized_memory,
    }


def _restore(state: dict[str, object]) -> None:
    """Inference mode alone cannot be set from here; it ends with its `with` block."""
    torch.set_default_dtype(state["default dtype"])
    torch.set_num_threads(state["threads"])
    torch.set_grad_enabled(state["grad mode"])
    torch.set_autocast_enabled("cpu", state["autocast"])
    if torch.get_default_device() != state["default device"]:
        torch.set_default_device(state["default device"])
    warn_only = state["deterministic, warn only"]
    torch.use_deterministic_algorithms(state["deterministic"], warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = state["fill uninitialized memory"]


@pytest.fixture(autouse=True)
def _state_of_torch():
    """Uninitialised memory is NaN, so that an element that no kernel writes shows. A test that leaves torch's
    global state changed fails, and the next one starts from the old state.
    """
    outside = _state()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    before = _state()
    yield
    leaked = {name: value for name, value in _state().items() if value != before[name]}
    _restore(outside)
    if leaked:
        pytest.fail(f"the test left torch's global state changed: {leaked}")
