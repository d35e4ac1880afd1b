"""Types that public functions take."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

# alpha or sigma: a number, or a tensor of real numbers, [] or [B]; those of NumPy are taken as well
Level: TypeAlias = float | Tensor
