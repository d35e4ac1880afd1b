"""Certified evaluation of clouds in many files: the bounds hold, far files are not read, and
indexes that are stale, damaged or missing are refused by name."""

from __future__ import annotations

import contextlib
import math
import os

import numpy as np
import pytest
import torch
from shards import write_shards
from tensors import rng
from test_global_state import STATES

import dfkernels as df
from dfkernels import ShardedCloud, cli
from dfkernels._io import rows
from dfkernels.certified.certificate import Certificate
from dfkernels.methods.sharded import _certified, _search, write_manifest

EPS = 1e-6


def fresh():
    return torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))


def normal(n, d, generator):
    return torch.randn(n, d, generator=generator)


def low_rank(n, d, generator):
    """Atoms near a space of 6 dimensions, as photographs are."""
    inside = normal(n, 6, generator) @ normal(6, d, rng(7)) / 6**0.5
    return inside + 0.05 * normal(n, d, generator)


def indexed(folder, parts, memory=1 << 30, **manifest):
    cloud = ShardedCloud(write_shards(folder, parts, **manifest), memory=memory)
    cloud.index()
    return cloud


@pytest.fixture
def reads(monkeypatch):
    """How many rows of each file, and of each tensor of an index, have been read."""
    count, fill = {}, rows._fill

    def spied(at, runs, into):
        name = at.path.name if at.path.suffix == ".npy" else f"{at.path.name}:{at.key}"
        count[name] = count.get(name, 0) + sum(last - first for first, last in runs)
        return fill(at, runs, into)

    monkeypatch.setattr(rows, "_fill", spied)
    return count


def exact(x, y, sigma, alpha=1.0):
    """log q, mean, tr F and F by the definition, in float64."""
    x, y = x.double(), y.double()
    alpha, sigma = (torch.as_tensor(t, dtype=torch.float64).expand(len(x)) for t in (alpha, sigma))
    u = (x[:, None] - alpha[:, None, None] * y) / sigma[:, None, None]
    logits = -u.square().sum(2) / 2 - math.log(len(y))
    d = x.shape[1]
    log_q = logits.logsumexp(1) - d * (sigma.log() + 0.5 * math.log(2 * math.pi))
    w = logits.softmax(1)
    mean = w @ y
    spread = u - (w[:, :, None] * u).sum(1, keepdim=True)
    trace = (d - (w[:, :, None] * spread.square()).sum((1, 2))) / sigma**2
    return log_q, mean, trace


def check_bounds(cloud, x, y, sigma, alpha=1.0, tolerance=EPS):
    """The results against the exact ones, and the part of the bound that the error reaches."""
    found = cloud.partial(x, alpha, sigma, tolerance=tolerance)
    p = found.posterior()
    log_q, mean, trace = exact(x, y, sigma, alpha)
    tiny = 1e-12 * (1 + log_q.abs())
    error = log_q - p.log_prob
    assert bool((error >= -tiny).all()) and bool((error <= found.log_prob_error + tiny).all())
    size = 1e-12 * (1 + mean.norm(dim=1))
    assert bool(((p.mean - mean).norm(dim=1) <= found.mean_error + size).all())
    size = 1e-11 * (1 + trace.abs() + x.shape[1] / torch.as_tensor(sigma) ** 2)
    assert bool(((p.fisher_trace - trace).abs() <= found.fisher_error + size).all())
    assert bool((found.dropped_mass <= tolerance).all())
    return found


@pytest.mark.parametrize("sigma", [0.02, 1.0, 5.0])
@pytest.mark.parametrize("kind", [normal, low_rank])
def test_the_bounds_hold(tmp_path, kind, sigma):
    generator = fresh()
    parts = [kind(n, 160, generator) + shift for n, shift in ((200, 0), (1, 0), (300, 1), (90, 9))]
    cloud, y = indexed(tmp_path, parts, memory=100 * 640), torch.cat(parts)
    rows = torch.randint(len(y), (6,), generator=generator)
    x = (y[rows] + sigma * normal(6, 160, generator)).double()
    found = check_bounds(cloud, x, y, sigma)
    if sigma < 1:
        assert found.certificate.selected.max() < 50
    check_bounds(cloud, 0.7 * x, y, torch.tensor([0.02, 0.1, 0.5, 2.0, 9.0, sigma]), 0.7, 0.3)


def test_what_is_dropped_may_be_nearly_all_that_is_allowed(tmp_path):
    """Files in which many equal atoms carry together what the tolerance allows: the true share of
    what is left out comes near the bound."""
    near, far = torch.zeros(1, 160), torch.zeros(2000, 160)
    near[:, 0], far[:, 0] = 1, 6.9
    cloud, y = indexed(tmp_path, [near, far]), torch.cat([near, far])
    x = near.double()
    found = check_bounds(cloud, x, y, 1.0, tolerance=1e-3)
    missed = (exact(x, y, 1.0)[0] - found.posterior().log_prob).item()
    assert found.certificate.selected.tolist() == [1]
    assert missed == pytest.approx(2000 * math.exp(-(5.9**2) / 2), rel=1e-3)  # 5.5e-5
    assert missed <= found.log_prob_error.item() <= 1.2 * missed


def test_a_far_file_is_read_as_far_as_its_first_level(tmp_path, reads):
    generator = fresh()
    parts = [low_rank(400, 160, generator) + 4 * i for i in range(4)]
    cloud = indexed(tmp_path, parts)
    x = parts[2][:3].double() + 0.1 * normal(3, 160, generator)
    cloud.partial(x, 1.0, 0.1, tolerance=EPS)  # checks the indexes
    reads.clear()
    found = cloud.partial(x.flip(0), 1.0, 0.1, tolerance=EPS)
    assert found.certificate.selected.tolist() == [1, 1, 1]
    near = {name for name in reads if name.endswith((".npy", ":fine_codes"))}
    assert near == {"part2.npy", "part2.npy.index:fine_codes"}
    assert reads["part2.npy"] < 15 and reads["part2.npy.index:fine_codes"] < 20
    firsts = [reads[f"part{i}.npy.index:coarse_codes"] for i in range(4)]
    assert firsts[2] == 2 * firsts[0] and firsts[0] == firsts[1] == firsts[3] > 0


def test_the_search_is_kept_for_the_same_queries(tmp_path, reads):
    generator = fresh()
    parts = [low_rank(300, 160, generator) + 4 * i for i in range(3)]
    cloud, y = indexed(tmp_path, parts), torch.cat(parts)
    x = y[[5, 400]].double() + 0.1 * normal(2, 160, generator)
    F = df.DiffusionFisher(x, cloud, 1.0, 0.1, tolerance=EPS)
    trace = F.trace()
    reads.clear()
    product, diagonal = F @ x, F.diagonal()
    assert not any("index" in name for name in reads)
    assert reads == {"part0.npy": 2, "part1.npy": 2}
    whole = df.DiffusionFisher(x, df.PointCloud(y), 1.0, 0.1)
    torch.testing.assert_close(trace, whole.trace())
    torch.testing.assert_close(product, whole @ x)
    torch.testing.assert_close(diagonal, whole.diagonal())
    log_q = exact(x + 1, y, 0.1)[0]
    torch.testing.assert_close(cloud.log_prob(x + 1, 1.0, 0.1, tolerance=EPS), log_q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fisher_with_a_tolerance_says_what_a_partial_says(tmp_path, dtype):
    generator = fresh()
    parts = [low_rank(300, 160, generator) for _ in range(3)]
    cloud = indexed(tmp_path, parts)
    x = (parts[1][:4] + normal(4, 160, generator)).to(dtype)
    v = normal(4, 160, generator).to(dtype)
    found = cloud.partial(x, 1.0, 1.0, v=v, diagonal=True, tolerance=1e-4)
    F = df.DiffusionFisher(x, cloud, 1.0, 1.0, tolerance=1e-4)
    assert torch.equal(F.dropped_mass, found.dropped_mass) and bool((F.dropped_mass > 0).all())
    assert torch.equal(F.atoms_read, found.certificate.selected)
    assert torch.equal(F.log_prob_error, found.log_prob_error)
    torch.testing.assert_close(F.mean_error, found.mean_error)
    torch.testing.assert_close(F.fisher_error, found.fisher_error)
    p = found.posterior()
    assert torch.equal(F.log_prob, p.log_prob) and torch.equal(F.denoised, p.mean)
    assert torch.equal(cloud.log_prob(x, 1.0, 1.0, tolerance=1e-4), p.log_prob)
    assert torch.equal(F.trace(), p.fisher_trace) and torch.equal(F @ v, found.fisher_matvec())
    assert torch.equal(F.diagonal(), found.fisher_diagonal())
    dense = F.to_dense()
    torch.testing.assert_close((dense @ v[..., None])[..., 0], F @ v)
    denoiser = df.Denoiser.exact(cloud, df.schedule.EDM(), tolerance=1e-4)
    torch.testing.assert_close(denoiser(x, torch.tensor(1.0)), p.mean)


def test_parts_of_the_files_merge_with_their_bounds(tmp_path):
    generator = fresh()
    parts = [low_rank(200, 160, generator) + i for i in range(4)]
    cloud, y = indexed(tmp_path, parts), torch.cat(parts)
    x = y[::150].double() + 0.5 * normal(len(y[::150]), 160, generator)
    by_file = [cloud.partial(x, 1.0, 0.5, tolerance=EPS, files=[i]) for i in range(4)]
    merged = df.merge(by_file)
    log_q, mean, _ = exact(x, y, 0.5)
    tiny = 1e-12 * (1 + log_q.abs())
    error = log_q - merged.posterior().log_prob
    assert bool((error >= -tiny).all()) and bool((error <= merged.log_prob_error + tiny).all())
    assert bool((merged.dropped_mass <= EPS).all())
    assert bool(((merged.mean - mean).norm(dim=1) <= merged.mean_error + 1e-11).all())
    plain = df.merge([by_file[0], *(cloud.partial(x, 1.0, 0.5, files=[i]) for i in (1, 2, 3))])
    assert bool((plain.dropped_mass <= by_file[0].dropped_mass * (1 + 1e-9)).all())
    assert bool((cloud.partial(x, 1.0, 0.5).dropped_mass == 0).all())
    assert bool((cloud.partial(x, 1.0, 0.5).mean_error == 0).all())


def test_what_two_parts_left_out_adds_up():
    def of(heaviest, dropped, centre, radius):
        numbers = (torch.tensor([t], dtype=torch.float64) for t in (heaviest, dropped))
        ball = torch.full((4,), centre, dtype=torch.float64), torch.tensor(radius).double()
        return Certificate(*numbers, torch.tensor([3]), *ball)

    both = of(-2.0, -9.0, 0.0, 5.0).with_other(of(-1.0, -8.0, 1.0, 4.0))
    expected = (math.exp(-9) + math.exp(-8)) / math.exp(-1)
    assert both.dropped_mass().item() == pytest.approx(expected, rel=1e-8)
    assert both.dropped_mass().item() >= expected and both.selected.tolist() == [6]
    assert both.radius.item() == pytest.approx(6)  # |centre| of the second is 2
    assert both.reach(torch.full((1, 4), 2.0)).item() == pytest.approx(4 + 6)


def test_pairs_that_a_better_atom_rules_out_are_counted_as_dropped():
    x, one = torch.zeros(2, 4, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    search = _search.Search(x, one, one, None, [], 5.0, 1)
    search.lower[:] = torch.tensor([[-1.0], [0.0]])
    upper = torch.tensor([-6.5, -5.5, -7.0, -1.0, -7.0], dtype=torch.float64)
    kept = search._pruned(_search.Sparse(torch.tensor([0, 0, 0, 1, 1]), torch.arange(5), upper))
    assert kept.atom.tolist() == [1, 3] and kept.upper.tolist() == [-5.5, -1.0]
    expected = torch.tensor([math.log(math.exp(-6.5) + math.exp(-7)), -7.0], dtype=torch.float64)
    torch.testing.assert_close(search.log_dropped, expected, rtol=1e-8, atol=0)
    assert bool((search.log_dropped >= expected).all())


def test_remote_atoms_are_dropped_with_a_bound_or_counted(tmp_path):
    generator = fresh()
    y = low_rank(600, 160, generator)
    y[5] += 1e4
    y[6] -= 3e4
    cloud = indexed(tmp_path, [y[:300], y[300:]])
    x = torch.stack([y[9], y[5], y[400]]).double() + 0.2 * normal(3, 160, generator)
    found = check_bounds(cloud, x, y, 0.2)
    near, remote, other = found.certificate.selected.tolist()
    assert near == other == 1 and remote >= 300  # all of the remote atom's file
    check_bounds(cloud, x, y, torch.tensor([0.2, 3e3, 1e4]))


def test_few_queries_at_a_time_and_small_blocks_change_little(tmp_path, monkeypatch):
    generator = fresh()
    parts = [low_rank(130, 160, generator) for _ in range(3)]
    cloud, y = indexed(tmp_path, parts), torch.cat(parts)
    sigma = torch.logspace(-2, 1, 7, dtype=torch.float64)
    x = y[:7].double() + sigma[:, None] * normal(7, 160, generator)
    for module, name, value in (
        (_certified, "_QUERIES", 3),
        (_search, "_PAIRS", 64 * 3),
        (_search, "_CODES", 160 * 5),
        (_search, "_SAMPLE", 4),
    ):
        monkeypatch.setattr(module, name, value)
    check_bounds(ShardedCloud(tmp_path, memory=2 * 640 * 7), x, y, sigma)
    assert cloud.partial(x[:0], 1.0, 1.0, tolerance=EPS).mean.shape == (0, 160)


def test_other_storage_and_numbers_for_each_channel(tmp_path):
    generator = fresh()
    y = (40 * low_rank(500, 160, generator) + 128).clamp(0, 255).to(torch.uint8).view(500, 2, 80)
    scale, offset = torch.tensor([0.02, 0.05]), torch.tensor([-2.0, 1.0])
    values = y.double() * scale.double()[:, None] + offset.double()[:, None]
    given = {"scale": scale.double().tolist(), "offset": offset.double().tolist()}
    cloud = indexed(tmp_path / "a", [y[:200], y[200:]], **given)
    x = values[[3, 300]] + 0.05 * torch.randn(2, 2, 80, generator=generator, dtype=torch.float64)
    found = cloud.partial(x, 1.0, 0.05, tolerance=EPS)
    log_q, mean, _ = exact(x.flatten(1), values.flatten(1), 0.05)
    assert found.certificate.selected.max() < 20
    torch.testing.assert_close(found.posterior().log_prob, log_q, rtol=1e-9, atol=2e-6)
    torch.testing.assert_close(found.posterior().mean.flatten(1), mean, rtol=1e-6, atol=1e-6)
    one = indexed(tmp_path / "b", [y[:200], y[200:]], scale=0.02, offset=-1.0)
    p = one.posterior(x, 1.0, 0.05, tolerance=EPS)
    q = df.ops.posterior(x, y, 1.0, 0.05, scale=0.02, offset=-1.0)
    torch.testing.assert_close(p.mean, q.mean)


def refused(call, message, kind=ValueError):
    with pytest.raises(kind) as raised:
        call()
    assert str(raised.value) == message


X = torch.zeros(1, 160)


def certified(cloud):
    return lambda: cloud.posterior(X, 1.0, 1.0, tolerance=EPS)


def test_indexes_that_are_missing_stale_or_damaged(tmp_path):
    parts = [normal(100, 160, rng(i)) for i in range(3)]
    cloud = ShardedCloud(write_shards(tmp_path, parts))
    name = tmp_path / "part1.npy.index"
    missing = (
        f"tolerance: {{}} is missing: `dfkernels index {tmp_path}` or cloud.index() writes the "
        "indexes"
    )
    refused(certified(cloud), missing.format(tmp_path / "part0.npy.index"))
    cloud.index()
    assert len(certified(cloud)().ess) == 1
    held = name.read_bytes()
    name.unlink()
    refused(certified(cloud), missing.format(name))
    name.write_bytes(held)
    refused(
        lambda: cloud.posterior(X + 1, 1.0, 1.0, tolerance=EPS),
        f"{name}: has changed since the cloud was opened: open it anew",
    )
    assert len(certified(ShardedCloud(tmp_path))().ess) == 1
    place = held.index(b"}", 1000) + 3000  # in the tensors
    name.write_bytes(held[:place] + bytes([held[place] ^ 1]) + held[place + 1 :])
    for call in (certified(ShardedCloud(tmp_path)), cloud.index):
        with pytest.raises(ValueError, match="part1.npy.index: damaged: the checksum of "):
            call()
    name.write_bytes(held[:5000])
    with pytest.raises(ValueError, match="part1.npy.index: truncated or unreadable: "):
        certified(ShardedCloud(tmp_path))()
    name.write_bytes(held)
    np.save(tmp_path / "part1.npy", parts[1].numpy() + 1)
    write_manifest(tmp_path, force=True)
    for call in (certified(ShardedCloud(tmp_path)), ShardedCloud(tmp_path).index):
        with pytest.raises(ValueError) as raised:
            call()
        message = str(raised.value)
        assert message.startswith(
            f"{name}: the index of another cloud: expected [100, 160] torch.f"
        )
        assert message.endswith(": remove it and index anew")


def test_a_file_that_changed_is_not_indexed(tmp_path):
    parts = [normal(100, 160, rng(i)) for i in range(2)]
    cloud = ShardedCloud(write_shards(tmp_path, parts))
    np.save(tmp_path / "part1.npy", parts[1].numpy() + 1)
    with pytest.raises(ValueError, match="part1.npy: has changed since manifest.json was written"):
        cloud.index()
    assert not (tmp_path / "part1.npy.index").exists()


def test_a_copied_folder_is_checked_before_its_atoms_count(tmp_path):
    """Its files have other times, so that their checksums are compared first."""
    parts = [normal(100, 160, rng(i)) for i in range(2)]
    indexed(tmp_path, parts)
    path = tmp_path / "part1.npy"
    changed = parts[1].numpy().copy()
    changed[50] += 1
    np.save(path, changed)
    x = parts[1][:1] + 0.01
    message = "part1.npy: has changed since manifest.json was written: its checksum is "
    with pytest.raises(ValueError, match=message):
        ShardedCloud(tmp_path).posterior(x, 1.0, 0.01, tolerance=EPS)
    np.save(path, parts[1].numpy())
    found = ShardedCloud(tmp_path).posterior(x, 1.0, 0.01, tolerance=EPS)
    torch.testing.assert_close(found.mean, parts[1][:1])


def test_an_index_that_is_there_is_kept(tmp_path, monkeypatch):
    """As after a run that was killed between two files."""
    parts = [normal(100, 160, rng(i)) for i in range(3)]
    cloud = indexed(tmp_path, parts)
    names = [tmp_path / f"part{i}.npy.index" for i in range(3)]
    (tmp_path / "part2.npy.index").unlink()
    before, said = [os.stat(name).st_mtime_ns for name in names[:2]], []
    cloud.index(callback=lambda *at: said.append(at))
    assert [os.stat(name).st_mtime_ns for name in names[:2]] == before and names[2].exists()
    assert said == [(100, 300), (200, 300), (300, 300)]
    assert write_manifest(tmp_path, force=True).exists()  # indexes are no shards
    assert len(ShardedCloud(tmp_path).files) == 3


def test_bad_arguments(tmp_path):
    cloud = indexed(tmp_path / "a", [normal(100, 160, rng(0))])
    for wrong in (0.0, 1.0, -1.0):
        refused(
            lambda wrong=wrong: cloud.partial(X, 1.0, 1.0, tolerance=wrong),
            f"tolerance: expected a number in (0, 1), or None for all atoms, got {wrong}",
        )
    refused(
        lambda: cloud.partial(X.clone().requires_grad_(), 1.0, 1.0, tolerance=EPS),
        "tolerance: expected None where x, alpha, sigma or v requires a gradient, got 1e-06: a "
        "search has no derivatives",
    )
    refused(
        lambda: cloud.partial(X + math.nan, 1.0, 1.0, tolerance=EPS),
        "x: expected finite values, got nan at index [0, 0]",
    )
    short = ShardedCloud(write_shards(tmp_path / "b", [normal(9, 7, rng(0))]))
    why = (
        "expected atoms of at least 32 bytes, got 28 (d = 7, torch.float32): these are read as "
        "fast as an index"
    )
    refused(short.index, f"index: {why}")
    refused(lambda: short.posterior(X[:, :7], 1.0, 1.0, tolerance=EPS), f"tolerance: {why}")


def test_ranks_have_no_searches(tmp_path, monkeypatch):
    cloud = indexed(tmp_path, [normal(100, 160, rng(0))])
    monkeypatch.setattr(cloud._files.ranks, "size", 2)
    assert cloud._no_index() == (
        "ranks search no indexes: leave it out, or open the cloud without group"
    )
    message = "{}: expected a cloud of one rank, got one of 2: open it without group"
    refused(cloud.index, message.format("index"))
    refused(lambda: cloud.draw(X, 1.0, 1.0, seed=0), message.format("draw"))
    refused(lambda: df.top_k(X, cloud, 1.0, 1.0, 1), message.format("top_k"))


def test_global_state_changes_nothing(tmp_path):
    parts = [normal(100, 160, rng(i)) for i in range(2)]
    expected = indexed(tmp_path / "a", parts).partial(X, 1.0, 3.0, tolerance=EPS)
    tensors = lambda path: (held := path.read_bytes())[8 + int.from_bytes(held[:8], "little") :]
    with contextlib.ExitStack() as states:
        names = "default dtype float64", "default device meta", "autocast bfloat16"
        for name in (*names, "inference mode"):
            states.enter_context(STATES[name]())
        found = indexed(tmp_path / "b", parts).partial(X, 1.0, 3.0, tolerance=EPS)
    for name in ("part0.npy.index", "part1.npy.index"):
        assert tensors(tmp_path / "a" / name) == tensors(tmp_path / "b" / name)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.dropped_mass, expected.dropped_mass)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "a", [normal(100, 160, rng(i)) for i in range(2)])
    for data in ("a", "a/manifest.json", "a"):
        assert cli.main(["index", data]) == 0
        assert capsys.readouterr().out == "2 files have their indexes in a\n"
    assert certified(ShardedCloud("a"))().ess.shape == (1,)
    start = "dfkernels index: error: "
    for more, name in ((["--out", "i"], "--out"), (["--scale", "2"], "--scale")):
        assert cli.main(["index", "a", *more]) == 2
        message = f"{start}{name}: expected none with a, whose manifest says all\n"
        assert capsys.readouterr().err == message
    assert cli.main(["index", "a/part0.npy"]) == 2
    assert capsys.readouterr().err == f"{start}--out: expected the name of the index\n"
    (tmp_path / "a" / "part1.npy.index").write_bytes(b"")
    assert cli.main(["index", "a"]) == 2
    assert "a/part1.npy.index: truncated or unreadable: " in capsys.readouterr().err
