"""Sub-categories of tissue classes for SC-CAM, by clustering the features of labelled windows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cluster(features: NDArray[np.float32], labels: NDArray[np.uint8], k: int, seed: int) -> NDArray[np.uint8]:
    """Give every window a sub-category of each of its classes (Chang et al. 2020), by k-means within the class.

    Args:
        features: (n, C) float32, pooled features of n windows.
        labels: (n, L) uint8 flags.
        k: sub-categories of a class; a class with fewer windows than that has as many as it has windows.
        seed: of the starting points.
    Returns:
        (n, L*k) uint8 flags; the sub-categories of class c are columns c*k ... (c+1)*k - 1, and exactly one of them is
        set where the window has class c.
    """
    from sklearn.cluster import KMeans

    if len(features) != len(labels) or k < 1:
        raise ValueError(
            f"needs features and labels of the same windows and k >= 1, not {len(features)}, {len(labels)}, {k}"
        )
    if seed >= 2**32:  # scikit-learn takes no larger ones
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    flags = np.zeros((len(labels), labels.shape[1] * k), np.uint8)
    for c in range(labels.shape[1]):
        members = np.flatnonzero(labels[:, c] == 1)
        if len(members):
            means = KMeans(min(k, len(members)), n_init=4, random_state=seed)
            flags[members, c * k + means.fit_predict(features[members])] = 1
    return flags
