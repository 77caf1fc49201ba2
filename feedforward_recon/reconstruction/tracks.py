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

    def seen_by(self, image: int, feature: np.ndarray, point: np.ndarray, px: np.ndarray
                ) -> PointTracks:
        """With features [n] of another image that show points [n] at pixels [n, 2]."""
        return PointTracks(np.concatenate([self.image, np.full(len(feature), image)]),
                           np.concatenate([self.feature, feature]),
                           np.concatenate([self.point, point]),
                           np.concatenate([self.px, px]), self.count)

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
    start = np.concatenate([[0], np.cumsum([len(shot.features) for shot in shots])])
    ordered = sorted(pairs, key=lambda pair: -len(pair))
    a = np.concatenate([np.zeros(0, int), *(start[p.i] + p.feature_i for p in ordered)])
    b = np.concatenate([np.zeros(0, int), *(start[p.j] + p.feature_j for p in ordered)])
    used, numbers = np.unique(np.concatenate([a, b]), return_inverse=True)
    image = np.searchsorted(start, used, side='right') - 1
    root = _joined(numbers[:len(a)].tolist(), numbers[len(a):].tolist(), image.tolist())
    rows = np.flatnonzero(np.bincount(root, minlength=len(used))[root] > 1)
    _, point = np.unique(root[rows], return_inverse=True)
    image, feature = image[rows], used[rows] - start[image[rows]]
    px = np.zeros((len(rows), 2))
    tracks = PointTracks(image, feature, point, px, int(point.max(initial=-1)) + 1)
    for number, seen in tracks.by_image():
        px[seen] = shots[number].features.keypoints[feature[seen]]
    return tracks


def _joined(a: list[int], b: list[int], image: list[int]) -> np.ndarray:
    """The track [N] of each feature, after joining a[k] and b[k] one by one (union-find).

    image: of each feature; a track sees an image once.
    """
    parent = list(range(len(image)))
    images: dict[int, set[int]] = {}  # of tracks with more than one feature, by their root

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for one, other in zip(a, b, strict=True):
        one, other = root(one), root(other)
        if one == other:
            continue
        sees, others = images.get(one) or {image[one]}, images.get(other) or {image[other]}
        if sees.isdisjoint(others):
            parent[other] = one
            images[one] = sees | others
            images.pop(other, None)
    return np.array([root(node) for node in range(len(parent))], int)
