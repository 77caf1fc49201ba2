"""Shows the map to whoever subscribes: path, keyframes, clouds.

A cloud is gathered on the worker, fused on a second one, and published on the executor's thread.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from feedforward_recon.ros.arrivals import Arrival
from feedforward_recon.ros.host import Host
from feedforward_recon.ros.outputs import MapOutputs
from feedforward_recon.ros.positioning import Positioning
from feedforward_recon.ros.session_runner import SessionRunner
from feedforward_recon.ros.worker import Job, Worker
from feedforward_recon.session.live import SessionInfo
from feedforward_recon.types import Trajectory


class MapView:
    """The map of one configured node as topics.

    fusing: the worker that fuses clouds.
    """

    def __init__(self, host: Host, positioning: Positioning, runner: SessionRunner,
                 outputs: MapOutputs, fusing: Worker) -> None:
        self._host, self._positioning, self._runner = host, positioning, runner
        self._outputs, self._fusing = outputs, fusing
        self._due_s = 0.0  # steady clock: the next whole cloud
        self._running = False  # a whole cloud is being made
        self._is_final = False  # the whole cloud of a map that changes no more was published
        self._closed = False

    def close(self) -> None:
        """The publishers are gone: clouds that are being made are not published."""
        self._closed = True

    def forget_cloud(self) -> None:
        """Another map, or an activation: the whole cloud has to be published again."""
        self._is_final = False

    def show(self, arrival: Arrival, keyframes: Trajectory, info: SessionInfo) -> None:
        """Publish a map that has grown. arrival: the newest image."""
        outputs = self._outputs
        shown = self._positioning.body_path(keyframes, arrival.frame_id, info.metres_per_unit)
        if outputs.wants_path:
            outputs.path(shown, self._host.config.path_length)
        if outputs.wants_markers:
            cameras = keyframes.transformed(np.eye(4), info.metres_per_unit or 1.0)
            outputs.markers(cameras.T_map_cam, arrival.stamp_ns)
        if outputs.wants_cloud:
            self._fuse(arrival.stamp_ns, info.metres_per_unit, whole=False)

    def show_cloud(self, stamp_ns: int) -> None:
        """Publish the whole cloud, at its period, and only for somebody who subscribes.

        The topic is latched: that of a map in which the node localises is published once.
        """
        if self._is_final and self._host.health.mode == 'localization':
            return
        due = not self._running and time.monotonic() >= self._due_s
        if not due or not self._outputs.wants_cloud_map:
            return
        self._running = True
        self._due_s = time.monotonic() + self._host.config.cloud_period_s
        self._fuse(stamp_ns, self._positioning.metres_per_unit, whole=True)

    def _fuse(self, stamp_ns: int, metres_per_unit: float | None, *, whole: bool) -> None:
        """Gather a cloud on one worker, fuse it on the other, publish it here."""
        session, health = self._runner.session, self._host.health
        frozen = health.mode == 'localization'

        def gathered(source: Any, error: Exception | None) -> None:
            if source is None:
                self._running = False
                return
            self._fusing.ask(Job(lambda: source.fused(metres_per_unit or 1.0), fused))

        def fused(cloud: Any, error: Exception | None) -> None:
            if whole:
                self._running = False
            if error is not None:
                self._host.notice('CLOUD', f'the cloud could not be made: {error}')
            elif not self._closed:
                self._outputs.cloud(cloud, stamp_ns, whole)
                self._is_final = whole and frozen and health.mode == 'localization'

        self._runner.ask(lambda: session.cloud_source(newest_only=not whole), gathered)
