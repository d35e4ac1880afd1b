"""The training loop: deterministic, resumable at any moment with the same bits, loud about the
wrong file."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from tensors import rng
from torch import nn

from dfkernels._io.files import FileError
from dfkernels.methods.networks import ImageNet, VectorNet
from dfkernels.methods.training import train


def line_loss(module, generator):
    x = torch.randn(16, 1, generator=generator)
    return (module(x) - 3 * x + 1).square().mean()


def wave_loss(module, generator):
    x = torch.randn(32, 2, generator=generator)
    return (module(x, torch.rand(32, generator=generator)) - x.sin()).square().mean()


def state(module):
    return torch.cat([p.flatten() for p in module.state_dict().values()])


def test_it_learns_and_returns_a_frozen_average():
    module = nn.Linear(1, 1)
    seen = []
    average = train(
        module,
        line_loss,
        steps=300,
        lr=0.1,
        ema=0.9,
        generator=rng(),
        callback=lambda *a: seen.append(a),
    )
    assert (average.weight.item(), average.bias.item()) == pytest.approx((3, -1), abs=1e-3)
    assert not average.training
    assert not any(p.requires_grad for p in average.parameters())
    assert module.weight.requires_grad
    assert seen == [(i, 300) for i in range(301)]


def test_the_average_is_the_documented_one():
    weights = []

    def loss(module, generator):
        weights.append(module.weight.item())
        return module.weight.square().sum()

    module = nn.Linear(1, 1, bias=False)
    average = train(module, loss, steps=5, ema=0.25, generator=rng())
    expected = weights[0]
    for i, p in enumerate([*weights[1:], module.weight.item()]):
        keep = min(0.25, (1 + i) / (10 + i))
        expected = keep * expected + (1 - keep) * p
    assert average.weight.item() == pytest.approx(expected, rel=1e-6)


def test_the_rate_falls_as_a_cosine():
    """Adam on a constant gradient moves by the rate itself."""
    seen = []

    def loss(module, generator):
        seen.append(module.weight.item())
        return module.weight.sum()

    module = nn.Linear(1, 1, bias=False)
    train(module, loss, steps=8, lr=0.5, generator=rng())
    moved = -torch.tensor([*seen, module.weight.item()]).diff()
    expected = [0.25 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert moved.tolist() == pytest.approx(expected, abs=1e-6)


def test_gradients_are_clipped_together():
    module = nn.Linear(2, 1, bias=False)
    seen = []
    module.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    train(
        module,
        lambda m, g: 100 * (m.weight * torch.tensor([[3.0, 4.0]])).sum(),
        steps=1,
        clip=2.0,
        generator=rng(),
    )
    assert seen[0].grad.flatten().tolist() == pytest.approx([1.2, 1.6], rel=1e-5)


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path):
    class Stop(Exception):
        pass

    def stop_at(last):
        def step(done, total):
            if done == last:
                raise Stop

        return step

    whole = train(VectorNet(2, width=8), wave_loss, steps=40, generator=rng())
    path = tmp_path / "run.pt"
    for last in (7, 23):  # between two checkpoints, the first time before any
        with pytest.raises(Stop):
            train(
                VectorNet(2, width=8),
                wave_loss,
                steps=40,
                generator=rng(),
                checkpoint=path,
                every=10,
                callback=stop_at(last),
            )
    done = []
    other = torch.Generator().manual_seed(5)
    resumed = train(
        VectorNet(2, width=8), wave_loss, steps=40, generator=other, checkpoint=path, every=10,
        callback=lambda i, n: done.append(i),
    )  # fmt: skip
    assert torch.equal(state(resumed), state(whole))
    assert done == list(range(20, 41))

    def never(module, generator):
        raise AssertionError("a finished run trains no more")

    module = VectorNet(2, width=8)
    again = train(module, never, steps=40, generator=rng(), checkpoint=path, every=10)
    assert torch.equal(state(again), state(whole))
    assert not torch.equal(state(module), state(whole))  # the weights themselves, not their average


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_with_the_same_bits(tmp_path):
    """SIGKILL, three times, while checkpoints are written as fast as they can be."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
            import sys, torch
            from pathlib import Path
            torch.set_num_threads(1)
            sys.path.insert(0, sys.argv[2])
            from test_training import wave_loss
            from dfkernels.methods.networks import VectorNet
            from dfkernels.methods.training import train
            train(VectorNet(2, width=8), wave_loss, steps=900, checkpoint=Path(sys.argv[1]),
                  every=1, generator=torch.Generator().manual_seed(0),
                  callback=lambda i, n: print(i, flush=True))
            """)
    )
    path = tmp_path / "run.pt"
    here = os.path.dirname(__file__)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(here), os.environ.get("PYTHONPATH", "")]),
    }
    first = 0
    for further in (1, 30, 77):
        with subprocess.Popen(
            [sys.executable, script, path, here], stdout=subprocess.PIPE, text=True, env=env
        ) as run:
            start = int(run.stdout.readline())
            assert start >= first  # nothing that a checkpoint holds is lost
            for _ in range(further):
                first = int(run.stdout.readline())
            run.send_signal(signal.SIGKILL)
        assert run.returncode == -signal.SIGKILL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = []
        resumed = train(
            VectorNet(2, width=8),
            wave_loss,
            steps=900,
            generator=rng(),
            checkpoint=path,
            every=1000,
            callback=lambda i, n: steps.append(i),
        )
        whole = train(VectorNet(2, width=8), wave_loss, steps=900, generator=rng())
    finally:
        torch.set_num_threads(threads)
    assert steps[0] >= first >= 100
    assert torch.equal(state(resumed), state(whole))


@pytest.fixture
def finished(tmp_path):
    path = tmp_path / "run.pt"
    train(
        nn.Linear(1, 1),
        line_loss,
        steps=3,
        generator=rng(),
        checkpoint=path,
        configuration={"noise": (1, 2)},
    )
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 4}, "steps: 3 there, 4 here"),
        ({"lr": 0.5}, "lr: 0.002 there, 0.5 here"),
        ({"configuration": {"noise": [1, 3]}}, r"noise: \[1, 2\] there, \[1, 3\] here"),
        ({"configuration": None}, r"noise: \[1, 2\] there, nothing here"),
        (
            {"module": nn.Linear(1, 1, bias=False)},
            r"module: .*bias=True\) there, .*bias=False\) here",
        ),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(finished, change, message):
    before = finished.read_bytes()
    given = {
        "module": nn.Linear(1, 1),
        "loss": line_loss,
        "steps": 3,
        "configuration": {"noise": (1, 2)},
    } | change
    with pytest.raises(
        FileError, match=f"run.pt: checkpoint of another configuration: {message}: delete it"
    ):
        train(**given, generator=rng(), checkpoint=finished)
    assert finished.read_bytes() == before


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    """str(module), which the configuration compares, does not show the size of an ImageNet."""
    path = tmp_path / "run.pt"

    def loss(module, generator):
        size = module.event[1]
        return (
            module(torch.randn(2, size, size, generator=generator), torch.zeros(2)).square().mean()
        )

    train(ImageNet(1, 4, width=8), loss, steps=1, generator=rng(), checkpoint=path)
    with pytest.raises(
        FileError, match=r"run\.pt: checkpoint of another module \(.*position.*\): delete it, or"
    ):
        train(ImageNet(1, 6, width=8), loss, steps=1, generator=rng(), checkpoint=path)


@pytest.mark.parametrize("keep", [0, 1, 100, -1000, -1])
def test_a_truncated_checkpoint_is_refused(finished, keep):
    finished.write_bytes(finished.read_bytes()[:keep])
    with pytest.raises(
        FileError, match=r"run\.pt: no checkpoint, or a truncated one \(.*\): delete it"
    ):
        train(nn.Linear(1, 1), line_loss, steps=3, generator=rng(), checkpoint=finished)


@pytest.mark.parametrize(
    "content", [{"a": torch.zeros(2)}, [1, 2], torch.zeros(3), {"configuration": {"steps": 3}}]
)
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "run.pt"
    torch.save(content, path)
    with pytest.raises(FileError, match=r"run\.pt: no checkpoint"):
        train(nn.Linear(1, 1), line_loss, steps=3, generator=rng(), checkpoint=path)


def test_an_unwritable_folder_is_named(tmp_path):
    with pytest.raises(FileError, match=r"gone/run\.pt: cannot write: No such file or directory"):
        train(
            nn.Linear(1, 1),
            line_loss,
            steps=1,
            generator=rng(),
            checkpoint=tmp_path / "gone" / "run.pt",
        )


def test_a_nan_loss_names_the_step_and_leaves_the_checkpoint(tmp_path):
    calls = []

    def loss(module, generator):
        calls.append(0)
        return line_loss(module, generator) * (math.nan if len(calls) == 7 else 1)

    path = tmp_path / "run.pt"
    with pytest.raises(
        FloatingPointError, match="^loss: expected a finite number, got nan at step 7 of 10$"
    ):
        train(nn.Linear(1, 1), loss, steps=10, generator=rng(), checkpoint=path, every=5)
    assert torch.load(path, weights_only=True)["done"] == 5


def test_a_nan_gradient_names_the_step():
    with pytest.raises(
        FloatingPointError, match="^gradient: expected finite numbers, got norm nan at step 1 of 2$"
    ):
        train(
            nn.Linear(1, 1),
            lambda m, g: (0 * m.weight).sqrt().sum(),
            steps=2,
            generator=rng(),
        )


def test_an_error_inside_the_loss_names_the_step():
    def loss(module, generator):
        raise ValueError("network: returned NaN")

    with pytest.raises(ValueError, match=r"^network: returned NaN \(in training, step 1 of 2\)$"):
        train(nn.Linear(1, 1), loss, steps=2, generator=rng())


def test_a_loss_that_is_no_number():
    with pytest.raises(ValueError, match=r"^loss: expected a scalar tensor, got shape \[1, 1\]$"):
        train(nn.Linear(1, 1), lambda m, g: m.weight, steps=1, generator=rng())
    with pytest.raises(ValueError, match="^loss: expected a scalar tensor, got float$"):
        train(nn.Linear(1, 1), lambda m, g: 0.5, steps=1, generator=rng())
    with pytest.raises(ValueError, match="^steps: expected an integer of at least 1, got 0$"):
        train(nn.Linear(1, 1), line_loss, steps=0, generator=rng())


# ---- accumulation and mixed precision

DATA = torch.randn(4 * 24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def in_turn(batch):
    """A loss in float64 over the rows of DATA in turn, `batch` at a time."""
    at = [0]

    def loss(module, generator):
        x = DATA[at[0] : at[0] + batch]
        at[0] += batch
        return (module(x, x[:, 0]) - x.sin()).square().mean()

    return loss


def test_accumulated_batches_are_one_large_batch():
    net = lambda: VectorNet(2, width=8).double()
    whole = train(net(), in_turn(24), steps=4, generator=rng())
    parts = train(net(), in_turn(6), steps=4, accumulate=4, generator=rng())
    half = train(net(), in_turn(6), steps=4, accumulate=2, generator=rng())
    torch.testing.assert_close(state(parts), state(whole), rtol=1e-9, atol=1e-9)
    assert (state(half) - state(whole)).abs().max() > 1e-4


def test_mixed_precision_multiplies_in_bfloat16_and_keeps_the_rest():
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            out = self.layer(x)
            seen.append((x.dtype, out.dtype))
            return out

    def loss(module, generator):
        x = torch.randn(16, 2, generator=generator)
        return (module(x) - x.sin()).square().mean()

    module = Net()
    average = train(module, loss, steps=2, autocast=torch.bfloat16, generator=rng())
    assert seen == 2 * [(torch.float32, torch.bfloat16)]
    assert {p.dtype for p in [*module.parameters(), *average.parameters()]} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")
    average(torch.ones(1, 2))
    assert seen[-1] == (torch.float32, torch.float32)


@pytest.mark.parametrize("how", [{"autocast": torch.bfloat16}, {"accumulate": 3}, {}], ids=str)
def test_a_stopped_run_goes_on_in_every_mode(tmp_path, how):
    """Killed within the batches of a step."""
    calls = []

    def stopping(module, generator):
        calls.append(0)
        if len(calls) == 5 * how.get("accumulate", 1):
            raise KeyboardInterrupt
        return wave_loss(module, generator)

    run = lambda loss, **more: train(
        VectorNet(2, width=8), loss, steps=8, generator=rng(), **how, **more
    )
    whole, path = run(wave_loss), tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run(stopping, checkpoint=path, every=2)
    assert torch.equal(state(run(wave_loss, checkpoint=path, every=2)), state(whole))
    if how:
        with pytest.raises(FileError, match=f"configuration: {next(iter(how))}: .* there, nothing"):
            train(VectorNet(2, width=8), wave_loss, steps=8, generator=rng(), checkpoint=path)


def test_mixed_precision_learns_as_float32_does():
    """500 steps of a curve: the error is at most half as large again, although every product is of
    numbers rounded to 8 bits."""
    found = {}
    for autocast in (None, torch.bfloat16):
        net = train(
            VectorNet(2, width=32), wave_loss, steps=500, generator=rng(), autocast=autocast
        )
        with torch.no_grad():
            found[autocast] = wave_loss(net, torch.Generator().manual_seed(1)).item()
    assert found[torch.bfloat16] < 1.5 * found[None] < 0.01


def test_half_precision_weights_and_float16_are_refused():
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).bfloat16())
    with pytest.raises(
        TypeError,
        match=r"^module: expected parameters in float32 or float64, got torch.bfloat16 for 1",
    ):
        train(module, line_loss, steps=1, generator=rng())
    module[1].requires_grad_(False)
    loss = lambda module, generator: module[0].weight.sum()
    train(module, loss, steps=1, generator=rng())  # what is frozen may be in any precision
    with pytest.raises(
        ValueError, match="^autocast: expected None or torch.bfloat16, got torch.float16$"
    ):
        train(nn.Linear(1, 1), line_loss, steps=1, generator=rng(), autocast=torch.float16)
    with pytest.raises(ValueError, match="^accumulate: expected an integer of at least 1, got 0$"):
        train(nn.Linear(1, 1), line_loss, steps=1, generator=rng(), accumulate=0)
