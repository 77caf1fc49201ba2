"""``GrowingMap``: keyframes, their poses, and the landmarks that they share."""

from __future__ import annotations

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.mapping.keyframes import MapKeyframe, View
from feedforward_recon.mapping.landmarks import LandmarkTable
from feedforward_recon.mapping.matching import Tracks, match_guided, spread
from feedforward_recon.types import Features, Keyframe

SAME_POINT_PX = 2.0  # two pixels nearer than this show one point: twice the error of a keypoint
GUIDED_RADIUS_PX = 5.0  # around where a landmark should be: poses are off by less while tracked
# Share by which two depths of one point may differ: three standard deviations of a depth camera
# at 4 m (tracking.depth_noise).
SAME_DEPTH = 0.05
NEIGHBOURS = 20  # keyframes whose landmarks are looked for: more cost time and add few


def is_hidden(sensed: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Whether the sensor saw another surface [n] than one at z-depths [n]; False where blind."""
    with np.errstate(invalid='ignore'):
        return (sensed > 0) & (np.abs(sensed - depth) > 2 * SAME_DEPTH * depth)


class GrowingMap:
    """Keyframes with poses T_map_cam [K, 4, 4] and landmarks, lengths in map units.

    Every method keeps them consistent. depth_spread: how far depth images are from the landmarks,
    standard deviation of 1/z; 0 until it is measured.
    """

    def __init__(self, config: MapperConfig, dim: int) -> None:
        self.config = config
        self.depth_spread = 0.0
        self.keyframes: list[MapKeyframe] = []
        self.T_map_cam = np.zeros((0, 4, 4))
        self.landmarks = LandmarkTable(dim)

    def __len__(self) -> int:
        return len(self.keyframes)

    @property
    def depth_noise(self) -> float:
        """Standard deviation of 1/z of a depth, 1/m: as measured, at least as in the settings."""
        return max(self.config.tracking.depth_noise, self.depth_spread)

    def clear(self) -> None:
        """Remove all keyframes and landmarks."""
        self.keyframes.clear()
        self.T_map_cam = np.zeros((0, 4, 4))
        self.landmarks = LandmarkTable(self.landmarks.descriptor.shape[1])
        self.depth_spread = 0.0

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
                               np.full(len(features), -1), view.image[v, u], view.source,
                               inv_depth_noise=view.inv_depth_noise)
        self.keyframes.append(keyframe)
        self.T_map_cam = np.concatenate([self.T_map_cam, T_map_cam[None]])
        tracks = self._snapped(keyframe, tracks)
        self.observe(keyframe, view, tracks.ids, tracks.px)
        quality = features.confidence
        if keyframe.has_sparse_depth:  # features with depth are scarce: they are chosen first
            quality = quality + (depth > 0)
        new = spread(features.keypoints, quality, tracks.px, view.camera.size_wh,
                     self.config.tracking.max_tracks)
        new = new[keyframe.landmark[new] < 0]
        ids = self.landmarks.add(id_, points[new], features.descriptors[new], keyframe.rgb[new])
        self.observe(keyframe, view, ids, features.keypoints[new])
        keyframe.landmark[new] = ids
        return Tracks(tracks.gray, np.concatenate([tracks.ids, ids]),
                      np.concatenate([tracks.px, features.keypoints[new]]))

    def observe(self, keyframe: MapKeyframe, view: View, ids: np.ndarray,
                 px: np.ndarray) -> None:
        """A keyframe sees landmarks ``ids`` [n] at pixels [n, 2] of its view."""
        depth = view.depth_at(px)
        inv_depth = 1 / np.where(depth > 0, depth, np.nan)
        self.landmarks.observe(ids, keyframe.id, px, view.camera.normalise(px), inv_depth, 1.0)

    def _snapped(self, keyframe: MapKeyframe, tracks: Tracks) -> Tracks:
        """Tracks moved onto the features that match them: corners do not drift, flow does."""
        if not len(tracks.ids):
            return tracks
        row, feature = match_guided(tracks.px, self.landmarks.descriptor[tracks.ids],
                                    keyframe.features, SAME_POINT_PX,
                                    self.config.tracking.match_similarity)
        keyframe.landmark[feature] = tracks.ids[row]
        px = tracks.px.copy()
        px[row] = keyframe.features.keypoints[feature]
        return Tracks(tracks.gray, tracks.ids, px)

    # -- seeing known landmarks again ------------------------------------------------------

    def neighbours(self, T_map_cam: np.ndarray, depth: float) -> np.ndarray:
        """Keyframes that look at the same place from about the same side, nearest first.

        depth: typical distance of what the camera sees, map units.
        """
        # A turn by 60 degrees weighs as much as a step as long as the depth.
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

    def depths(self, keyframe: int, ids: np.ndarray) -> np.ndarray:
        """z-depths of landmarks ``ids`` [n] in a keyframe, map units; negative behind it."""
        points = self.landmarks.points_map(ids, self.T_map_cam)
        return transform_points(inverse(self.T_map_cam[keyframe]), points)[:, 2]

    def typical_depth(self, keyframe: int) -> float:
        """Median z-depth of the landmarks that a keyframe sees, map units (1 if none)."""
        ids = self.landmarks.seen_by(keyframe)
        ids = ids[self.landmarks.has_point[ids]]
        return max(float(np.median(self.depths(keyframe, ids))), 1e-6) if len(ids) else 1.0

    def current(self, tracks: Tracks) -> Tracks:
        """Tracks under the present ids of their landmarks, without those that are gone."""
        ids = self.landmarks.alias[tracks.ids]
        alive = np.flatnonzero(self.landmarks.alive[ids])
        first = alive[np.unique(ids[alive], return_index=True)[1]]
        return Tracks(tracks.gray, ids[first], tracks.px[first])

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
        z = self.depths(id_, ids)
        front = z > 0
        px = keyframe.features.keypoints[shown[front]]
        points[shown[front]] = keyframe.camera.unproject(px, z[front])
        return points

    def exported(self, id_: int) -> Keyframe:
        """A keyframe as an immutable value."""
        return self.keyframes[id_].exported(self.T_map_cam[id_], self.points_cam(id_))
