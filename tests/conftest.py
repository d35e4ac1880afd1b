from __future__ import annotations

import os
import sys
from pathlib import Path

# torch.compile keeps compiled graphs between processes and knows them by the names of the ops in
# them, not by what the ops' derivatives were then.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from torch_state import restore, state


def pytest_collection_modifyitems(items):
    """The slow ones first: side by side, none of them is left over when everything else is done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _state_of_torch():
    """Uninitialised memory is NaN, so that an element that no kernel writes shows. A test that
    leaves torch's global state changed fails, and the next one starts from the old state.
    """
    outside = state()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    before = state()
    yield
    leaked = {name: value for name, value in state().items() if value != before[name]}
    restore(outside)
    if leaked:
        pytest.fail(f"the test left torch's global state changed: {leaked}")
