"""One row per op: what its tests and benchmarks need to know of it.

Tests, `bench`, `bench.gpu` and `bench.triton_budget` read this table. A new op over a data set
needs one row here besides its own files; ``python -m tools.new_op NAME`` lays those out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module


@dataclass(frozen=True)
class OpSpec:
    """What is particular to one op.

    Attributes:
        name: The op is ``dfkernels.ops.<name>`` and ``torch.ops.dfkernels.<name>``.
        arguments: The tensors that can be differentiated, in the order of the reference's
            signature.
        over_data: Whether the op sums over the atoms of a data set. Every test of such ops takes it
            up: values, derivatives, transforms, errors, lists of atoms, opcheck, backends.
        returns: The right-hand side of the op's schema.
        other_arguments: Of the schema, what comes after the tensors; for ops over a data set it is
            the same for all.
        moments: For ops over a data set, how many products of a matrix with the atoms a query
            needs, given d and the number of vectors K: one for the logits, one for every sum.
        vectors: How many vectors of d numbers a query reads or writes besides x, given d and K.
        exact: The names of its outputs in ``tests/difference.py``, where float32 results are
            compared with plain PyTorch's; empty if they are not there.
        gpu_sizes: B, N, d of the rows that `bench.gpu` has for it beside its main ones.
        launch_options: Every set of further keywords that its Triton launcher takes.
    """

    name: str
    arguments: tuple[str, ...] = ("x", "y", "alpha", "sigma", "log_prior")
    over_data: bool = True
    returns: str = "Tensor"
    other_arguments: str = ""
    moments: Callable[[int, int], int] = lambda d, K: 0
    vectors: Callable[[int, int], int] = lambda d, K: 1
    exact: tuple[str, ...] = ()
    gpu_sizes: tuple[tuple[int, int, int], ...] = ()
    launch_options: tuple[dict[str, object], ...] = field(default=({},))

    @property
    def reference(self) -> Callable:
        """The plain PyTorch form."""
        return import_module(f"dfkernels.ops.{self.name}").reference

    @property
    def launch(self) -> Callable:
        """The Triton launcher; imports Triton."""
        return import_module(f"dfkernels.ops.{self.name}.triton").launch

    @property
    def schema(self) -> str:
        """What the op is registered with."""
        if not self.over_data:
            return f"({self.other_arguments}) -> {self.returns}"
        tensors = ", ".join(f"Tensor {a}" for a in self.arguments if a != "log_prior")
        return (
            f"({tensors}, Tensor? log_prior, float scale, float offset, "
            f"Tensor? atoms=None, Tensor? counts=None) -> {self.returns}"
        )

    def flops(self, B: int, N: int, d: int, K: int) -> int:
        """Floating-point operations of products with the atoms; a chain: of K steps."""
        if self.name == "transport_chain":  # logits, mean, a symmetric covariance C, and C A
            return 2 * K * B * (2 * N * d + N * d * (d + 1) // 2 + d**3)
        return 2 * self.moments(d, K) * B * N * d

    def exps(self, B: int, N: int, K: int) -> int:
        """Exponentials, one per query and atom; a chain: and step."""
        return B * N * (K if self.name == "transport_chain" else 1)

    def bytes(self, B: int, N: int, d: int, K: int, itemsize: int = 4) -> int:
        """Every input read once, the result written once; ``itemsize`` is that of an atom."""
        return itemsize * N * d + 4 * B * d * (1 + self.vectors(d, K))


MIXTURE_ARGUMENTS = ("x", "y", "variance", "alpha", "sigma", "log_prior")
MATVEC_ARGUMENTS = ("x", "y", "v", "alpha", "sigma", "log_prior")

TABLE = {
    spec.name: spec
    for spec in (
        OpSpec(
            "posterior",
            returns="(Tensor, Tensor, Tensor, Tensor)",
            moments=lambda d, K: 2,
            exact=("log_prob", "mean", "fisher_trace", "ess"),
        ),
        OpSpec(
            "fisher_matvec",
            arguments=MATVEC_ARGUMENTS,
            moments=lambda d, K: 1 + 2 * K,
            vectors=lambda d, K: 2 * K,
            exact=("matvec",),
            launch_options=({"fisher": True}, {"fisher": False}),
        ),
        OpSpec(
            "fisher_diagonal",
            moments=lambda d, K: 3,
            exact=("diagonal",),
            gpu_sizes=((64, 50_000, 784), (1024, 10_000, 64)),
        ),
        OpSpec(
            "fisher_dense",
            moments=lambda d, K: 1 + d,
            vectors=lambda d, K: d,
            exact=("dense",),
            gpu_sizes=((16, 50_000, 784), (256, 10_000, 64)),
        ),
        OpSpec(
            "log_prob", moments=lambda d, K: 1, vectors=lambda d, K: 0, exact=("log_prob_alone",)
        ),
        OpSpec(
            "average",
            arguments=("x", "y", "values", "alpha", "sigma", "log_prior"),
            over_data=False,
            returns="(Tensor, Tensor)",
            other_arguments=(
                "Tensor x, Tensor y, Tensor values, Tensor alpha, Tensor sigma, "
                "Tensor? log_prior, float scale, float offset, Tensor? atoms=None, "
                "Tensor? counts=None"
            ),
            moments=lambda d, K: 2,  # with values of d numbers
        ),
        OpSpec(
            "draw",
            over_data=False,
            other_arguments=(
                "Tensor x, Tensor y, Tensor alpha, Tensor sigma, Tensor? log_prior, "
                "float scale, float offset, int seed, Tensor queries, int total, "
                "Tensor? atoms=None, Tensor? counts=None"
            ),
            moments=lambda d, K: 1,
            vectors=lambda d, K: 0,
        ),
        OpSpec(
            "endpoint_matvec",
            arguments=("v", "x0", "mean", "alpha", "sigma"),
            over_data=False,
            other_arguments=(
                "Tensor v, Tensor x0, Tensor mean, Tensor alpha, Tensor sigma, str form"
            ),
            vectors=lambda d, K: 2 * K + 1,
        ),
        OpSpec(
            "matched_trace",
            arguments=("m", "eps", "alpha", "sigma", "x"),
            over_data=False,
            other_arguments=(
                "Tensor m, Tensor eps, Tensor? x, Tensor alpha, Tensor sigma, str form"
            ),
        ),
        OpSpec(
            "mixture_posterior",
            arguments=MIXTURE_ARGUMENTS,
            over_data=False,
            returns="(Tensor, Tensor, Tensor, Tensor, Tensor)",
            other_arguments=(
                "Tensor x, Tensor y, Tensor variance, Tensor alpha, Tensor sigma, "
                "Tensor? log_prior, float scale, float offset"
            ),
            moments=lambda d, K: 2,
            vectors=lambda d, K: 2,
        ),
        OpSpec(
            "mixture_matvec",
            arguments=("x", "v", *MIXTURE_ARGUMENTS[1:]),
            over_data=False,
            other_arguments=(
                "Tensor x, Tensor v, Tensor y, Tensor variance, Tensor alpha, Tensor sigma, "
                "Tensor? log_prior, float scale, float offset"
            ),
            moments=lambda d, K: 1 + 2 * K,
            vectors=lambda d, K: 2 * K,
        ),
        OpSpec(
            "mixture_diagonal",
            arguments=MIXTURE_ARGUMENTS,
            over_data=False,
            other_arguments=(
                "Tensor x, Tensor y, Tensor variance, Tensor alpha, Tensor sigma, "
                "Tensor? log_prior, float scale, float offset"
            ),
            moments=lambda d, K: 3,
        ),
        OpSpec(
            "transport_chain",
            over_data=False,
            returns="(Tensor, Tensor, Tensor)",
            other_arguments=(
                "Tensor x, Tensor y, Tensor alpha, Tensor sigma, Tensor? log_prior, "
                "Tensor? rates, bool transposed"
            ),
            vectors=lambda d, K: 1 + d,
        ),
    )
}
DATA_OPS = tuple(name for name, spec in TABLE.items() if spec.over_data)
# Those with samples in tests/cases.py; chains of steps and draws have tests of their own.
OPS = tuple(name for name in TABLE if name not in ("transport_chain", "draw"))
