"""Runs `ShardedCloud`s in process groups and writes down what each rank got, for test_ranks.py.

    python tests/ranks.py FOLDER SCENARIO:RANKS ...

torch is imported once: the ranks are forks of this process, which has started no threads by then.
FOLDER holds data/ with a manifest, and gets SCENARIO.RANKS.json, the outcomes by rank.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

import dfkernels as df
from dfkernels import cli
from dfkernels._io import files
from dfkernels._io.elsewhere import Elsewhere
from dfkernels.methods import _ranks

E = (2, 3)
ALPHA, SIGMA = 0.9, 0.7


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, V = normal(3, *E, seed=1), normal(3, 2, *E, seed=2)


def bits(*tensors):
    """A number for all bits of some tensors."""
    return files.checksums(tensors)


def outcome(call):
    """What a call returns, or its error as text."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def whole(cloud, x=X, alpha=ALPHA, sigma=SIGMA, v=V, **more):
    p = cloud.partial(x, alpha, sigma, v=v, diagonal=True, **more)
    return bits(*p.posterior(), p.score(), p.fisher_matvec(), p.fisher_diagonal(), p.log_weight)


def opened(folder, group=None, memory=200):
    group = distributed.group.WORLD if group is None else group
    return df.ShardedCloud(folder, memory=memory, group=group)


def uses(cloud):
    """Numbers for what a cloud does besides `partial`."""
    x = X.clone().requires_grad_()
    sigma = torch.full((3,), SIGMA, requires_grad=True)
    p = cloud.posterior(x, ALPHA, sigma)
    results = {"log_prob": p.log_prob, "mean": p.mean, "trace": p.fisher_trace}
    results["product"] = cloud.fisher_matvec(x, V, ALPHA, sigma)
    found = {
        name: bits(*torch.autograd.grad(t.square().sum(), (x, sigma), retain_graph=True))
        for name, t in results.items()
    }
    found["rows"] = bits(cloud.rows(torch.tensor([49, 0, 7, 8, 9, 7])))
    found["sample"] = bits(cloud.sample(5, torch.Generator().manual_seed(3)))
    denoiser = df.Denoiser.exact(cloud, df.schedule.EDM())
    adaptive = {"method": "dopri5", "rtol": 1e-2, "atol": 1e-2}
    found["dopri5"] = bits(df.log_prob(denoiser, X, (0.5, 5.0), "exact", **adaptive).bits_per_dim)
    return found


def results(rank, folder):
    cloud = opened(folder / "data")
    cloud.verify()
    return {"whole": outcome(lambda: whole(cloud)), "own": cloud.own_files, "repr": repr(cloud)}


def using(rank, folder):
    return {"uses": outcome(lambda: uses(opened(folder / "data")))}


def gradient(cloud, loss, name="fisher_trace"):
    x = X.clone().requires_grad_()
    found = getattr(cloud.posterior(x, ALPHA, SIGMA), name)
    return bits(*torch.autograd.grad(loss * found.sum(), x))


def disagreeing(rank, folder):
    """What rank 1 is asked for differs, in one thing after the other; then all is well again."""
    cloud, data = opened(folder / "data"), folder / "data"
    pick = lambda usual, other: other if rank == 1 else usual
    names = ("scaled", "lacking", "local", "second")
    scaled, lacking, local, second = (folder / f"{name}{rank}" for name in names)
    for place in (scaled, lacking, local, second):
        shutil.copytree(data, place)
    df.methods.sharded.write_manifest(scaled, scale=pick(1.0, 2.0), force=True)
    (second / "part8.npy").unlink()
    df.methods.sharded.write_manifest(second, force=True)
    (lacking / pick("part8.npy", "part11.npy")).unlink()  # of rank 2 on ranks 0 and 2, of rank 1
    for name in set(cloud.files) - set(cloud.own_files):
        (local / name).unlink()

    another = opened(second)

    def versions(call):
        usual = _ranks._versions
        _ranks._versions = pick(usual, lambda: "dfkernels 0")
        try:
            return call()
        finally:
            _ranks._versions = usual

    calls = {
        "x": lambda: whole(cloud, pick(X, X + 1e-7)),
        "shape": lambda: whole(cloud, pick(X, X[:2]), v=None),
        "dtype": lambda: whole(cloud, pick(X, X.double()), v=None),
        "alpha": lambda: whole(cloud, alpha=pick(ALPHA, 0.8)),
        "sigma": lambda: whole(cloud, sigma=pick(torch.full((3,), SIGMA), torch.ones(3))),
        "v": lambda: whole(cloud, v=pick(V, V[:, :1])),
        "diagonal": lambda: cloud.partial(X, ALPHA, SIGMA, diagonal=pick(False, True)),
        "files": lambda: whole(cloud, files=pick([0, 2], [0, 1])),
        "method": lambda: pick(lambda: whole(cloud), cloud.verify)(),
        "mapped": lambda: whole(cloud._mapped(torch.tensor([pick(1.0, 2.0)]), torch.zeros(1), 1)),
        "cloud": lambda: whole(pick(cloud, another), files=[0]),
        "manifest": lambda: opened(pick(data, scaled)),
        "memory": lambda: opened(data, memory=pick(200, 300)),
        "versions": lambda: versions(lambda: whole(cloud)),
        "gradient": lambda: gradient(cloud, pick(1.0, 2.0)),
        "mean": lambda: gradient(cloud, pick(1.0, 2.0), "mean"),
        "rows": lambda: bits(cloud.rows(torch.tensor([pick(0, 1)]))),
        "missing": lambda: opened(lacking),
        "local": lambda: whole(opened(local)),
        "argument": lambda: whole(cloud, pick(X, "x")),
        "after": lambda: whole(cloud),
    }
    return {name: outcome(call) for name, call in calls.items()}


def raising(rank, folder):
    """Errors in the work of one rank, of two, and the same one on all."""
    cloud = opened(folder / "data")
    nan = X.clone()
    nan[1, 0, 2] = torch.nan

    def fail(ranks, done, total):
        if rank in ranks:
            raise OSError(f"no space on {len(ranks)}")

    calls = {
        "one": lambda: whole(cloud, callback=functools.partial(fail, [1])),
        "two": lambda: whole(cloud, callback=functools.partial(fail, [0, 2])),
        "all": lambda: whole(cloud, callback=functools.partial(fail, range(9))),
        "shape": lambda: whole(cloud, X[..., :2], v=None),
        "nan": lambda: whole(cloud, nan),
        "long": lambda: whole(cloud, callback=lambda *_: 1 / 0 if rank else {}["\0ß" * 9999]),
        "after": lambda: whole(cloud),
    }
    return {name: outcome(call) for name, call in calls.items()}


def subgroup(rank, folder):
    """Two of the ranks have a group of their own; a third is outside of it."""
    group = distributed.new_group([0, 2])

    def call():
        cloud = opened(folder / "data", group)
        return [whole(copy.deepcopy(cloud)), repr(cloud), cloud.own_files]

    found = {"inside": outcome(call)}
    cloud = opened(folder / "data")
    distributed.destroy_process_group()
    found["destroyed"] = outcome(lambda: opened(folder / "data", cloud._files.ranks.group))
    return found


def killed(rank, folder):
    """Rank 1 is killed while it works."""
    cloud = opened(folder / "data")
    end = lambda *_: os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None
    return {"killed": outcome(lambda: whole(cloud, callback=end))}


def hanging(rank, folder):
    """Rank 1 takes longer than the group's timeout of a second."""
    cloud = opened(folder / "data")
    return {
        "late": outcome(lambda: whole(cloud, callback=lambda *_: time.sleep(0.6 * (rank == 1))))
    }


def command(arguments, rank):
    """Exit code, standard output and standard error of `torchrun -m dfkernels posterior`."""
    os.environ["MASTER_PORT"] = str(PORTS.pop())
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["posterior", *arguments.split()])
    return [code, out.getvalue(), err.getvalue()]


JOB = "data x.npy --sigma 0.7 --memory 1K --chunk 1"


def commands(rank, folder):
    pick = lambda first, second: second if rank == 1 else first
    calls = {
        "archive": f"{JOB} -o two.npz",
        "folder": f"{JOB} -o two/",
        "again": f"{JOB} -o two/",
        "input": f"{JOB} -o x.npy",
        "file": "x.npy x.npy --sigma 0.7",
        "queries": JOB.replace("x.npy", pick("x.npy", "none.npy")),
        "sigma": f"{JOB} --sigma {pick(1, 2)} -o three.npz",
    }
    return {name: command(arguments, rank) for name, arguments in calls.items()}


def command_killed(rank, folder):
    """Rank 1 is killed when it has done two of three chunks."""
    add = Elsewhere.add

    def last(work, rows):
        add(work, rows)
        if rank == 1 and work.rows == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Elsewhere.add = last
    return {"killed": command(f"{JOB} -o kept.npz", rank)}


IN_A_GROUP = (results, using, disagreeing, raising, subgroup, killed, hanging)
COMMANDS = (commands, command_killed)
SCENARIOS = {call.__name__: call for call in (*IN_A_GROUP, *COMMANDS)}


def run(scenario, rank, ranks, folder):
    """One rank, in a process of its own."""
    torch.set_num_threads(1)
    name = f"{scenario.__name__}.{ranks}"
    if scenario in IN_A_GROUP:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder / name}.store",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=1 if scenario is hanging else 60),
        )
    else:
        os.chdir(folder)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost")
    found = scenario(rank, folder)
    (folder / f"{name}.{rank}.json").write_text(json.dumps(found))


def fork(scenario, ranks, folder):
    """All ranks; what they found, None of a rank that wrote nothing."""
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            try:
                run(SCENARIOS[scenario], rank, ranks, folder)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    paths = [folder / f"{scenario}.{ranks}.{rank}.json" for rank in range(ranks)]
    return [json.loads(p.read_text()) if p.exists() else None for p in paths]


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]


if __name__ == "__main__":
    place, PORTS = Path(sys.argv[1]), free_ports(8)
    for what in sys.argv[2:]:
        scenario, _, count = what.partition(":")
        found = fork(scenario, int(count), place)
        (place / f"{scenario}.{count}.json").write_text(json.dumps(found))
