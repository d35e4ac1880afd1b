"""A mixture of Gaussians in the place of a data set: every atom has a width (Prop. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _components, ops
from ._atoms import as_tensor, checked_log_prior, checked_stored, finite, masked
from ._components import Components
from ._fitted import parameters_of
from ._io import files
from ._torch import check
from ._torch.objects import Watched, plain
from ._torch.product import product
from .law import Drawn, Law, per_channel

__all__ = ["GaussianMixture"]

_SYMMETRIC = 1e-5  # relative: estimates in float32 are not exactly symmetric, nor semidefinite


class _Frame(NamedTuple):
    """The mixture on the axes of the covariance that all components share."""

    axes: Tensor  # [d, d]: the eigenvectors, in columns
    means: Tensor  # [N, d]
    variance: Tensor  # [1, d]


class GaussianMixture(Law):
    """The law sum_i pi_i N(y_i, S_i), immutable, its values checked once: a kernel density
    estimate, a fitted mixture, data with noise of their own. Use it wherever a `PointCloud` goes.

    Under noise each component stays a Gaussian, of covariance sigma^2 I + alpha^2 S_i. With
    variances v_i, tau_i^2 = sigma^2 + alpha^2 v_i and s_i = -(x - alpha y_i)/tau_i^2 (Prop. 3),

        w_i ~ pi_i tau_i^-d exp(-|x - alpha y_i|^2/(2 tau_i^2)),   score s = sum w_i s_i
        E[x_0 | x] = sum w_i (y_i + (alpha v_i/tau_i^2)(x - alpha y_i))
        F = sum w_i/tau_i^2 I - sum w_i (s_i - s)(s_i - s)^T

    At v = 0 this is the `PointCloud` of the means. Unlike there, nothing diverges at low noise: F
    and the score tend to those of the density itself, and its denoiser does not memorise the means.

    >>> kde = df.GaussianMixture(data, variance=0.3**2)  # Gaussian kernel density, bandwidth 0.3
    >>> fitted = df.GaussianMixture.from_sklearn(model)

    Args:
        means: [N, *E], N >= 1, a tensor or numpy array, stored as `PointCloud` stores y;
            computation follows the query's dtype.
        variance: finite and >= 0, in the squared unit of the data: a number for all components and
            axes; [N], one for each component; [1, *E], one for each entry of x_0; [N, *E], the
            diagonals of all covariances.
        covariance: [d, d], of all components, symmetric and positive semidefinite, for x_0
            flattened. Exactly one of variance and covariance is given.
        log_prior: [N], as in `PointCloud`; for example the logarithms of importance weights.
        scale, offset: the means are scale * means + offset.

    A component costs about what an atom costs, one with a diagonal of its own several times as
    much; with a covariance, queries and results are turned into its axes and back, d^2 operations
    each. There is no index, and so no `tolerance=`.

    Raises:
        TypeError: A type, layout or dtype is wrong.
        ValueError: A shape is wrong, or a value is not finite, or negative where it may not be.
    """

    means = Watched[Tensor]()
    variance: Watched[Tensor | None] = Watched()
    covariance: Watched[Tensor | None] = Watched()
    _frame: Watched[_Frame | None] = Watched()
    _posterior_type = ops.MixturePosterior

    def __init__(
        self,
        means: Tensor | np.ndarray,
        *,
        variance: float | Tensor | np.ndarray | None = None,
        covariance: Tensor | np.ndarray | None = None,
        log_prior: Tensor | np.ndarray | None = None,
        scale: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        means = checked_stored("means", means)
        if (variance is None) == (covariance is None):
            came = "none" if variance is None else "both"
            raise check.mismatch("variance, covariance", "one of the two", came)
        state: dict[str, Any] = {
            "scale": check.constant("scale", scale),
            "offset": check.constant("offset", offset),
        }
        with plain(means.device):
            means = means.detach().resolve_neg().contiguous()
            log_prior = checked_log_prior(log_prior, "means", means)
            finite("means", means, masked(log_prior))
            state |= {"means": means, "log_prior": log_prior}
            state |= {"variance": None, "covariance": None, "_frame": None}
            if covariance is None:
                state["variance"] = _checked_variance(variance, means)
            else:
                state["covariance"] = _checked_covariance(covariance, means)
                state["_frame"] = _frame(**state)
        self.__setstate__(state)

    @classmethod
    def from_sklearn(
        cls, model: object, *, event_shape: Sequence[int] | None = None
    ) -> GaussianMixture:
        """The law of a fitted scikit-learn `GaussianMixture` or `BayesianGaussianMixture`
        (covariance_type 'spherical', 'diag' or 'tied') or `KernelDensity` (Gaussian kernel,
        Euclidean metric), with its weights, in float64: `.to(torch.float32)` for float32 queries.

        Args:
            model: the model, after `fit`; its parameters are copied.
            event_shape: E, for x_0 that are not vectors; scikit-learn's data were [n, prod(E)].

        Raises:
            TypeError: The model is of another class.
            ValueError: It has not been fitted, or is not of Gaussians with axes in common:
                covariance_type 'full', another kernel or metric.
        """
        return cls(**parameters_of(model, event_shape))

    @property
    def _y(self) -> Tensor:
        return GaussianMixture.means.peek(self)

    def to(self, *args: Any, **kwargs: Any) -> GaussianMixture:
        """A mixture with its means moved or cast as by `Tensor.to`; self where nothing changes. The
        rest moves along and keeps its dtype.

        Raises:
            TypeError: A cast between floating and integer storage.
            ValueError: A narrower dtype overflows.
        """
        with plain(self.device):
            means = self.means.to(*args, **kwargs)
        if means.dtype.is_floating_point != self.dtype.is_floating_point:
            raise TypeError(
                f"dtype: expected a cast that keeps {self.dtype} values, got {means.dtype}"
            )
        return self if means is self.means else self._replaced(means=means)

    def _replaced(self, means: Tensor, **changes: Any) -> GaussianMixture:
        """A mixture with other means and some other arguments, on the means' device."""
        names = ("variance", "covariance", "log_prior", "scale", "offset")
        given = {name: getattr(self, name) for name in names} | changes
        moved: dict[str, Any] = {
            name: t.to(means.device) if isinstance(t, Tensor) else t for name, t in given.items()
        }
        return GaussianMixture(means, **moved)

    def posterior(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor
    ) -> ops.MixturePosterior:
        """`ops.mixture_posterior` over the components."""
        self._checked_queries(x)
        p = ops.mixture_posterior(self._turned(x), *self._given(x), alpha, sigma, **self._more(x))
        return p._replace(mean=self._back(p.mean, x), score=self._back(p.score, x))

    def _eps(self, p: Any, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return -_beside(sigma, x) * p.score

    def _score(self, p: Any, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return p.score.clone()  # p is kept by who asks

    def fisher_matvec(
        self, x: Tensor, v: Tensor, alpha: float | Tensor, sigma: float | Tensor
    ) -> Tensor:
        """`ops.mixture_matvec` over the components."""
        self._checked_queries(x)
        check.vectors("v", v, "x", x, self.d)
        z, turned = self._turned(x), self._turned(v)
        out = ops.mixture_matvec(z, turned, *self._given(x), alpha, sigma, **self._more(x))
        return self._back(out, v)

    def fisher_diagonal(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """`ops.mixture_diagonal` over the components; with a covariance, from d products."""
        self._checked_queries(x)
        if self._frame is None:
            return ops.mixture_diagonal(x, *self._given(x), alpha, sigma, **self._more(x))
        parts = [part.diagonal(start, 1, 2) for start, part in self._rows(x, alpha, sigma)]
        return torch.cat(parts, 1).reshape(x.shape)

    def draw(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, *, seed: int) -> Drawn:
        self._checked_queries(x)
        seed = check.integer("seed", seed, 0, 2**63 - 1)
        with torch.no_grad(), plain(x.device):
            a, s = (level.double() for level in (check.alpha(alpha, x), check.sigma(sigma, x)))
            z = self._turned(x).reshape(len(x), self.d).double()
            all_of = self._components()
            found = _components.drawn(all_of, z, a, s, seed)
            a, s = a[:, None], s[:, None]
            y = all_of.y[found].double() * all_of.scale + all_of.offset
            rows = all_of.variance if len(all_of.variance) == 1 else all_of.variance[found]
            variance = rows.double().expand_as(y)
            generator = torch.Generator("cpu").manual_seed(seed)
            noise = _normal(y.shape, generator, y.device)
            tau2 = s**2 + a**2 * variance
            mean = y + a * variance / tau2 * (z - a * y)
            draws = mean + (variance / tau2).sqrt() * s * noise
            return Drawn(found, self._back(draws, x.double()).to(x.dtype))

    def _checked_queries(self, x: Tensor) -> None:
        check.events("x", x, self.event_shape, "to match the mixture")

    def _turned(self, v: Tensor) -> Tensor:
        """Vectors [..., *E] on the axes of the covariance, [..., d]; as they are where there is
        none.
        """
        if self._frame is None:
            return v
        lead = v.shape[: v.ndim - len(self.event_shape)]
        return product(v.reshape(*lead, self.d), self._cast("axes", self._frame.axes, v.dtype))

    def _back(self, v: Tensor, like: Tensor) -> Tensor:
        """The inverse of `_turned`, in the shape of `like`."""
        if self._frame is None:
            return v.reshape(like.shape)
        axes = self._cast("axes", self._frame.axes, v.dtype)
        return product(v, axes.mT).reshape(like.shape)

    def _given(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances as the ops take them beside x."""
        if x.dtype == torch.float32 and self.dtype == torch.float64:
            raise TypeError(
                "x: expected float64 like the means, got float32; mixture.to(torch.float32) "
                "computes in float32"
            )
        if self._frame is not None:
            means = self._frame.means
            return means.to(x.dtype), self._cast("variance", self._frame.variance, x.dtype)
        assert self.variance is not None
        return self.means, self._cast("variance", self.variance, x.dtype)

    def _more(self, x: Tensor) -> dict[str, Any]:
        given = {"log_prior": self._log_pi(x.dtype)}
        return given if self._frame is not None else {**given, **self._map}

    @property
    def _map(self) -> dict[str, float]:
        return {"scale": self.scale, "offset": self.offset}

    def _cast(self, name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of this mixture in a dtype, cast once."""
        if t.dtype == dtype:
            return t
        results = vars(self).setdefault("_results", {})
        if (name, dtype) not in results:
            with plain(self.device):
                results[name, dtype] = t.to(dtype)
        return results[name, dtype]

    def _components(self) -> Components:
        log_pi = self._log_pi_of_all()
        if self._frame is not None:
            return Components(self._frame.means, self._frame.variance, log_pi, 1.0, 0.0)
        assert self.variance is not None
        rows, flat = (t.reshape(len(t), -1) for t in (self.variance, self.means))
        return Components(flat, rows, log_pi, self.scale, self.offset)

    def _k_heaviest(self, x: Tensor, alpha: Tensor, sigma: Tensor, k: int) -> tuple[Tensor, Tensor]:
        z = self._turned(x).reshape(len(x), self.d)
        return _components.k_heaviest(self._components(), z, alpha, sigma, k)

    def _sampled(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        y = self.means[rows].double() * self.scale + self.offset
        noise = _normal(y.shape, generator, y.device)
        if self._frame is not None:
            noise = noise.reshape(len(y), self.d) * self._frame.variance.double().sqrt()
            return y + self._back(noise, y)
        assert self.variance is not None
        variance = self.variance if len(self.variance) == 1 else self.variance[rows]
        return y + _beside(variance.double().sqrt(), y) * noise

    def _width(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (sigma**2 + alpha**2 * self._least).sqrt()

    @property
    def _least(self) -> float:
        """The least variance of any component along any axis."""
        variance = self.variance if self._frame is None else self._frame.variance
        assert variance is not None
        results = vars(self).setdefault("_results", {})
        if "least" not in results:
            results["least"] = variance.min().item()
        return results["least"]

    def _points_behind(self, ess: Tensor) -> Tensor:
        return torch.full_like(ess, torch.inf) if self._least > 0 else ess

    def _mapped(self, a: Tensor, b: Tensor, most: int) -> GaussianMixture:
        if len(a) == 1:
            factor = a.item()
            return self._replaced(
                self.means,
                variance=None if self.variance is None else factor**2 * self.variance,
                covariance=None if self.covariance is None else factor**2 * self.covariance,
                scale=factor * self.scale,
                offset=factor * self.offset + b.item(),
            )
        y = self.means.double() * self.scale + self.offset
        more: dict[str, Any] = {"scale": 1.0, "offset": 0.0}
        if self.covariance is not None:
            each = per_channel(a, y).expand(1, *self.event_shape).flatten()
            more["covariance"] = each[:, None] * self.covariance.double() * each
        else:
            assert self.variance is not None
            rows = _beside(self.variance.double(), y).expand(len(self.variance), *self.event_shape)
            more["variance"] = per_channel(a, y) ** 2 * rows
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        means = (per_channel(a, y) * y + per_channel(b, y)).to(dtype)
        return self._replaced(means, **more)

    def _fingerprint(self) -> str:
        tensors = (self.means, self.variance, self.covariance, self.log_prior)
        found = ["none" if t is None else f"{files.checksum(t.cpu())}" for t in tensors]
        return f"{self!r} crc32={','.join(found)}"

    def _no_index(self) -> str | None:
        return (
            "expected None with a GaussianMixture, got a number: there is no index of components "
            "with a width, and so no bound on what leaving some of them out would change"
        )


def _beside(rows: Tensor, y: Tensor) -> Tensor:
    """Variances [n] or [n, *E] in a shape that goes with values y [n, *E]."""
    return rows.reshape(len(rows), *[1] * (y.ndim - 1)) if rows.ndim == 1 else rows


def _normal(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Normal noise in float64, the same on every device."""
    noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
    return noise.to(device)


def _checked_variance(value: float | Tensor | np.ndarray | None, means: Tensor) -> Tensor:
    """Variances as [1], [N], [1, *E] or [N, *E]."""
    if not isinstance(value, (Tensor, np.ndarray)) or not value.ndim:
        number = check.nonnegative("variance", value)
        return torch.full((1,), number, dtype=torch.float64, device=means.device)
    variance = _floating("variance", value, means)
    N, event = means.shape[0], means.shape[1:]
    if variance.shape not in ((1,), (N,), (1, *event), (N, *event)):
        shapes = " or ".join(str([*shape]) for shape in ((N,), (1, *event), (N, *event)))
        raise check.mismatch("variance", f"a number or shape {shapes}", list(variance.shape))
    _first("variance", variance, variance.isfinite() & (variance >= 0), "finite values >= 0")
    return variance


def _checked_covariance(value: Tensor | np.ndarray, means: Tensor) -> Tensor:
    """A symmetric covariance [d, d]."""
    covariance, d = _floating("covariance", value, means), means[0].numel()
    if covariance.shape != (d, d):
        expected = f"shape {[d, d]}, one matrix for all components"
        raise check.mismatch("covariance", expected, list(covariance.shape))
    _first("covariance", covariance, covariance.isfinite(), "finite values")
    close = (covariance - covariance.mT).abs() <= _SYMMETRIC * covariance.abs().max()
    _first("covariance", covariance, close, "a symmetric matrix")
    return covariance


def _floating(name: str, value: Tensor | np.ndarray, means: Tensor) -> Tensor:
    t = as_tensor(name, value)
    if not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {t.dtype}")
    if t.device != means.device:
        raise check.mismatch(name, f"device {means.device} as the means'", t.device)
    return t.detach().resolve_neg().contiguous()


def _first(name: str, t: Tensor, good: Tensor, expected: str) -> None:
    """Raises ValueError for the first entry that is not good."""
    if not bool(good.all()):
        place = (~good).nonzero()[0].tolist()
        raise check.mismatch(name, expected, f"{t[tuple(place)].item()} at index {place}")


def _frame(means: Tensor, covariance: Tensor, scale: float, offset: float, **_: object) -> _Frame:
    """The axes of a covariance, and the mixture on them."""
    double = covariance.double()
    values, axes = torch.linalg.eigh((double + double.mT) / 2)
    if values[0] < -_SYMMETRIC * values[-1].abs():
        raise check.mismatch(
            "covariance", "a positive semidefinite matrix", f"an eigenvalue {values[0].item():g}"
        )
    dtype = torch.float64 if means.dtype == torch.float64 else torch.float32
    turned = (means.double().reshape(len(means), -1) * scale + offset) @ axes
    return _Frame(axes, turned.to(dtype), values.clamp_min(0)[None])
