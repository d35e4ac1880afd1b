"""The main job on real data, in its quick form: numbers, files, and what happens when something is
missing or full.
"""

from __future__ import annotations

import errno
import re

import numpy as np
import pytest
import torch

from dfkernels._io import files
from dfkernels._page import extra

pytest.importorskip("sklearn", reason="needs the extra: pip install dfkernels[demo]")
pytest.importorskip("matplotlib", reason="needs the extra: pip install dfkernels[demo]")
pytest.importorskip("PIL", reason="needs the extra: pip install dfkernels[demo]")

from coarse_figures import draw_coarsely

from experiments import __main__ as program
from experiments import demo, text
from experiments.demo import data, report
from experiments.demo.speed import plain, sdpa
from experiments.demo.sweep import CHECKS, LIMIT

FIGURES = ["accuracy.png", "digits.png", "noise.png", "patches.png", "speed.png"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One quick run for all tests."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        draw_coarsely(patch)
        return out, program.main(["demo", "--quick", "--out", str(out)])


@pytest.mark.slow
def test_every_check_holds(finished):
    out, code = finished
    assert code == 0
    with np.load(out / "results.npz") as results:
        for name, levels in (("digits", 7), ("patches", 5)):
            errors = results[f"{name}_errors"]
            assert errors.shape == (levels, len(CHECKS)) and float(errors.max()) <= LIMIT


@pytest.mark.slow
def test_numbers_behave_as_theory_says(finished):
    """ESS runs from 1 to N, sigma^2 tr F / d from 1 back to the Gaussian value, eigenvalues stay
    below 1/sigma^2.
    """
    with np.load(finished[0] / "results.npz") as r:
        ess, trace = r["digits_ess"], r["digits_trace"]
        assert ess[0].max() < 1.001 and 1200 < ess[-1].min() < ess[-1].max() <= 1797
        np.testing.assert_allclose(trace[0], 1, atol=1e-6)
        np.testing.assert_allclose(trace[-1], r["digits_gaussian"][-1], atol=2e-3)
        for name in ("digits", "patches"):
            assert r[f"{name}_large"].max() < 1 + 1e-5 and bool(
                (np.diff(r[f"{name}_small"], axis=-1) >= -1e-6).all()
            )
        assert r["patches_small"].min() < 0  # log q is not concave somewhere
        rms = np.sqrt((r["digits_denoised"][0] - r["digits_noisy"][0]) ** 2).mean()
        assert 0.06 < rms < 0.1  # mean |noise| at sigma = 0.1


@pytest.mark.slow
def test_files(finished):
    out = finished[0]
    assert sorted(p.name for p in out.iterdir()) == sorted([*FIGURES, "index.html", "results.npz"])
    for name in FIGURES:
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 * len(FIGURES)
    # nothing outside is referred to
    assert not re.search(r"(?:src|href|srcset)=['\"](?!data:)", page)
    assert "prefers-color-scheme:dark" in page and page.count("<tr>") == 8 + 6 + 5


def test_data_are_what_they_say():
    full = data.patches(quick=False)
    assert (
        len(full.cloud) == 133_140 >= 100_000
        and full.cloud.d == 192
        and len(data.digits(quick=False).cloud) == 1797
    )
    assert full.cloud.y.min() >= -1 and full.cloud.y.max() <= 1
    held = full.clean.flatten(1)[:4]
    nearest = torch.cdist(held, full.cloud.y.flatten(1)).min(1).values
    assert float(nearest.min()) > 0.1  # the queries are no atoms


def test_peers_compute_the_same_thing():
    """The peers that are timed agree with the op; float64 where they can."""
    from dfkernels import ops

    draw = torch.Generator().manual_seed(0)
    y, x = torch.randn(300, 64, generator=draw), torch.randn(5, 64, generator=draw) * 2
    expected = ops.posterior(x.double(), y.double(), 1.0, 1.0)
    for got, want in zip(plain(x.double(), y.double(), 1.0), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    log_prob, mean = sdpa(x, y, 1.0)
    torch.testing.assert_close(log_prob.double(), expected.log_prob, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(mean.double(), expected.mean, rtol=1e-4, atol=1e-4)


def test_a_check_that_fails_shows():
    assert report._error(2 * LIMIT).endswith(" !") and report._error(float("nan")).endswith(" !")
    assert report._error(1e-6) == "1e-6" and report._error(0.0) == "<1e-9"


def test_table_is_aligned():
    assert text.text_table(["a", "bb"], [["100", "2"]]) == "  a  bb\n───────\n100   2"
    assert text.text_table(["a", "b"], [["x", "10"]], words={0}) == "a   b\n─────\nx  10"


def test_missing_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == "sklearn" else object())
    assert program.main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert (
        capsys.readouterr().err
        == "python -m experiments demo: error: sklearn not installed: pip install"
        ' "dfkernels[demo]"\n'
    )
    assert not (tmp_path / "out").exists()


def test_unwritable_out_is_found_before_any_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(data, "digits", lambda quick: pytest.fail("worked first"))
    assert program.main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith(
        f"python -m experiments demo: error: {tmp_path}/file: cannot write there: "
    )


@pytest.mark.slow
def test_full_disk_keeps_what_was_computed(tmp_path, monkeypatch, capsys, finished):
    """Figures cannot be written: the tables are printed and results.npz is whole."""
    monkeypatch.setattr(demo, "sweep", lambda each, step: saved_sweep(finished[0], each))
    monkeypatch.setattr(
        demo,
        "speed",
        lambda each, batches, step: demo.Speed(each, batches, [[1.0, 2.0, 3.0]] * len(batches)),
    )
    real = files.write

    def write(path, fill):
        def full(file):
            raise OSError(errno.ENOSPC, "No space left on device")

        real(path, full if path.suffix == ".png" else fill)

    monkeypatch.setattr(demo, "write", write)
    assert program.main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.endswith(
        f"python -m experiments demo: error: {tmp_path}/digits.png: cannot write: No space left on"
        " device\n"
    )
    assert "all checks hold" in printed.out
    assert [p.name for p in tmp_path.iterdir()] == ["results.npz"] and len(
        np.load(tmp_path / "results.npz").files
    ) == 30


def saved_sweep(out, each):
    """The finished run's Sweep, read back."""
    with np.load(out / "results.npz") as results:
        names = [f for f in demo.Sweep.__dataclass_fields__ if f != "data"]
        return demo.Sweep(
            each, **{name: torch.from_numpy(results[f"{each.name}_{name}"]) for name in names}
        )


def test_interrupt(tmp_path, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "sweep", stop)
    assert program.main(["demo", "--quick", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("\npython -m experiments demo: interrupted\n")
