"""The online mapper for frames whose poses a network has given."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from feedforward_recon.config import MapperConfig
from feedforward_recon.mapping.online import Memory, OnlineReconstructor
from feedforward_recon.mapping.tracking import Tracker
from feedforward_recon.model import Encoder
from feedforward_recon.types import Estimate, FloatArray, Frame, Status


class PosedMapper(OnlineReconstructor):
    """The online mapper for poses that come from a network and may move later.

    Loops may bend the map, as they do where poses are estimated.
    """

    def __init__(self, config: MapperConfig, encoder: Encoder, memory: Memory | None = None, *,
                 relocalise: Callable[[Frame], Estimate] | None = None) -> None:
        super().__init__(config, encoder, memory, poses='given', relocalise=relocalise)
        self.bends = True
        self._follower = Tracker(config.tracking)

    def pose(self, frame: int) -> FloatArray | None:
        """Where the camera was in a frame, by its number, as the map knows it now."""
        return self._journal.pose(frame, self._map.T_map_cam)

    def newest_look(self) -> np.ndarray | None:
        """Global descriptor of the last frame; None if it became no keyframe."""
        keyframe = self._map.keyframes[-1] if len(self._map) else None
        if keyframe is None or keyframe.frame != len(self._journal) - 1:
            return None
        return keyframe.features.global_descriptor

    def follow(self, frame: Frame, *, note: bool) -> Estimate:
        """Pose of a frame in the map as it is, which stays as it is.

        note: list the frame among the estimates. Raises InputError for an image that cannot be
        used.
        """
        started = time.perf_counter()
        view = self._preparation.view(frame, len(self._journal))
        self._tracker, self._follower = self._follower, self._tracker
        tracked = self._tracker.track(view, self._map)
        if tracked is None:
            tracked = self._recover(view, frame)
        else:
            self._tracker.accept(view, tracked.tracks, tracked.fit.T_map_cam)
        self._tracker, self._follower = self._follower, self._tracker
        if note:
            return self._record(view, tracked, False, started)
        latency_ms = (time.perf_counter() - started) * 1e3
        if tracked is not None:
            return self._measured(view, tracked.fit, False, latency_ms)
        status, reason = self._no_pose()
        return Estimate(view.stamp_ns, status, reason=reason, latency_ms=latency_ms,
                        source=view.source)

    def _no_pose(self) -> tuple[Status, str]:
        status, reason = super()._no_pose()
        return status, 'no known place in view' if status is Status.LOST else reason

    def settle(self, exact: MapperConfig) -> None:
        """Refine all keyframes and write the memory; frames with given poses may follow."""
        wide = self.config
        self._refine_all(refine_focal=False)
        self.config = self._map.config = exact
        self._refine_all(refine_focal=False)
        self.config = self._map.config = wide
        self._write_memory(everything=True)

    def release(self, exact: MapperConfig) -> None:
        """Refine all keyframes with wide gates; from now on the settings are ``exact``.

        Errors of degrees are many pixels: gates that suit tracking would take the evidence for
        outliers.
        """
        self.poses = 'estimated'
        self._refine_all(refine_focal=False)
        self.config = self._map.config = exact
