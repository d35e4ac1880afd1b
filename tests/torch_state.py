"""torch's state for the whole process: read, set back, and set for a while."""

from __future__ import annotations

import contextlib

import pytest
import torch


def state() -> dict[str, object]:
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


def restore(saved: dict[str, object]) -> None:
    """Inference mode alone cannot be set from here; it ends with its `with` block."""
    torch.set_default_dtype(saved["default dtype"])
    torch.set_num_threads(saved["threads"])
    torch.set_grad_enabled(saved["grad mode"])
    torch.set_autocast_enabled("cpu", saved["autocast"])
    if torch.get_default_device() != saved["default device"]:
        torch.set_default_device(saved["default device"])
    warn_only = saved["deterministic, warn only"]
    torch.use_deterministic_algorithms(saved["deterministic"], warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = saved["fill uninitialized memory"]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def one_thread():
    """For tests of many small calls, which import it: waking another thread for each takes longer
    than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
