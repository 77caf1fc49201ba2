"""The landmark table: points anchored in keyframes, and where keyframes saw them.

A landmark is stored in the camera frame of its anchor keyframe, so that correcting a
keyframe's pose moves its landmarks with it. Points that sensor depth gave and points that
were triangulated live in the same table; a landmark whose depth is still unknown has a NaN
point and is followed all the same.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from feedforward_recon.geometry.transforms import inverse


class LandmarkTable:
    """Columns of landmarks [M] and of observations [O]; ids are row numbers and never change.

    anchor: keyframe id; point_cam: [M, 3] in the anchor's camera frame; descriptor: [M, D];
    rgb: colour [M, 3]; alive: bool; alias: the landmark that this one was merged into, itself
    otherwise.
    seen_landmark, seen_keyframe: ids; seen_px: pixels [O, 2]; seen_xy: normalised [O, 2];
    seen_inv_depth: sensor 1/z, NaN if none; seen_sigma: pixel error expected.
    """

    OBSERVATION_COLUMNS = ('seen_landmark', 'seen_keyframe', 'seen_px', 'seen_xy',
                           'seen_inv_depth', 'seen_sigma')

    def __init__(self, dim: int) -> None:
        self.anchor = np.zeros(0, np.int32)
        self.point_cam = np.zeros((0, 3))
        self.descriptor = np.zeros((0, dim), np.float32)
        self.rgb = np.zeros((0, 3), np.uint8)
        self.alive = np.zeros(0, bool)
        self.alias = np.zeros(0, np.int64)
        self.seen_landmark = np.zeros(0, np.int32)
        self.seen_keyframe = np.zeros(0, np.int32)
        self.seen_px = np.zeros((0, 2), np.float32)
        self.seen_xy = np.zeros((0, 2))
        self.seen_inv_depth = np.zeros(0)
        self.seen_sigma = np.zeros(0)

    def __len__(self) -> int:
        return len(self.anchor)

    @property
    def has_point(self) -> np.ndarray:
        """Mask [M] of living landmarks whose position is known."""
        return self.alive & np.isfinite(self.point_cam[:, 2])

    def add(self, keyframe: int, point_cam: np.ndarray, descriptor: np.ndarray,
            rgb: np.ndarray) -> np.ndarray:
        """New landmarks [n] anchored in a keyframe; returns their ids."""
        ids = np.arange(len(self), len(self) + len(descriptor))
        self.anchor = np.append(self.anchor, np.full(len(ids), keyframe, np.int32))
        self.point_cam = np.concatenate([self.point_cam, point_cam])
        self.descriptor = np.concatenate([self.descriptor, descriptor])
        self.rgb = np.concatenate([self.rgb, rgb])
        self.alias = np.append(self.alias, ids)
        self.alive = np.append(self.alive, np.ones(len(ids), bool))
        return ids

    def observe(self, landmark: np.ndarray, keyframe: int, px: np.ndarray, xy: np.ndarray,
                inv_depth: np.ndarray, sigma: float) -> None:
        """Landmarks [n] were seen by a keyframe at pixels [n, 2]."""
        rows = (landmark, np.full(len(landmark), keyframe, np.int32), px, xy, inv_depth,
                np.full(len(landmark), sigma))
        for name, values in zip(self.OBSERVATION_COLUMNS, rows, strict=True):
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.asarray(values, column.dtype)]))

    def append(self, other: LandmarkTable, first_keyframe: int) -> None:
        """Take over the landmarks of another map, whose keyframes count from that number."""
        first = len(self)
        self.anchor = np.append(self.anchor, other.anchor + np.int32(first_keyframe))
        self.alias = np.append(self.alias, other.alias + first)
        for name in ('point_cam', 'descriptor', 'rgb', 'alive'):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(other, name)]))
        moved = {'seen_landmark': first, 'seen_keyframe': first_keyframe}
        for name in self.OBSERVATION_COLUMNS:
            column = getattr(other, name)
            setattr(self, name, np.concatenate([getattr(self, name), column + column.dtype.type(
                moved[name])] if name in moved else [getattr(self, name), column]))

    def forget(self, rows: np.ndarray) -> None:
        """Drop observations [n], given by their places in the columns."""
        if len(rows):
            keep = np.ones(len(self.seen_landmark), bool)
            keep[rows] = False
            for name in self.OBSERVATION_COLUMNS:
                setattr(self, name, getattr(self, name)[keep])

    def points_map(self, ids: np.ndarray, T_map_cam: np.ndarray) -> np.ndarray:
        """Points [n, 3] in the map frame, given all keyframe poses [K, 4, 4]."""
        T = T_map_cam[self.anchor[ids]]
        return np.matmul(T[:, :3, :3], self.point_cam[ids][..., None])[..., 0] + T[:, :3, 3]

    def set_points_map(self, ids: np.ndarray, points: np.ndarray, T_map_cam: np.ndarray) -> None:
        """Store map points [n, 3] in the frames of their anchors."""
        T = inverse(T_map_cam[self.anchor[ids]])
        self.point_cam[ids] = np.matmul(T[:, :3, :3], points[..., None])[..., 0] + T[:, :3, 3]

    def mask(self, ids: np.ndarray) -> np.ndarray:
        """Bool [M] that is True at ids."""
        out = np.zeros(len(self), bool)
        out[ids] = True
        return out

    def first_seen(self, ids: np.ndarray, T_map_cam: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From where [4, 4, n] and at which normalised coordinates [2, n] each was first seen.

        ids: [n], each once and with an observation.
        """
        rows = np.flatnonzero(self.mask(ids)[self.seen_landmark])
        row_of = np.zeros(len(self), np.int64)
        row_of[self.seen_landmark[rows[::-1]]] = rows[::-1]  # the first row is written last
        rows = row_of[ids]
        return np.moveaxis(T_map_cam[self.seen_keyframe[rows]], 0, -1), self.seen_xy[rows].T

    def seen_by(self, keyframe: int) -> np.ndarray:
        """Ids of the landmarks that a keyframe saw."""
        return self.seen_landmark[self.seen_keyframe == keyframe]

    def shared(self, ids: np.ndarray, keyframes: int) -> np.ndarray:
        """How many of the landmarks ``ids`` each keyframe 0..keyframes-1 saw, [K]."""
        rows = self.mask(ids)[self.seen_landmark]
        return np.bincount(self.seen_keyframe[rows], minlength=keyframes)

    def shared_by(self, keyframes: np.ndarray, count: int) -> np.ndarray:
        """How many landmarks ``keyframes`` [k] share with each of ``count``, [k, count]."""
        seen = sparse.csr_array((np.ones(len(self.seen_keyframe), np.int32),
                                 (self.seen_keyframe, self.seen_landmark)), (count, len(self)))
        return (seen[keyframes] @ seen.T).toarray()

    def views(self) -> np.ndarray:
        """Number of keyframes that saw each landmark, [M]."""
        return np.bincount(self.seen_landmark, minlength=len(self))

    def merge(self, old: np.ndarray, new: np.ndarray) -> None:
        """Landmarks ``new`` [n] turn out to be ``old`` [n]: their observations move over."""
        renamed = np.arange(len(self))
        renamed[new] = old
        self.alias = renamed[self.alias]
        self.seen_landmark = renamed[self.seen_landmark].astype(np.int32)
        self.alive[new] = False
        # A keyframe sees a landmark once: the observation that came first stays.
        rows = np.flatnonzero(self.mask(old)[self.seen_landmark])
        key = self.seen_landmark[rows].astype(np.int64) << 32 | self.seen_keyframe[rows]
        again = np.ones(len(rows), bool)
        again[np.unique(key, return_index=True)[1]] = False
        self.forget(rows[again])
