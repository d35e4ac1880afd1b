"""One schedule of every kind, all with sigma/alpha from 0.05 to 20 in their range."""

from __future__ import annotations

import torch

from dfkernels import schedule

SCHEDULES = [
    schedule.VP(),
    schedule.SubVP(),
    schedule.VE(),
    schedule.EDM(),
    schedule.RectifiedFlow(),
    schedule.Tabulated(torch.linspace(0.9999, 0.0001, 500, dtype=torch.float64)),
]
