"""What some tests need, and are left out without."""

from __future__ import annotations

import pytest

from dfkernels._torch import native

needs_native = pytest.mark.skipif(not native.available, reason=f"no compiled part: {native.reason}")
