"""diffusers: schedulers, and models that return an object with `.sample`.

Conventions, as read in diffusers 0.42.1 (schedulers/scheduling_*.py), for x = alpha x_0 + sigma
eps, s = sigma/alpha and ac = `alphas_cumprod`. What a model is given and what it returns depends on
the class of its scheduler:

    "table"  DDPM, DDIM, PNDM, Euler, Heun, DPM-Solver, UniPC, ... with `alphas_cumprod`:
             alpha^2 = ac[t], sigma^2 = 1 - ac[t]. The samplers in x/alpha coordinates (those with
             `scale_model_input`) scale back before they call the model. t = 0 is the least noise,
             not none.
    "flow"   FlowMatchEuler, FlowMatchHeun, FlowMatchLCM, or `use_flow_sigmas`: alpha = 1 - sigma,
             `timesteps` = 1000 sigma, the model returns eps - x_0. With `invert_sigmas` (Mochi) the
             clock runs backwards and the model returns x_0 - eps.
    "edm"    EDMEuler, EDMDPMSolverMultistep, CosineDPMSolverMultistep, or EulerDiscrete with
             continuous v-prediction: alpha = 1; the model is given x/(s^2 + d^2)^(1/2), d =
             `sigma_data`, and ln(s)/4 (Cosine: 2 atan(s)/pi), and returns F with x_0 = c_skip x +
             c_out F, c_skip = d^2/(s^2 + d^2), c_out = s d/(s^2 + d^2)^(1/2), negative for
             v-prediction.
    "ve"     ScoreSdeVe: alpha = 1; the model is given sigma and returns the score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..law import Law
from ..methods._calls import call
from ..methods.denoiser import Denoiser
from ..schedule import EDM, RectifiedFlow, ReversedRectifiedFlow, Tabulated
from ..schedule._tabulated import FLOOR, floored
from ._adapted import Adapted
from ._exact import ExactNetwork, column, positive, times
from ._schedulers import Edm, Flow, Table, convention
from ._timestep import Timestep

__all__ = ["ExactDiffusers", "ModelOutput", "as_diffusers", "from_diffusers"]


class ModelOutput(NamedTuple):
    """What diffusers' models return: an object with `sample`, whose first entry it is."""

    sample: Tensor


def from_diffusers(
    model: Callable[..., object],
    scheduler: object,
    *,
    clock: Callable[[Tensor], Tensor] | None = None,
    discrete: bool = False,
) -> Denoiser:
    """The denoiser of a diffusers model, of the kind that its scheduler says.

    >>> denoiser = from_diffusers(unet, scheduler)
    >>> denoiser = from_diffusers(unet, scheduler).bind(encoder_hidden_states=embedding)
    >>> denoiser = from_diffusers(sd3_transformer, scheduler, clock=lambda sigma: 1000 * sigma)

    Args:
        model: a UNet or transformer, or any callable with the arguments x and `timestep`; one
            without an argument of that name is called as model(x, t). Outputs are taken as
            `Denoiser` takes them: `.sample`, tuples, the first half of a learned variance's
            channels. A model whose pipeline changes the sign or the clock is given as
            `methods.Called(model, lambda model, x, t, **kw: -model(x, 1 - t, **kw).sample)`.
        scheduler: the one that the model was trained with, or any of diffusers made of its
            configuration: classes, tables and `config.prediction_type` count, sampling options
            (spacing, shift, clipping) do not, since nodes come from `time_grid`.
        clock: what the model is given as its time, from the schedule's t. Needed for flow
            schedulers, since it differs by model: `lambda sigma: 1000 * sigma` for SD3, Wan,
            HunyuanVideo; `lambda sigma: sigma` for Flux and Qwen-Image, whose pipelines divide by
            1000. Elsewhere it follows from the scheduler.
        discrete: for a model that knows the integer timesteps of a table only: t and its level are
            rounded to them.

    Returns:
        A `Denoiser` in the clock of the schedule: for a table the timestep (`schedule.Tabulated`),
        for flows sigma (`ReversedRectifiedFlow`; `RectifiedFlow` for a clock that runs backwards),
        for the others sigma (`EDM`). States are in the coordinates alpha x_0 + sigma eps, also for
        schedulers that sample in x/alpha.

    Raises:
        TypeError: `model` is not callable.
        ValueError: The class of the scheduler is unknown, `clock` is missing or there is none to
            set, or a table that ends with zero SNR comes with a model that predicts the noise.
    """
    found = convention(scheduler)
    kind = type(scheduler).__name__
    if isinstance(found, Flow):
        if clock is None:
            raise ValueError(
                f"clock: expected what the model is given for sigma with {kind}, such as "
                "lambda sigma: 1000 * sigma (SD3) or lambda sigma: sigma (Flux), got None"
            )
        path = RectifiedFlow() if found.backwards else ReversedRectifiedFlow()
        made = Denoiser(Timestep(model), path, found.prediction, clock=clock)
    elif clock is not None and not isinstance(found, Table):
        raise ValueError(f"clock: expected None with {kind}, which says what the model is given")
    elif isinstance(found, Table):
        schedule = Tabulated(_without_zero_snr(found), discrete=discrete)
        return Denoiser(Timestep(model), schedule, found.prediction, clock=clock)
    elif isinstance(found, Edm):
        made = Denoiser(_Preconditioned(model, found), EDM(), "sample")
    else:
        made = Denoiser(Timestep(model), EDM(), "score")
    if discrete:
        raise ValueError(f"discrete: expected False with {kind}, whose models know every level")
    return made


def _without_zero_snr(found: Table) -> Tensor:
    """The table, with a floor for a last entry of 0. diffusers' samplers in sigma/alpha have put
    their floor there already, even where the entry before is below it. Only a noise prediction has
    no information there.
    """
    table = found.scheduler.alphas_cumprod.to("cpu", torch.float64)
    if table[-1] != 0 and not (table[-1] == FLOOR and table[-2] <= FLOOR):
        return table
    if found.prediction == "epsilon":
        raise ValueError(
            "scheduler: expected another prediction_type than 'epsilon' with a table that ends "
            "without signal (rescale_betas_zero_snr): the noise says nothing of the sample there"
        )
    return floored(table)


class _Preconditioned(Adapted):
    """x_0 = c_skip x + c_out F(c_in x, c_noise), at t = sigma."""

    full_precision = True  # of x, which comes back in c_skip x

    def __init__(self, model: Callable[..., object], edm: Edm) -> None:
        super().__init__(Timestep(model), "model")
        self.edm = edm

    def forward(self, x: Tensor, t: Tensor, **conditions: object) -> Tensor:
        skip, out = self.edm.coefficients(t)
        given = column(1 / self.edm.scale(t), x) * x
        answer = call(self.network, given, self.edm.noise(t), conditions)
        return column(skip, x) * x + column(out, x) * answer


def as_diffusers(
    cloud: Law, scheduler: object, *, tolerance: float | None = None
) -> ExactDiffusers:
    """The data set as a diffusers model, for diffusers' schedulers and pipelines.

    >>> unet = as_diffusers(cloud, scheduler)
    >>> images = DDIMPipeline(unet, scheduler)(batch_size=16, num_inference_steps=50).images

    Args:
        cloud: the atoms, in the space in which the model works: images in [-1, 1], or latents
            after the VAE's shift and scale.
        scheduler: of diffusers, or with the same attributes. It says what the model predicts, and
            the level of each timestep: for a scheduler with `sigmas` that of the step in its
            `timesteps`, which is the level that its sampler works at, else its table's.
        tolerance: as in `DiffusionFisher`.

    Raises:
        ValueError: The scheduler is of an unknown class, or wants a variance (a learned
            variance_type) from the model.
    """
    return ExactDiffusers(cloud, scheduler, tolerance)


class _Config(NamedTuple):
    in_channels: int
    out_channels: int
    sample_size: tuple[int, ...]


class ExactDiffusers(ExactNetwork):
    """What `as_diffusers` returns: `model(sample, timestep)` -> an object with `.sample`.

    For images [C, H, W] it has `config.in_channels` and `config.sample_size`, and it has `dtype`
    and `device`, as pipelines ask for.
    """

    dtype = torch.float32  # of the noise that pipelines draw

    def __init__(self, cloud: Law, scheduler: Any, tolerance: float | None) -> None:
        super().__init__(cloud, tolerance)
        self.scheduler, self.convention = scheduler, convention(scheduler)
        variance = getattr(scheduler.config, "variance_type", None)
        if isinstance(variance, str) and variance.startswith("learned"):
            raise ValueError(
                f"scheduler: expected a fixed variance_type, got {variance!r}, which asks the "
                "model for a variance"
            )
        channels, *size = [*cloud.event_shape] or [1]
        self.config = _Config(channels, channels, tuple(size))

    @property
    def device(self) -> torch.device:
        return self.cloud.device

    def forward(
        self, sample: Tensor, timestep: float | Tensor, return_dict: bool = True
    ) -> ModelOutput | tuple[Tensor]:
        """The prediction, [B, *E] in sample's dtype.

        Args:
            sample: [B, *E], floating: the model's input, after `scheduler.scale_model_input`.
            timestep: one number or B, as in `scheduler.timesteps`.
            return_dict: False returns the tuple (prediction,).

        Raises:
            ValueError: The scheduler has no such timestep, or there is no noise at it.
        """
        t = times("timestep", timestep, sample)
        alpha, sigma = self.convention.levels(t)
        scale = self.convention.scale(positive("timestep", sigma, t))
        exact = self.exact(sample, alpha, sigma, scale=scale)
        out = self.convention.output(exact).to(sample.dtype)
        return ModelOutput(out) if return_dict else (out,)
