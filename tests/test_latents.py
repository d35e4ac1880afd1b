"""Folders of latents: read by rows in the units of the diffusion, whatever they are stored in; and
what is wrong with a folder, by name."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dfkernels as df
from dfkernels import Latents, PointCloud
from dfkernels._io.files import FileError
from dfkernels.methods import latents as module

EVENT, ROWS = (3, 4, 2), 5
MEAN, STD = torch.tensor([5.0, -2.0, 0.5]), torch.tensor([4.0, 0.5, 2.0])


def rows(shard, n=ROWS, dtype=torch.float32, flip=False):
    generator = torch.Generator().manual_seed(shard)
    z = torch.randn(n, *EVENT, generator=generator)
    z = z.flip(3) if flip else z
    return (z * STD.view(-1, 1, 1) + MEAN.view(-1, 1, 1)).to(dtype)


def name(rank, shard):
    return f"latents_rank{rank:02d}_shard{shard:03d}.safetensors"


def save(path, shard=0, **changed):
    z = {"latents": rows(shard), "latents_flip": rows(shard, flip=True)}
    z["labels"] = torch.arange(ROWS) + ROWS * shard
    save_file({k: t.contiguous() for k, t in {**z, **changed}.items() if t is not None}, path)


@pytest.fixture
def folder(tmp_path):
    """Two ranks with two shards each, of 5 rows [3, 4, 2], and their statistics."""
    for rank in range(2):
        for shard in range(2):
            save(tmp_path / name(rank, shard), 2 * rank + shard)
    statistics = {"mean": MEAN.view(1, -1, 1, 1), "std": STD.view(1, -1, 1, 1)}
    torch.save(statistics, tmp_path / "latents_stats.pt")
    return tmp_path


def mapped(z):
    """The formula, in float64."""
    return (z.double() - MEAN.double().view(-1, 1, 1)) / STD.double().view(-1, 1, 1)


def test_rows_come_in_the_order_of_the_shards_normalised_per_channel(folder):
    latents = Latents(folder)
    assert (len(latents), tuple(latents.event_shape), latents.dtype) == (20, EVENT, torch.float32)
    assert repr(latents) == "Latents(N=20, event_shape=(3, 4, 2), torch.float32, files=4)"
    assert latents.labels.tolist() == list(range(20))
    expected = mapped(torch.cat([rows(i) for i in range(4)]))
    everything = latents[:]
    assert everything.dtype == torch.float32
    torch.testing.assert_close(everything.double(), expected, rtol=0, atol=3e-6)  # |z| eps/std
    some = torch.tensor([19, 0, 7, 7, 12, -1])
    assert torch.equal(latents[some], everything[some])
    assert torch.equal(latents[3:14:5], everything[3:14:5])
    assert torch.equal(latents[-2], everything[-2])
    assert latents[some[:0]].shape == (0, *EVENT)
    assert latents[some.view(2, 3)].shape == (2, 3, *EVENT)
    with pytest.raises(IndexError):
        latents[20]


def test_rows_of_a_block_that_holds_one_are_the_same(folder, monkeypatch):
    expected = Latents(folder)[:]
    monkeypatch.setattr(module, "_BLOCK", 1)
    assert torch.equal(Latents(folder)[:], expected)


def test_with_two_keys_the_mirrored_images_follow_the_images(folder):
    latents = Latents(folder, keys=("latents", "latents_flip"))
    assert len(latents) == 40
    assert latents.labels.tolist() == 2 * list(range(20))
    assert torch.equal(latents[20:], latents[:20].flip(3))
    assert torch.equal(Latents(folder, keys="latents_flip")[:], latents[20:])


def test_shift_and_scale_are_given_or_those_of_the_file_beside(folder):
    z = torch.cat([rows(i) for i in range(4)]).double()
    for shift, scale in (
        (0.1159, 0.3611),
        (None, 0.18215),
        (MEAN, None),
        (MEAN.numpy(), [2, 3, 4]),
    ):
        at = lambda a, missing: torch.as_tensor(missing if a is None else a).double()
        expected = (z - at(shift, 0.0).view(-1, 1, 1)) * at(scale, 1.0).view(-1, 1, 1)
        latents = Latents(folder, shift=shift, scale=scale)
        torch.testing.assert_close(latents[:].double(), expected, rtol=1e-6, atol=3e-6)
        assert latents.shift.shape == latents.scale.shape == (3,)
    (folder / "latents_stats.pt").unlink()
    with pytest.raises(
        ValueError,
        match=r"^shift, scale: expected numbers, since there is no .*/latents_stats\.pt; shift=0 ",
    ):
        Latents(folder)
    assert torch.equal(Latents(folder, shift=0)[:].double(), z)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.uint8], ids=str
)
def test_every_dtype_is_read_in_float32(tmp_path, dtype):
    z = rows(0, dtype=dtype) if dtype != torch.uint8 else torch.randint(256, (5, *EVENT)).byte()
    save(tmp_path / "a.safetensors", latents=z)
    latents = Latents(tmp_path, shift=MEAN, scale=1 / STD.double())
    assert latents.dtype == dtype
    assert latents[:].dtype == torch.float32
    # float64 is subtracted before it is rounded; of the others float32 holds every value
    atol = 1e-6 if dtype == torch.float64 else 1e-4 if dtype == torch.uint8 else 3e-6
    torch.testing.assert_close(latents[:].double(), mapped(z), rtol=0, atol=atol)


def test_a_file_is_a_folder_of_one(folder, tmp_path):
    one = Latents(folder / name(1, 0))
    assert torch.equal(one[:], Latents(folder)[10:15]) and one.labels.tolist() == [*range(10, 15)]
    os.mkdir(folder / "npy")
    np.save(folder / "npy" / "z.npy", rows(0).numpy())
    latents = Latents(folder / "npy" / "z.npy", shift=MEAN, scale=1 / STD)
    assert torch.equal(latents[:], Latents(folder)[:5])
    assert latents.labels is None


@pytest.mark.parametrize("layout", ["<f4", ">f4", "<f2", "fortran"])
def test_npy_files_in_the_order_of_their_numbers(tmp_path, layout):
    """One row a file, as fast-DiT and SiT have them: 2.npy comes before 10.npy."""
    z = rows(0, 12)
    for i, row in enumerate(z.numpy()):
        row = np.asfortranarray(row[None]) if layout == "fortran" else row[None].astype(layout)
        np.save(tmp_path / f"{i}.npy", row)
    latents = Latents(tmp_path, shift=0)
    expected = z.half().float() if layout == "<f2" else z
    assert torch.equal(latents[:], expected)
    assert latents.labels is None


def test_a_cloud_of_latents_is_the_one_of_the_mapped_rows(folder):
    latents = Latents(folder)
    cloud = PointCloud(latents[:])
    x = torch.randn(3, *EVENT, generator=torch.Generator().manual_seed(1))
    found = df.ops.posterior(x, cloud.y, 0.8, 0.6)
    exact = df.ops.posterior(x.double(), mapped(torch.cat([rows(i) for i in range(4)])), 0.8, 0.6)
    torch.testing.assert_close(found.mean.double(), exact.mean, rtol=1e-4, atol=1e-5)
    assert cloud.y.data_ptr() == PointCloud(cloud.y).y.data_ptr()  # no second copy


def test_only_the_rows_asked_for_are_read(tmp_path):
    """A shard of 4 GiB, sparse but for its ends, is opened and read in the memory of a few rows."""
    event = (4, 512, 512)
    n = 1024
    path = tmp_path / "sparse.npy"
    z = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, *event))
    z[0], z[n - 1] = 1, 2
    del z
    code = f"""
        import resource, torch
        from dfkernels import Latents
        limit = 3 << 30  # of memory that is allocated; the map of the file is none
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        latents = Latents({str(path)!r}, shift=0)
        print(latents[torch.tensor([0, {n - 1}, 77])].mean((1, 2, 3)).tolist())
        """
    done = run(code)
    assert done.stdout == "[1.0, 2.0, 0.0]\n", done.stderr


def run(code):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_another_process_reads_the_same_from_a_small_copy(folder):
    latents = Latents(folder)
    everything = latents[:]
    copied = pickle.dumps(latents)
    assert len(copied) < 5000  # names, labels, statistics: no rows
    (folder / "copy.pickle").write_bytes(copied)
    code = f"""
        import pickle
        latents = pickle.load(open({str(folder / "copy.pickle")!r}, "rb"))
        print(latents[7].flatten().tolist(), latents.labels[7].item())
        """
    assert run(code).stdout == f"{everything[7].flatten().tolist()} 7\n"
    batches = torch.utils.data.DataLoader(latents, batch_size=8, num_workers=2)
    assert torch.equal(torch.cat(list(batches)), everything)


def test_more_files_than_a_process_may_have_open(tmp_path):
    for i in range(300):
        np.save(tmp_path / f"{i}.npy", np.full((1, 2, 1, 1), i + 1, np.float32))
    code = f"""
        import resource, torch
        from dfkernels import Latents
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        print(int(Latents({str(tmp_path)!r}, shift=0)[:].sum()))
        """
    done = run(code)
    assert done.stdout == f"{2 * sum(range(301))}\n", done.stderr


# ---- what is wrong


def refused(path, message, **how):
    with pytest.raises(FileError, match=f"^{re.escape(str(path))}{message}"):
        Latents(path if path.is_dir() else path.parent, **how)


def test_a_shard_or_a_rank_missing_in_the_numbering(folder):
    (folder / name(0, 0)).unlink()
    refused(folder, rf": expected shards without gaps in their numbers, got no {name(0, 0)}$")
    (folder / name(0, 1)).unlink()
    refused(folder, rf": expected shards without gaps in their numbers, got no {name(0, 0)}$")
    (folder / name(1, 1)).rename(folder / name(3, 7))
    missing = f"{name(0, 0)}, {name(2, 0)}, {name(3, 0)}, ...$"
    refused(folder, f": expected shards without gaps in their numbers, got no {missing}")


def test_a_missing_last_shard_is_a_warning(folder):
    (folder / name(1, 1)).unlink()
    with pytest.warns(
        RuntimeWarning, match="rank 1 has 1 shards, rank 0 has 2: the last ones"
    ) as w:
        assert len(Latents(folder)) == 15
    assert w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (folder / name(0, 1)).unlink()
        assert len(Latents(folder)) == 10  # one of each rank


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_shard(folder, keep):
    shard = folder / name(1, 0)
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(FileError, match=r"rank01_shard000\.safetensors: truncated or unreadable: "):
        Latents(folder)


@pytest.mark.parametrize("keep", [0, 7, 130, -1])
def test_a_truncated_npy_file(tmp_path, keep):
    path = tmp_path / "3.npy"
    np.save(path, rows(0).numpy())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileError, match=r"3\.npy: truncated or unreadable: "):
        Latents(tmp_path, shift=0)


def test_a_shard_that_is_truncated_or_replaced_later(folder):
    latents = Latents(folder)
    before = latents[:]
    shard = folder / name(1, 0)
    data = shard.read_bytes()
    shard.write_bytes(data[:-200])
    with pytest.raises(FileError, match=r"shard000\.safetensors: has changed since it was first"):
        latents[:]
    assert torch.equal(latents[:10], before[:10])
    shard.unlink()
    with pytest.raises(FileError, match=r"shard000\.safetensors: cannot read: No such file"):
        latents[12]


def written_to(n):
    return torch.cat([rows(0, n), torch.zeros(ROWS - n, *EVENT)])


UNLIKE = {
    "key": ({"latents": None}, r": holds 2 arrays \(labels, latents_flip\), none of them named "),
    "shape": (
        {"latents": torch.ones(5, 3, 4, 3)},
        r":latents: expected rows \[3, 4, 2\] in float32 as in .*, got rows \[3, 4, 3\] in float",
    ),
    "half": (
        {"latents": torch.ones(5, *EVENT).half()},
        r":latents: expected rows \[3, 4, 2\] in float32 as in .*, got rows \[3, 4, 2\] in float16",
    ),
    "integers": (
        {"latents": torch.ones(5, *EVENT).int()},
        ":latents: expected dtype float64, float32, float16, bfloat16, uint8, got torch.int32$",
    ),
    "numbers": (
        {"latents": torch.ones(5)},
        r":latents: expected rows \[n, C, \*\] with n >= 1, got shape \[5\]$",
    ),
    "none": (
        {"latents": torch.ones(0, *EVENT)},
        r":latents: expected rows \[n, C, \*\] with n >= 1, got shape \[0, 3, 4, 2\]$",
    ),
    "died": (
        {"latents": written_to(2)},
        ":latents: rows 2 to 4, the last, hold nothing but zeros, as where a writer died: ",
    ),
    "died before": (
        {"latents": written_to(0)},
        ":latents: rows 0 to 4, the last, hold nothing but zeros",
    ),
    "unlabelled": (
        {"labels": None},
        r": expected labels, as .*rank00_shard000\.safetensors has them, got none$",
    ),
    "labels": (
        {"labels": torch.arange(4)},
        r":labels: expected shape \[5\], one for each row, got \[4\]$",
    ),
    "one-hot": (
        {"labels": torch.ones(5, 2)},
        r":labels: expected shape \[5\], one for each row, got \[5, 2\]$",
    ),
}


@pytest.mark.parametrize("changed, message", UNLIKE.values(), ids=UNLIKE)
def test_a_shard_unlike_the_others(folder, changed, message):
    shard = folder / name(0, 1)
    save(shard, 1, **changed)
    refused(shard, message)


def test_keys_of_different_lengths(folder):
    shard = folder / name(0, 1)
    save(shard, 1, latents_flip=rows(0, 4))
    how = {"keys": ("latents", "latents_flip")}
    refused(shard, ":latents_flip: expected 5 rows, as many as .*:latents has, got 4$", **how)
    with pytest.raises(ValueError, match="^keys: expected at least one, got none$"):
        Latents(folder, keys=())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_is_named_where_it_is_read(folder, value):
    z = rows(1)
    z[3, 1, 2, 0] = value
    save(folder / name(0, 1), 1, latents=z)
    latents = Latents(folder)
    assert latents[:8].isfinite().all()
    with pytest.raises(
        FileError,
        match=rf"shard001\.safetensors:latents: expected finite .* got {value} in row 3$",
    ):
        latents[torch.tensor([19, 8, 2])]


def test_values_that_float32_does_not_hold(tmp_path):
    save(tmp_path / "a.safetensors", latents=rows(0).double() * 1e39)
    with pytest.raises(
        FileError, match=r":latents: expected finite numbers in float32, got .*e\+3"
    ):
        Latents(tmp_path, shift=0)[:]


@pytest.mark.parametrize(
    "how, message",
    [
        ({"shift": torch.ones(4)}, r"shift: expected a number, or 3 of them, .*, got shape \[4\]$"),
        ({"scale": [1, 2]}, r"scale: expected a number, or 3 of them, .*, got shape \[2\]$"),
        ({"scale": [1, 2, 0]}, r"scale: expected numbers > 0, got \[1.0, 2.0, 0.0\]$"),
        ({"shift": float("nan")}, r"shift: expected finite numbers, got \[nan, nan, nan\]$"),
        ({"shift": "mean"}, "shift: expected numbers, got str$"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:9],
)
def test_wrong_shift_and_scale(folder, how, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        Latents(folder, **how)


@pytest.mark.parametrize(
    "saved, message",
    [
        ({"mean": MEAN[:2], "std": STD}, r":mean: expected a number, or 3 of .*, got shape \[2\]$"),
        ({"mean": MEAN, "std": 0 * STD}, r":std: expected numbers > 0, got \[0.0, 0.0, 0.0\]$"),
        ({"mean": MEAN}, r":std|: holds 1 array \(mean\), none of them named std$"),
    ],
    ids=["channels", "zero", "missing"],
)
def test_wrong_statistics(folder, saved, message):
    path = folder / "latents_stats.pt"
    torch.save(saved, path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}({message})"):
        Latents(folder)


def test_folders_without_latents(tmp_path):
    expected = r": expected \.safetensors or \.npy files, got "
    refused(tmp_path, f"{expected}an empty folder$")
    (tmp_path / "notes.txt").write_text("none")
    refused(tmp_path, f"{expected}a folder of 1 others$")
    with pytest.raises(FileError, match=f"notes.txt{expected}.txt$"):
        Latents(tmp_path / "notes.txt")
    with pytest.raises(FileError, match=r"gone: no such file or folder$"):
        Latents(tmp_path / "gone")


def test_a_foreign_file_among_the_shards_is_named(folder):
    save_file({"weight": torch.ones(2, 2)}, folder / "model.safetensors")
    refused(
        folder / "model.safetensors", r": holds 1 array \(weight\), none of them named latents$"
    )


def test_reading_does_not_depend_on_global_state(folder):
    expected = Latents(folder)[:]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            module._mapped.cache_clear()
            latents = Latents(folder)
            found = latents[:]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected) and found.device.type == "cpu"
    assert not latents.labels.is_inference()  # which no embedding could save for its backward pass
    later = latents[:]
    later.requires_grad_().square().sum().backward()
    assert torch.equal(later.grad, 2 * expected)


def test_a_network_is_trained_on_a_folder(folder):
    """Conditional, from a path given as text, killed and gone on with: the same bits."""
    latents = Latents(str(folder))

    class Labelled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = df.methods.networks.ImageNet(3, EVENT[1:], width=8)
            self.place = torch.nn.Embedding(20, 3)
            torch.nn.init.zeros_(self.place.weight)

        def forward(self, x, t, label):
            return self.body(x, t.log()) + self.place(label)[:, :, None, None]

    def loss(network, generator):
        rows = torch.randint(len(latents), (8,), generator=generator)
        denoiser = df.Denoiser(network, df.schedule.EDM()).bind(label=latents.labels[rows])
        return df.denoising_loss(denoiser, latents[rows], generator, noise=(0.1, 5.0))

    def trained(**how):
        torch.manual_seed(0)
        module = Labelled()
        generator = torch.Generator().manual_seed(0)
        return df.methods.training.train(module, loss, steps=4, generator=generator, **how)

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    whole = trained()
    path = Path(folder) / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(checkpoint=path, every=2, callback=stop)
    again = trained(checkpoint=path, every=2)
    for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b)
