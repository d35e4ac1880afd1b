"""Round after round of reflow, from checkpoints where it was interrupted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..._io import files, tensor_files
from ..._torch import check
from .._reporting import Callback, reporting
from ..denoiser import Denoiser, expect_denoiser
from ..training import train
from .loss import loss
from .pairs import Pairs

__all__ = ["Recipe", "rounds"]

Recipe = Callable[[Denoiser, torch.Generator], Pairs]


@torch.inference_mode(False)  # weights made in that mode could never be trained
def rounds(
    denoiser: Denoiser,
    recipe: Recipe,
    count: int,
    *,
    steps: int,
    batch: int = 256,
    lr: float = 2e-3,
    ema: float = 0.999,
    seed: int = 0,
    folder: str | Path | None = None,
    every: int = 1000,
    configuration: Mapping[str, object] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> list[Denoiser]:
    """Reflows a flow several times: each round takes pairs, and trains the network of the round
    before on them.

    >>> def recipe(current, generator):
    ...     noise = torch.randn(5000, 2, generator=generator)
    ...     real = reverse_pairs(first, data, t, generator)
    ...     return mix(pairs(current, noise, t), real, 0.3, generator)
    >>> second, third = rounds(first, recipe, 2, steps=2000, folder=Path("reflow"))

    Args:
        denoiser: the first round's flow, of a network with parameters, with RectifiedFlow or
            another schedule that reaches from pure noise to data. It stays as it is.
        recipe: recipe(current, generator) -> Pairs, what the next round is trained on; all its
            randomness comes from the generator (on the CPU).
        count: of rounds after the first.
        steps, lr, ema: of the training in each round, see `training.train`; every parameter is
            trained, and the learning rate starts anew.
        batch: pairs in a training step, drawn with replacement.
        seed: of everything that is drawn.
        folder: where round k = 2, 3, ... keeps its pairs, `round-k-pairs.safetensors`, and its
            training, `round-k.pt`, each written whole or not at all. If they exist, the run goes on
            from them at the round and the training step where it was, with the same bits; rounds
            that are finished are just read.
        every: training steps between checkpoints.
        configuration: whatever else decides the result (the recipe's ratio, its data, t): numbers,
            strings, lists, dicts. Files of another configuration, another seed or another first
            round are refused by name.
        callback: called as callback(done, total) after each training step of count * steps.
        progress: show a bar on stderr.

    Returns:
        The flows of rounds 2, ..., count + 1, frozen, in eval mode.

    Raises:
        TypeError, ValueError: An argument is wrong; a file is truncated, damaged, unwritable or of
            another configuration (a `FileError` that names it).
        FloatingPointError: A loss or a gradient is not finite.
    """
    _network_of(denoiser)
    check.function("recipe", recipe, "a callable recipe(current, generator)")
    count, steps = check.integer("count", count, 1), check.integer("steps", steps, 1)
    batch, seed = check.integer("batch", batch, 1), check.integer("seed", seed)
    folder = None if folder is None else files.folder(Path(folder))
    found = [denoiser]
    total = count * steps
    with reporting("reflow", callback, progress, total) as report:
        for k in range(count):
            given = {
                **(configuration or {}),
                "round": k + 2,
                "seed": seed,
                "batch": batch,
                "previous": files.checksums(_network_of(found[-1]).state_dict().values()),
            }
            stored = _Stored(found[-1], recipe, folder, json.loads(json.dumps(given)))
            begin = k * steps
            step = lambda done, _, begin=begin: report(begin + done, total)
            how = {"steps": steps, "lr": lr, "ema": ema, "every": every, "callback": step}
            found.append(_round(found[-1], stored, batch, how))
    return found[1:]


class _Stored:
    """The pairs of one round, made when first asked for, or read from its file."""

    def __init__(
        self,
        current: Denoiser,
        recipe: Recipe,
        folder: Path | None,
        configuration: dict[str, object],
    ) -> None:
        self.current, self.recipe, self.configuration = current, recipe, configuration
        self.number = int(str(configuration["round"]))
        self.file = None if folder is None else folder / f"round-{self.number}-pairs.safetensors"
        self.checkpoint = None if folder is None else folder / f"round-{self.number}.pt"
        self._pairs: Pairs | None = None

    def generator(self, purpose: int) -> torch.Generator:
        """0: of the pairs, 1: of the training; each round has its own."""
        seed = int(str(self.configuration["seed"]))
        return torch.Generator().manual_seed(1_000_003 * seed + 2 * self.number + purpose)

    def prepare(self) -> None:
        """Makes or reads the pairs, unless there is a checkpoint alone: of a training that may need
        them no more."""
        trained = self.checkpoint is not None and self.checkpoint.exists()
        if not trained or (self.file is not None and self.file.exists()):
            self.pairs()

    def pairs(self) -> Pairs:
        if self._pairs is None:
            there = self.file is not None and self.file.exists()
            self._pairs = self._read() if there else self._make()
        return self._pairs

    def _read(self) -> Pairs:
        assert self.file is not None
        tensors, metadata = tensor_files.read(self.file)
        try:
            saved = dict(json.loads(metadata["configuration"]))
            device = next(_network_of(self.current).parameters()).device
            kept = Pairs(*(tensors[name].to(device) for name in ("noise", "sample")))
        except (KeyError, TypeError, ValueError):
            raise files.FileError(f"{self.file}: no pairs of reflow: name another folder") from None
        files.refuse_another(self.file, "pairs", saved, self.configuration)
        return kept

    def _make(self) -> Pairs:
        made = self.recipe(self.current, self.generator(0))
        check.instance("recipe", made, Pairs, "Pairs from it")
        if not len(made):
            raise check.mismatch("recipe", "at least one pair from it", "none")
        if self.file is not None:
            parts = {"noise": made.noise, "sample": made.sample}
            said = {"configuration": json.dumps(self.configuration)}
            tensor_files.save(self.file, parts, said)
        return made


def _round(current: Denoiser, stored: _Stored, batch: int, how: dict) -> Denoiser:
    stored.prepare()
    network = copy.deepcopy(_network_of(current)).requires_grad_(True)
    trained = _of(current, network)

    def batch_loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        kept = stored.pairs()
        rows = torch.randint(
            len(kept), (batch,), generator=generator, dtype=torch.int64, device=generator.device
        )
        return loss(trained, kept[rows.to(kept.noise.device)], generator)

    average = train(
        network,
        batch_loss,
        generator=stored.generator(1),
        checkpoint=stored.checkpoint,
        configuration=stored.configuration,
        **how,
    )
    return _of(current, average)


def _network_of(denoiser: Denoiser) -> nn.Module:
    expect_denoiser(denoiser)
    network = denoiser.network
    if isinstance(network, nn.Module) and any(True for _ in network.parameters()):
        return network
    expected = "one of an nn.Module with parameters to train"
    raise TypeError(f"denoiser: expected {expected}, got {denoiser.short}")


def _of(like: Denoiser, network: nn.Module) -> Denoiser:
    """A denoiser with another network."""
    clock = like.clock
    made = Denoiser(network, like.schedule, like.prediction_type, clock=clock)
    return made.bind(**like.conditions)
