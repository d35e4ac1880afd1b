"""Methods built from the ops, one per file, for a network of any convention or for the data set
itself."""

from __future__ import annotations

from . import (
    adjoint,
    ancestral,
    audit,
    audit_page,
    called,
    classifier_free,
    convention,
    denoiser,
    endpoint,
    grid,
    guided_likelihood,
    langevin,
    latents,
    likelihood,
    monte_carlo,
    networks,
    nsgf,
    particles,
    reflow,
    samplers,
    sharded,
    sinkhorn,
    trace_matching,
    training,
    transport,
)
from .called import Called
from .denoiser import Denoiser

__all__ = [
    "Called",
    "Denoiser",
    "adjoint",
    "ancestral",
    "audit",
    "audit_page",
    "called",
    "classifier_free",
    "convention",
    "denoiser",
    "endpoint",
    "grid",
    "guided_likelihood",
    "langevin",
    "latents",
    "likelihood",
    "monte_carlo",
    "networks",
    "nsgf",
    "particles",
    "reflow",
    "samplers",
    "sharded",
    "sinkhorn",
    "trace_matching",
    "training",
    "transport",
]
