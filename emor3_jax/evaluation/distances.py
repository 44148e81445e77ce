"""Distances between distributions over labels, and agreement of numbers such as valence."""

import numpy as np

from emor3_jax.evaluation.confidence import average_ranks

SMALLEST = 1e-6
"""Shares that are less count as so much in the divergence, which would else be infinite."""


def distribution_distances(true: np.ndarray, said: np.ndarray) -> dict[str, float]:
    """Returns the means over rows of the six measures of label distribution learning.

    X. Geng, Label distribution learning, 2016. Clark and Canberra are not divided by the number of
    labels, as some papers do.

    Args:
      true: float[n, K], shares of raters, 0 or more; each row is divided by its sum.
      said: float[n, K], likewise, of the policy. Rows that sum to 0 in either are left out.

    Returns:
      `kl` (true from said, nats), `chebyshev`, `clark`, `canberra`: lower is better; `cosine` and
      `intersection`: higher is better. Nothing of no rows.
    """
    there = (true.sum(axis=1) > 0) & (said.sum(axis=1) > 0)
    if not there.any():
        return {}
    p, q = (x[there] / x[there].sum(axis=1, keepdims=True) for x in (true, said))
    apart, total = np.abs(p - q), p + q
    # A label of no share in both adds nothing.
    relative = np.divide(apart, total, out=np.zeros_like(p), where=total > 0)
    logs = np.log(np.maximum(p, SMALLEST)) - np.log(np.maximum(q, SMALLEST))
    norms = np.linalg.norm(p, axis=1) * np.linalg.norm(q, axis=1)
    rows = {
        "kl": (p * logs).sum(axis=1),
        "chebyshev": apart.max(axis=1),
        "clark": np.sqrt((relative**2).sum(axis=1)),
        "canberra": relative.sum(axis=1),
        "cosine": (p * q).sum(axis=1) / norms,
        "intersection": np.minimum(p, q).sum(axis=1),
    }
    return {name: float(np.mean(values)) for name, values in rows.items()}


def agreement(true: np.ndarray, said: np.ndarray) -> dict[str, float]:
    """Returns how well numbers such as valence agree with their true values.

    Args:
      true: float[n].
      said: float[n]; NaN where the policy says none. Such rows are in no score but `covered`.

    Returns:
      `covered`, the share of rows with a number; `mae`; `plcc` and `srcc`, Pearson's and Spearman's
      correlation in [-1, 1]; `ccc`, Lin's concordance in [-1, 1] (Lin, 1989; with variances of
      the rows, not of a population they stand for). A score that is not defined, such as a
      correlation of numbers that are all equal, is left out.
    """
    if not len(true):
        return {}
    there = ~np.isnan(said)
    x, y = true[there], said[there]
    found = {"covered": float(np.mean(there))}
    if not len(x):
        return found
    found["mae"] = float(np.mean(np.abs(x - y)))
    covariance = float(np.mean((x - x.mean()) * (y - y.mean())))
    if np.ptp(x) and np.ptp(y):
        found["plcc"] = covariance / float(x.std() * y.std())
        found["srcc"] = float(np.corrcoef(average_ranks(x), average_ranks(y))[0, 1])
    if spread := float(x.var() + y.var() + (x.mean() - y.mean()) ** 2):
        found["ccc"] = 2 * covariance / spread
    return found
