"""Tracks: where images show one point, joined from the matches of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from feedforward_recon.reconstruction.pairs import PairGeometry
from feedforward_recon.reconstruction.shots import Shot


@dataclass(frozen=True)
class PointTracks:
    """Observations of ``count`` points: image, feature, point: index [O]; px: pixels [O, 2]."""

    image: np.ndarray
    feature: np.ndarray
    point: np.ndarray
    px: np.ndarray
    count: int

    def __len__(self) -> int:
        return len(self.image)

    def select(self, keep: np.ndarray) -> PointTracks:
        """The observations of a mask [O]; points that then have fewer than two are gone."""
        enough = np.bincount(self.point[keep], minlength=self.count) >= 2
        rows = np.flatnonzero(keep & enough[self.point])
        number = np.cumsum(enough) - 1
        return PointTracks(self.image[rows], self.feature[rows], number[self.point[rows]],
                           self.px[rows], int(enough.sum()))

    def views(self, count: int) -> np.ndarray:
        """Number of observations [N] in each of ``count`` images."""
        return np.bincount(self.image, minlength=count)

    def by_image(self) -> list[tuple[int, np.ndarray]]:
        """Each image and its observations [n]."""
        order = np.argsort(self.image, kind='stable')
        images, first = np.unique(self.image[order], return_index=True)
        parts = np.split(order, first[1:])[:len(images)]  # one empty part, where there are none
        return list(zip(images.tolist(), parts, strict=True))


def tracks_of(shots: Sequence[Shot], pairs: Iterable[PairGeometry]) -> PointTracks:
    """Tracks, joined match by match.

    The pairs with most matches come first. A match that would put two features of one image into
    a track is left out: one of them is wrong, and later ones are more often.
    """
    sizes = [len(shot.features) for shot in shots]
    start = np.concatenate([[0], np.cumsum(sizes)])
    image_of = np.repeat(np.arange(len(sizes)), sizes)
    parent = list(range(int(start[-1])))
    images = [1 << image for image in image_of.tolist()]  # of the track of a root, as bits

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for pair in sorted(pairs, key=lambda pair: -len(pair)):
        for a, b in zip((start[pair.i] + pair.feature_i).tolist(),
                        (start[pair.j] + pair.feature_j).tolist(), strict=True):
            a, b = root(a), root(b)
            if a != b and not images[a] & images[b]:
                parent[b] = a
                images[a] |= images[b]
    roots = np.array([root(node) for node in range(len(parent))], int)
    rows = np.flatnonzero(np.bincount(roots, minlength=len(parent))[roots] > 1)
    _, point = np.unique(roots[rows], return_inverse=True)
    image, feature = image_of[rows], rows - start[image_of[rows]]
    px = np.concatenate([np.zeros((0, 2)), *(shot.features.keypoints for shot in shots)])
    return PointTracks(image, feature, point, px[rows].astype(float),
                       int(point.max(initial=-1)) + 1)
