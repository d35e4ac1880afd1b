"""Mixtures and densities that scikit-learn fitted, as laws of data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensors import normal
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import dfkernels as df


def sklearn():
    return pytest.importorskip("sklearn", reason="needs the extra: pip install dfkernels[demo]")


DATA = np.concatenate([normal(40, 4, seed=30).numpy(), 0.3 * normal(40, 4, seed=31).numpy() + 2])


@pytest.mark.parametrize("kind", ["spherical", "diag", "tied"])
def test_a_fitted_mixture_is_the_same_law(kind):
    sklearn()
    from sklearn.mixture import GaussianMixture

    fitted = GaussianMixture(3, covariance_type=kind, random_state=0).fit(DATA)
    law = df.GaussianMixture.from_sklearn(fitted)
    x = torch.from_numpy(DATA[::9])
    found = df.DiffusionFisher(x, law, 1.0, 1e-6).log_prob
    torch.testing.assert_close(found, torch.from_numpy(fitted.score_samples(DATA[::9])))
    shaped = df.GaussianMixture.from_sklearn(fitted, event_shape=(2, 2))
    again = df.DiffusionFisher(x.view(-1, 2, 2), shaped, 1.0, 1e-6).log_prob
    torch.testing.assert_close(again, found)


def test_a_bayesian_mixture_is_the_law_that_it_samples():
    sklearn()
    from sklearn.mixture import BayesianGaussianMixture

    fitted = BayesianGaussianMixture(n_components=3, covariance_type="tied", random_state=0).fit(
        DATA
    )
    means, covariance = (torch.from_numpy(a) for a in (fitted.means_, fitted.covariances_))
    weights = Categorical(probs=torch.from_numpy(fitted.weights_))
    expected = MixtureSameFamily(weights, MultivariateNormal(means, covariance))
    x, law = torch.from_numpy(DATA[::9]), df.GaussianMixture.from_sklearn(fitted)
    found = df.DiffusionFisher(x, law, 1.0, 1e-6).log_prob
    torch.testing.assert_close(found, expected.log_prob(x))


@pytest.mark.parametrize("weights", [None, np.arange(80.0)])
def test_a_kernel_density_is_the_same_law(weights):
    sklearn()
    from sklearn.neighbors import KernelDensity

    fitted = KernelDensity(bandwidth="scott").fit(DATA, sample_weight=weights)
    law = df.GaussianMixture.from_sklearn(fitted)
    found = df.DiffusionFisher(torch.from_numpy(DATA[::9]), law, 1.0, 1e-6).log_prob
    torch.testing.assert_close(found, torch.from_numpy(fitted.score_samples(DATA[::9])))
    assert len(law) == 80 and law.dtype == torch.float64


def test_models_that_are_no_such_law_are_refused():
    sklearn()
    from sklearn.mixture import GaussianMixture
    from sklearn.neighbors import KernelDensity

    read = df.GaussianMixture.from_sklearn
    with pytest.raises(TypeError, match=r"^model: expected scikit-learn's .*, got ndarray"):
        read(DATA)
    for model in (GaussianMixture(2), KernelDensity()):
        with pytest.raises(ValueError, match=r"^model: expected a fitted .* model.fit\(data\)"):
            read(model)
    with pytest.raises(
        ValueError, match=r"^model: expected covariance_type .* got 'full', .*sample"
    ):
        read(GaussianMixture(2, covariance_type="full").fit(DATA))
    with pytest.raises(ValueError, match=r"^model: .* kernel 'gaussian' .*, got 'tophat'"):
        read(KernelDensity(kernel="tophat").fit(DATA))
    with pytest.raises(ValueError, match=r"^event_shape: expected a shape of 4 numbers, got \[3\]"):
        read(KernelDensity().fit(DATA), event_shape=[3])
