"""t_of_log_snr takes the ends of the range up to rounding, and nothing beyond."""

from __future__ import annotations

import math

import pytest
import torch

import dfkernels as df

CLOSED = [
    s
    for s in (df.schedule.VP(), df.schedule.EDM(), df.schedule.VE())
    if math.isfinite(s.t_range[1])
]


@pytest.mark.parametrize("schedule", CLOSED, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_end_of_the_range_is_reached_and_not_passed(schedule, dtype):
    """A thousand roundings beyond the end are refused; the end itself and one rounding of its
    log-SNR are not."""
    end = torch.tensor(schedule.t_range[1], dtype=dtype)
    at_end = schedule.log_snr(end)
    assert float(schedule.t_of_log_snr(at_end)) == pytest.approx(float(end), rel=1e-5)
    # by how much the log-SNR falls over a thousand roundings of t
    slope = float(schedule.log_snr(end * (1 - 1e-3)) - at_end) / 1e-3 if float(end) else 0.0
    beyond = at_end - 1000 * torch.finfo(dtype).eps * slope * max(float(end), 1.0)
    assert slope > 0 and float(beyond) < float(at_end)
    with pytest.raises(ValueError, match="t_of_log_snr"):
        schedule.t_of_log_snr(beyond)
