"""The state from which a sampler starts."""

from __future__ import annotations

import warnings

from torch import Tensor

from .._torch import check
from .grid import Nodes

__all__ = ["warn_of_little_noise"]

# of so many numbers or more, alpha x_0 + sigma eps has a root mean square below sigma/2 with a
# probability of at most 2e-9, whatever x_0 is (Chernoff's bound for chi^2)
_NUMBERS = 64


def warn_of_little_noise(name: str, x: Tensor, path: Nodes) -> None:
    """Warns, for a sampler `name`, of an x [B, *E] that has not the noise of the first node, as
    where standard normal numbers have not been multiplied by sigma.
    """
    if x.numel() < _NUMBERS or check.values_hidden(x):
        return
    size, sigma = x.detach().square().mean().sqrt().item(), path.sigma[0].item()
    if size < sigma / 2:
        warnings.warn(
            f"{name}: expected x = alpha x_0 + sigma eps with sigma = {sigma:.3g} at t[0], got a "
            f"root mean square of {size:.3g}: was sigma left out, as in sigma * torch.randn?",
            RuntimeWarning,
            stacklevel=3,
        )
