"""CG's restart: the recursive residual says that it has converged, and it has not."""

from __future__ import annotations

import torch

import dfkernels as df


class Sloppy(df.DiffusionFisher):
    """Its first products are wrong by one part in a thousand, so that the residuals which CG
    updates by them drift away from the true ones, as they do by rounding in long runs.
    """

    wrong = 4

    def __matmul__(self, v):
        out = super().__matmul__(v)
        if self.wrong == 0:
            return out
        self.wrong -= 1
        return out * (1 + 1e-3 * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype))


def test_a_restart_mends_what_the_recursive_residual_misses():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(50, 12, dtype=torch.float64, generator=generator)
    b = torch.randn(3, 12, dtype=torch.float64, generator=generator)
    F = Sloppy(y[:3] + 0.1, df.PointCloud(y), 0.9, 0.7)
    damping = 1.1 * float(-torch.linalg.eigvalsh(F.to_dense()).min().clamp_max(-0.1))
    found = F.solve_ex(b, damping, tol=1e-10)
    left = b - (F @ found.x + damping * found.x)
    assert F.wrong == 0 and float(found.residual.max()) <= 1e-10
    assert float((left.norm(dim=1) / b.norm(dim=1)).max()) <= 2e-10
