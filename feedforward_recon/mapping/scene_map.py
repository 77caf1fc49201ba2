"""``SceneMap``: what remains of a run - keyframe poses, cloud, and what is known about scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.mapping.cloud import cloud_source
from feedforward_recon.mapping.keyframe_graph import KeyframeGraph, keyframe_graph
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.types import Estimate, Keyframe, PointCloud, Trajectory


@dataclass(frozen=True)
class SceneMap:
    """A finished map.

    keyframes: with final poses; trajectory: every frame that has a pose; estimates: one per
    input image, with final poses.
    metres_per_unit: 1.0 for metric maps, None when the scale is unknown.
    scale_source: 'depth', 'stereo', 'given poses' or 'unknown'.
    camera_source: 'given', 'exif', 'guessed', 'refined', or 'predicted' by a feed-forward network.
    frame: 'first camera' (its optical axes), 'z up' (gravity known or assumed, x forward at the
    start) or 'given poses'.
    graph: what a later session needs to go on; None without keyframes. sessions: how many made
    the map.
    """

    keyframes: tuple[Keyframe, ...] = ()
    trajectory: Trajectory = field(default_factory=Trajectory)
    estimates: tuple[Estimate, ...] = ()
    cloud: PointCloud = field(default_factory=PointCloud)
    metres_per_unit: float | None = None
    scale_source: str = 'unknown'
    camera_source: str = 'given'
    frame: str = 'first camera'
    graph: KeyframeGraph | None = None
    sessions: int = 1


def finished_map(map_: GrowingMap, estimates: Sequence[Estimate], **about: Any) -> SceneMap:
    """A map whose keyframes need nothing more; about: what else ``SceneMap`` says of it."""
    return SceneMap(
        tuple(map_.exported(id_) for id_ in range(len(map_))),
        Trajectory.of((e.stamp_ns, e.T_map_cam) for e in estimates if e.T_map_cam is not None),
        tuple(estimates), cloud_source(map_, map_.config.cloud).fused(),
        graph=keyframe_graph(map_, map_.config.keyframes.saved), **about)


@dataclass(frozen=True)
class StartingMap:
    """A map of earlier sessions that a mapper goes on with.

    camera: for frames that come without one. sessions: how many made it.
    """

    map: GrowingMap
    gauge: Gauge
    camera: Camera
    sessions: int


@dataclass(frozen=True)
class Gauge:
    """What the unit and the axes of a map rest on; see ``SceneMap``."""

    metres_per_unit: float | None
    scale_source: str
    frame: str


@dataclass(frozen=True)
class Draft:
    """A map as it stands while mapping goes on.

    scene: puts it together, on any thread. pending: keyframes that the memory does not hold yet,
    because they are still being refined.
    """

    scene: Callable[[], SceneMap]
    pending: list[Keyframe]


@dataclass
class Stats:
    """Counts of a run.

    restarts: monocular maps given up before they had depth; revisited: frames that would have
    become keyframes had the map not known what they show.
    """

    frames: int = 0
    keyframes: int = 0
    lost: int = 0
    relocalised: int = 0
    loops: int = 0
    corrections: int = 0
    restarts: int = 0
    revisited: int = 0


class Memory(Protocol):
    """What the mapper needs of a scene memory."""

    def write(self, keyframe: Keyframe) -> None:
        """Take in a keyframe that hardly moves any more."""

    def reanchor(self, poses: dict[int, np.ndarray]) -> None:
        """Keyframes {id: T_map_cam} have moved."""

    def correct(self, keyframe: Keyframe) -> None:
        """A keyframe that was written before has better points by now."""
