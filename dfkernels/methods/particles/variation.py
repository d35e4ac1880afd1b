"""What a functional says of the particles: which way is down."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Variation"]


@dataclass(frozen=True, eq=False)
class Variation:
    """The first variation of a functional F at the particles. Any callable that returns it for
    `Particles` is a functional for `Flow`.

    Attributes:
        gradient: G ``[M, *E]``, the gradient of the first variation in the position of each
            particle, in the dtype of x: (1/w_i) dF/dx_i where F is a function of the particles.
        value: Phi [M], dF/dw_i up to a constant. None: it is not known, and weights stay.
        energy: F, up to a constant. NaN: it is not known.
    """

    gradient: Tensor
    value: Tensor | None = None
    energy: float = math.nan
