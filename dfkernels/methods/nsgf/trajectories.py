"""Fills a pool with the trajectories of many small flows, between fresh batches of source and
target.

A run can be killed at any moment: what it has is in its checkpoint, a .safetensors file with
checksums, which is the pool and the generator's state after some batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..._io import files, tensor_files
from ..._torch import check
from ..._torch.objects import plain
from .._reporting import Callback, reporting
from .flow import step_size
from .pool import STORED, TrajectoryPool
from .velocity import found, warn

__all__ = ["Draw", "trajectory_pool"]

Draw = Callable[[int, torch.Generator], Tensor]


def trajectory_pool(
    source: Draw,
    target: Draw,
    blur: float,
    *,
    batches: int,
    n: int,
    steps: int,
    eta: float,
    generator: torch.Generator,
    size: int | None = None,
    dtype: torch.dtype = torch.float32,
    tol: float = 1e-4,
    max_iter: int = 1000,
    checkpoint: str | Path | None = None,
    every: int = 100,
    configuration: Mapping[str, object] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> TrajectoryPool:
    """Runs the flow between n points of the source and n of the target, batch after batch, and
    keeps x, t and v before each of its steps.

    A network that has learnt them (`velocity_loss`) has the mean over batches of the velocity at x,
    which depends on the rest of the batch: the larger n, the nearer it is to that of the two laws.

    Args:
        source: `source(n, generator)` -> points ``[n, *E]``, float32 or float64, fresh ones at each
            call, all randomness from the generator.
        target: The same of the target; for a data set `lambda n, g: data[torch.randint(len(data),
            (n,), generator=g)]`.
        blur: sqrt(eps) > 0, as in `velocity`.
        batches: How many flows.
        n: Points of either kind in each.
        steps: Steps of each flow; the pool gets as many times n points of it.
        eta: The step size, 0 < eta < 2, as in `flow`. The time of step k is k eta.
        generator: Moved on; with the same one the pool is the same.
        size: How many points the pool holds, the last ones; at least n. Default: all of them.
        dtype: Of the stored points, torch.float32 or torch.float16.
        tol: The marginal error of the plans, as in `velocity`.
        max_iter: The largest number of iterations of each plan.
        checkpoint: A .safetensors file written every `every` batches and at the end, whole or not
            at all. If it exists, the run goes on from it with the same result as if it had never
            stopped; a finished one is just read. Small pools, which are made anew in seconds, need
            none.
        every: Batches between two checkpoints; writing one takes the time of a copy of the pool.
        configuration: What source and target are, in words and numbers: a checkpoint with another
            one, with other arguments or from another state of the generator is refused.
        callback: Called as callback(done, batches) after each batch, and once at the start.
        progress: Whether to show a bar on stderr.

    Returns:
        The `TrajectoryPool`, on the device of the source's points.

    Warns:
        NotConverged: Some plans stopped above tol; the message says how many, and at what.

    Raises:
        ValueError: The checkpoint is damaged, unwritable or of another run (a `FileError` that
            names it), or an argument is wrong.
        TypeError: An argument is wrong; the message names it.
    """
    batches, n = check.integer("batches", batches, 1), check.integer("n", n, 1)
    steps, every = check.integer("steps", steps, 1), check.integer("every", every, 1)
    eta = step_size(eta)
    check.generator(generator)
    size = batches * n * steps if size is None else check.integer("size", size, n)
    check.choice("dtype", dtype, STORED)
    run = {
        "blur": check.positive("blur", blur),
        "batches": batches,
        "n": n,
        "steps": steps,
        "eta": eta,
        "size": size,
        "dtype": str(dtype),
        "tol": check.positive("tol", tol),
        "max_iter": check.integer("max_iter", max_iter, 1),
        "generator": files.checksum(generator.get_state()),
        **(configuration or {}),
    }
    run = json.loads(json.dumps(run))  # what a checkpoint can hold and compare
    pool, done, errors = None, 0, []
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if checkpoint is not None:
        files.prepare(checkpoint)
        if checkpoint.exists():
            pool, done = _resume(checkpoint, run, generator)
    bar = reporting("trajectory_pool", callback, progress, batches)
    with torch.no_grad(), bar as report:
        report(done, batches)
        while done < batches:
            x, y = _drawn("source", source, n, generator), _drawn("target", target, n, generator)
            if pool is None:
                pool = TrajectoryPool(size, tuple(x.shape[1:]), dtype=dtype, device=x.device)
            errors += _flown(pool, x, y, blur, steps, eta, tol, max_iter)
            done += 1
            if checkpoint is not None and (done % every == 0 or done == batches):
                _save(checkpoint, pool, run, done, generator)
            report(done, batches)
    assert pool is not None
    warn("trajectory_pool", errors, tol, stacklevel=3)
    return pool


def _drawn(name: str, draw: Draw, n: int, generator: torch.Generator) -> Tensor:
    points = draw(n, generator)
    check.query(name, points)
    if len(points) != n:
        raise check.mismatch(name, f"{n} points", f"shape {[*points.shape]}")
    return points


def _flown(
    pool: TrajectoryPool,
    x: Tensor,
    y: Tensor,
    blur: float,
    steps: int,
    eta: float,
    tol: float,
    max_iter: int,
) -> list[float]:
    """Adds one flow to the pool; returns the marginal error of each step."""
    errors, v = [], None
    with plain(x.device):
        for k in range(steps):
            v = found(x, y, blur, None, None, tol, max_iter, v)
            pool.add(x, k * eta, v.value)
            errors.append(v.marginal_error)
            x = x + eta * v.value
    return errors


def _save(
    path: Path, pool: TrajectoryPool, run: dict[str, object], done: int, generator: torch.Generator
) -> None:
    tensors = {"x": pool.x, "t": pool.t, "v": pool.v, "generator": generator.get_state()}
    about = {"configuration": json.dumps(run), "done": str(done), "added": str(pool.added)}
    tensor_files.save(path, tensors, about)


def _resume(
    path: Path, run: dict[str, object], generator: torch.Generator
) -> tuple[TrajectoryPool, int]:
    """The pool as far as it came, on the generator's device, and how many batches it took."""
    held, about = tensor_files.read(path)
    try:
        saved = dict(json.loads(about["configuration"]))
        done, added = int(about["done"]), int(about["added"])
        x, t, v, state = (held[name] for name in ("x", "t", "v", "generator"))
    except (KeyError, ValueError, TypeError) as error:
        why = files.first_sentence(error)
        raise files.FileError(f"{path}: no checkpoint of a pool ({why}): delete it") from None
    files.refuse_another(path, "checkpoint", saved, run)
    pool = TrajectoryPool(len(x), tuple(x.shape[1:]), dtype=x.dtype, device=generator.device)
    pool.x.copy_(x), pool.t.copy_(t), pool.v.copy_(v)
    pool.added = added
    generator.set_state(state.clone())
    return pool, done
