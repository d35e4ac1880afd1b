"""What the verdict of an audit counts as clear, large or few: one name, one number."""

from __future__ import annotations

__all__ = [
    "ASYMMETRIC",
    "CLEAR",
    "COARSE",
    "DIFFERENT",
    "ENOUGH_ATOMS",
    "FEW_POINTS",
    "IMPOSSIBLE",
    "LIKELIER",
    "MEMORISED",
    "MISCALIBRATED",
    "OVERFITTED",
    "OWN",
    "SAME",
    "TRACE",
    "UNDERTRAINED",
    "derivative_error",
]

CLEAR = 3.0  # standard errors beyond which a difference is no chance
UNDERTRAINED = 0.1  # part by which the network's error exceeds that of another prediction
MEMORISED = 0.05  # part of the exact mean's gap between held-out and training data
OWN = 0.2  # part of the network's own error that the gap is, however large the exact mean's
OVERFITTED = 0.2, 0.5  # the same two parts from which it memorises, rather than begins to
LIKELIER = 0.02  # nats per number by which training data are more likely
DIFFERENT = 0.1  # part by which the error of a multiple of x differs between data of two laws
ASYMMETRIC = 0.3  # |J - J^T|/|J| that a well-trained network stays below
IMPOSSIBLE = 0.5  # by which an eigenvalue of sigma J exceeds 1; trained networks stay below
MISCALIBRATED = 0.2  # part by which a predicted variance is off
TRACE = 0.005  # an error of sigma tr J/d that a well-trained network has
ENOUGH_ATOMS = 100.0  # that share the weight where the exact mean is that of the law, almost
FEW_POINTS = 100  # of a kind: below, errors are large, and a share of 1 % cannot be seen
SAME = 1e-6  # of the root mean square of samples: a distance that is rounding
COARSE = 1e-4  # rounding of a network that computes in half precision
_RESOLVED = 10.0  # times the rounding of a derivative that a number must exceed to be none


def derivative_error(rounding: float) -> float:
    """What an asymmetry or an eigenvalue must exceed to be no rounding of a network's derivatives:
    those by differences are exact to the power 2/3 of its rounding.
    """
    return _RESOLVED * rounding ** (2 / 3)
