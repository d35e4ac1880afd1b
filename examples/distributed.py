"""A folder of files whose rows several processes share out; each gets all results, to the bit.

Every process reads its share of the files and nothing else. What the files leave, 2 d + 4 numbers a
query for each, goes to all processes and is merged there in the order of the files, so that neither
the number of processes nor who reads what changes a digit.

Run: torchrun --nproc_per_node 2 examples/distributed.py (seconds)
or:  python examples/distributed.py (one process, the same digits)
"""

import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import distributed

import dfkernels as df

D, ROWS = 64, (3000, 1000, 2000, 2000, 4000)  # numbers in an atom; atoms in each file
ALPHA, SIGMA = 1.0, 2.0


def write(folder: Path) -> None:
    """Files as an encoder leaves them, a Gaussian of growing width along its axes."""
    generator = torch.Generator().manual_seed(0)
    width = torch.linspace(0.1, 3.0, D)
    for i, rows in enumerate(ROWS):
        y = width * torch.randn(rows, D, generator=generator)
        np.save(folder / f"part{i}.npy", y.numpy())
    df.methods.sharded.write_manifest(folder)


def main(folder: Path, group: distributed.ProcessGroup | None) -> None:
    rank = 0 if group is None else distributed.get_rank(group)
    if rank == 0:
        write(folder)
    if group is not None:
        distributed.barrier(group)  # the files are there
    cloud = df.ShardedCloud(folder, group=group)
    # in one piece: print writes the end of the line by itself, and ranks write at the same time
    sys.stdout.write(f"rank {rank} reads {', '.join(cloud.own_files)}\n")

    # the same queries on every rank: another seed on one of them would be an error on all
    generator = torch.Generator().manual_seed(1)
    x = SIGMA * torch.randn(16, D, generator=generator)
    total = cloud.partial(x, ALPHA, SIGMA, v=torch.ones_like(x))
    p, product = total.posterior(), total.fisher_matvec()

    if rank == 0:
        files = [torch.from_numpy(np.load(folder / name)) for name in cloud.files]
        one = df.ops.posterior(x, torch.cat(files), ALPHA, SIGMA)
        print(cloud)
        print(f"log q of the first query: {p.log_prob[0]:.6f}, in memory {one.log_prob[0]:.6f}")
        print(
            f"posterior means differ from those in memory by {(p.mean - one.mean).abs().max():.0e}"
        )
        print(f"sum of all F v, every digit: {float(product.double().sum()).hex()}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        if "RANK" not in os.environ:  # not under torchrun
            main(Path(place), None)
        else:
            distributed.init_process_group("gloo", timeout=timedelta(minutes=5))
            # the first rank's; on several machines it has to be one that they share
            folder = [place]
            distributed.broadcast_object_list(folder)
            main(Path(folder[0]), distributed.group.WORLD)
            distributed.destroy_process_group()
