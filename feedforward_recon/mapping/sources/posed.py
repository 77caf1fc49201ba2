"""The online mapper for frames whose poses a network has given."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from feedforward_recon.config.schema import MapperConfig, TrackingConfig
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.mapper import Memory, OnlineReconstructor
from feedforward_recon.mapping.relocalisation import relocalise, settle
from feedforward_recon.mapping.tracking import Tracked, Tracker
from feedforward_recon.model import Encoder
from feedforward_recon.types import Estimate, FloatArray, Frame, Status

CELLS = 4  # the image has CELLS x CELLS of them
MIN_SPREAD = 0.5  # share of the cells that landmarks must be seen in


class PosedMapper(OnlineReconstructor):
    """The online mapper for poses that come from a network and may move later."""

    def __init__(self, config: MapperConfig, encoder: Encoder, memory: Memory | None = None, *,
                 relocalise: Callable[[Frame], Estimate] | None = None,
                 exact: MapperConfig | None = None) -> None:
        super().__init__(config, encoder, memory, poses='given', relocalise=relocalise)
        self._follower = Tracker((exact or config).tracking)

    def pose(self, frame: int) -> FloatArray | None:
        """Where the camera was in a frame, by its number, as the map knows it now."""
        return self._journal.pose(frame, self._map.T_map_cam)

    def newest_look(self) -> np.ndarray | None:
        """Global descriptor of the last frame; None if it became no keyframe."""
        keyframe = self._map.keyframes[-1] if len(self._map) else None
        if keyframe is None or keyframe.frame != len(self._journal) - 1:
            return None
        return keyframe.features.global_descriptor

    def follow(self, frame: Frame, *, note: bool, refresh: bool) -> Estimate:
        """Pose of a frame in the map as it is, which stays as it is.

        note: list the frame among the estimates. refresh: look for all landmarks in view again,
        instead of following those of the last frame, which drift.
        Raises InputError for an image that cannot be used.
        """
        started, exact = time.perf_counter(), self._follower.config
        view = self._preparation.view(frame, len(self._journal))
        tracked, moved = self._follower.track(view, self._map), True
        if tracked is None:
            tracked, moved = self._found(view, frame, exact), False
        elif refresh:
            features = self.encoder.encode(view.image)
            tracked = settle(view, features, self._map, tracked.fit.T_map_cam, exact) or tracked
        if tracked is not None:
            self._follower.accept(view, tracked.tracks, tracked.fit.T_map_cam, moved=moved)
        estimate = self._answer(view, tracked, (time.perf_counter() - started) * 1e3)
        if note:
            self.stats.frames += 1
            self.stats.lost += tracked is None
            newest = len(self._map) - 1  # the views so far may have had too little texture
            self._journal.note(estimate, newest,
                               self._map.T_map_cam[newest] if newest >= 0 else None)
        return estimate

    def _answer(self, view: View, tracked: Tracked | None, latency_ms: float) -> Estimate:
        """A pose from landmarks in a corner of the image is not to be relied on."""
        if tracked is None:
            status, reason = self._no_pose()
            return Estimate(view.stamp_ns, status, reason=reason, latency_ms=latency_ms,
                            source=view.source)
        estimate = self._measured(view, tracked.fit, False, latency_ms)
        cells = np.unique((CELLS * tracked.tracks.px / view.camera.size_wh).astype(int), axis=0)
        sure = estimate.status is Status.TRACKING and len(cells) >= MIN_SPREAD * CELLS**2
        return replace(estimate, status=Status.TRACKING if sure else Status.UNCERTAIN)

    def _no_pose(self) -> tuple[Status, str]:
        status, reason = super()._no_pose()
        return status, 'no known place in view' if status is Status.LOST else reason

    def _found(self, view: View, frame: Frame, config: TrackingConfig) -> Tracked | None:
        """A lost camera, among the keyframes or wherever the caller knows to ask."""
        features = self.encoder.encode(view.image)
        tracked = relocalise(view, features, self._map, config)
        if tracked is None and self.relocalise is not None:
            T_map_cam = self.relocalise(frame).T_map_cam
            if T_map_cam is not None:
                tracked = settle(view, features, self._map, T_map_cam, config)
        self.stats.relocalised += tracked is not None
        return tracked

    def adjust(self, newest: int, exact: MapperConfig) -> None:
        """Refine the newest keyframes, first with wide gates, then with exact ones.

        Errors of degrees are many pixels: gates that suit tracking would take the evidence for
        outliers. Older keyframes that share landmarks hold the new ones.
        """
        for config in (self.config, exact):
            steps = replace(config.refine, window=newest, window_steps=config.refine.global_steps)
            self._map.config = replace(config, refine=steps)
            self._map.refine_window()
        self._map.config = self.config

    def refine(self, exact: MapperConfig) -> None:
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
