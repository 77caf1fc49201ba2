"""Poses that become known after their images: those of the windows of a feed-forward network.

Everything here runs on the worker, beside the session.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from feedforward_recon.ros.arrivals import Arrival
from feedforward_recon.session.live import LiveSession, SessionInfo
from feedforward_recon.types import Estimate, Trajectory

WAITING = 2048  # images without a pose whose headers are kept


@dataclass(frozen=True)
class LateResult:
    """What a window of the network brought.

    poses: of earlier images. keyframes: of the map, None if it has as many as before. newest: the
    last image that the session saw, without its pixels.
    """

    poses: list[tuple[Arrival, Estimate]]
    keyframes: Trajectory | None
    newest: Arrival
    info: SessionInfo


class LatePoses:
    """Remembers the headers of images without a pose until the session knows it.

    on_result: called on the worker.
    """

    def __init__(self, session: LiveSession, on_result: Callable[[LateResult], Any]) -> None:
        self._session, self._on_result = session, on_result
        self._waiting: dict[int, Arrival] = {}
        self._newest: Arrival | None = None
        self._keyframes = 0

    def used(self, arrival: Arrival, estimate: Estimate) -> None:
        """The session has seen an image."""
        self._newest = replace(arrival, image=None, depth=None)
        if estimate.T_map_cam is None:
            self._waiting[arrival.stamp_ns] = self._newest
            if len(self._waiting) > WAITING:
                del self._waiting[next(iter(self._waiting))]
        self._collect()

    def work(self) -> bool:
        """One piece of what the session put off; False when nothing is left."""
        more = self._session.work()
        self._collect()
        return more

    def _collect(self) -> None:
        """Hand on what became known, if anything did."""
        late, info = self._session.late(), self._session.info
        poses = [(self._waiting.pop(estimate.stamp_ns), estimate) for estimate in late
                 if estimate.stamp_ns in self._waiting]
        # Without windows, the estimate of a keyframe says already that the map has grown.
        grown = bool(info.window) and info.keyframes != self._keyframes
        self._keyframes = info.keyframes
        if self._newest is not None and (poses or grown):
            keyframes = self._session.keyframe_poses() if grown else None
            self._on_result(LateResult(poses, keyframes, self._newest, info))
