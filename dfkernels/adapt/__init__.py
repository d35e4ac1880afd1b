"""Adapters to other libraries, in both directions.

`from_*` make a `Denoiser` of a library's network, and `as_*` make of a data set an exact network in
a library's convention, for its samplers. None of the libraries is imported: what an adapter needs
it asks for by attribute.
"""

from __future__ import annotations

from .azula import as_azula, from_azula
from .diffusers import as_diffusers, from_diffusers
from .edm import as_edm, from_edm, from_k_diffusion
from .flow_matching import as_torchcfm, as_velocity, from_flow_matching, from_torchcfm
from .pipelines import from_pipeline
from .score_sde import from_score_sde

__all__ = [
    "as_azula",
    "as_diffusers",
    "as_edm",
    "as_torchcfm",
    "as_velocity",
    "from_azula",
    "from_diffusers",
    "from_edm",
    "from_flow_matching",
    "from_k_diffusion",
    "from_pipeline",
    "from_score_sde",
    "from_torchcfm",
]
