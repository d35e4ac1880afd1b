"""Whole pipelines with random weights, saved as save_pretrained does: their own samples, and
`dfkernels nll` over their folders."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import dfkernels as df
from dfkernels import cli
from dfkernels.cli import nll
from dfkernels.methods.guided_likelihood import GuidedSample

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

UNET = dict(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
DDIM = dict(clip_sample=False, timestep_spacing="trailing")
WIDTH = 16  # of a text encoder


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(4,),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        sample_size=8,
    )


def tokenizer(folder):
    """CLIP's, with a byte per token."""
    ends = ["<|startoftext|>", "<|endoftext|>"]
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    names = [*letters, *(letter + "</w>" for letter in letters), *ends]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=9
    )


def text_encoder(kind="CLIPTextModel"):
    config = transformers.CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=2,
        num_hidden_layers=3,
        vocab_size=54,
        projection_dim=WIDTH,
        max_position_embeddings=9,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return getattr(transformers, kind)(config)


def conditional(**more):
    return diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **UNET,
        **more,
    )


def ddpm(folder):
    unet = diffusers.UNet2DModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **UNET,
    )
    return diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(**DDIM))


def stable_diffusion(folder):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", **DDIM
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(folder),
        unet=conditional(cross_attention_dim=WIDTH),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(folder):
    unet = conditional(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    )
    tokens = tokenizer(folder)
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder("CLIPTextModelWithProjection"),
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(**DDIM),
        add_watermarker=False,
    )


def stable_diffusion_3(folder):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
    )
    tokens = tokenizer(folder)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=text_encoder("CLIPTextModelWithProjection"),
        tokenizer=tokens,
        text_encoder_2=text_encoder("CLIPTextModelWithProjection"),
        tokenizer_2=tokens,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def dit(folder):
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    return diffusers.DiTPipeline(transformer, vae(), diffusers.DDIMScheduler(**DDIM))


MADE = {
    "DDIM": (ddpm, {}),
    "SD": (stable_diffusion, dict(prompt="a red fox")),
    "SDXL": (stable_diffusion_xl, dict(prompt="a red fox")),
    "SD3": (stable_diffusion_3, dict(prompt="a red fox")),
    "DiT": (dit, dict(label=7)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each pipeline's folder, made once."""
    found = {}
    for name, (make, _) in MADE.items():
        torch.manual_seed(0)
        root = tmp_path_factory.mktemp(name)
        make(root / "tokens").save_pretrained(root / "pipeline")
        found[name] = root / "pipeline"
    return found


def loaded(folder):
    pipeline = nll._loaded(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(name, pipeline, scale, steps):
    """The states before each step of the pipeline's own sampler, and what they end in."""
    states, step = [], pipeline.scheduler.step

    def watched(out, t, x, **how):
        states.append(x)
        return step(out, t, x, **how)

    pipeline.scheduler.step = watched
    generator = torch.Generator().manual_seed(3)
    how = dict(num_inference_steps=steps, generator=generator)
    if name == "DDIM":
        images = pipeline(batch_size=1, output_type="np", **how).images
        return states, torch.from_numpy(images).permute(0, 3, 1, 2)
    if name == "DiT":
        images = pipeline([7], guidance_scale=scale, output_type="np", **how).images
        return [x[:1] for x in states], torch.from_numpy(images).permute(0, 3, 1, 2)
    made = pipeline("a red fox", guidance_scale=scale, output_type="latent", **how)
    return states, made.images


@pytest.mark.parametrize("name", MADE)
@pytest.mark.covers("diffusers", "sample")
def test_the_flow_at_a_scale_is_the_pipeline_s_own(name, folders):
    """Prompt, null condition, guidance, sizes, clock, sign and scales, all at once."""
    pipeline, scale = loaded(folders[name]), 1.0 if name == "DDIM" else 4.0
    flows = df.adapt.from_pipeline(pipeline, **MADE[name][1])
    assert flows.guided == (name != "DDIM") and flows.latents == flows.guided
    assert flows.shape == ((1, 8, 8) if name == "DDIM" else (4, 8, 8))
    states, end = theirs(name, pipeline, scale, 5)
    drawn = torch.randn(1, *flows.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(states[0], drawn)  # the noise of a seed is a pipeline's
    scheduler = pipeline.scheduler
    nodes = scheduler.sigmas[:-1] if name == "SD3" else scheduler.timesteps
    denoiser = flows.denoiser_at(scale)
    first = 1 if name == "SD3" else 0  # a flow starts at alpha = 0, where x says nothing of x_0
    two = torch.cat([states[first], states[first]])  # one condition, a batch of another size
    with torch.no_grad():
        path = df.sample(denoiser, two, nodes[first:].double(), "ddim")
        x0 = denoiser(path.x[-1], nodes[-1].double())
    for ours, state in zip(path.x, states[first:], strict=True):
        assert (ours - state).abs().max() < 5e-5 * state.abs().max()
    if name == "DDIM":
        x0 = (x0 / 2 + 0.5).clamp(0, 1)
    elif name == "DiT":
        decoded = pipeline.vae.decode(x0 / pipeline.vae.config.scaling_factor).sample
        x0 = (decoded / 2 + 0.5).clamp(0, 1)
    assert (x0 - end).abs().max() < 1e-4 * end.abs().max()


@pytest.mark.parametrize("name", MADE)
@pytest.mark.covers("diffusers", "likelihood")
def test_the_command_over_a_folder(name, folders, tmp_path, capsys):
    """Rows are those of log_prob, called by hand."""
    argv = ["nll", str(folders[name]), "--device", "cpu", "--seeds", "0", "2", "--noise", "0.1"]
    argv += ["20", "--steps", "3", "--likelihood-steps", "4", "-o", str(tmp_path / "out.json")]
    for option, value in MADE[name][1].items():
        argv += [f"--{option}", str(value)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # four steps are few
        assert cli.main([*argv, "--guidance", "1" if name == "DDIM" else "3"]) == 0
        rows = json.loads((tmp_path / "out.json").read_text())["rows"]
        flows = df.adapt.from_pipeline(loaded(folders[name]), **MADE[name][1])
        model, guided = (flows.denoiser_at(w) for w in (1.0, rows[0]["scale"]))
        grid = df.time_grid(model.schedule, 3, (0.1, 20.0), "edm")
        alpha, sigma = model.schedule(grid[0])
        for row in (GuidedSample(**row) for row in rows):
            generator = torch.Generator().manual_seed(row.seed)
            x = torch.randn(1, *flows.shape, generator=generator)
            probes = df.Hutchinson(generator, 2)
            with torch.no_grad():
                x = df.sample(guided, (alpha**2 + sigma**2).sqrt().float() * x, grid, "heun").x[-1]
                how = dict(method="rk4", steps=4, data_std=1.0)
                found = df.log_prob(model, x, (0.1, 20.0), probes, **how)
            assert row.bits_per_dim == pytest.approx(found.bits_per_dim.item(), abs=1e-3)
            assert row.trace_error > 0
    assert [row["seed"] for row in rows] == [0, 2]
    said = capsys.readouterr().out
    assert ("of the autoencoder's latents, not of images" in said) == (name != "DDIM")


def test_a_folder_with_a_damaged_file_is_one_line(folders, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folders["DDIM"], copy)
    (copy / "unet" / "config.json").write_text("{")
    assert cli.main(["nll", str(copy)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"dfkernels nll: error: {copy}: diffusers cannot load it: ")


def test_networks_distilled_with_guidance_are_refused(folders):
    pipeline = loaded(folders["SD"])
    pipeline.unet = conditional(cross_attention_dim=WIDTH, time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="^pipeline: expected a network without guidance inside"):
        df.adapt.from_pipeline(pipeline, prompt="a")
    with pytest.raises(ValueError, match="^prompt: expected a text for StableDiffusionPipeline, g"):
        df.adapt.from_pipeline(pipeline)
