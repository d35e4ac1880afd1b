"""`dfkernels posterior`: the posterior sums of a user's own file of atoms at a file of queries."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .._io import arrays, files
from .._io.files import FileError
from .._torch import check
from ..fisher import DiffusionFisher
from . import arguments, inputs
from .progress import progress

FIELDS = ("log_prob", "mean", "score", "fisher_trace", "ess")


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "posterior",
        help="log q, posterior mean, score, Fisher trace and ESS for your own files",
        description=(
            "Sums over the atoms of DATA [N, ...] at QUERIES [B, ...]: .npy, .npz, .safetensors,"
            " .pt or .pth; FILE:KEY picks one array of several, a.b being entry b of dict a. Writes"
            " log_prob, mean, score, fisher_trace and ess as .npz."
        ),
    )
    arguments.add_data(parser)
    parser.add_argument(
        "queries", metavar="QUERIES", help="noisy queries, [B, *E], of any real dtype"
    )
    parser.add_argument("--sigma", type=arguments.positive, required=True, help="noise level, > 0")
    parser.add_argument(
        "--alpha", type=arguments.number, default=1.0, help="signal level (default: 1)"
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("out.npz"), help="result (default: out.npz)"
    )
    parser.add_argument(
        "--force", action="store_true", help="let the result replace one of the inputs"
    )
    parser.add_argument(
        "--chunk",
        type=arguments.count,
        default=1024,
        help="queries per pass over the atoms (default: 1024)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="computation (default: float32)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if not args.force:
        _refuse_inputs(args)
    files.prepare(args.out)
    try:
        with progress("posterior", "queries") as step:
            results = evaluate(
                args.data,
                args.queries,
                args.sigma,
                args.alpha,
                log_prior=args.log_prior,
                scale=args.scale,
                offset=args.offset,
                dtype=getattr(torch, args.dtype),
                chunk=args.chunk,
                step=step,
            )
    except ValueError as error:  # names the file or the argument at fault
        raise FileError(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise FileError("not enough memory: a smaller --chunk needs less") from None
    # With the result on standard output, what is said about it goes where the progress bar is.
    notes = sys.stderr if files.is_standard_output(args.out) else sys.stdout
    save(args.out, results)
    for name, value in results.items():
        print(f"{name:<13}{list(value.shape)!s:<18}mean {value.mean():.6g}", file=notes)
    print(f"written: {args.out}", file=notes)
    return 0


def _refuse_inputs(args: argparse.Namespace) -> None:
    """Raises FileError if the result would replace one of the inputs, under whatever name."""
    for name in (args.data, args.queries, args.log_prior):
        path = None if name is None else arrays.split(name)[0]
        if path is not None and files.is_same(path, args.out):
            raise FileError(
                f"{args.out}: is the input {path}: name another result, or --force to replace it"
            )


def evaluate(
    data: str,
    queries: str,
    sigma: float,
    alpha: float = 1.0,
    *,
    log_prior: str | None = None,
    scale: float = 1.0,
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
    chunk: int = 1024,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """The posterior sums of atoms in a file at queries in another one.

    Args:
        data: FILE or FILE:KEY of atoms [N, *E], as `arrays.load` reads them; see `inputs.cloud`.
        queries: The same for queries [B, *E], which are converted to ``dtype`` chunk by chunk.
        sigma, alpha: The levels of all queries.
        log_prior: The same for log weights [N]; None for equal ones.
        scale, offset: Atoms are ``scale * data + offset``; queries are taken as they are.
        dtype: float32 or float64, of the computation.
        chunk: Queries that share one pass over the atoms.
        step: Called as ``step(done, total)`` after each chunk, in queries.

    Returns:
        log_prob [B], mean [B, *E], score [B, *E], fisher_trace [B], ess [B].

    Raises:
        FileError: Anything wrong with a file or its contents; it names the file, and the rows.
        ValueError, TypeError: Another argument is wrong.
    """
    check.choice("dtype", dtype, tuple(inputs.EXACT))
    chunk = check.integer("chunk", chunk, 1)
    if torch.tensor(check.constant("sigma", sigma), dtype=dtype, device="cpu") <= 0:
        raise ValueError(
            f"sigma: expected a number that is > 0 in {inputs.short(dtype)} too, got {sigma}"
        )
    cloud, asked = inputs.cloud(data, log_prior, scale, offset, dtype), arrays.load(queries)
    if asked.ndim < 1 or asked.shape[1:] != cloud.y.shape[1:] or not len(asked):
        expected = ", ".join(["B", *map(str, cloud.y.shape[1:])])
        raise FileError(
            f"{queries}: expected shape [{expected}] with B >= 1 to match {data}, got"
            f" {list(asked.shape)}"
        )
    parts: dict[str, list[np.ndarray]] = {name: [] for name in FIELDS}
    chunk = min(chunk, len(asked))
    for start in range(0, len(asked), chunk):
        rows = asked[start : start + chunk]
        x = inputs.converted(queries, rows, dtype, start)
        inputs.check_finite(queries, x, start)
        place = f"{queries}, rows {start} to {start + len(rows) - 1}"
        with inputs.blaming({"x": place, "y": data, "log_prior": log_prior}, place):
            at = DiffusionFisher(x, cloud, alpha, sigma)
            for name, value in zip(
                FIELDS, (at.log_prob, at.denoised, at.score, at.trace(), at.ess), strict=True
            ):
                parts[name].append(value.numpy())
        step(start + len(rows), len(asked))
    return {name: np.concatenate(values) for name, values in parts.items()}


def save(path: Path, results: dict[str, np.ndarray]) -> None:
    """Write the results as .npz, whole or not at all, to exactly this name. Raises FileError."""
    # pyrefly: ignore[bad-argument-type]  NumPy's stub takes the names for its own keyword
    files.write(path, lambda file: np.savez(file, **results))
