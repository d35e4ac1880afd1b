"""Which dtypes queries, and stored atoms, may have."""

from __future__ import annotations

import torch

from . import words

__all__ = ["COMPUTED", "STORED", "STORED_BY_NAME", "STORED_IN_WORDS"]

COMPUTED = (torch.float32, torch.float64)
STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8)
STORED_BY_NAME = {words.dtype(dtype): dtype for dtype in STORED}
STORED_IN_WORDS = "float64, float32, float16, bfloat16 or uint8"  # for errors
