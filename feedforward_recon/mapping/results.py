"""What a mapper can say about its map at any time."""

from __future__ import annotations

from typing import Literal

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.mapping.cloud import CloudSource, cloud_source
from feedforward_recon.mapping.estimates import Journal
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.preparation import Preparation
from feedforward_recon.mapping.scene_map import Draft, SceneMap
from feedforward_recon.types import Estimate, Keyframe, PointCloud, Trajectory


class MapResults:
    """The reading half of ``OnlineReconstructor``; nothing here changes the map."""

    config: MapperConfig
    poses: Literal['estimated', 'given']
    T_map_first: np.ndarray
    _map: GrowingMap
    _journal: Journal
    _preparation: Preparation
    _written: int

    def scene_map(self) -> SceneMap:
        """The result so far."""
        return SceneMap(tuple(self.keyframes), self.trajectory(), tuple(self.estimates),
                        self.cloud(), 1.0 if self._is_metric else None, self.scale_source,
                        self.camera_source, self.frame)

    def draft(self) -> Draft:
        """The map as it stands, unrefined.

        Taking it costs little however long the walk was, and mapping may go on meanwhile.
        """
        T_map_cam, journal = self._map.T_map_cam.copy(), self._journal.copy()
        keyframes, source = list(self._map.keyframes), self.cloud_source()
        about = (1.0 if self._is_metric else None, self.scale_source, self.camera_source,
                 self.frame)
        return Draft(lambda: SceneMap(
            tuple(k.exported(T, k.points_cam)
                  for k, T in zip(keyframes, T_map_cam, strict=True)),
            journal.trajectory(T_map_cam), tuple(journal.estimates(T_map_cam)), source.fused(),
            *about), [self._map.exported(id_) for id_ in range(self._written, len(self._map))])

    @property
    def frame(self) -> str:
        """What the axes of the map rest on."""
        if self.poses == 'given':
            return 'given poses'
        return 'first camera' if np.array_equal(self.T_map_first, np.eye(4)) else 'z up'

    @property
    def _is_metric(self) -> bool:
        return self.poses == 'given' or self._preparation.metric

    @property
    def camera(self) -> Camera | None:
        """The camera in use; None before the first frame."""
        return self._preparation.camera

    @property
    def camera_source(self) -> str:
        """'given', 'guessed' or 'refined'."""
        return self._preparation.camera_source

    @property
    def scale_source(self) -> str:
        """What the unit of the map rests on."""
        if self.poses == 'given':
            return 'given poses'
        return 'depth' if self._preparation.metric else 'unknown'

    @property
    def keyframes(self) -> list[Keyframe]:
        """Keyframes with their present poses and points."""
        return [self._map.exported(id_) for id_ in range(len(self._map))]

    @property
    def estimates(self) -> list[Estimate]:
        """One estimate per processed frame, with poses as the map knows them now."""
        return self._journal.estimates(self._map.T_map_cam)

    def trajectory(self) -> Trajectory:
        """Poses of all frames that have one, as the map knows them now."""
        return self._journal.trajectory(self._map.T_map_cam)

    def cloud_source(self, newest_only: bool = False) -> CloudSource:
        """What the cloud is fused from: sensor depth of keyframes, else landmarks."""
        return cloud_source(self._map, self.config.cloud, newest_only)

    def cloud(self) -> PointCloud:
        """Coloured points in the map frame."""
        return self.cloud_source().fused()

    def keyframe_poses(self) -> Trajectory:
        """Stamps and present poses of the keyframes."""
        return Trajectory(np.array([k.stamp_ns for k in self._map.keyframes], np.int64),
                          self._map.T_map_cam.copy())
