"""python -m bench.gpu.compile SHARE OF [PATTERN]: compiles a share of the kernels that the cases
launch, into Triton's cache.

The launchers run on tensors without a device, and every launch compiles instead of running.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from dfkernels.ops.common.triton import device

from .. import triton_budget as budget
from .cases import Case, chosen


def launchers(case: Case) -> Iterator[Callable[[], object]]:
    """The calls that launch a case's kernels, on tensors without a device. A derivative takes the
    kernels of both modes; `top_k` has none."""
    shape = (case.B, case.N, case.d, case.K) if case.N else (case.B, case.d, case.K)
    names = [case.op]
    if case.way:
        search = ["select_atoms", "dropped_weight"] if case.way == "tolerance" else []
        names = [] if case.way == "top_k" else [*search, f"lists_{case.op}"]
    if case.derivative:
        names += [f"pair_{name}" for name in budget.PAIR_KERNELS]
    for name in names:
        launcher, ways = budget.launcher(name)
        storage = getattr(torch, case.storage)
        for args in budget.arguments(name, shape, torch.float32, storage):
            yield partial(launcher, *args, **ways[0])


def launches(cases: list[Case]) -> dict[tuple[str, str], Callable[[], object]]:
    """What compiles each kernel, by file and name of the budget's kind."""
    found: dict[tuple[str, str], Callable[[], object]] = {}
    run = JITFunction.run

    def note(kernel, *values, grid, warmup, **options):
        launch = budget.recorded(kernel, values, options)
        compiles = partial(run, kernel, *values, grid=grid, warmup=True, **options)
        found.setdefault((kernel.__module__, launch.name), compiles)

    with mock.patch.object(JITFunction, "run", note):
        for case in cases:
            for launch in launchers(case):
                launch()
    return found


def main() -> None:
    share, of = int(sys.argv[1]), int(sys.argv[2])
    cases = chosen(sys.argv[3] if len(sys.argv) > 3 else "")
    here = device._cuda_device(torch.cuda.current_device())
    failed = {}
    with mock.patch.dict(device.DEVICES, {90: here}):  # that of tensors that are on no GPU
        mine = sorted(launches(cases).items())[share::of]
        for key, compiles in mine:
            try:
                compiles()
            except Exception as error:
                failed[" ".join(key)] = f"{type(error).__name__}: {str(error)[:300]}"
    print(json.dumps({"kernels": len(mine), "failed": failed}))


if __name__ == "__main__":
    main()
