"""What the tests with other libraries share beside small_data: k-diffusion."""

from __future__ import annotations

import sys
from types import ModuleType
from unittest import mock

import pytest

# What `import k_diffusion` asks for beyond samplers and wrappers: metrics, augmentation, configs.
UNUSED = (
    "clip",
    "cleanfid",
    "cleanfid.inception_torchscript",
    "jsonmerge",
    "skimage",
    "torchvision",
    "torchvision.transforms",
)


@pytest.fixture(scope="module")
def k_diffusion():
    """The library, with empty modules for what its samplers and wrappers do not use."""
    empty = {}
    for name in UNUSED:
        empty[name] = module = ModuleType(name)
        module.__getattr__ = lambda attribute: mock.MagicMock()
        module.__path__ = []
    with mock.patch.dict(sys.modules, empty):
        return pytest.importorskip("k_diffusion")
