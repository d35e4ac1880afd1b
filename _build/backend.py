"""setuptools' build backend, which asks for torch only when the environment has none.

An unpinned torch in build-system.requires would fetch gigabytes of CUDA into every isolated build,
and then compile against another torch than the user's. Only its headers are needed, and those are
on disk.
"""

from __future__ import annotations

from setuptools.build_meta import *  # noqa: F403  the hooks that need no change
from setuptools.build_meta import get_requires_for_build_editable as _editable
from setuptools.build_meta import get_requires_for_build_wheel as _wheel

import native


def torch_requirement() -> list[str]:
    """What an isolated build must install besides build-system.requires: nothing, or torch."""
    try:
        native.compiler()
    except native.NoNative:
        return []  # nothing will be compiled
    return [] if native.find_torch() else ["torch>=" + ".".join(map(str, native.TORCH_MIN))]


def get_requires_for_build_wheel(config_settings=None):
    return _wheel(config_settings) + torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return _editable(config_settings) + torch_requirement()
