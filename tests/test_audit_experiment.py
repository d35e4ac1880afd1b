"""`python -m experiments audit`: a quick run, what it writes, and the files that it reads."""

from __future__ import annotations

import gzip
import re
import struct

import pytest
import torch

pytest.importorskip("sklearn", reason="needs the extra: pip install dfkernels[demo]")
pytest.importorskip("matplotlib", reason="needs the extra: pip install dfkernels[demo]")

from coarse_figures import draw_coarsely

from dfkernels._io.files import FileError
from experiments import __main__ as program
from experiments.audit import data, networks


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick run: (folder, exit code)."""
    out = tmp_path_factory.mktemp("audit")
    with pytest.MonkeyPatch.context() as patch:
        draw_coarsely(patch)
        return out, program.main(["audit", "--quick", "--out", str(out)])


@pytest.mark.slow
def test_a_quick_run_shows_what_it_claims(finished):
    out, code = finished
    text = (out / "audits.md").read_text()
    assert code == 0
    assert "Trained on 1,500 images" in text and "Trained on 60 images" in text
    assert "Most likely the network was trained on data of another scale" in text


@pytest.mark.slow
def test_every_figure_is_there_and_is_shown(finished):
    out = finished[0]
    shown = re.findall(r"!\[[^\]]+\]\(audits/([^)]+)\)", (out / "audits.md").read_text())
    assert sorted(shown) == sorted(p.name for p in (out / "audits").iterdir())
    for name in shown:
        assert (out / "audits" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
@pytest.mark.parametrize("name, images", [("many", "1,500"), ("few", "60")])
def test_each_network_has_its_page(finished, name, images):
    text = (finished[0] / f"{name}.html").read_text()
    assert images in text and "handwritten" not in text
    assert not re.search(r"(?:src|href|srcset)=['\"](?!data:|#)", text)  # nothing outside


@pytest.mark.slow
def test_a_second_run_goes_on_from_the_first(finished, capsys, monkeypatch):
    """Nothing is trained or measured again, and the page is the same."""
    out = finished[0]
    before = (out / "audits.md").read_text()
    draw_coarsely(monkeypatch)
    monkeypatch.setattr(networks, "denoising_loss", None)
    assert program.main(["audit", "--quick", "--out", str(out)]) == 0
    assert (out / "audits.md").read_text() == before


def test_the_networks_differ_in_their_images_alone(tmp_path):
    images = data.digits()
    size = networks.Size(few=8, width=8, steps=1)
    few, many = (
        networks.trained(name, count, images, size, tmp_path, lambda stage: None)
        for name, count in (("few", 8), ("many", None))
    )
    assert torch.equal(few.train, images.train[:8]) and torch.equal(many.train, images.train)
    assert few.parameters == many.parameters > 10_000
    assert str(few.denoiser.network) == str(many.denoiser.network)


# ---- Fashion-MNIST's files


def idx(images, kind=2051, shape=None):
    """Images [n, H, W] in uint8 as a gzipped file of the IDX format."""
    header = struct.pack(">4i", kind, *(shape or images.shape))
    return gzip.compress(header + images.numpy().tobytes())


@pytest.fixture
def folder(tmp_path):
    draw = torch.Generator().manual_seed(0)
    parts = {"train": 5, "t10k": 3}
    for name, count in parts.items():
        images = torch.randint(256, (count, 28, 28), generator=draw, dtype=torch.uint8)
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(images))
    return tmp_path


def test_pixels_are_averaged_and_scaled(folder):
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    images[:, :2, :2] = torch.tensor([[255, 255], [255, 0]])
    images[:, 2:4, :2] = 255
    (folder / "train-images-idx3-ubyte.gz").write_bytes(idx(images))
    found = data.fashion(folder)
    assert found.size == 14 and found.train.shape == (2, 1, 14, 14)
    assert found.train[:, 0, :3, 0].tolist() == 2 * [[0.5, 1.0, -1.0]]
    assert found.held_out.shape == (3, 1, 14, 14)
    assert found.held_out.min() >= -1 and found.held_out.max() <= 1


def test_images_come_in_a_fixed_random_order(folder):
    whole = torch.stack([torch.full((28, 28), i, dtype=torch.uint8) for i in range(200)])
    (folder / "train-images-idx3-ubyte.gz").write_bytes(idx(whole))
    first, second = (data.fashion(folder).train[:, 0, 0, 0] for _ in range(2))
    order = ((first + 1) * 127.5).round().int().tolist()
    assert torch.equal(first, second) and sorted(order) == list(range(200)) != order


def test_missing_images_say_where_to_get_them(tmp_path):
    with pytest.raises(FileError) as error:
        data.fashion(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/train-images-idx3-ubyte.gz: no such file: it belongs to Fashion-MNIST, which "
        "Debian has as a package (apt-get install dataset-fashion-mnist); with your own copy, "
        "--data FOLDER"
    )


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no gzip", "cannot read: Not a gzipped file"),
        (idx(torch.zeros(4, 28, 28, dtype=torch.uint8))[:-20], "cannot read: "),
        (gzip.compress(b"short"), "expected images of the IDX format, got 5 bytes"),
        (
            idx(torch.zeros(4, 28, 28, dtype=torch.uint8), kind=2049),
            "expected images of the IDX format (type 2051), got type 2049",
        ),
        (
            idx(torch.zeros(4, 28, 28, dtype=torch.uint8), shape=(5, 28, 28)),
            "got type 2051 and 3,136 pixels for 5 x 28 x 28",
        ),
    ],
    ids=["no gzip", "truncated", "short", "labels", "missing rows"],
)
def test_damaged_images_are_refused(folder, content, message):
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(FileError) as error:
        data.fashion(folder)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_the_command_line_names_a_folder_without_images(tmp_path, capsys):
    argv = ["audit", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert program.main(argv) == 2
    assert f"error: {tmp_path}/train-images-idx3-ubyte.gz: no such file" in capsys.readouterr().err
