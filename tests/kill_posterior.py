"""Kills `dfkernels posterior` at random moments, starts it again, and compares what it writes in
the end with what an undisturbed run writes.

    python -m tests.kill_posterior [--times 50] [--seed 0]

Each process is killed by SIGKILL at a random moment, from its start to the end of its result. After
each, what is kept has to hold every chunk of queries that was done; the next process goes on from
there. A result that was finished has to have the same bytes. Results are .npz files and folders,
atoms one file and a folder of shards. Exit status 1 if anything is lost or different.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dfkernels.methods.sharded import write_manifest

QUERIES, CHUNK = 3000, 250
# What a process runs: everything that can be kept is kept at once, and a line is logged when the
# work begins and after each chunk.
CHILD = """
import sys
from dfkernels import cli
from dfkernels._io import unfinished
from dfkernels.methods import _posterior_sums
unfinished.SECONDS = _posterior_sums.SECONDS = 0.0
add, log = unfinished.Unfinished.add, open("log", "a", buffering=1)
def logged(work, rows):
    add(work, rows)
    log.write(f"{work.rows}\\n")
unfinished.Unfinished.add = logged
log.write("0\\n")
sys.exit(cli.main(sys.argv[1:]))
"""


def make_inputs() -> None:
    """Shards latents/*.npy, the same atoms in y.npy, and queries x.npy, in the current folder."""
    draw = np.random.default_rng(0)
    y = draw.standard_normal((16000, 64), np.float32)
    Path("latents").mkdir()
    for i, part in enumerate(np.split(y, [3000, 9000])):
        np.save(f"latents/part{i}.npy", part)
    write_manifest("latents")
    np.save("y.npy", y)
    np.save("x.npy", draw.standard_normal((QUERIES, 64), np.float32))


def start(data: str, out: str) -> subprocess.Popen[bytes]:
    argv = ["posterior", data, "x.npy", "--sigma", "2", "--chunk", str(CHUNK), "-o", out]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *argv],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def content(out: str) -> dict[str, bytes]:
    """The bytes of a result, by file."""
    path = Path(out)
    return {file.name: file.read_bytes() for file in (path.iterdir() if path.is_dir() else [path])}


def done() -> int:
    """How many queries the processes have said to be done."""
    lines = Path("log").read_text().split("\n")[:-1] if Path("log").exists() else []
    return max(map(int, lines), default=0)


def kept(out: str) -> int:
    """How many queries are kept, also in a result that is finished."""
    if Path(out).exists():
        return QUERIES
    path = Path(f"{out.rstrip('/')}.unfinished/job.json")
    return json.loads(path.read_bytes())["rows"] if path.exists() else 0


def killed(child: subprocess.Popen[bytes], draw: random.Random, duration: float) -> bool:
    """Waits for a random moment, of an undisturbed run's duration, and kills the process; False if
    it had ended before.
    """
    if draw.random() < 0.8:  # else while it starts
        await_line(child)
    time.sleep(draw.uniform(0, duration))
    child.kill()
    return child.wait() < 0


def await_line(child: subprocess.Popen[bytes]) -> None:
    """Waits until the process logs something, or ends."""
    size = lambda: Path("log").stat().st_size if Path("log").exists() else 0
    before = size()
    while child.poll() is None and size() == before:
        time.sleep(0.01)


def run_through(
    data: str, out: str, times: int, draw: random.Random, duration: float = 0.0
) -> tuple[int, dict[str, bytes]]:
    """Runs a command to its end through at most `times` kills, and removes the result. Returns how
    many kills there were, and its bytes."""
    kills = 0
    while True:
        child = start(data, out)
        if kills < times and killed(child, draw, duration):
            kills += 1
            print(f"{data} {out}: killed with {done()} of {QUERIES} queries done", flush=True)
            if kept(out) < done():
                sys.exit(f"lost: {kept(out)} are kept")
        elif child.wait() != 0:
            sys.exit(f"{data} {out}: exit code {child.returncode}")
        else:
            break
    left = {path.name for path in Path().iterdir()} - {"latents", "y.npy", "x.npy", "log"}
    if left != {out.rstrip("/")}:
        sys.exit(f"{data} {out}: left behind: {left}")
    found = content(out)
    shutil.rmtree(out) if Path(out).is_dir() else Path(out).unlink()
    Path("log").unlink()
    return kills, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, kills, results = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_inputs()
        commands = [(data, out) for data in ("latents", "y.npy") for out in ("a.npz", "a/")]
        whole, begin = {}, time.monotonic()
        for command in commands:
            whole[command] = run_through(*command, 0, draw)[1]
        duration = (time.monotonic() - begin) / len(commands)
        for command in itertools.cycle(commands):
            if kills == args.times:
                break
            more, found = run_through(*command, args.times - kills, draw, duration)
            if found != whole[command]:
                sys.exit(f"{' '.join(command)}: other bytes than those of an undisturbed run")
            kills, results = kills + more, results + 1
    print(f"{kills} kills, {results} results: no finished chunk lost, the same bytes")


if __name__ == "__main__":
    main()
