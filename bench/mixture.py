"""python -m bench.mixture: the operators of a Gaussian mixture, beside those of atoms on the same
sizes and beside what people write today; a few minutes. Prints a table, and writes nothing.

Columns: milliseconds of the operator; how many times as long it takes as the one of atoms; how many
times as long MixtureSameFamily of PyTorch takes for log q and, by autograd, the score, which is
less than `mixture_posterior` gives. float32, one level for all queries and, as "levels", one for
each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dfkernels import ops

SIZES = ((64, 20_000, 2), (64, 20_000, 64), (64, 5_000, 784), (1, 20_000, 784))
NOISE = {"low": 0.1, "high": 5.0}
SHAPES = ("[1]", "[N]", "[1, d]", "[N, d]")
PEER = 2**28  # numbers of a [B, N, d] block, above which the peer takes too much memory


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The shortest of a few runs."""
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def variances(shape: str, N: int, d: int, generator: torch.Generator) -> Tensor:
    """Of about a hundredth of the data's variance."""
    size = {"[1]": (1,), "[N]": (N,), "[1, d]": (1, d)}.get(shape, (N, d))
    return 0.01 * (0.5 + torch.rand(*size, generator=generator))


def peer(x: Tensor, y: Tensor, variance: Tensor, sigma: Tensor) -> Tensor:
    """The score by autograd through torch.distributions."""
    D = torch.distributions
    tau = (sigma[0] ** 2 + variance.reshape(len(variance), -1)).sqrt().expand(len(y), y.shape[1])
    normal = D.Independent(D.Normal(y, tau, validate_args=False), 1, validate_args=False)
    weights = D.Categorical(logits=torch.zeros(len(y)))
    q = D.MixtureSameFamily(weights, normal, validate_args=False)
    x = x.clone().requires_grad_()
    return torch.autograd.grad(q.log_prob(x).sum(), x)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    columns = ("B", "N", "d", "noise", "variance", "operator", "ms", "/ atoms", "peer /")
    print("".join(f"{c:>12}" for c in columns))
    for (B, N, d), (noise, level) in [(s, n) for s in SIZES for n in NOISE.items()]:
        generator = torch.Generator().manual_seed(0)
        y = torch.randn(N, d, generator=generator)
        v, noise_of_x = torch.randn(2, B, d, generator=generator)
        x = y[:B] + level * noise_of_x
        one = torch.full((B,), level)
        atoms = {
            "posterior": seconds(lambda: ops.posterior(x, y, 1.0, one), repeats),  # noqa: B023
            "matvec": seconds(lambda: ops.fisher_matvec(x, y, v, 1.0, one), repeats),  # noqa: B023
            "diagonal": seconds(lambda: ops.fisher_diagonal(x, y, 1.0, one), repeats),  # noqa: B023
        }
        for shape in SHAPES:
            own = variances(shape, N, d, generator)
            levels = {"": one} | ({"levels": one + torch.arange(B) / 1e4} if B > 1 else {})
            for name, sigma in levels.items():
                calls = {
                    "posterior": lambda: ops.mixture_posterior(x, y, own, 1.0, sigma),  # noqa: B023
                    "matvec": lambda: ops.mixture_matvec(x, v, y, own, 1.0, sigma),  # noqa: B023
                    "diagonal": lambda: ops.mixture_diagonal(x, y, own, 1.0, sigma),  # noqa: B023
                }
                for op, call in calls.items():
                    took = seconds(call, repeats)
                    beside = ""
                    if op == "posterior" and not name and B * N * d <= PEER:
                        theirs = seconds(lambda: peer(x, y, own, sigma), 1)  # noqa: B023
                        beside = f"{theirs / took:.1f}"
                    cells = (B, N, d, noise, shape, f"{op} {name}".strip(), f"{1e3 * took:.1f}")
                    cells = (*cells, f"{took / atoms[op]:.2f}", beside)
                    print("".join(f"{c:>12}" for c in cells), flush=True)


if __name__ == "__main__":
    main()
