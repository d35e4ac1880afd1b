"""What an audit measured: at each noise level, of likelihoods, and of samples.

Every mean square error and variance is one of x_0, per number, in squared units of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = [
    "Calibration",
    "Errors",
    "Estimate",
    "JacobianAudit",
    "LevelAudit",
    "LikelihoodAudit",
    "SampleAudit",
]


class Estimate(NamedTuple):
    """A number and its standard error, over what was drawn at random to estimate it."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.error:.1g}"


class Errors(NamedTuple):
    """Mean square errors of predictions of x_0 on noisy data of one kind, training or held-out."""

    network: Estimate  # of the network
    exact: Estimate | None  # of the exact posterior mean of the training data; None without them
    excess: Estimate | None  # network - exact, on the same queries
    distance: Estimate | None  # mean square difference between the network and the exact mean
    ess: float | None  # the median effective number of training atoms


class JacobianAudit(NamedTuple):
    """The network's Jacobian J = d eps/dx. For the score of any law sigma J is I - Cov(u), with u
    = (x - alpha x_0)/sigma given x: symmetric, and with no eigenvalue above 1.
    """

    asymmetry: Estimate  # |J - J^T|/|J| in the Frobenius norm: 0 for a gradient, at most 2
    eigenvalue: float  # the largest one found of sigma (J + J^T)/2, over some queries; from below
    impossible: float  # the share of these queries at which it is above 1 by more than is allowed
    trace: Estimate  # sigma tr J/d = sigma^2 tr F/d of the network, over the queries
    exact_trace: Estimate | None  # the same of the training data at the same queries
    trace_error: Estimate | None  # trace - exact_trace, query by query


class Calibration(NamedTuple):
    """The variance of x_0 given x that the network's Jacobian implies,
    (sigma/alpha)^2 (1 - sigma tr J/d), beside the network's mean square error.
    """

    predicted: Estimate
    actual: Estimate
    ratio: Estimate | None  # predicted/actual: 1 if calibrated; None where the error is 0


@dataclass(frozen=True)
class LevelAudit:
    """What was measured at one noise level.

    Attributes:
        t, alpha, sigma: the level; `.noise` is sigma/alpha.
        baseline: the mean square error of the best multiple of x as a prediction of centred data:
            s^2 v/(s^2 + v), s = sigma/alpha, v the data's variance per number.
        train, held_out: the errors on noisy data of either kind; None for data that were not given.
        best: the least mean square error possible on the training data: the mean posterior variance
            under their law; None without training data.
        gap: held_out - train of the network's error, with the same noise; None unless both were
            given. What a multiple of x, which cannot memorise, explains of the difference is taken
            out, since it is chance: the error is then several times smaller.
        exact_gap: the same of the exact mean, which memorises.
        linear_gap: held_out - train of the error of that multiple of x: 0 if both kinds of data
            follow the same law.
        memorised: gap/exact_gap: 0 if it generalises, 1 for the exact mean; None where the exact
            mean's gap is not clear of its error.
        jacobian, calibration: on noisy held-out data, or training data where no others are given.
    """

    t: float
    alpha: float
    sigma: float
    baseline: float
    train: Errors | None
    held_out: Errors | None
    best: Estimate | None
    gap: Estimate | None
    exact_gap: Estimate | None
    linear_gap: Estimate | None
    memorised: Estimate | None
    jacobian: JacobianAudit
    calibration: Calibration

    @property
    def noise(self) -> float:
        """sigma/alpha."""
        return self.sigma / self.alpha

    @property
    def errors(self) -> Errors:
        """Those on held-out data, or on training data where no others are given."""
        found = self.held_out or self.train
        assert found is not None  # one of the two is always given
        return found


@dataclass(frozen=True)
class LikelihoodAudit:
    """Log-likelihoods of x/alpha under the network's flow, in nats per number.

    Attributes:
        noise: (low, high), the range of levels of the flow.
        train, held_out: the mean over the points, and its standard error over them (the trace's
            random probes included); None for data that were not given.
        integration: the mean estimated error of the integration, the larger of the two kinds.
        gap: train - held_out; None unless both were given.
        points: of each kind.
        width: of a bin, if given; then the points were spread over their bins.
        train_bits, held_out_bits: bits per dimension for this width; None without it.
    """

    noise: tuple[float, float]
    train: Estimate | None
    held_out: Estimate | None
    integration: float
    gap: Estimate | None
    points: int
    width: float | None
    train_bits: Estimate | None
    held_out_bits: Estimate | None


@dataclass(frozen=True, eq=False)
class SampleAudit:
    """Samples of the network beside the training data. Distances are Euclidean ones divided by
    sqrt(d): root mean squares per number. The errors of shares are binomial.

    Attributes:
        count: how many samples were drawn.
        ratio: the share of samples at less than a third of the distance of the second nearest
            training atom from the nearest one (Yoon et al. 2023; the threshold as in Gu et al.
            2023).
        chance_ratio: the same share of held-out points, or, without these, of training points among
            the others: that of chance.
        closer: the share of samples nearer to a training atom than all but `expected` of the
            held-out points; None without them.
        expected: the share that chance gives: 0.01, or more for fewer than 100 held-out points.
        threshold: that distance.
        train_side: the share of samples whose nearest point is of the training data, not of the
            held-out, of as many of either kind: one half by chance, with this error, for which
            samples with the same nearest point count as one. None without held-out points.
        distance: the median distance of a sample to the nearest training atom.
        held_out_distance: that of held-out points; None without them.
        samples: some of the samples, [K, *E] float32, those nearest to a training atom first.
        rows: int64 [count], the row of the nearest training atom of every sample, in that order.
        distances, ratios: float64 [count], its distance, and that over the second nearest's.
        held_out_distances: float64 [M], rising: of at most 1024 held-out points to the nearest
            training atom; None without them.
    """

    count: int
    ratio: Estimate
    chance_ratio: Estimate
    closer: Estimate | None
    expected: float | None
    threshold: float | None
    train_side: Estimate | None
    distance: float
    held_out_distance: float | None
    samples: Tensor
    rows: Tensor
    distances: Tensor
    ratios: Tensor
    held_out_distances: Tensor | None
