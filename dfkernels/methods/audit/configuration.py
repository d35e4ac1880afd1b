"""What decides the result of an audit, as far as a file can tell it from that of another."""

from __future__ import annotations

from torch import Tensor, nn

from ..._io import files
from .._posterior_mean import DataSet
from ..denoiser import Denoiser
from .task import Task

__all__ = ["configuration"]


def configuration(task: Task) -> dict[str, object]:
    """The network with its conditions, the data, and how much of what is done."""
    return {
        "denoiser": task.denoiser.short,
        "network": _network(task.denoiser),
        "conditions": {name: _text(value) for name, value in task.denoiser.conditions.items()},
        **{kind: cloud._fingerprint() for kind, cloud in task.clouds.items()},
        "noise": task.noise,
        "levels": len(task.levels),
        "queries": [task.groups, task.repeats],
        "points": task.points,
        "samples": task.samples,
        "width": task.width,
        "seed": task.seed,
    }


def _network(denoiser: Denoiser) -> str:
    """The checksum of parameters and buffers, and the data sets that serve as a network; of a plain
    callable nothing is known but its name.
    """
    network = denoiser.network
    if not isinstance(network, nn.Module):
        return "unknown"
    total = files.checksums(network.state_dict().values())
    exact = [part for part in network.modules() if isinstance(part, DataSet)]
    return ", ".join(
        [
            f"crc32={total}",
            *(f"{part.cloud._fingerprint()} tolerance={part.tolerance}" for part in exact),
        ]
    )


def _text(value: object) -> str:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        return f"{list(plain.shape)} {plain.dtype} crc32={files.checksum(plain)}"
    simple = isinstance(value, (int, float, str, bool, type(None)))
    return repr(value) if simple else type(value).__name__
