"""The map while it grows: keyframes, their poses, and the landmark table that ties them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.refine import BundleProblem, BundleResult, bundle_adjust
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.geometry.triangulate import ray_errors, triangulate
from feedforward_recon.mapping.keyframes import MapKeyframe, View
from feedforward_recon.mapping.landmarks import LandmarkTable
from feedforward_recon.mapping.matching import Tracks, match_guided, match_mutual, spread
from feedforward_recon.types import Features, Keyframe

log = logging.getLogger(__name__)
SAME_POINT_PX = 2.0
GUIDED_RADIUS_PX = 5.0
SAME_DEPTH = 0.05
CULL_FACTOR = 3.0
NEIGHBOURS = 20
MIN_BASELINE = 0.04  # of the typical depth, for matches to be triangulated
MATCHED_KEYFRAMES = 2
POINTS_PIECE = 5000  # observations whose landmarks are refined at once


class GrowingMap:
    """Keyframes with poses [K, 4, 4] and landmarks; every method keeps them consistent."""

    def __init__(self, config: MapperConfig, dim: int) -> None:
        self.config = config
        self.keyframes: list[MapKeyframe] = []
        self.T_map_cam = np.zeros((0, 4, 4))
        self.landmarks = LandmarkTable(dim)

    def __len__(self) -> int:
        return len(self.keyframes)

    # -- growing ---------------------------------------------------------------------------

    def add_keyframe(self, view: View, features: Features, T_map_cam: np.ndarray,
                     tracks: Tracks) -> Tracks:
        """Insert a keyframe that sees ``tracks``; returns them with its new landmarks."""
        id_ = len(self.keyframes)
        depth = view.depth_at(features.keypoints)
        points = view.camera.unproject(features.keypoints, np.where(depth > 0, depth, np.nan))
        u, v = np.clip(np.rint(features.keypoints), 0, np.array(view.camera.size_wh) - 1
                       ).astype(int).T
        keyframe = MapKeyframe(id_, view.index, view.stamp_ns, view.camera, features, points,
                               np.full(len(features), -1), view.image[v, u], view.source)
        self.keyframes.append(keyframe)
        self.T_map_cam = np.concatenate([self.T_map_cam, T_map_cam[None]])
        tracks = self._snapped(keyframe, tracks)
        self._observe(keyframe, view, tracks.ids, tracks.px)
        quality = features.confidence
        if keyframe.has_sparse_depth:  # what has depth is scarce: it goes first
            quality = quality + (depth > 0)
        new = spread(features.keypoints, quality, tracks.px, view.camera.size_wh,
                     self.config.tracking.max_tracks)
        new = new[keyframe.landmark[new] < 0]
        ids = self.landmarks.add(id_, points[new], features.descriptors[new], keyframe.rgb[new])
        self._observe(keyframe, view, ids, features.keypoints[new])
        keyframe.landmark[new] = ids
        return Tracks(tracks.gray, np.concatenate([tracks.ids, ids]),
                      np.concatenate([tracks.px, features.keypoints[new]]))

    def _observe(self, keyframe: MapKeyframe, view: View, ids: np.ndarray,
                 px: np.ndarray) -> None:
        depth = view.depth_at(px)
        inv_depth = 1 / np.where(depth > 0, depth, np.nan)
        self.landmarks.observe(ids, keyframe.id, px, view.camera.normalise(px), inv_depth, 1.0)

    def _snapped(self, keyframe: MapKeyframe, tracks: Tracks) -> Tracks:
        """Tracks moved onto the features that they show: corners do not drift, flow does."""
        if not len(tracks.ids):
            return tracks
        row, feature = match_guided(tracks.px, self.landmarks.descriptor[tracks.ids],
                                    keyframe.features, SAME_POINT_PX,
                                    self.config.tracking.match_similarity)
        keyframe.landmark[feature] = tracks.ids[row]
        px = tracks.px.copy()
        px[row] = keyframe.features.keypoints[feature]
        return Tracks(tracks.gray, tracks.ids, px)

    def triangulate_pending(self, keyframe: int) -> int:
        """Give a position to landmarks that a keyframe sees and parallax now determines."""
        table = self.landmarks
        pending = table.seen_by(keyframe)
        pending = pending[table.alive[pending] & np.isnan(table.point_cam[pending, 2])]
        rows = np.flatnonzero(table.mask(pending)[table.seen_landmark])
        ids, index = np.unique(table.seen_landmark[rows], return_inverse=True)
        if not len(ids):
            return 0
        T, xy = self.T_map_cam[table.seen_keyframe[rows]], table.seen_xy[rows]
        points, angle_deg = triangulate(T, xy, index, len(ids))
        error = ray_errors(T, xy, np.nan_to_num(points)[index])
        worst = np.zeros(len(ids))
        np.maximum.at(worst, index, error)
        focal_px = self.keyframes[keyframe].camera.fx
        good = (angle_deg > self.config.keyframes.min_parallax_deg) & (
            worst * focal_px < self.config.tracking.outlier_px)
        table.set_points_map(ids[good], points[good], self.T_map_cam)
        return int(good.sum())

    def triangulate_matches(self, id_: int) -> int:
        """New landmarks from features that match those of other keyframes by descriptor.

        Only features whose depth is unknown. Not in a keyframe with sparse sensor depth: there the
        landmarks with depth, and followed ones whose parallax grows, hold the camera better than
        many young ones of two views (docs/experiments.md).
        """
        table, found = self.landmarks, 0
        if self.keyframes[id_].has_sparse_depth:
            return 0
        tied = table.shared(table.seen_by(id_), len(self))[:id_]
        baseline = np.linalg.norm(self.T_map_cam[:id_, :3, 3] - self.T_map_cam[id_, :3, 3], axis=1)
        apart = baseline > MIN_BASELINE * self.typical_depth(id_)
        for other in np.argsort(-tied * apart, kind='stable')[:MATCHED_KEYFRAMES]:
            if apart[other] and tied[other] > 0:
                found += self._match_pair(self.keyframes[id_], self.keyframes[other])
        return found

    def _match_pair(self, new: MapKeyframe, old: MapKeyframe) -> int:
        free = [np.flatnonzero((k.landmark < 0) & np.isnan(k.points_cam[:, 2]))
                for k in (new, old)]
        a, b = match_mutual(new.descriptors[free[0]],
                            old.descriptors[free[1]],
                            self.config.tracking.match_similarity)
        a, b = free[0][a], free[1][b]
        px = [new.features.keypoints[a], old.features.keypoints[b]]
        T = self.T_map_cam[np.repeat([new.id, old.id], len(a))]
        xy = np.concatenate([new.camera.normalise(px[0]), old.camera.normalise(px[1])])
        points, angle_deg = triangulate(T, xy, np.tile(np.arange(len(a)), 2), len(a))
        error = ray_errors(T, xy, np.tile(np.nan_to_num(points), (2, 1))).reshape(2, -1).max(0)
        good = (angle_deg > self.config.keyframes.min_parallax_deg) & (
            error * new.camera.fx < SAME_POINT_PX)
        a, b, count = a[good], b[good], int(good.sum())
        ids = self.landmarks.add(old.id, np.full((count, 3), np.nan),
                                 old.descriptors[b], old.rgb[b])
        self.landmarks.set_points_map(ids, points[good], self.T_map_cam)
        unknown = np.full(count, np.nan)
        for keyframe, rows, seen, half in ((new, a, px[0], 0), (old, b, px[1], 1)):
            keyframe.landmark[rows] = ids
            self.landmarks.observe(ids, keyframe.id, seen[good],
                                   xy.reshape(2, -1, 2)[half][good], unknown, 1.0)
        return count

    # -- seeing known landmarks again ------------------------------------------------------

    def neighbours(self, T_map_cam: np.ndarray, depth: float) -> np.ndarray:
        """Keyframes that look at the same place from about the same side, nearest first.

        depth: typical distance of what the camera sees, map units.
        """
        distance = np.linalg.norm(self.T_map_cam[:, :3, 3] - T_map_cam[:3, 3], axis=1) / depth
        cosine = self.T_map_cam[:, :3, 2] @ T_map_cam[:3, 2]
        cost = distance + 2 * (1 - cosine)
        order = np.argsort(cost, kind='stable')
        return order[cost[order] < 1.0][:NEIGHBOURS]

    def visible(self, keyframes: np.ndarray, T_map_cam: np.ndarray, camera: Camera
                ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Landmarks of some keyframes in view of a camera: ids, pixels [n, 2], z-depths [n]."""
        table = self.landmarks
        rows = np.isin(table.seen_keyframe, keyframes)
        ids = np.flatnonzero(table.mask(table.seen_landmark[rows]) & table.has_point)
        points = transform_points(inverse(T_map_cam), table.points_map(ids, self.T_map_cam))
        px = camera.project(points)
        with np.errstate(invalid='ignore'):
            inside = (px >= 0).all(1) & (px < camera.size_wh).all(1)
        # Seen from twice as near or far, a patch no longer looks the same.
        ratio = points[:, 2] / np.maximum(table.point_cam[ids, 2], 1e-9)
        inside &= (ratio > 0.5) & (ratio < 2.0)
        return ids[inside], px[inside], points[inside, 2]

    def reassociate(self, id_: int, view: View, tracks: Tracks) -> Tracks:
        """Find landmarks of neighbouring keyframes again in keyframe ``id_`` by guided matching.

        Adds observations, merges landmarks that turn out to be one, and returns the tracks
        under their new names with the re-found landmarks.
        """
        keyframe, table = self.keyframes[id_], self.landmarks
        ids, px, depth = self._expected(keyframe, view)
        row, feature = match_guided(px, table.descriptor[ids], keyframe.features,
                                    GUIDED_RADIUS_PX, self.config.tracking.match_similarity)
        ids, depth = ids[row], depth[row]
        present = keyframe.landmark[feature]
        free = present < 0
        new_px = keyframe.features.keypoints[feature[free]]
        self._observe(keyframe, view, ids[free], new_px)
        keyframe.landmark[feature[free]] = ids[free]
        self._merge(keyframe, ids[~free], present[~free], depth[~free])
        named = table.alias[np.concatenate([tracks.ids, ids[free]])]
        px = np.concatenate([tracks.px, new_px])
        first = np.unique(named, return_index=True)[1]
        return Tracks(tracks.gray, named[first], px[first])

    def _expected(self, keyframe: MapKeyframe,
                  view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        T = self.T_map_cam[keyframe.id]
        near = self.neighbours(T, self.typical_depth(keyframe.id))
        ids, px, depth = self.visible(near[near != keyframe.id], T, keyframe.camera)
        unseen = ~self.landmarks.mask(self.landmarks.seen_by(keyframe.id))[ids]
        sensed = view.depth_at(px)
        hidden = (sensed > 0) & (np.abs(sensed - depth) > 2 * SAME_DEPTH * depth)
        keep = unseen & ~hidden
        return ids[keep], px[keep], depth[keep]

    def _merge(self, keyframe: MapKeyframe, ids: np.ndarray, present: np.ndarray,
               depth: np.ndarray) -> None:
        """Landmarks ``ids`` matched features that already show ``present``: one and the same?"""
        table = self.landmarks
        present = table.alias[present]
        known = np.isfinite(table.point_cam[present, 2])
        T = inverse(self.T_map_cam[keyframe.id])
        z = transform_points(T, table.points_map(present, self.T_map_cam))[:, 2]
        same = ~known | (np.abs(z - depth) < SAME_DEPTH * depth)
        self._join(ids[same], present[same])

    def _join(self, ids: np.ndarray, others: np.ndarray) -> None:
        """Merge pairs of landmarks; the older one stays unless only the other has a point."""
        table = self.landmarks
        usable = table.alive[ids] & table.alive[others] & (ids != others)
        pairs = np.sort(np.stack([ids[usable], others[usable]], 1), 1)
        # A pending landmark has no position to keep.
        swap = np.isnan(table.point_cam[pairs[:, 0], 2])
        pairs[swap] = pairs[swap][:, ::-1]
        # Each landmark takes part in one merge at a time: no chains.
        _, first = np.unique(pairs[:, 0], return_index=True)
        pairs = pairs[first]
        _, first = np.unique(pairs[:, 1], return_index=True)
        pairs = pairs[first]
        pairs = pairs[~np.isin(pairs[:, 1], pairs[:, 0])]
        table.merge(pairs[:, 0], pairs[:, 1])

    def tie(self, id_: int, features: np.ndarray, landmarks: np.ndarray) -> None:
        """Features [n] of a keyframe show old landmarks [n], verified by the caller."""
        keyframe, table = self.keyframes[id_], self.landmarks
        landmarks = table.alias[landmarks]
        present = keyframe.landmark[features]
        free = (present < 0) & ~table.mask(table.seen_by(id_))[landmarks] & table.alive[landmarks]
        px = keyframe.features.keypoints[features[free]]
        table.observe(landmarks[free], id_, px, keyframe.camera.normalise(px),
                      1 / keyframe.points_cam[features[free], 2], 1.0)
        keyframe.landmark[features[free]] = landmarks[free]
        self._join(landmarks[present >= 0], table.alias[present[present >= 0]])

    def typical_depth(self, keyframe: int) -> float:
        """Median z-depth of the landmarks that a keyframe sees, map units (1 if none)."""
        table = self.landmarks
        ids = table.seen_by(keyframe)
        ids = ids[table.has_point[ids]]
        if not len(ids):
            return 1.0
        z = transform_points(inverse(self.T_map_cam[keyframe]),
                             table.points_map(ids, self.T_map_cam))[:, 2]
        return max(float(np.median(z)), 1e-6)

    def current(self, tracks: Tracks) -> Tracks:
        """Tracks under the present names of their landmarks, without those that are gone."""
        ids = self.landmarks.alias[tracks.ids]
        alive = np.flatnonzero(self.landmarks.alive[ids])
        first = alive[np.unique(ids[alive], return_index=True)[1]]
        return Tracks(tracks.gray, ids[first], tracks.px[first])

    # -- refinement ------------------------------------------------------------------------

    def refine_window(self, *, poses_fixed: bool = False) -> BundleResult | None:
        """Bundle adjustment of the newest keyframes; those that share landmarks hold them."""
        config, count = self.config.refine, len(self)
        moving = np.arange(max(1, count - config.window), count)
        newest = np.unique(self.landmarks.seen_landmark[
            self.landmarks.seen_keyframe >= count - config.window])
        shared = self.landmarks.shared(newest, count)
        shared[moving] = 0
        holding = np.argsort(-shared, kind='stable')[:config.window_fixed]
        holding = holding[shared[holding] > 0]
        if not poses_fixed and not len(holding):
            holding, moving = moving[:1], moving[1:]
        if poses_fixed:
            moving, holding = moving[:0], np.concatenate([moving, holding])
        return self._refine(moving, holding, newest, config.window_steps)

    def refine_points(self, steps: int) -> Iterator[None]:
        """Refine all landmarks from all their views, poses held, in pieces of bounded cost.

        The map may grow between the pieces.
        """
        views = self.landmarks.views() * self.landmarks.has_point
        piece = np.cumsum(views) // POINTS_PIECE
        for number in np.unique(piece[views > 0]):
            ids = np.flatnonzero((piece == number) & (views > 0))
            self._refine(np.zeros(0, int), np.arange(len(self)), ids, steps)
            yield

    def refine_all(self, steps: int, *, refine_focal: bool = False) -> BundleResult | None:
        """Bundle adjustment of the whole map (at most ``refine.max_keyframes`` move)."""
        config, count = self.config.refine, len(self)
        moving = np.arange(max(1, count - config.max_keyframes), count)
        holding = np.arange(moving[0]) if len(moving) else np.zeros(0, int)
        ids = np.flatnonzero(self.landmarks.has_point)
        return self._refine(moving, holding, ids, steps, refine_focal)

    def _refine(self, moving: np.ndarray, holding: np.ndarray, ids: np.ndarray, steps: int,
                refine_focal: bool = False) -> BundleResult | None:
        problem, rows, ids = self.problem(moving, holding, ids, refine_focal)
        if problem is None:
            return None
        result = bundle_adjust(problem, steps)
        used = np.concatenate([moving, holding])
        self.T_map_cam[used] = result.T_map_cam
        self.landmarks.set_points_map(ids, result.points, self.T_map_cam)
        if refine_focal:
            self._rescale_focal(result.focal_scale)
        # Beyond the tracking threshold: an observation that ties the window to an old place may
        # disagree until the loop is closed, and must not be lost before.
        self._cull(rows[result.residual > CULL_FACTOR * self.config.tracking.outlier_px], ids)
        return result

    def problem(self, moving: np.ndarray, holding: np.ndarray, ids: np.ndarray,
                refine_focal: bool = False
                ) -> tuple[BundleProblem | None, np.ndarray, np.ndarray]:
        """Bundle adjustment of landmarks ``ids`` and keyframes, with its rows and landmarks.

        Poses in the order of ``moving``, then ``holding``, which stay.
        """
        table, used = self.landmarks, np.concatenate([moving, holding])
        ids = ids[table.has_point[ids]]
        local = np.full(len(self), -1)
        local[used] = np.arange(len(used))
        rows = np.flatnonzero(table.mask(ids)[table.seen_landmark]
                              & (local[table.seen_keyframe] >= 0))
        # One view without depth says nothing about a point.
        weight = 1 + np.isfinite(table.seen_inv_depth[rows])
        firm = np.bincount(table.seen_landmark[rows], weight, len(table)) >= 2
        rows = rows[firm[table.seen_landmark[rows]]]
        if not len(rows):
            return None, rows, ids
        ids, point_index = np.unique(table.seen_landmark[rows], return_inverse=True)
        problem = BundleProblem(
            self.T_map_cam[used], table.points_map(ids, self.T_map_cam),
            np.arange(len(used)) >= len(moving), local[table.seen_keyframe[rows]], point_index,
            table.seen_xy[rows], table.seen_inv_depth[rows], table.seen_sigma[rows],
            self.keyframes[-1].camera.fx, self.config.tracking.depth_noise,
            self.config.refine.robust_px, refine_focal)
        return problem, rows, ids

    def _cull(self, bad_rows: np.ndarray, ids: np.ndarray) -> None:
        """Drop observations that disagree, and positions that too little supports."""
        table = self.landmarks
        table.forget(bad_rows)
        rows = np.flatnonzero(table.mask(ids)[table.seen_landmark])
        weight = 1 + np.isfinite(table.seen_inv_depth[rows])
        support = np.bincount(table.seen_landmark[rows], weight, len(table))[ids]
        table.alive[ids[support == 0]] = False
        table.point_cam[ids[support == 1]] = np.nan

    def _rescale_focal(self, scale: float) -> None:
        for keyframe in self.keyframes:
            keyframe.camera = scaled_focal(keyframe.camera, scale)
            keyframe.points_cam[:, :2] /= scale
            keyframe.cloud_cam[:, :2] /= scale
        self.landmarks.seen_xy /= scale

    def rescale(self, scale: float) -> None:
        """Multiply all lengths of the map."""
        self.T_map_cam[:, :3, 3] *= scale
        self.landmarks.point_cam *= scale

    # -- reading ---------------------------------------------------------------------------

    def points_cam(self, id_: int) -> np.ndarray:
        """Camera-frame points [N, 3] of a keyframe's features; NaN where unknown.

        A refined landmark (two views or more) is better than one sensor reading.
        """
        keyframe, table = self.keyframes[id_], self.landmarks
        points = keyframe.points_cam.copy()
        shown = np.flatnonzero(keyframe.landmark >= 0)
        ids = table.alias[keyframe.landmark[shown]]
        good = table.has_point[ids]
        shown, ids = shown[good], ids[good]
        z = transform_points(inverse(self.T_map_cam[id_]),
                             table.points_map(ids, self.T_map_cam))[:, 2]
        front = z > 0
        px = keyframe.features.keypoints[shown[front]]
        points[shown[front]] = keyframe.camera.unproject(px, z[front])
        return points

    def exported(self, id_: int) -> Keyframe:
        """A keyframe as an immutable value."""
        return self.keyframes[id_].exported(self.T_map_cam[id_], self.points_cam(id_))


def scaled_focal(camera: Camera, scale: float) -> Camera:
    """The camera with its focal lengths multiplied."""
    return Camera(camera.width, camera.height, camera.fx * scale, camera.fy * scale, camera.cx,
                  camera.cy, camera.distortion, camera.model)
