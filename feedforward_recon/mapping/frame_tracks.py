"""``FrameTracks``: what each frame saw of the map, so that its pose can be refined with the map.

A frame that is no keyframe moves rigidly with one while the map grows. When the map is finished
its pose is fitted once more to the landmarks that it saw, where they are then.
"""

from __future__ import annotations

import numpy as np

from feedforward_recon.config.schema import TrackingConfig
from feedforward_recon.geometry.pnp import refine_pose
from feedforward_recon.mapping.estimates import EstimateHistory
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.mapping.tracking import is_well_supported

# Observations that are kept of all frames: 4 MB, and all there are for about 1000 images. Beyond,
# every second one is left out, as often as needed: 40 in each image give a pose.
BUDGET = 300_000
# Times outlier_px that a fit may move the view of a frame (20 px): drift that was not corrected is
# far below; where half of the view moved by itself, another pose has as many landmarks.
MAX_SHIFT = 5.0


class FrameTracks:
    """Landmarks and pixels that frames saw, within a budget of observations."""

    def __init__(self, budget: int = BUDGET) -> None:
        self._budget = budget
        self._seen: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._total, self._step = 0, 1

    def clear(self) -> None:
        """The map was given up."""
        self._seen.clear()
        self._total = 0

    def record(self, frame: int, tracks: Tracks) -> None:
        """Frame ``frame`` saw these landmarks."""
        # From another first one each time: what was left out of one frame is kept of the next.
        chosen = slice(frame % self._step, None, self._step)
        self._seen[frame] = tracks.ids[chosen].astype(np.int32), \
            tracks.px[chosen].astype(np.float32)
        self._total += len(self._seen[frame][0])
        while self._total > self._budget:
            self._seen = {key: (ids[::2].copy(), px[::2].copy())
                          for key, (ids, px) in self._seen.items()}
            self._total = sum(len(ids) for ids, _ in self._seen.values())
            self._step *= 2

    def refit(self, map_: GrowingMap, history: EstimateHistory, config: TrackingConfig) -> int:
        """Fit the poses of frames that are no keyframes to the map as it is now.

        A pose that few landmarks support, or only somewhere else, stays as it was. Returns how
        many were fitted.
        """
        found, table = 0, map_.landmarks
        for frame, (ids, px) in self._seen.items():
            T_map_cam, keyframe = history.pose(frame, map_.T_map_cam), history.keyframe(frame)
            ids = table.alias[ids]
            known = table.has_point[ids]
            if T_map_cam is None or known.sum() < config.min_inliers:
                continue
            points, camera = (table.points_map(ids[known], map_.T_map_cam),
                              map_.keyframes[keyframe].camera)
            fit = refine_pose(T_map_cam, points, px[known], camera, outlier_px=config.outlier_px)
            moved_px = camera.shift_px(T_map_cam, fit.T_map_cam, points[fit.inliers])
            if is_well_supported(fit, config) and moved_px < MAX_SHIFT * config.outlier_px:
                history.move(frame, fit.T_map_cam, map_.T_map_cam[keyframe])
                found += 1
        return found
