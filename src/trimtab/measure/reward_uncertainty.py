"""How sure is a reward model of a pair? A Laplace approximation of its linear head, and conservative rewards.

Pairs with feature differences d_i = f(chosen) - f(rejected), Bradley-Terry likelihood and a Gaussian prior:

    w = argmin -sum log sigmoid(d_i . w) + lambda / 2 |w|^2        H = sum sig_i (1 - sig_i) d_i d_i^T + lambda I
    r_a - r_b ~ N(d . w, d^T H^-1 d)                                P(a beats b) ~ sigmoid(mu / sqrt(1 + pi var / 8))

A conservative reward is mu - k sd. Pairs whose variance lies above the 95th percentile of the calibration pairs' are
unlike anything the head was fitted on. A reward needs a zero: features are used less a reference's (`centre`), or variance
would depend on where the features' origin is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from trimtab.errors import UsageError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LaplaceHead:
    """weights [D]; covariance [D, D]; limit: the 95th percentile of the variance of the pairs it was fitted on."""

    weights: Array
    covariance: Array
    limit: float

    @classmethod
    def fit(cls, differences: npt.ArrayLike, ridge: float = 1.0) -> LaplaceHead:
        """From feature differences [N, D] of chosen minus rejected; ridge: lambda above, the prior's precision."""
        from scipy.optimize import minimize

        d = np.asarray(differences, dtype=np.float64)
        if d.ndim != 2 or not d.size or not np.isfinite(d).all():
            raise UsageError(f"feature differences [pairs, features], all finite, are needed, not {d.shape}")
        if not ridge > 0:
            raise UsageError(f"ridge must be above 0, not {ridge}")

        def loss(w: Array) -> tuple[float, Array]:
            margins = d @ w
            value = float(np.logaddexp(0, -margins).sum() + ridge / 2 * w @ w)
            return value, -d.T @ expit(-margins) + ridge * w

        w = minimize(loss, np.zeros(d.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
        for _ in range(20):  # Newton steps to machine precision: the covariance is that of the exact optimum
            step = np.linalg.solve(_hessian(d, w, ridge), loss(w)[1])
            w = w - step
            if np.abs(step).max() < 1e-12:
                break
        covariance = np.asarray(np.linalg.inv(_hessian(d, w, ridge)), dtype=np.float64)
        variances = np.einsum("nd,de,ne->n", d, covariance, d)
        return cls(np.asarray(w, dtype=np.float64), covariance, float(np.quantile(variances, 0.95)))

    def margin(self, differences: npt.ArrayLike) -> tuple[Array, Array]:
        """Mean and standard deviation of r_a - r_b for feature differences [N, D]."""
        d = np.asarray(differences, dtype=np.float64)
        return d @ self.weights, np.sqrt(np.einsum("nd,de,ne->n", d, self.covariance, d))

    def wins(self, differences: npt.ArrayLike) -> Array:
        """P(a beats b) [N], doubt about the head included (MacKay's approximation)."""
        mean, deviation = self.margin(differences)
        return expit(mean / np.sqrt(1 + math.pi * deviation**2 / 8))

    def conservative(self, features: npt.ArrayLike, centre: npt.ArrayLike, k: float = 1.0) -> Array:
        """mu - k sd [N] of features [N, D], against the features `centre` [D] of a reference answer."""
        mean, deviation = self.margin(np.asarray(features, dtype=np.float64) - np.asarray(centre, dtype=np.float64))
        return mean - k * deviation

    def unlike(self, differences: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Which pairs the head knows least about: variance above `limit`."""
        return self.margin(differences)[1] ** 2 > self.limit


def _hessian(d: Array, w: Array, ridge: float) -> Array:
    sig = expit(d @ w)
    return (d * (sig * (1 - sig))[:, None]).T @ d + ridge * np.eye(d.shape[1])
