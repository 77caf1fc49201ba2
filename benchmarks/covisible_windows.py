"""Windows of overlapping views, drawn from poses alone: all that any posed set has."""

from __future__ import annotations

import numpy as np
from scipy.sparse.csgraph import connected_components

APART_DEG = (5.0, 45.0)  # between orientations: less is hardly a new view, more may share nothing
# An image overlaps with images among its nearest: this share of a set, and no fewer than these.
NEAREST_SHARE, FEWEST_NEAREST = 1 / 16, 8
DRAWS = 4  # for each window that is wanted: a draw may give one that was drawn before


def covisible(T_world_cam: np.ndarray) -> np.ndarray:
    """Which views overlap, bool [N, N], symmetric, from their poses [N, 4, 4] in order of time.

    Their orientations are ``APART_DEG`` apart, and one is among the nearest camera centres of
    the other. Views without any such partner, as of a car that drives straight on, overlap with
    the ones before and after them.
    """
    count, R = len(T_world_cam), T_world_cam[:, :3, :3]
    cosine = (np.einsum('aij,bij->ab', R, R) - 1) / 2
    angle_deg = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    centres = T_world_cam[:, :3, 3]
    distance = np.linalg.norm(centres[:, None] - centres, axis=-1)
    np.fill_diagonal(distance, -1.0)  # an image is the nearest to itself
    rank = distance.argsort(1, kind='stable').argsort(1)
    near = rank <= max(FEWEST_NEAREST, int(NEAREST_SHARE * count))
    overlap = (near | near.T) & (angle_deg >= APART_DEG[0]) & (angle_deg <= APART_DEG[1])
    alone = ~overlap.any(1)
    beside = np.abs(np.subtract.outer(np.arange(count), np.arange(count))) == 1
    return overlap | beside & (alone[:, None] | alone)


def drawn_windows(overlap: np.ndarray, size: int, count: int, rng: np.random.Generator
                  ) -> list[np.ndarray]:
    """At most ``count`` different windows of ``size`` views, each an index [size] in any order.

    overlap: bool [N, N], see ``covisible``. Every view of a window overlaps with another one of
    it. Windows share no image while enough others overlap, and as few as possible afterwards.
    """
    taken = np.zeros(len(overlap), int)
    windows: dict[frozenset[int], np.ndarray] = {}
    for _ in range(DRAWS * count):
        fresh = overlap & np.logical_and.outer(taken == 0, taken == 0)
        window = _grown(fresh, taken, size, rng) or _grown(overlap, taken, size, rng)
        taken[window] += 1
        if window:
            windows.setdefault(frozenset(window), rng.permutation(window))
        if len(windows) == count or not window:
            break
    return list(windows.values())


def _grown(overlap: np.ndarray, taken: np.ndarray, size: int, rng: np.random.Generator
           ) -> list[int]:
    """A window around an image that is connected with enough others; empty without any."""
    _, part = connected_components(overlap, directed=False)
    enough = np.flatnonzero(np.bincount(part)[part] >= size)
    window = [_least(enough, taken, rng)] if len(enough) else []
    while 0 < len(window) < size:
        around = overlap[window].any(0)
        around[window] = False
        window.append(_least(np.flatnonzero(around), taken, rng))
    return window


def _least(images: np.ndarray, taken: np.ndarray, rng: np.random.Generator) -> int:
    """One of the images that the fewest windows have."""
    return int(rng.choice(images[taken[images] == taken[images].min()]))
