"""Whole pipelines of diffusers: network, scheduler and conditions as a `Denoiser` for each guidance
scale.

Conventions, as read in diffusers 0.42.1 (pipelines/*/pipeline_*.py). With guidance w each forms
out_null + w (out_condition - out_null):

    class                         network               condition            null
    DDPMPipeline, DDIMPipeline    unet                  none
    StableDiffusionPipeline       unet                  the prompt           the prompt ""
    StableDiffusionXLPipeline     unet                  the prompt, sizes    the prompt "", or zeros
    StableDiffusion3Pipeline      transformer, clock    the prompt           the prompt ""
                                  1000 sigma
    DiTPipeline                   transformer           a class label        the label after the
                                                                             last class

All but the first work on latents of an autoencoder, after its shift and scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import check
from ..methods._calls import call
from ..methods.classifier_free import ClassifierFreeGuidance
from ..methods.denoiser import Denoiser
from ._adapted import Adapted
from ._timestep import Timestep
from .diffusers import from_diffusers

__all__ = ["PIPELINES", "PipelineFlows", "from_pipeline", "supported"]

_HIGHEST = 100.0  # of the default range: far above any data that a network is trained on
_FLOWS = (0.01, 100.0)  # of models whose levels have no ends
Conditions = dict[str, Any]


@dataclass(frozen=True)
class PipelineFlows:
    """What `from_pipeline` returns."""

    denoiser_at: Callable[[float], Denoiser]  # of the guidance scale; 1: the model's own flow
    shape: tuple[int, ...]  # [C, H, W], that of one sample
    noise: tuple[float, float]  # levels sigma/alpha that the network was trained on
    guided: bool  # whether there is guidance: without, the scale has to be 1
    latents: bool  # whether samples are latents of an autoencoder; else images in [-1, 1]


class _Model(NamedTuple):
    """What differs between the pipelines."""

    network: Any
    conditions: Conditions
    null: Conditions
    clock: Callable[[Tensor], Tensor] | None = None
    latents: bool = True


def from_pipeline(
    pipeline: Any, *, prompt: str | None = None, label: int | None = None
) -> PipelineFlows:
    """The flows of a diffusers pipeline under one condition, for `guided_likelihood` and others.

    >>> pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    >>> flows = from_pipeline(pipeline, prompt="a photograph of an astronaut")
    >>> rows = guided_likelihood(flows.denoiser_at, flows.shape, (1, 3, 7.5), range(8), flows.noise)

    Args:
        pipeline: of one of the classes in PIPELINES. It is asked for its network, scheduler and
            embedding of the prompt by attribute, and stays as it is; samples are where its network
            is.
        prompt: of a text-to-image pipeline. The null condition is the empty prompt.
        label: the class, of a class-conditional pipeline.

    Raises:
        ValueError: The class of the pipeline is not supported, the prompt or label is missing, not
            wanted or unknown, the network was distilled with guidance inside, or the scheduler is
            of an unknown class: the message names it.
    """
    kind = type(pipeline).__name__
    supported(kind)
    with torch.no_grad():
        model = PIPELINES[kind](pipeline, prompt, label)
    scheduler = pipeline.scheduler

    def denoiser_at(scale: float) -> Denoiser:
        network: Adapted | ClassifierFreeGuidance = Timestep(model.network)
        if model.null:
            network = ClassifierFreeGuidance(network, scale, model.null)
        elif scale != 1:
            raise check.mismatch("scale", f"1 with {kind}, which has no guidance", f"{scale:g}")
        each = _ForEachSample(network, "network")
        made = from_diffusers(each, scheduler, clock=model.clock)
        return made.bind(**model.conditions)

    config = model.network.config
    size = config.sample_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    noise = _levels(denoiser_at(1.0), scheduler)
    return PipelineFlows(
        denoiser_at, (config.in_channels, *size), noise, bool(model.null), model.latents
    )


def supported(kind: str) -> None:
    """Raises ValueError, with what is supported, unless PIPELINES has this class of pipeline."""
    if kind in PIPELINES:
        return
    why = ""
    if kind.startswith("Flux"):
        why = ", whose networks are distilled with guidance inside and predict no posterior mean"
    raise check.mismatch("pipeline", f"one of {', '.join(PIPELINES)}", kind + why)


class _ForEachSample(Adapted):
    """A network whose conditions are given once, [1, ...], for a batch of any size."""

    full_precision = True  # `call` casts

    def forward(self, x: Tensor, t: Tensor, **conditions: object) -> Tensor:
        each = {name: _expanded(condition, len(x)) for name, condition in conditions.items()}
        return call(self.network, x, t, each)


def _expanded(condition: object, n: int) -> object:
    if isinstance(condition, dict):
        return {name: _expanded(entry, n) for name, entry in condition.items()}
    if isinstance(condition, Tensor):
        return condition.expand(n, *condition.shape[1:])
    return condition


def _levels(denoiser: Denoiser, scheduler: Any) -> tuple[float, float]:
    """The range of levels that a network was trained on, as far as it is known."""
    ends = denoiser.schedule.t_range
    if all(map(math.isfinite, ends)):
        snr = denoiser.schedule.log_snr(torch.tensor(ends, dtype=torch.float64, device="cpu"))
        low, high = sorted((snr / -2).exp().tolist())
        if low > 0 and high < math.inf:
            return low, min(high, _HIGHEST)
    given = (getattr(scheduler.config, name, None) for name in ("sigma_min", "sigma_max"))
    low, high = given
    return _FLOWS if low is None or high is None else (float(low), min(float(high), _HIGHEST))


def _unconditional(pipeline: Any, prompt: str | None, label: int | None) -> _Model:
    _unwanted(pipeline, prompt=prompt, label=label)
    return _Model(pipeline.unet, {}, {}, latents=False)


def _stable_diffusion(pipeline: Any, prompt: str | None, label: int | None) -> _Model:
    _wanted(pipeline, prompt, label)
    _undistilled(pipeline)
    text, empty = _encoded(pipeline, prompt)
    return _Model(pipeline.unet, {"encoder_hidden_states": text}, {"encoder_hidden_states": empty})


def _stable_diffusion_xl(pipeline: Any, prompt: str | None, label: int | None) -> _Model:
    _wanted(pipeline, prompt, label)
    _undistilled(pipeline)
    text, empty, pooled, empty_pooled = _encoded(pipeline, prompt)
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    # original size, upper left corner of the crop, target size: of an image that is not cropped
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=text.dtype, device=text.device)

    def condition(text: Tensor, pooled: Tensor) -> Conditions:
        added = {"text_embeds": pooled, "time_ids": sizes}
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}

    return _Model(pipeline.unet, condition(text, pooled), condition(empty, empty_pooled))


def _stable_diffusion_3(pipeline: Any, prompt: str | None, label: int | None) -> _Model:
    _wanted(pipeline, prompt, label)
    text, empty, pooled, empty_pooled = _encoded(pipeline, prompt, prompt_2=None, prompt_3=None)
    return _Model(
        pipeline.transformer,
        {"encoder_hidden_states": text, "pooled_projections": pooled},
        {"encoder_hidden_states": empty, "pooled_projections": empty_pooled},
        clock=lambda sigma: 1000 * sigma,
    )


def _dit(pipeline: Any, prompt: str | None, label: int | None) -> _Model:
    _unwanted(pipeline, prompt=prompt)
    classes = pipeline.transformer.config.num_embeds_ada_norm
    if label is None:
        raise check.mismatch("label", f"a class of {type(pipeline).__name__}", "None")
    label = check.integer("label", label, 0, classes - 1)
    device = next(pipeline.transformer.parameters()).device
    given = torch.tensor([label], dtype=torch.int64, device=device)
    return _Model(pipeline.transformer, {"class_labels": given}, {"class_labels": classes})


PIPELINES: dict[str, Callable[[Any, str | None, int | None], _Model]] = {
    "DDPMPipeline": _unconditional,
    "DDIMPipeline": _unconditional,
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "DiTPipeline": _dit,
}


def _encoded(pipeline: Any, prompt: str | None, **more: object) -> tuple[Tensor, ...]:
    """What `encode_prompt` makes of the prompt and of the empty one, each [1, ...]."""
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    device = next(network.parameters()).device
    return pipeline.encode_prompt(
        prompt=prompt,
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        **more,
    )


def _wanted(pipeline: Any, prompt: str | None, label: int | None) -> None:
    """Refuses a missing prompt, and a label."""
    _unwanted(pipeline, label=label)
    if not isinstance(prompt, str):
        came = "None" if prompt is None else type(prompt).__name__
        raise check.mismatch("prompt", f"a text for {type(pipeline).__name__}", came)


def _unwanted(pipeline: Any, **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            takes = f"None with {type(pipeline).__name__}, which takes none"
            raise check.mismatch(name, takes, repr(value))


def _undistilled(pipeline: Any) -> None:
    if getattr(pipeline.unet.config, "time_cond_proj_dim", None) is not None:
        raise check.mismatch(
            "pipeline",
            "a network without guidance inside",
            "one distilled with it (time_cond_proj_dim), which predicts no posterior mean",
        )
