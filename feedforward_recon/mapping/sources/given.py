"""``GivenPoses``: the poses that come with the frames, taken as they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.pnp import PoseFit
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.mapping.scene_map import Gauge
from feedforward_recon.mapping.sources.base import MapExtension, first_view, missing_for_start
from feedforward_recon.mapping.tracking import Tracked, Tracker
from feedforward_recon.model import Encoder
from feedforward_recon.types import Estimate


class GivenPoses:
    """Poses from ``Frame.T_map_cam``; frames without one have none."""

    is_exact = True
    holds_poses = True
    refines_calibration = True
    is_busy = False
    progress = ''
    lost = 'no pose was given'

    def __init__(self, config: MapperConfig, encoder: Encoder) -> None:
        self.tracker = Tracker(config.tracking)
        self.T_map_first = np.eye(4)  # not used: the first pose is given as well
        self._encoder = encoder
        self._needs_depth = False

    def mapping_config(self, config: MapperConfig) -> MapperConfig:
        """The settings as they are."""
        return config

    def locate(self, view: View, map_: GrowingMap) -> Tracked | None:
        """The given pose, with the landmarks that agree with it."""
        self._needs_depth = view.needs_depth
        if view.T_given is None:
            return None
        if len(map_):
            tracked: Tracked | None = self.tracker.given(view, map_, view.T_given)
        else:
            tracked = first_view(view, self._encoder, view.T_given, self.tracker.config)
        if tracked is not None:
            self.tracker.accept(view, tracked.tracks, tracked.fit.T_map_cam)
        return tracked

    def keyframe_added(self, map_: GrowingMap, tracks: Tracks) -> list[tuple[View, PoseFit]]:
        """Nothing follows for other frames."""
        return []

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
        """Texture, or texture with depth; '' once there is a map."""
        return '' if len(map_) else missing_for_start(needs_depth=self._needs_depth)

    def gauge(self, *, sensor: str) -> Gauge:
        """Those of the given poses, in metres."""
        return Gauge(1.0, 'given poses', 'given poses')

    def final_settings(self, config: MapperConfig) -> Sequence[MapperConfig]:
        """One bundle adjustment, in which no pose is moved."""
        return [config]

    def wants_relocalisation(self, estimate: Estimate) -> bool:
        """Frames without a given pose get none."""
        return False
