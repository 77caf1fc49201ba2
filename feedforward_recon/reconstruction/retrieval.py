"""Which images may show the same: similarities of their global descriptors."""

from __future__ import annotations

import numpy as np


def similarities(descriptors: np.ndarray) -> np.ndarray:
    """Cosines float32 [N, N] of unit vectors [N, G]; that of an image with itself is -1."""
    S = (descriptors @ descriptors.T).astype(np.float32)
    np.fill_diagonal(S, -1.0)
    return S


def likely_pairs(S: np.ndarray, neighbours: int) -> np.ndarray:
    """Pairs i < j [P, 2] of which one is among the ``neighbours`` most similar of the other."""
    count = min(neighbours, len(S) - 1)
    if count < 1:
        return np.zeros((0, 2), int)
    near = np.argpartition(-S, count - 1, axis=1)[:, :count]
    pairs = np.stack([np.repeat(np.arange(len(S)), count), near.ravel()], 1)
    return np.unique(np.sort(pairs, 1), axis=0)


def pairs_with(S: np.ndarray, images: np.ndarray, others: np.ndarray, neighbours: int
               ) -> np.ndarray:
    """Pairs i < j [P, 2] of each of ``images`` [n] and the ``others`` most like it."""
    near = np.argsort(-S[np.ix_(images, others)], axis=1, kind='stable')[:, :neighbours]
    pairs = np.stack([np.repeat(images, near.shape[1]), others[near].ravel()], 1)
    return np.unique(np.sort(pairs, 1), axis=0)


def bridging_pairs(S: np.ndarray, parts: list[np.ndarray], neighbours: int) -> np.ndarray:
    """Pairs i < j [P, 2] of the first part [n] of the images and each other one, the most similar.

    The first is to be the largest; pairs of all parts with each other would be too many.
    """
    found = [np.zeros((0, 2), int)]
    for part in parts[1:]:
        between = S[np.ix_(parts[0], part)]
        best = np.argsort(-between, axis=None, kind='stable')[:neighbours]
        row, column = np.unravel_index(best, between.shape)
        found.append(np.stack([parts[0][row], part[column]], 1))
    return np.unique(np.sort(np.concatenate(found), 1), axis=0)
