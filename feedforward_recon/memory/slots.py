"""The bounded table of landmark slots: fused descriptors with anchored points.

A slot keeps the camera-frame point of the keyframe that first saw it, so that a corrected
pose moves it; observations from other keyframes are averaged into both point and descriptor.
When the table is full, slots seen once give way, then those of the keyframes that have most.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy.spatial import cKDTree

from feedforward_recon.geometry.eight_bits import quantised, unit_length
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.types import Keyframe

# The first three, and other values of them: docs/experiments.md, Slots.
SEARCH_PX = 4.0  # around where a slot should be seen
SAME_DESCRIPTOR = 0.75  # cosine, as tracking.match_similarity
# While there is room, a landmark that looks this different gets another slot: a mean of what it
# looks like from several sides is like none of them (docs/experiments.md, Views of a landmark).
SAME_VIEW = 0.82
# Share by which two depths of one point differ: twice the noise of a depth camera at 4 m.
SAME_DEPTH = 0.03
NEIGHBOURS = 4  # slots near a feature that are compared: few are within SEARCH_PX
# A new slot has so many keyframes to be seen again before it may give way; chosen by hand.
PROTECTED_KEYFRAMES = 3
YOUNG = 1.5  # keyframes that it counts as seen more until then; chosen by hand
# Observations after which new ones no longer weigh less, so that a slot follows what changes; the
# mean of the last 3 instead of 20 was worse (docs/experiments.md, Slots).
LONGEST_MEAN = 20
ARRAYS = ('descriptors', 'points_cam', 'anchor', 'counts', 'born')


def same_features(keyframe: Keyframe, points_cam: np.ndarray, descriptors: np.ndarray
                  ) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of points [N, 3] in a keyframe's camera are which of its features.

    The nearest one with a point that is alike, within ``SEARCH_PX`` of where the point shows.
    Returns rows and features.
    """
    known = np.flatnonzero(keyframe.has_point)
    pixels = keyframe.camera.project(points_cam)
    shown = np.flatnonzero(np.isfinite(pixels).all(1))
    if not len(known) or not len(shown):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    distance, near = cKDTree(keyframe.features.keypoints[known]).query(pixels[shown])
    feature = known[near]
    alike = np.einsum('nd,nd->n', descriptors[shown],
                      keyframe.features.descriptors[feature]) > SAME_DESCRIPTOR
    good = alike & (distance < SEARCH_PX)
    return shown[good], feature[good]


class SlotTable:
    """Mutable landmark slots of fixed capacity.

    descriptors int8 [S, D] (running means, see ``quantised``), points_cam float32 [S, 3] in the
    frame of keyframe ``anchor`` [S], counts [S] (0 = empty), born [S] (write number).
    """

    def __init__(self, capacity: int, dim: int) -> None:
        self.descriptors = np.zeros((capacity, dim), np.int8)
        self.points_cam = np.zeros((capacity, 3), np.float32)
        self.anchor, self.counts, self.born = (np.zeros(capacity, np.int32) for _ in range(3))
        self.writes = 0

    def map_points(self, poses: np.ndarray) -> np.ndarray:
        """Points [S, 3] in the map, from keyframe poses [K, 4, 4] indexed by id."""
        T = poses[self.anchor]
        return np.einsum('sij,sj->si', T[:, :3, :3], self.points_cam) + T[:, :3, 3]

    def move(self, anchor: np.ndarray, T_anchor_old: np.ndarray) -> None:
        """Anchor what keyframe k saw in keyframe ``anchor[k]``; T_anchor_old: [K, 4, 4]."""
        T = T_anchor_old[self.anchor]
        self.points_cam = np.einsum('sij,sj->si', T[:, :3, :3], self.points_cam) + T[:, :3, 3]
        self.anchor = anchor[self.anchor]

    @property
    def trusted(self) -> np.ndarray:
        """Mask [S] of slots worth reading.

        Once half of the table is confirmed by a second view, slots seen once are wrong more
        often than they help; before that, there are no others.
        """
        confirmed = self.counts > 1
        return confirmed if confirmed.sum() > len(confirmed) / 2 else self.counts > 0

    def correct(self, keyframe: Keyframe) -> None:
        """Give the slots of a keyframe the points that its features have by now.

        A landmark that was refined from all its views is better than the mean of what single
        keyframes said when they were written.
        """
        own = np.flatnonzero((self.counts > 0) & (self.anchor == keyframe.id))
        row, feature = same_features(keyframe, self.points_cam[own],
                                     unit_length(self.descriptors[own]))
        self.points_cam[own[row]] = keyframe.points_cam[feature]

    def state(self) -> dict[str, torch.Tensor]:
        """The arrays as named tensors that share their memory."""
        return {name: torch.from_numpy(getattr(self, name)) for name in ARRAYS}

    def restore(self, state: Mapping[str, torch.Tensor], writes: int) -> None:
        """Take over a ``state`` after that many writes."""
        self.writes = writes
        for name in ARRAYS:
            getattr(self, name)[:] = state[name].numpy()

    def write(self, keyframe: Keyframe, poses: np.ndarray) -> None:
        """Fuse the keyframe's points into the slots they repeat; add the others as new."""
        self.writes += 1
        known = np.flatnonzero(keyframe.has_point)
        if not len(known) or not len(self.counts):
            return
        feature, slot = self._associate(keyframe, known, poses)
        self._fuse(keyframe, feature, slot, poses)
        fresh = np.setdiff1d(known, feature)
        self._add(keyframe, fresh)

    def _associate(self, keyframe: Keyframe, known: np.ndarray,
                   poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (feature, slot): near in the image, alike in depth and descriptor."""
        used = np.flatnonzero(self.counts)
        points = transform_points(inverse(keyframe.T_map_cam), self.map_points(poses)[used])
        pixels = keyframe.camera.project(points)
        size = np.array(keyframe.camera.size_wh)
        with np.errstate(invalid='ignore'):
            seen = np.all((pixels > -1) & (pixels < size), axis=1)
        used, points, pixels = used[seen], points[seen], pixels[seen]
        if not len(used):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        tree = cKDTree(pixels)
        _, near = tree.query(keyframe.features.keypoints[known], NEIGHBOURS,
                             distance_upper_bound=SEARCH_PX)
        found = near < len(used)
        near = np.where(found, near, 0)
        similarity = np.einsum('nd,nkd->nk', keyframe.features.descriptors[known],
                               unit_length(self.descriptors[used[near]]))
        depth = keyframe.points_cam[known, 2]
        close = np.abs(points[near, 2] - depth[:, None]) < SAME_DEPTH * depth[:, None]
        similarity = np.where(found & close, similarity, -1.0)
        best = similarity.argmax(1)
        rows = np.arange(len(known))
        same = SAME_DESCRIPTOR if self.counts.all() else SAME_VIEW
        good = np.flatnonzero(similarity[rows, best] > same)
        good = good[np.argsort(-similarity[good, best[good]], kind='stable')]
        slot, first = np.unique(near[good, best[good]], return_index=True)
        return known[good[first]], used[slot]

    def _fuse(self, keyframe: Keyframe, feature: np.ndarray, slot: np.ndarray,
              poses: np.ndarray) -> None:
        weight = 1.0 / (np.minimum(self.counts[slot], LONGEST_MEAN) + 1)[:, None]
        mean = (1 - weight) * unit_length(self.descriptors[slot]) \
            + weight * keyframe.features.descriptors[feature]
        self.descriptors[slot] = quantised(mean)
        in_map = transform_points(keyframe.T_map_cam, keyframe.points_cam[feature])
        T = poses[self.anchor[slot]]
        in_anchor = np.einsum('sji,sj->si', T[:, :3, :3], in_map - T[:, :3, 3])
        self.points_cam[slot] = (1 - weight) * self.points_cam[slot] + weight * in_anchor
        self.counts[slot] += 1

    def _add(self, keyframe: Keyframe, fresh: np.ndarray) -> None:
        order = fresh[np.argsort(-keyframe.features.confidence[fresh], kind='stable')]
        slots = self._room_for(len(order))
        order = order[:len(slots)]
        self.descriptors[slots] = quantised(keyframe.features.descriptors[order])
        self.points_cam[slots] = keyframe.points_cam[order]
        self.anchor[slots] = keyframe.id
        self.counts[slots] = 1
        self.born[slots] = self.writes

    def _room_for(self, wanted: int) -> np.ndarray:
        """Slots for new landmarks: empty ones, then those seen once, then those of rich keyframes.

        A full table goes on taking in new places: the keyframe that has most slots loses its least
        useful one, as long as it has more than the new keyframe by then.
        """
        empty = np.flatnonzero(self.counts == 0)
        missing = wanted - len(empty)
        if missing <= 0:
            return empty[:wanted]
        old = self.writes - self.born >= PROTECTED_KEYFRAMES
        passing = np.flatnonzero((self.counts == 1) & old)
        passing = passing[np.argsort(self.born[passing], kind='stable')][:missing]
        free = np.concatenate([empty, passing])
        if len(free) >= wanted:
            return free
        used = np.flatnonzero((self.counts > 1) | (self.counts == 1) & ~old)
        rank = self._rank(used)
        richest = np.argsort(-rank, kind='stable')[:wanted - len(free)]
        poorer = len(free) + 1 + np.arange(len(richest)) <= rank[richest]
        return np.concatenate([free, used[richest[poorer]]])

    def _rank(self, used: np.ndarray) -> np.ndarray:
        """How many more useful slots of the same keyframe each of ``used`` [U] has."""
        young = self.writes - self.born[used] < PROTECTED_KEYFRAMES
        usefulness = self.counts[used] + np.where(young, YOUNG, 0.0)
        anchor = self.anchor[used]
        order = np.lexsort((-usefulness, anchor))
        first = np.searchsorted(anchor[order], anchor[order])
        rank = np.empty(len(used), np.int64)
        rank[order] = np.arange(len(used)) - first
        return rank
