"""Types that public functions take."""

from __future__ import annotations

from typing import SupportsFloat, TypeAlias

from torch import Tensor

# alpha or sigma: a number of any library, or a tensor or NumPy array of real numbers, [] or [B]
Level: TypeAlias = SupportsFloat | Tensor
