"""`dfkernels nll` and `from_pipeline` over stand-ins for pipelines of diffusers: their own are in
tests/ecosystem/."""

from __future__ import annotations

import functools
import json
import math
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dfkernels as df
from dfkernels import cli
from dfkernels.adapt.pipelines import PIPELINES
from dfkernels.cli import nll
from dfkernels.methods import likelihood
from dfkernels.methods.guided_likelihood import GuidedSample, guided_likelihood


class DDPMScheduler:
    def __init__(self, **config):
        self.config = SimpleNamespace(**{"prediction_type": "epsilon"} | config)
        self.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)


class Labels(torch.nn.Module):
    """The noise prediction of classes N(k, 1), k = 0 ... 3; 3 stands for no class."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(in_channels=1, sample_size=2, num_embeds_ada_norm=3)
        self.mean = torch.nn.Parameter(torch.arange(4.0), requires_grad=False)
        self.table = DDPMScheduler().alphas_cumprod

    def forward(self, hidden_states, timestep, class_labels):
        assert class_labels.shape == (len(hidden_states),)
        alpha = df.schedule.Tabulated(self.table).alpha(timestep.double()).float()[:, None]
        mean = alpha * self.mean[class_labels][:, None]
        x = hidden_states.flatten(1)
        return SimpleNamespace(sample=((1 - alpha**2).sqrt() * (x - mean)).view_as(hidden_states))


class DiTPipeline:
    def __init__(self):
        self.transformer, self.scheduler = Labels().eval(), DDPMScheduler()

    def to(self, device):
        return self


class DDPMPipeline:
    def __init__(self, unet=None):
        network = torch.nn.Conv2d(1, 1, 1)
        torch.nn.init.zeros_(network.weight)
        network.config = SimpleNamespace(in_channels=1, sample_size=(2, 3))
        network.forward = unet or (lambda sample, timestep: SimpleNamespace(sample=0.5 * sample))
        self.unet, self.scheduler = network.eval(), DDPMScheduler()

    def to(self, device):
        return self


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"dit": DiTPipeline(), "ddpm": DDPMPipeline()}
    monkeypatch.setattr(nll, "_loaded", lambda folder: given[folder.name])
    return tmp_path


ARGS = ["--device", "cpu", "--steps", "6", "--likelihood-steps", "6"]
DIT = ["nll", "dit", "--label", "1", "--seeds", "0-4", "--batch", "2", *ARGS]


def rows(file="nll.json"):
    return [GuidedSample(**row) for row in json.loads(Path(file).read_text())["rows"]]


def test_a_pipeline_of_classes(here, capsys):
    assert (
        cli.main([*DIT, "--guidance", "1", "3", "--figure", "a.png", "--noise", ".02", "20"]) == 0
    )
    flows = df.adapt.from_pipeline(DiTPipeline(), label=1)
    assert flows.shape == (1, 2, 2) and flows.guided and flows.latents
    assert flows.noise == pytest.approx((0.01, 100), rel=1e-3)
    how = dict(sampling_steps=6, method="rk4", steps=6, batch=2)
    wanted = guided_likelihood(flows.denoiser_at, (1, 2, 2), (1, 3), range(5), (0.02, 20), **how)
    assert rows() == wanted
    # the flow at scale 3 is that of N(3 + 3 (1 - 3), 1): far from the class, N(1, 1)
    assert wanted[5].nll > wanted[0].nll + 3
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "negative log-likelihood of the autoencoder's latents, not of images, "
        "under the model's own flow"
    )
    assert said[1].split() == [
        *("guidance", "seeds", "nats/number", "standard", "error", "bits/dim"),
        *("integration", "trace"),
    ]
    mean = sum(row.nll for row in wanted[:5]) / 5
    assert said[2].split()[:3] == ["1", "5", f"{mean:.5f}"]
    assert said[3].split()[0] == "3"
    assert said[4:] == ["written: nll.json", "written: a.png"]
    assert struct.unpack(">II", Path("a.png").read_bytes()[16:24]) == (1290, 540)


def test_a_pipeline_without_guidance(here, capsys):
    argv = ["nll", "ddpm", "--seeds", "3", "0-1", "--under", "guided", *ARGS]
    assert cli.main([*argv, "--figure", "b.png"]) == 0
    assert [(row.scale, row.seed) for row in rows()] == [(1, 3), (1, 0), (1, 1)]
    said = capsys.readouterr().out
    assert "likelihood of images in [-1, 1], under the guided flow of each row" in said
    assert struct.unpack(">II", Path("b.png").read_bytes()[16:24]) == (690, 540)
    assert cli.main([*argv, "--guidance", "2"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == (
        "dfkernels nll: error: scale: expected 1 with DDPMPipeline, which has no guidance, got 2"
    )


def test_an_interrupted_run_goes_on(here, capsys, monkeypatch):
    assert cli.main([*DIT, "--guidance", "2", "-o", "whole.json"]) == 0
    at = Labels.forward
    calls = []

    def interrupted(self, *args, **conditions):
        calls.append(1)
        if len(calls) == 60:  # in the second of three batches
            raise KeyboardInterrupt
        return at(self, *args, **conditions)

    monkeypatch.setattr(Labels, "forward", interrupted)
    assert cli.main([*DIT, "--guidance", "2"]) == 130
    assert [row.seed for row in rows()] == [0, 1]
    assert cli.main([*DIT, "--guidance", "2"]) == 0
    assert rows() == rows("whole.json")
    assert os.listdir() and not [name for name in os.listdir() if name.startswith(".")]
    capsys.readouterr()
    assert cli.main([*DIT[:3], "2", *DIT[4:]]) == 2  # another label
    assert "nll.json: results of another configuration: label: 1 there, 2 here" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr(Labels, "forward", at)
    nll._loaded(here / "dit").transformer.mean += 1  # other weights
    assert cli.main(DIT) == 2
    assert "another configuration: weights: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        ("dit", "label: expected a class of DiTPipeline, got None"),
        ("dit --label 3", "label: expected an integer from 0 to 2, got 3"),
        (
            "dit --label 1 --prompt a",
            "prompt: expected None with DiTPipeline, which takes none, got 'a'",
        ),
        ("ddpm --label 1", "label: expected None with DDPMPipeline, which takes none, got 1"),
        (
            "dit --label 1 --guidance 2 2",
            "scales: expected distinct ones, got 2 twice",
        ),
        ("dit --label 1 --seeds 0-3 2", "seeds: expected distinct ones, got 2 twice"),
        ("ddpm --noise 2 1", "noise: expected 0 < noise[0] < noise[1]"),
        ("ddpm --noise 1e-4 1", "noise: expected levels in [0.01"),
        ("ddpm --out .", ".: cannot write: it is a directory"),
        ("ddpm --out /dev/null", "/dev/null: expected a regular file, which is written piecemeal"),
        ("ddpm --figure .", ".: cannot write: it is a directory"),
    ],
)
def test_what_is_wrong_is_said(here, capsys, argv, message):
    assert cli.main(["nll", *argv.split(), *ARGS]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"dfkernels nll: error: {message}")


@pytest.mark.parametrize(
    "argv, message",
    [
        ("ddpm --seeds -1", "expected a seed or a range such as 0-15, got '-1'"),
        ("ddpm --seeds 5-3", "expected a range such as 0-15, got '5-3'"),
        ("ddpm --device nowhere", "cannot compute on 'nowhere': "),
        ("ddpm --guidance nan", "expected a finite number, got nan"),
    ],
)
def test_options_that_cannot_be_are_refused(here, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["nll", *argv.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_network_that_returns_nan_is_one_line(here, capsys, monkeypatch):
    broken = DDPMPipeline(lambda sample, timestep: SimpleNamespace(sample=sample * math.nan))
    monkeypatch.setattr(nll, "_loaded", lambda folder: broken)
    assert cli.main(["nll", "ddpm", *ARGS]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dfkernels nll: error: network: returned NaN or inf for 8 of 8")
    assert error.endswith("(guidance scale 1, seeds 0 to 7)")


def test_a_stiff_network_is_one_line(here, capsys, monkeypatch):
    stiff = DDPMPipeline(lambda sample, timestep: SimpleNamespace(sample=(100 * sample).sin()))
    monkeypatch.setattr(nll, "_loaded", lambda folder: stiff)
    few = functools.partial(likelihood.log_prob, max_evaluations=100)
    monkeypatch.setattr(likelihood, "log_prob", few)
    assert cli.main(["nll", "ddpm", "--device", "cpu", "--steps", "2", "--seeds", "0"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dfkernels nll: error: gave up at noise level ")
    assert error.endswith(": take --likelihood-steps, or a higher --noise")


def folder(path, **index):
    path.mkdir()
    (path / "model_index.json").write_text(json.dumps(index))
    return str(path)


def test_what_is_no_pipeline_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    def error(*argv):
        assert cli.main(["nll", *argv]) == 2
        return capsys.readouterr().err.removeprefix("dfkernels nll: error: ").rstrip()

    what = "expected a folder with the pipeline that save_pretrained writes, got"
    assert error("runwayml/stable") == f"runwayml/stable: {what} no folder"
    assert error(str(tmp_path)) == f"{tmp_path}: {what} one without model_index.json"
    some = folder(tmp_path / "other", _class_name="FluxPipeline")
    known = ", ".join(PIPELINES)
    assert error(some) == (
        f"pipeline: expected one of {known}, got FluxPipeline, whose networks are distilled with "
        "guidance inside and predict no posterior mean"
    )
    assert error(folder(tmp_path / "new", _class_name="WanPipeline")) == (
        f"pipeline: expected one of {known}, got WanPipeline"
    )
    assert error(folder(tmp_path / "none")).startswith(f"{tmp_path}/none/model_index.json: unread")
    (tmp_path / "none" / "model_index.json").write_text("[")
    assert error(str(tmp_path / "none")).startswith(f"{tmp_path}/none/model_index.json: unreadable")
    monkeypatch.setattr(nll, "find_spec", lambda name: None)
    assert error(folder(tmp_path / "dit", _class_name="DiTPipeline")) == (
        "not installed: pip install diffusers transformers"
    )
