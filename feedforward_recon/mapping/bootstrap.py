"""Starting a monocular map: wait for parallax, then triangulate from two views.

The relative pose is that of the five-point algorithm in RANSAC (``geometry.twoview``).
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import replace

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.errors import DegenerateError
from feedforward_recon.geometry.pnp import PoseFit
from feedforward_recon.geometry.twoview import SEARCHES, TwoView, relative_pose
from feedforward_recon.mapping.adjustment import refine_all
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.mapping.tracking import Tracked, exact_fit, fit_pose

log = logging.getLogger(__name__)
# Landmarks that two views must give: 2.5 times tracking.min_inliers, so that the next frames can
# be tracked although some get lost; chosen by hand.
START_POINTS = 50
# Share of the first tracks that must be left: with fewer the two views hardly overlap, and a newer
# first frame does better; chosen by hand.
MIN_SHARE = 0.3
# Median angle between the rays of the first landmarks. With less, the first 50 poses of a kitchen
# walk were 5 to 7 cm off; what tracks are lost lowers it to nothing, since waiting no
# longer helps then; chosen by hand (docs/experiments.md, Poses while driving).
START_PARALLAX_DEG = 1.5
MAX_WAITING = 1000  # frames kept, without their images, for a pose later: 33 s at 30 Hz
EMPTY = np.zeros((0, 0), np.uint8)  # in place of images that are not needed any more


class Bootstrap:
    """Follows the tracks of the first keyframe until parallax determines the second.

    base: all tracks of the first keyframe.
    """

    def __init__(self, config: MapperConfig, base: Tracks) -> None:
        self.config = config
        self._count = len(base.ids)
        self._base_px = base.px[np.argsort(base.ids)]  # ids of a new map count from 0
        self._waiting: deque[tuple[View, Tracks]] = deque(maxlen=MAX_WAITING)

    def has_lost_tracks(self, tracks: Tracks) -> bool:
        """Whether too few of the first tracks are left to start from."""
        return len(tracks.ids) < max(START_POINTS, MIN_SHARE * self._count)

    def second_view(self, view: View, tracks: Tracks, T_map_first: np.ndarray
                    ) -> Tracked | None:
        """The frame as second keyframe, or None while parallax is too small (it waits).

        T_map_first: pose [4, 4] of the first.
        """
        two = self._relative_pose(view, tracks)
        if two is None:
            light = replace(view, image=EMPTY, gray=EMPTY)
            self._waiting.append((light, Tracks(EMPTY, tracks.ids, tracks.px)))
            return None
        fit = exact_fit(T_map_first @ two.T_a_b, int(two.inliers.sum()))
        return Tracked(tracks.select(two.inliers), fit)

    def _relative_pose(self, view: View, tracks: Tracks) -> TwoView | None:
        base = self._base_px[tracks.ids]
        motion_px = float(np.median(np.linalg.norm(tracks.px - base, axis=1)))
        if motion_px < self.config.keyframes.init_motion_share * view.camera.width:
            return None
        xy_base, xy = view.camera.normalise(base), view.camera.normalise(tracks.px)
        try:
            for searches in (1, SEARCHES):  # most frames have too little parallax by the first
                two = relative_pose(xy_base, xy, view.camera.fx, seed=self.config.tracking.seed,
                                    searches=searches)
                if not self._has_parallax(two):
                    return None
        except DegenerateError as error:
            log.debug('not yet: %s', error)
            return None
        return two

    def _has_parallax(self, two: TwoView) -> bool:
        firm = two.inliers & (two.angle_deg > self.config.keyframes.min_parallax_deg)
        left = (len(two.inliers) / self._count - MIN_SHARE) / (1 - MIN_SHARE)
        wide = np.median(two.angle_deg[two.inliers]) >= START_PARALLAX_DEG * left
        return bool(wide and firm.sum() >= START_POINTS)

    def complete(self, map_: GrowingMap) -> list[tuple[View, PoseFit]]:
        """Fix the unit of a map of two keyframes, refine it, and place the frames between.

        The unit is the median depth of the first landmarks in the first view.
        """
        refine_all(map_, self.config)
        map_.rescale(1 / map_.typical_depth(0))
        placed = []
        for view, tracks in self._waiting:
            known = map_.landmarks.has_point[tracks.ids]
            fit = fit_pose(view, map_, tracks.select(known), map_.T_map_cam[0],
                           self.config.tracking)
            if fit.count >= self.config.tracking.min_inliers:
                placed.append((view, fit))
        return placed
