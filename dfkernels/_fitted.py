"""Mixtures that scikit-learn has fitted, read by their attributes: nothing of it is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["parameters_of"]

_KINDS = ("spherical", "diag", "tied")


def parameters_of(model: Any, event_shape: Sequence[int] | None) -> dict[str, Any]:
    """The arguments of a `GaussianMixture` that is the law which a model stands for.

    Raises:
        TypeError: The model is neither a GaussianMixture, a BayesianGaussianMixture nor a
            KernelDensity.
        ValueError: It has not been fitted, or is none of Gaussians with axes in common.
    """
    if hasattr(model, "covariance_type"):
        given = _of_mixture(model)
    elif hasattr(model, "kernel") and hasattr(model, "bandwidth"):
        given = _of_kernel_density(model)
    else:
        raise TypeError(
            "model: expected scikit-learn's GaussianMixture, BayesianGaussianMixture or "
            f"KernelDensity, got {type(model).__name__}"
        )
    if event_shape is not None:
        given["means"] = _shaped(given["means"], event_shape)
        variance = given.get("variance")
        if isinstance(variance, np.ndarray) and variance.ndim == 2:
            given["variance"] = _shaped(variance, event_shape)
    return given


def _shaped(rows: np.ndarray, event_shape: Sequence[int]) -> np.ndarray:
    shape = tuple(event_shape)
    if int(np.prod(shape)) != rows.shape[1]:
        raise ValueError(
            f"event_shape: expected a shape of {rows.shape[1]} numbers, got {list(shape)}"
        )
    return rows.reshape(len(rows), *shape)


def _of_mixture(model: Any) -> dict[str, Any]:
    _fitted(model, "means_")
    kind = model.covariance_type
    if kind not in _KINDS:
        raise ValueError(
            f"model: expected covariance_type 'spherical', 'diag' or 'tied', got {kind!r}, which "
            "gives each component axes of its own. Fit with one of these, or take samples of the "
            "model as points: PointCloud(model.sample(n)[0])"
        )
    means, covariances = _array(model.means_), _array(model.covariances_)
    with np.errstate(divide="ignore"):  # a component without weight is masked
        log_prior = np.log(_array(model.weights_))
    shape = {"covariance" if kind == "tied" else "variance": covariances}
    return {"means": means, "log_prior": log_prior, **shape}


def _of_kernel_density(model: Any) -> dict[str, Any]:
    _fitted(model, "tree_")
    if model.kernel != "gaussian" or model.metric not in ("euclidean", "l2"):
        raise ValueError(
            "model: expected a KernelDensity with kernel 'gaussian' and metric 'euclidean', got "
            f"{model.kernel!r} and {model.metric!r}"
        )
    weight = getattr(model.tree_, "sample_weight", None)
    log_prior = None
    if weight is not None:
        with np.errstate(divide="ignore"):
            log_prior = np.log(_array(weight))
    return {
        "means": _array(model.tree_.data),
        "variance": float(model.bandwidth_) ** 2,
        "log_prior": log_prior,
    }


def _fitted(model: Any, attribute: str) -> None:
    if not hasattr(model, attribute):
        raise ValueError(
            f"model: expected a fitted {type(model).__name__}, got one without {attribute}: call "
            "model.fit(data) first"
        )


def _array(values: Any) -> np.ndarray:
    """A copy in float64, which later fits of the model leave alone."""
    return np.array(values, dtype=np.float64)
