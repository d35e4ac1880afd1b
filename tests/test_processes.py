"""The ops from two threads at once, and in the workers of a DataLoader, forked and spawned."""

from __future__ import annotations

import threading

import pytest
import torch

from dfkernels import ops

CASES = [(3, 50, 2), (9, 300, 17), (20, 200, 64)]


def results(seed):
    """All forward ops on a few clouds."""
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    generator, found = torch.Generator().manual_seed(seed), []
    for b, n, d in CASES:
        x, y, v, log_prior = normal(b, d), normal(n, d), normal(b, 2, d), normal(n)
        some = torch.arange(0, n, 3)
        lists = {"atoms": some.repeat(b), "counts": torch.full((b,), len(some))}
        for more in ({}, lists):
            found += ops.posterior(x, y, 1.0, 0.5, log_prior, **more)
            found.append(ops.fisher_matvec(x, y, v, 1.0, 0.5, log_prior, **more))
            found.append(ops.fisher_diagonal(x, y, 1.0, 0.5, log_prior, **more))
        found.append(ops.endpoint_matvec(v, x, x + 1, 1.0, 0.5))
    levels = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    found += ops.transport_chain(normal(5, 3), normal(20, 3), levels, 1 - levels)
    return found


def assert_same(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_two_threads_at_once():
    want = [results(seed) for seed in (0, 1)]
    got, start = [[], []], threading.Barrier(2)

    def work(i):
        start.wait()
        for _ in range(5):
            got[i].append(results(i))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert len(got[i]) == 5
        for some in got[i]:
            assert_same(some, want[i])


class Scores(torch.utils.data.Dataset):
    """What a data set does that computes in its workers."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.cat([o.flatten() for o in results(i)])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_in_the_workers_of_a_data_loader(start):
    want = [Scores()[i] for i in range(4)]  # before the fork: its threads do not live on
    loader = torch.utils.data.DataLoader(
        Scores(), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=300
    )
    assert_same(list(loader), want)
