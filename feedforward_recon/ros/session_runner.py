"""The session at work: images and jobs on the worker's thread, results on the executor's.

offer -> FrameQueue -> Worker: decode, LiveSession.process -> Mailbox -> SessionResults
change, ask -> Worker: anything else that a session does
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.ros.arrivals import Arrival, decoded_frame
from feedforward_recon.ros.health import Health
from feedforward_recon.ros.late_poses import LatePoses, LateResult
from feedforward_recon.ros.map_start import FirstPose
from feedforward_recon.ros.worker import FrameQueue, Job, Mailbox, Worker
from feedforward_recon.session.live import LiveSession, SessionInfo, session_of
from feedforward_recon.types import Estimate, Trajectory


@dataclass(frozen=True)
class ImageResult:
    """What the session made of one image.

    keyframes: of the map, None if this image is none. posed: its pose was handed on before.
    """

    estimate: Estimate
    info: SessionInfo
    keyframes: Trajectory | None
    posed: bool


class SessionResults(Protocol):
    """Gets the results of a session, on the executor's thread."""

    def pose_known(self, arrival: Arrival, estimate: Estimate, info: SessionInfo) -> None:
        """The pose of an image, before the image becomes a keyframe."""

    def image_used(self, arrival: Arrival, first: FirstPose, result: ImageResult) -> None:
        """The session is done with an image."""

    def image_refused(self, error: Exception | None) -> None:
        """An image could not be used."""

    def poses_found(self, late: LateResult) -> None:
        """Poses of earlier images became known."""


class _Item(NamedTuple):
    """An image in the queue, and its pose should it start the map."""

    arrival: Arrival
    first: FirstPose


class SessionRunner:
    """One ``LiveSession`` on one worker; from configure to cleanup.

    session: read it on the executor's thread, change it with ``change`` and ``ask``.
    """

    def __init__(self, config: NodeConfig, mailbox: Mailbox, health: Health,
                 results: SessionResults) -> None:
        """Load the networks, and the map to localise in or to go on with. Raises ReconError."""
        self._mailbox, self._health, self._results = mailbox, health, results
        self._finishes_work = config.queue == 'offline'
        self._queue = FrameQueue(config.queue, config.queue_size)
        self.worker = Worker('worker', mailbox, self._queue, self._use, self._used,
                             lambda: self._late.work())
        self.session: LiveSession = session_of(config, self._wake)
        self._late = LatePoses(self.session, lambda late: self._post(
            lambda: results.poses_found(late)))
        self._closed = False
        self.worker.start()

    @property
    def dropped(self) -> int:
        """Images that a newer one has displaced in the queue."""
        return self._queue.dropped

    @property
    def is_busy(self) -> bool:
        """A network is at work on a thread of its own."""
        return self.session.info.is_busy

    def offer(self, arrival: Arrival, first: FirstPose) -> None:
        """Queue an image; with queue 'offline' this waits for room."""
        self.worker.offer(_Item(arrival, first))

    def forget_images(self) -> None:
        """Leave out the images that wait."""
        self._queue.clear()

    def change(self, change: Callable[[LiveSession], Any]) -> None:
        """Have the session changed by the worker; nobody waits for a result."""
        self.ask(lambda: change(self.session), lambda *_: None)

    def ask(self, run: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        """Have something run by the worker; done(result, error) comes through the mailbox."""
        self.worker.ask(Job(run, done))

    def close(self) -> None:
        """Results of images are not listened to any more; jobs are still done and answered."""
        self._closed = True
        self.worker.stop(timeout_s=0.0)

    # -- on the worker ---------------------------------------------------------------------

    def _use(self, item: _Item) -> ImageResult:
        """One image through the session."""
        arrival, first, session = item.arrival, item.first, self.session
        frame, posed = decoded_frame(arrival, self._health.inputs), []
        self._health.pictures.look(frame.image, frame.depth)

        def on_pose(estimate: Estimate) -> None:
            """The pose goes out now; making the frame a keyframe takes longer than tracking."""
            posed.append(estimate)
            info = session.info
            self._post(lambda: self._results.pose_known(arrival, estimate, info))

        estimate = session.process(frame, first.T_map_cam, finish_work=self._finishes_work,
                                   on_pose=on_pose)
        self._late.used(arrival, estimate)
        keyframes = session.keyframe_poses() if estimate.is_keyframe else None
        return ImageResult(estimate, session.info, keyframes, bool(posed))

    def _post(self, call: Callable[[], None]) -> None:
        """Have a result taken by the executor's thread, unless the runner is closed by then."""
        self._mailbox.post(lambda: None if self._closed else call())

    # -- on the executor's thread ----------------------------------------------------------

    def _used(self, item: _Item | None, result: ImageResult | None, error: Exception | None
              ) -> None:
        """The worker is done with an image, or failed at work that it does in between."""
        if self._closed:
            return
        if error is not None or result is None or item is None:
            self._results.image_refused(error)
        else:
            self._results.image_used(item.arrival, item.first, result)

    def _wake(self) -> None:
        """A network has ended its work on its own thread: the worker takes over."""
        self.worker.ask(Job(lambda: None, lambda *_: None))
