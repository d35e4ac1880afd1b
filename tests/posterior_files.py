"""What tests of `dfkernels posterior` on files and folders share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dfkernels import cli
from dfkernels.methods.sharded import write_manifest

SIZES = (7, 1, 12)
EVENT = (2, 3)
FIELDS = ("ess", "fisher_trace", "log_prob", "mean", "score")


def make_inputs():
    """Shards latents/part*.npy [20, 2, 3], the same atoms in y.npy, and queries x.npy [5, 2, 3]."""
    draw = np.random.default_rng(0)
    y = draw.standard_normal((sum(SIZES), *EVENT)).astype(np.float32)
    Path("latents").mkdir()
    for i, part in enumerate(np.split(y, np.cumsum(SIZES)[:-1])):
        np.save(f"latents/part{8 + i}.npy", part)
    write_manifest("latents", scale=2.0, offset=0.5)
    np.save("y.npy", y)
    np.save("x.npy", draw.standard_normal((5, *EVENT)))


def run(argv, code=0):
    assert cli.main(["posterior", *argv.split()]) == code


def refused(capsys, argv):
    """The error, one line, of a run that ends with exit code 2."""
    capsys.readouterr()
    run(argv, 2)
    error = capsys.readouterr().err
    assert error.startswith("dfkernels posterior: error: ") and error.count("\n") == 1
    return error.removeprefix("dfkernels posterior: error: ").strip()
