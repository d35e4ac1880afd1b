"""diffusers: its schedulers and pipelines over a data set, and our methods over its models."""

from __future__ import annotations

import warnings

import pytest
import torch
from small_data import column, digits, distance, noise

import dfkernels as df
from dfkernels.adapt.diffusers import ExactDiffusers

diffusers = pytest.importorskip("diffusers")

FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
ZERO_SNR = dict(
    prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
)
# Solvers of the ODE, each in the configurations that change what a model is given or returns.
SOLVERS = [
    ("DDIMScheduler", dict(clip_sample=False)),
    ("DDIMScheduler", dict(clip_sample=False, prediction_type="v_prediction")),
    ("DDIMScheduler", dict(clip_sample=False, prediction_type="sample")),
    ("DDIMScheduler", dict(clip_sample=False, beta_schedule="squaredcos_cap_v2")),
    ("DDIMScheduler", dict(clip_sample=False, **ZERO_SNR)),
    ("PNDMScheduler", dict(skip_prk_steps=True)),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", dict(prediction_type="v_prediction")),
    ("EulerDiscreteScheduler", dict(use_karras_sigmas=True)),
    (
        "EulerDiscreteScheduler",
        dict(timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True),
    ),
    ("EulerDiscreteScheduler", ZERO_SNR),
    ("HeunDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", dict(use_karras_sigmas=True)),
    ("KDPM2DiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True)),
    ("DPMSolverMultistepScheduler", FLOW),
    ("DPMSolverSinglestepScheduler", dict(lower_order_final=True)),
    ("DEISMultistepScheduler", dict(prediction_type="v_prediction")),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", FLOW),
    ("UniPCMultistepScheduler", ZERO_SNR),
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0)),
    ("FlowMatchEulerDiscreteScheduler", dict(invert_sigmas=True)),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("EDMEulerScheduler", {}),
    ("EDMEulerScheduler", dict(prediction_type="v_prediction", sigma_data=1.0)),
    ("EDMDPMSolverMultistepScheduler", {}),
]
NOISY = [
    ("DDPMScheduler", dict(clip_sample=False)),
    ("EulerAncestralDiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("LCMScheduler", {}),
    ("FlowMatchLCMScheduler", {}),
    ("CosineDPMSolverMultistepScheduler", {}),
    ("CosineDPMSolverMultistepScheduler", dict(prediction_type="v_prediction")),
    ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++")),
]


def named(case):
    return "-".join([case[0].removesuffix("Scheduler"), *map(str, case[1].values())])


def run(scheduler, model, x, steps):
    """Their loop, as every pipeline has it."""
    scheduler.set_timesteps(steps)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        x = scheduler.step(model(scaled(x, t), t).sample, t, x).prev_sample
    return x


class Watched(ExactDiffusers):
    """Keeps the noise that it finds at every call."""

    def exact(self, x, alpha, sigma, **kwargs):
        found = super().exact(x, alpha, sigma, **kwargs)
        self.seen.append((sigma.float(), found.eps))
        return found


@pytest.mark.parametrize("case", SOLVERS, ids=named)
@pytest.mark.covers("diffusers", "exact")
def test_every_step_of_a_solver_is_at_the_level_that_the_exact_model_answers_for(case):
    """Of one atom every path x = alpha y + sigma eps is a solution, so that a solver which is exact
    for constant eps and x_0 stays on it: the model finds the same noise at every call if, and only
    if, it takes the sampler's levels, scales and signs.
    """
    scheduler = getattr(diffusers, case[0])(**case[1])
    atom = 0.5 * noise(1, 1, 4, 4, seed=1)
    model = Watched(df.PointCloud(atom), scheduler, None)
    model.seen = []
    end = run(scheduler, model, noise(3, 1, 4, 4), 8)
    assert len(model.seen) >= 8
    first = model.seen[0][1]
    for sigma, eps in model.seen:
        # rounding of the state, and of levels and timesteps in float32
        assert ((eps - first).abs() <= 1e-4 + 2e-5 / column(sigma, eps)).all()
    assert torch.isfinite(end).all()


@pytest.mark.parametrize("case", [*SOLVERS[::4], *NOISY], ids=named)
@pytest.mark.covers("diffusers", "exact")
def test_samples_of_an_exact_model_are_atoms(case):
    scheduler, cloud = getattr(diffusers, case[0])(**case[1]), digits()
    torch.manual_seed(0)
    x = run(scheduler, df.adapt.as_diffusers(cloud, scheduler), noise(4, 1, 8, 8), 50)
    assert distance(x, cloud) < 0.03


@pytest.mark.covers("diffusers", "exact")
def test_a_pipeline_takes_the_exact_model_for_a_network():
    scheduler, cloud = diffusers.DDIMScheduler(), digits()
    pipeline = diffusers.DDIMPipeline(df.adapt.as_diffusers(cloud, scheduler), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    made = pipeline(
        batch_size=4, num_inference_steps=30, generator=generator, output_type="np"
    ).images
    images = torch.from_numpy(made).permute(0, 3, 1, 2) * 2 - 1
    assert distance(images, cloud) < 1e-3


@pytest.mark.parametrize(
    "name, options",
    [("DDIMScheduler", dict(clip_sample=False)), ("EulerDiscreteScheduler", {})],
    ids=["DDIM", "Euler"],
)
@pytest.mark.covers("diffusers", "exact")
def test_their_sampler_over_the_exact_model_is_ours_over_the_exact_denoiser(name, options):
    scheduler, cloud = getattr(diffusers, name)(timestep_spacing="leading", **options), digits()
    x = noise(4, 1, 8, 8)
    scheduler.set_timesteps(20)
    theirs = run(scheduler, df.adapt.as_diffusers(cloud, scheduler), x, 20)
    schedule = df.schedule.Tabulated(scheduler.alphas_cumprod)
    denoiser = df.Denoiser.exact(cloud, schedule)
    nodes = scheduler.timesteps.double()
    if name.startswith("Euler"):  # x/alpha
        x = x * scheduler.init_noise_sigma * schedule.alpha(nodes[0]).float()
    path = df.sample(denoiser, x, nodes, method="ddim")
    if name.startswith("Euler"):
        ours = denoiser(path.x[-1], nodes[-1])  # its last step goes to sigma = 0
    else:
        x0, eps = denoiser(path.x[-1], nodes[-1]), denoiser.eps(path.x[-1], nodes[-1])
        alpha = scheduler.final_alpha_cumprod.sqrt()
        ours = alpha * x0 + (1 - alpha**2).sqrt() * eps
    assert (theirs - ours).abs().max() < 1e-4  # float32 steps amplify rounding where modes part


KINDS = [
    ("DDPMScheduler", {}, {}),
    ("DDPMScheduler", dict(prediction_type="v_prediction"), {}),
    ("EulerDiscreteScheduler", dict(beta_schedule="scaled_linear"), {}),
    ("FlowMatchEulerDiscreteScheduler", {}, dict(clock=lambda s: 1000 * s)),
    ("FlowMatchEulerDiscreteScheduler", dict(invert_sigmas=True), dict(clock=lambda t: 1000 * t)),
    ("UniPCMultistepScheduler", FLOW, dict(clock=lambda s: 1000 * s)),
    ("EDMEulerScheduler", {}, {}),
    ("EDMEulerScheduler", dict(prediction_type="v_prediction"), {}),
    ("CosineDPMSolverMultistepScheduler", {}, {}),
    ("ScoreSdeVeScheduler", dict(sigma_max=50.0), {}),
]


@pytest.mark.parametrize(
    "name, options, how", KINDS, ids=lambda v: named((v, {})) if isinstance(v, str) else ""
)
def test_there_and_back_is_the_exact_denoiser(name, options, how):
    scheduler, cloud = getattr(diffusers, name)(**options), digits(dtype=torch.float64)
    denoiser = df.adapt.from_diffusers(df.adapt.as_diffusers(cloud, scheduler), scheduler, **how)
    exact = df.Denoiser.exact(cloud, denoiser.schedule)
    lam = torch.tensor([-6.0, -2.0, 1.0, 5.0], dtype=torch.float64)
    t = denoiser.schedule.t_of_log_snr(lam)
    if isinstance(denoiser.schedule, df.schedule.Tabulated):
        t = t.round()  # between the integers diffusers and we interpolate differently
    # a scheduler's sigmas are float32, and so are its timesteps
    tolerance = 1e-4 if hasattr(scheduler, "sigmas") else 1e-9
    alpha, sigma = denoiser.schedule(t)
    x = noise(4, 1, 8, 8, dtype=torch.float64)
    x = column(alpha, x) * cloud.y[:4] + column(sigma, x) * x
    for method in ("forward", "eps", "score"):
        found, wanted = (getattr(d, method)(x, t) for d in (denoiser, exact))
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max(), method


def test_the_schedule_of_a_table_is_the_table_and_shifts_do_not_count():
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    denoiser = df.adapt.from_diffusers(lambda x, t: x, scheduler)
    alpha, sigma = denoiser.schedule(torch.arange(1000))
    table = scheduler.alphas_cumprod.double()
    assert torch.allclose(alpha**2, table, rtol=1e-12)
    assert torch.allclose(sigma**2, 1 - table, rtol=1e-12)
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    shifted.set_timesteps(10)  # which shifts once more: the sigmas of the table are shifted already
    net = df.adapt.as_diffusers(digits(), shifted)
    assert torch.allclose(
        net.convention.levels(shifted.timesteps.double())[1], shifted.sigmas[:-1].double()
    )


UNET = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    norm_num_groups=8,
    layers_per_block=1,
)


def models():
    """(name, model, scheduler, arguments, shape of a sample, what the model is given for sigma)"""
    torch.manual_seed(0)
    plain = diffusers.UNet2DModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **UNET,
    )
    conditional = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **UNET,
    )
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    sd3 = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )
    flux = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    text, pooled = noise(2, 3, 16, seed=1), noise(2, 16, seed=2)
    vp = diffusers.DDIMScheduler(clip_sample=False)
    v = diffusers.DDIMScheduler(
        clip_sample=False, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {
        "UNet2DModel": (plain, vp, {}, (2, 1, 8, 8), None),
        "UNet2DConditionModel": (
            conditional,
            v,
            dict(encoder_hidden_states=text),
            (2, 4, 8, 8),
            None,
        ),
        "DiT": (dit, vp, dict(class_labels=torch.tensor([1, 2])), (2, 4, 8, 8), None),
        "SD3": (
            sd3,
            flow,
            dict(encoder_hidden_states=text, pooled_projections=pooled),
            (2, 4, 8, 8),
            1000,
        ),
        "Flux": (
            flux,
            flow,
            dict(
                encoder_hidden_states=text,
                pooled_projections=pooled,
                txt_ids=torch.zeros(3, 3),
                img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
            ),
            (2, 16, 16),
            1,
        ),
    }


@pytest.fixture(scope="module")
def networks():
    return models()


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel", "DiT", "SD3", "Flux"])
@pytest.mark.covers("diffusers", "sample")
def test_our_sampler_over_their_model_is_their_sampler(name, networks):
    model, scheduler, arguments, shape, factor = networks[name]
    model = model.eval().requires_grad_(False)
    clock = None if factor is None else lambda sigma: factor * sigma
    denoiser = df.adapt.from_diffusers(model, scheduler, clock=clock).bind(**arguments)
    assert not denoiser.training
    x = noise(*shape)
    scheduler.set_timesteps(6)
    theirs, states = x, []
    for t in scheduler.timesteps:
        states.append(theirs)
        given = t if factor is None else t * factor / 1000
        out = model(theirs, timestep=given.expand(2), **arguments).sample
        out = out[:, : shape[1]]  # of a learned variance
        theirs = scheduler.step(out, t, theirs).prev_sample
    nodes = scheduler.timesteps.double() if factor is None else scheduler.sigmas[:-1].double()
    # a flow starts at alpha = 0, where x says nothing of x_0: we start one step later
    ours = df.sample(denoiser, states[1], nodes[1:], method="ddim").x
    size = states[-1].abs().max()
    for a, b in zip(ours, states[1:], strict=True):
        assert (a - b).abs().max() < 3e-5 * size


@pytest.mark.covers("diffusers", "sample")
def test_guidance_goes_inside(networks):
    model, scheduler, arguments, shape, _ = networks["UNet2DConditionModel"]
    model = model.eval().requires_grad_(False)
    empty = noise(1, 3, 16, seed=7)
    guided = df.ClassifierFreeGuidance(model, 3.0, {"encoder_hidden_states": empty})
    x, t = noise(*shape), torch.tensor([400, 400])
    found = df.adapt.from_diffusers(guided, scheduler)(x, 400, **arguments)
    v = model(x, t, **arguments).sample
    null = model(x, t, encoder_hidden_states=empty.expand(2, 3, 16)).sample
    alpha, sigma = (level.float() for level in df.schedule.Tabulated(scheduler.alphas_cumprod)(400))
    wanted = alpha * x - sigma * (null + 3 * (v - null))
    assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["UNet2DModel", "DiT"])
@pytest.mark.covers("diffusers", "likelihood")
def test_the_likelihood_of_their_model_goes_through_attention(name, networks):
    """By reverse mode: attention has no forward derivative. Equal steps: random weights are stiff
    for a solver that chooses its own.
    """
    model, scheduler, arguments, shape, _ = networks[name]
    model = model.eval().requires_grad_(False)
    denoiser = df.adapt.from_diffusers(model, scheduler).bind(**arguments)
    x = 0.1 * noise(*shape)
    how = dict(noise=(0.1, 100.0), trace="hutchinson", method="rk4", steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # four steps are few
        found = df.log_prob(denoiser, x, **how).log_prob
    assert found.shape == (2,) and torch.isfinite(found).all()


@pytest.mark.parametrize(
    "name", ["EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep"]
)
def test_a_zero_snr_table_whose_floor_is_above_the_entry_before_is_taken(name):
    """With the default betas the entry before the last is 4.2e-9, less than diffusers' floor."""
    made = getattr(diffusers, f"{name}Scheduler")(**ZERO_SNR)
    table = made.alphas_cumprod.double()
    assert table[-1] > table[-2]
    found = df.adapt.from_diffusers(lambda x, t: x, made)
    assert torch.allclose(found.schedule.alpha(998), table[998] ** 0.5, rtol=1e-9)
    assert torch.allclose(found.schedule.alpha(999), table[998] ** 0.5 / 2, rtol=1e-9)


def test_a_multistep_solver_of_a_flow_model_s_configuration_is_no_noise_table():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    for name in ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "DDIM"):
        solver = getattr(diffusers, f"{name}Scheduler")
        with pytest.raises(
            ValueError, match="^scheduler: .*use_flow_sigmas=True, prediction_type="
        ):
            df.adapt.from_diffusers(lambda x, t: x, solver.from_config(flow), clock=torch.abs)
    said = diffusers.UniPCMultistepScheduler.from_config(flow, **FLOW)
    found = df.adapt.from_diffusers(lambda x, t: x, said, clock=lambda s: 1000 * s)
    assert found.schedule == df.schedule.ReversedRectifiedFlow()
    own = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0)
    df.adapt.from_diffusers(lambda x, t: x, own, clock=lambda s: 1000 * s)


def test_what_is_not_known_is_said():
    cloud = digits()
    with pytest.raises(
        ValueError, match="^scheduler: expected a scheduler .*, got IPNDMScheduler$"
    ):
        df.adapt.as_diffusers(cloud, diffusers.IPNDMScheduler())
    with pytest.raises(ValueError, match=r"^clock: expected .*SD3.*Flux.*, got None$"):
        df.adapt.from_diffusers(lambda x, t: x, diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="^clock: expected None with EDMEulerScheduler"):
        df.adapt.from_diffusers(lambda x, t: x, diffusers.EDMEulerScheduler(), clock=torch.log)
    with pytest.raises(ValueError, match="^scheduler: .* 'epsilon' .* ends without signal"):
        df.adapt.from_diffusers(
            lambda x, t: x, diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
        )
    with pytest.raises(ValueError, match="^scheduler: expected a fixed variance_type"):
        df.adapt.as_diffusers(cloud, diffusers.DDPMScheduler(variance_type="learned_range"))
    table = diffusers.DDIMScheduler(**ZERO_SNR).alphas_cumprod.double()
    assert table[-1] == 0
    zero = df.adapt.from_diffusers(lambda x, t: x, diffusers.DDIMScheduler(**ZERO_SNR))
    assert torch.allclose(zero.schedule.alpha(998), table[998] ** 0.5, rtol=1e-9)
    assert torch.allclose(zero.schedule.alpha(999), table[998] ** 0.5 / 2, rtol=1e-9)
