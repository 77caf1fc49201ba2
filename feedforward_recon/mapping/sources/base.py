"""``PoseSource``: what the mapper needs to know of how frames get their poses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from feedforward_recon.config.schema import MapperConfig, TrackingConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.pnp import PoseFit
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.mapping.scene_map import Gauge
from feedforward_recon.mapping.tracking import Tracked, Tracker, exact_fit
from feedforward_recon.model import Encoder
from feedforward_recon.types import Estimate

log = logging.getLogger(__name__)
NO_KNOWN_PLACE = 'no known place in view'


class MapExtension(Protocol):
    """What a source may call of the mapper when frames get their poses later."""

    def insert(self, view: View, tracked: Tracked | None, reason: str = '') -> Estimate:
        """Give an earlier frame its pose, and make it a keyframe if it shows something new."""
        ...

    def pose(self, frame: int) -> np.ndarray | None:
        """T_map_cam [4, 4] of a frame by its number, as the map has it now; None without."""
        ...

    def adopt_camera(self, camera: Camera) -> None:
        """Use a camera that a network predicted for the frames that come without one."""
        ...


class PoseSource(Protocol):
    """How frames get their poses.

    T_map_first: pose [4, 4] of the camera that starts a map, map units.
    """

    T_map_first: np.ndarray

    @property
    def is_exact(self) -> bool:
        """Poses are taken as they are: no loop is closed, and only landmarks are refined."""
        ...

    @property
    def holds_poses(self) -> bool:
        """Not even the refinement of the finished map moves a pose."""
        ...

    @property
    def refines_calibration(self) -> bool:
        """Poses are exact enough to tell the calibration from them."""
        ...

    @property
    def lost(self) -> str:
        """Reason given for a frame without a pose in an established map."""
        ...

    @property
    def is_busy(self) -> bool:
        """A network is at work on a thread of its own."""
        ...

    @property
    def progress(self) -> str:
        """What a network waits for or does, in words; '' without one."""
        ...

    @property
    def tracker(self) -> Tracker:
        """From where the next frame is tracked; the mapper keeps it in step with the map."""
        ...

    def mapping_config(self, config: MapperConfig) -> MapperConfig:
        """The settings that a mapper of this source begins with."""
        ...

    def locate(self, view: View, map_: GrowingMap) -> Tracked | None:
        """Pose of a frame; None: lost, or waiting for what starts a map.

        May clear a map that has no depth yet, to start it again.
        """
        ...

    def keyframe_added(self, map_: GrowingMap, tracks: Tracks) -> list[tuple[View, PoseFit]]:
        """The newest keyframe sees ``tracks``; poses of earlier frames that follow from it."""
        ...

    def work(self, mapper: MapExtension, map_: GrowingMap, *, wait: bool, final: bool) -> bool:
        """One piece of what gives earlier frames their poses; False when nothing is left to do.

        wait: for a network that is at work. final: no frame will follow soon.
        """
        ...

    def late(self) -> list[Estimate]:
        """Poses of earlier frames that became known since the last call."""
        ...

    def kept_images(self) -> list[tuple[int, np.ndarray]]:
        """Mapped images [H, W, 3] that a network is shown again, with the numbers of frames."""
        ...

    def waiting_for(self, map_: GrowingMap) -> str:
        """What is missing before there is a map with depth, in words; '' once there is one."""
        ...

    def gauge(self, *, sensor: str) -> Gauge:
        """Unit and axes of the map. sensor: 'depth' or 'stereo', which frames come with, or ''."""
        ...

    def final_settings(self, config: MapperConfig) -> Sequence[MapperConfig]:
        """Settings of the bundle adjustments of the finished map, in their order."""
        ...

    def wants_relocalisation(self, estimate: Estimate) -> bool:
        """Whether a frame is to be relocalised in the finished map."""
        ...


def first_view(view: View, encoder: Encoder, T_map_cam: np.ndarray,
               config: TrackingConfig) -> Tracked | None:
    """The first frame of a map at T_map_cam [4, 4]; None without enough texture or depth."""
    features = encoder.encode(view.image)
    enough = 2 * config.min_inliers
    if view.needs_depth and (view.depth_at(features.keypoints) > 0).sum() < enough:
        return None
    if len(features) < enough:
        return None
    if not view.knows_camera:
        log.warning('no camera calibration: assuming a horizontal field of view of %.0f degrees',
                    config.guessed_fov_deg)
    nothing = Tracks(view.gray, np.zeros(0, int), np.zeros((0, 2), np.float32))
    return Tracked(nothing, exact_fit(T_map_cam), features)


def missing_for_start(*, needs_depth: bool) -> str:
    """What the first frames lacked so far, in words."""
    return 'waiting for texture with depth' if needs_depth else 'waiting for texture'
