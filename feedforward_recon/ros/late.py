"""Poses that become known after their images: what the windows of a network bring.

Everything here runs on the worker, beside the session; what it finds goes through the mailbox.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from feedforward_recon.ros.inputs import Arrival
from feedforward_recon.session.live import LiveSession, SessionInfo
from feedforward_recon.types import Estimate, Trajectory

WAITING = 2048  # images without a pose whose headers are kept


@dataclass(frozen=True)
class News:
    """What a window brought. keyframes: of the map, None if it has as many as before."""

    poses: list[tuple[Arrival, Estimate]]
    keyframes: Trajectory | None
    newest: Arrival
    info: SessionInfo


class LatePoses:
    """Remembers the headers of images without a pose until the session knows it.

    post: called with news, on the worker.
    """

    def __init__(self, session: LiveSession, post: Callable[[News], Any]) -> None:
        self._session, self._post = session, post
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
        self.tell()

    def work(self) -> bool:
        """One piece of what the session put off; False when nothing is left."""
        more = self._session.work()
        self.tell()
        return more

    def tell(self) -> None:
        """Post what became known, if anything did."""
        late, info = self._session.late(), self._session.info
        poses = [(self._waiting.pop(estimate.stamp_ns), estimate) for estimate in late
                 if estimate.stamp_ns in self._waiting]
        # Without windows, the image that became a keyframe tells of the map.
        grown = bool(info.window) and info.keyframes != self._keyframes
        self._keyframes = info.keyframes
        if self._newest is not None and (poses or grown):
            keyframes = self._session.keyframe_poses() if grown else None
            self._post(News(poses, keyframes, self._newest, info))
