"""A path prints as a line: a list of tensors would print every number of every state."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

import torch

import dfkernels as df
from dfkernels.methods import nsgf


def records():
    """Every class of the package whose fields hold a list of tensors."""
    for found in pkgutil.walk_packages(df.__path__, "dfkernels."):
        if "triton" in found.name or found.name.endswith("__main__"):
            continue
        for kind in vars(importlib.import_module(found.name)).values():
            fields = getattr(kind, "__annotations__", {}).values()
            if isinstance(kind, type) and any("list[Tensor]" in str(f) for f in fields):
                yield kind


def test_every_record_with_a_list_of_tensors_is_printed_in_short():
    kinds = set(records())
    assert {kind.__name__ for kind in kinds} == {"Flow", "Trajectory"}
    assert {kind.__repr__ for kind in kinds} == {df.methods.grid.in_short}


def test_a_path_in_short():
    schedule = df.schedule.EDM()
    generator = torch.Generator().manual_seed(0)
    cloud = df.PointCloud(torch.randn(20, 1, 8, 8, generator=generator))
    t = df.time_grid(schedule, 4, (0.5, 8.0))
    x = torch.randn(3, 1, 8, 8, generator=generator)
    path = df.sample(df.Denoiser.exact(cloud, schedule), x, t)
    assert repr(path) == "Trajectory(5 states [3, 1, 8, 8] torch.float32, t from 8 to 0.5)"
    assert repr(type(path)(t[:0], [])) == "Trajectory(0 states)"
    hidden = type(path)(t.to("meta"), path.x)
    assert repr(hidden) == "Trajectory(5 states [3, 1, 8, 8] torch.float32)"
    flow = nsgf.flow(x.flatten(1), cloud.y.flatten(1), blur=8.0, steps=2, eta=0.5)
    assert repr(flow) == "Flow(3 states [3, 64] torch.float32, t from 0 to 1)"


def test_an_index_and_the_report_of_an_audit_are_printed_in_a_line():
    generator = torch.Generator().manual_seed(0)
    cloud = df.PointCloud(torch.randn(40, 160, generator=generator))
    index = cloud.index()
    size = f"{len(index.basis)} axes, 2 levels, {index.nbytes} bytes, cpu"
    assert repr(index) == str(index) == f"CloudIndex(40 atoms, d = 160, {size})"
    points = df.PointCloud(torch.randn(8, 3, generator=generator))
    denoiser = df.Denoiser.exact(points, df.schedule.EDM())
    report = df.audit(denoiser, points, None, levels=2, queries=8, points=0, samples=0)
    bad = [finding.name for finding in report.findings if finding.status == "bad"]
    said = f"bad: {', '.join(bad)}" if bad else "none of them bad"
    assert repr(report) == (
        f"AuditReport(Denoiser(PosteriorMean, EDM(), 'sample'), 2 levels, "
        f"{len(report.findings)} findings, {said})"
    )
    sound = dataclasses.replace(report, findings=())
    assert repr(sound).endswith(", 0 findings, none of them bad)")
