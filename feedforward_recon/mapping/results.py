"""``MapResults``: what can be read of a map at any time, while it grows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.mapping.cloud import CloudSource, cloud_source
from feedforward_recon.mapping.estimates import EstimateHistory
from feedforward_recon.mapping.feed import MemoryFeed
from feedforward_recon.mapping.keyframe_graph import keyframe_graph
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.preparation import Preparation
from feedforward_recon.mapping.scene_map import Draft, Gauge, SceneMap, StartingMap
from feedforward_recon.mapping.sources import PoseSource
from feedforward_recon.types import Estimate, Keyframe, PointCloud, Trajectory


class MapResults:
    """The reading side of a ``Mapper``; nothing here changes the map."""

    def __init__(self, map_: GrowingMap, history: EstimateHistory, preparation: Preparation,
                 source: PoseSource, feed: MemoryFeed, start: StartingMap | None = None) -> None:
        self._map, self._history, self._preparation = map_, history, preparation
        self._source, self._feed, self._start = source, feed, start

    def scene_map(self) -> SceneMap:
        """The result so far."""
        return replace(self.draft().scene(), keyframes=tuple(self.keyframes))

    def draft(self) -> Draft:
        """The map as it stands, unrefined.

        Taking it costs little however long the walk was, and mapping may go on meanwhile.
        """
        T_map_cam, history = self._map.T_map_cam.copy(), self._history.copy()
        keyframes, source = list(self._map.keyframes), self.cloud_source()
        gauge, camera_source = self.gauge, self.camera_source
        config, graph, sessions = self._map.config, None, self.sessions
        if len(self._map):
            graph = keyframe_graph(self._map, config.keyframes.saved)
        return Draft(lambda: SceneMap(
            tuple(k.exported(T, k.points_cam)
                  for k, T in zip(keyframes, T_map_cam, strict=True)),
            history.trajectory(T_map_cam), tuple(history.estimates(T_map_cam)), source.fused(),
            gauge.metres_per_unit, gauge.scale_source, camera_source, gauge.frame, graph,
            sessions),
            [self._map.exported(id_) for id_ in range(self._feed.written, len(self._map))])

    @property
    def gauge(self) -> Gauge:
        """What the unit and the axes of the map rest on."""
        if self._start is not None:
            return self._start.gauge
        return self._source.gauge(sensor=self._preparation.sensor)

    @property
    def sessions(self) -> int:
        """How many sessions made the map, this one included."""
        return 1 if self._start is None else self._start.sessions + 1

    @property
    def camera(self) -> Camera | None:
        """The camera in use; None before the first frame."""
        return self._preparation.camera

    @property
    def camera_source(self) -> str:
        """'given', 'guessed', 'refined' or 'predicted'."""
        return self._preparation.camera_source

    @property
    def keyframes(self) -> list[Keyframe]:
        """Keyframes with their present poses and points."""
        return [self._map.exported(id_) for id_ in range(len(self._map))]

    @property
    def estimates(self) -> list[Estimate]:
        """One estimate per processed frame, with poses as the map knows them now."""
        return self._history.estimates(self._map.T_map_cam)

    def trajectory(self) -> Trajectory:
        """Poses of all frames that have one, as the map knows them now."""
        return self._history.trajectory(self._map.T_map_cam)

    def cloud_source(self, newest_only: bool = False) -> CloudSource:
        """What the cloud is fused from: sensor depth of keyframes, else landmarks."""
        return cloud_source(self._map, self._map.config.cloud, newest_only)

    def cloud(self) -> PointCloud:
        """Coloured points in the map frame, map units."""
        return self.cloud_source().fused()

    def keyframe_poses(self) -> Trajectory:
        """Stamps and present poses of the keyframes."""
        return Trajectory(np.array([k.stamp_ns for k in self._map.keyframes], np.int64),
                          self._map.T_map_cam.copy())
