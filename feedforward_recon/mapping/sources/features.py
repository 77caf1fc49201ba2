"""``FeaturePoses``: landmarks followed from frame to frame, and found again by descriptor.

no map            -> the first frame with texture, or with depth where the camera has it
no depth so far   -> two-view geometry once there is parallax (monocular cameras)
tracked before    -> optical flow (KLT) and PnP
lost              -> by descriptor where it should be, relocalisation among the keyframes, then by
                     the caller's relocaliser; a map that was hardly begun starts again
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.pnp import PoseFit
from feedforward_recon.mapping.bootstrap import Bootstrap
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.mapping.relocalisation import found_place, relocalise, verified
from feedforward_recon.mapping.scene_map import Gauge
from feedforward_recon.mapping.sources.base import (
    NO_KNOWN_PLACE,
    MapExtension,
    first_view,
    missing_for_start,
)
from feedforward_recon.mapping.sources.settling import Settling
from feedforward_recon.mapping.tracking import Tracked, Tracker
from feedforward_recon.model import Encoder
from feedforward_recon.types import Estimate, Features

# A map without depth of fewer keyframes that misses its camera for more images than it ever placed
# is given up: its two first views may have been wrong, and another start does better; by hand.
YOUNG = 5
# Landmarks that must agree with a camera that was lost only now, where it should be: fewer than
# tracking.relocalise_inliers, because the place is known. A fast car sees no more of a young map.
NEAR_INLIERS = 35
Relocaliser = Callable[[View], Estimate]  # finds a lost camera, e.g. in the scene memory


class FeaturePoses:
    """Poses from the features of the images alone.

    relocalise: called for a lost camera that is not found among the keyframes.
    T_map_first: pose [4, 4] of the camera that starts the map, in a frame with z up; the
    identity puts the origin and the axes into the first camera.
    """

    is_exact = False
    holds_poses = False
    refines_calibration = True
    is_busy = False
    progress = ''
    lost = NO_KNOWN_PLACE

    def __init__(self, config: MapperConfig, encoder: Encoder, *,
                 relocalise: Relocaliser | None = None) -> None:
        self.tracker = Tracker(config.tracking)
        self.T_map_first = np.eye(4)
        self._config, self._encoder, self._relocalise = config, encoder, relocalise
        self._bootstrap: Bootstrap | None = None
        self._needs_depth = False
        self._is_own, self._posed, self._missed = False, 0, 0  # since this source began the map
        self._settling, self._lost = Settling(config.tracking), False

    def mapping_config(self, config: MapperConfig) -> MapperConfig:
        """The settings as they are."""
        return config

    def locate(self, view: View, map_: GrowingMap) -> Tracked | None:
        """Pose of a frame from tracks, two views or relocalisation; see the module."""
        self._needs_depth = view.needs_depth
        if not len(map_):
            tracked = self._first(view)
        elif self._bootstrap is not None:
            tracked = self._second(view, map_, self._bootstrap)
        else:
            tracked = self._followed(view, map_)
            if tracked is None:
                return self._unless_settled(self._found_again(view, map_), map_)
        if tracked is not None:
            self._posed, self._missed, self._lost = self._posed + 1, 0, False
            self.tracker.accept(view, tracked.tracks, tracked.fit.T_map_cam)
        return self._unless_settled(tracked, map_)

    def _followed(self, view: View, map_: GrowingMap) -> Tracked | None:
        """By optical flow; from before a loss with as many landmarks as any place needs."""
        strict = self._lost and not self._needs_depth  # lengths would go wrong with few
        least = self._config.tracking.relocalise_inliers if strict else 0
        return self.tracker.track(view, map_, least)

    def _unless_settled(self, tracked: Tracked | None, map_: GrowingMap) -> Tracked | None:
        """Not sure before the map has settled: without a sensor its lengths may be wrong."""
        if tracked is None or self._needs_depth or not self._is_own:
            return tracked
        settled = self._settling.has_settled(tracked, map_)
        return tracked if settled else replace(tracked, sure=False)

    def _first(self, view: View) -> Tracked | None:
        self.tracker, self._bootstrap = Tracker(self._config.tracking), None
        self._is_own, self._posed, self._missed = True, 0, 0
        self._settling, self._lost = Settling(self._config.tracking), False
        return first_view(view, self._encoder, self.T_map_first, self._config.tracking)

    def _second(self, view: View, map_: GrowingMap, bootstrap: Bootstrap) -> Tracked | None:
        """Monocular: the frame whose parallax gives the map its depth."""
        tracks = self.tracker.flow(view, map_, self.T_map_first)
        if bootstrap.has_lost_tracks(tracks):
            map_.clear()
            return self._first(view)
        tracked = bootstrap.second_view(view, tracks, self.T_map_first)
        if tracked is None:
            self.tracker.accept(view, tracks, self.T_map_first)
        return tracked

    def _found_again(self, view: View, map_: GrowingMap) -> Tracked | None:
        """By descriptor: where the camera should be if it was just lost, then anywhere."""
        features, tracked = self._encoder.encode(view.image), None
        if not self._lost:
            near_config = replace(self._config.tracking, relocalise_inliers=NEAR_INLIERS)
            tracked = verified(view, features, map_, self.tracker.predict(view.stamp_ns),
                               near_config)
        near = tracked is not None
        self._lost = not near
        if tracked is None:
            tracked = relocalise_lost(view, features, map_, self._config, self._relocalise)
        if tracked is not None:
            if tracked.extends:  # a place that is not sure is looked for again in the next frame
                self._posed, self._missed, self._lost = self._posed + 1, 0, False
                self.tracker.accept(view, tracked.tracks, tracked.fit.T_map_cam, moved=near)
            return tracked
        # An image with hardly any features says nothing of the map.
        self._missed += len(features) >= self._config.tracking.relocalise_inliers
        if self._is_own and not self._needs_depth and len(map_) < YOUNG \
                and self._missed > self._posed:
            map_.clear()
            tracked = self._first(view)
            if tracked is not None:
                self.tracker.accept(view, tracked.tracks, tracked.fit.T_map_cam)
        return tracked

    def keyframe_added(self, map_: GrowingMap, tracks: Tracks) -> list[tuple[View, PoseFit]]:
        """Enter and leave the phase in which a monocular map has no depth yet."""
        bootstrap, since_first = self._bootstrap, list[tuple[View, PoseFit]]()
        if len(map_) == 1 and not self._needs_depth:
            self._bootstrap = Bootstrap(self._config, tracks)
        elif bootstrap is not None:
            self._bootstrap = None
            since_first = bootstrap.complete(map_)
        if not self._needs_depth:
            self._settling.keyframe_added(map_)
        return since_first

    def work(self, mapper: MapExtension, map_: GrowingMap, *, wait: bool, final: bool) -> bool:
        """Nothing is put off."""
        return False

    def late(self) -> list[Estimate]:
        """No pose comes late."""
        return []

    def kept_images(self) -> list[tuple[int, np.ndarray]]:
        """None is shown again."""
        return []

    def waiting_for(self, map_: GrowingMap) -> str:
        """Texture, depth or parallax; '' once there is a map."""
        if not len(map_):
            return missing_for_start(needs_depth=self._needs_depth)
        return '' if self._bootstrap is None else 'waiting for parallax'

    def gauge(self, *, sensor: str) -> Gauge:
        """Metres from the sensor, or a unit of its own; axes of the first camera, or z up."""
        at_first_camera = np.array_equal(self.T_map_first, np.eye(4))
        return Gauge(1.0 if sensor else None, sensor or 'unknown',
                     'first camera' if at_first_camera else 'z up')

    def final_settings(self, config: MapperConfig) -> Sequence[MapperConfig]:
        """One bundle adjustment."""
        return [config]

    def wants_relocalisation(self, estimate: Estimate) -> bool:
        """Frames without a pose: the finished map shows what came later, too."""
        return not estimate.status.has_pose


def relocalise_lost(view: View, features: Features, map_: GrowingMap, config: MapperConfig,
                    relocaliser: Relocaliser | None) -> Tracked | None:
    """A lost camera, found among the keyframes or where ``relocaliser`` has it."""
    tracked = relocalise(view, features, map_, config.tracking)
    if (tracked is None or not tracked.extends) and relocaliser is not None:
        T_map_cam = relocaliser(view).T_map_cam
        other = None if T_map_cam is None else found_place(view, features, map_, T_map_cam,
                                                           config.tracking)
        if other is not None and (tracked is None or other.extends):
            tracked = other
    return None if tracked is None else replace(tracked, relocalised=tracked.extends)
