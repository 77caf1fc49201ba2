"""Threads of a node: inference never runs in a callback, publishing never outside of one.

    callbacks -> FrameQueue -> Worker (owns the session) -> Mailbox -> callbacks

The executor's thread translates and publishes; one ``Worker`` owns everything that infers;
another one does slow work that shares nothing (saving, fusing clouds).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rclpy.node import Node


class Mailbox:
    """Calls that other threads ask the executor's thread to make, in order."""

    def __init__(self, node: Node) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._signal = node.create_guard_condition(self.empty)

    def post(self, call: Callable[[], None]) -> None:
        """Have ``call`` made by the executor's thread."""
        self._calls.append(call)
        self._signal.trigger()

    def empty(self) -> None:
        """Make the calls that were posted; also done on a timer, should a signal be missed."""
        while self._calls:
            self._calls.popleft()()


class FrameQueue:
    """Bounded queue of frames with a declared policy.

    live: the oldest frame makes room and is counted; offline: ``put`` waits for room, so that
    nothing is lost and the sender slows down.
    """

    def __init__(self, policy: str, size: int) -> None:
        self.policy, self.size = policy, size
        self.dropped = 0
        self._frames: deque[Any] = deque()
        self._changed = threading.Condition()
        self._open = True

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, frame: Any) -> None:
        """Add a frame, as the policy says."""
        with self._changed:
            if self.policy == 'offline':
                self._changed.wait_for(lambda: len(self._frames) < self.size or not self._open)
            while len(self._frames) >= self.size:
                self._frames.popleft()
                self.dropped += 1
            self._frames.append(frame)
            self._changed.notify_all()

    def take(self) -> Any | None:
        """The oldest frame, or None."""
        with self._changed:
            frame = self._frames.popleft() if self._frames else None
            self._changed.notify_all()
        return frame

    def clear(self) -> int:
        """Forget the waiting frames; says how many."""
        with self._changed:
            count = len(self._frames)
            self._frames.clear()
            self._changed.notify_all()
        return count

    def close(self) -> None:
        """End the waits for room."""
        with self._changed:
            self._open = False
            self._changed.notify_all()


@dataclass(frozen=True)
class Job:
    """Something to run, then ``done(result, None)`` or ``done(None, error)``."""

    run: Callable[[], Any]
    done: Callable[[Any, Exception | None], None]


class Worker(threading.Thread):
    """Runs jobs one after another, and ``on_frame`` for queued frames in between.

    ``on_idle`` is called while nothing waits, until it returns False. Jobs and frames answer
    through the mailbox; an exception is an answer like any other: bad input must not end the
    thread.
    """

    def __init__(self, name: str, mailbox: Mailbox, frames: FrameQueue | None = None,
                 on_frame: Callable[[Any], Any] | None = None,
                 on_answer: Callable[[Any, Any, Exception | None], None] | None = None,
                 on_idle: Callable[[], bool] | None = None) -> None:
        super().__init__(name=name, daemon=True)
        self._mailbox, self._frames = mailbox, frames
        self._on_frame, self._on_answer, self._on_idle = on_frame, on_answer, on_idle
        self._jobs: deque[Job] = deque()
        self._work = threading.Semaphore(0)
        self._stopping = False

    def ask(self, job: Job) -> None:
        """Run a job before any waiting frame."""
        self._jobs.append(job)
        self._work.release()

    def offer(self, frame: Any) -> None:
        """Queue a frame."""
        assert self._frames is not None
        self._frames.put(frame)
        self._work.release()

    def stop(self, timeout_s: float) -> bool:
        """Finish what was asked for and end; False if it takes longer than this."""
        self._stopping = True
        if self._frames is not None:
            self._frames.close()
        self._work.release()
        if self.is_alive():
            self.join(timeout_s)
        return not self.is_alive()

    def run(self) -> None:
        """Take work until told to stop."""
        while True:
            if not self._work.acquire(blocking=False):
                if self._idle():
                    continue
                self._work.acquire()
            if self._stopping:
                self._end()
                return
            self._step()

    def _idle(self) -> bool:
        """No frame and no job waits: a piece of the work that was put off; False without any."""
        if self._on_idle is None:
            return False
        more, error = _attempt(self._on_idle)
        on_answer = self._on_answer
        if error is not None and on_answer is not None:
            self._mailbox.post(lambda: on_answer(None, None, error))
        return bool(more)

    def _end(self) -> None:
        """Do what was asked for before: a map may have to be saved, and callers wait."""
        while self._jobs:
            self._step()

    def _answer(self, job: Job, result: Any, error: Exception | None) -> None:
        self._mailbox.post(lambda: job.done(result, error))

    def _step(self) -> None:
        if self._jobs:
            job = self._jobs.popleft()
            self._answer(job, *_attempt(job.run))
            return
        frame = self._frames.take() if self._frames is not None else None
        if frame is None or self._on_frame is None:
            return
        on_frame, on_answer = self._on_frame, self._on_answer
        answer, problem = _attempt(lambda: on_frame(frame))
        if on_answer is not None:
            self._mailbox.post(lambda: on_answer(frame, answer, problem))


def _attempt(run: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return run(), None
    except Exception as error:
        return None, error
