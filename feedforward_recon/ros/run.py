"""Running a node: one executor thread, and an orderly end on SIGINT and SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.logging import get_logger
from rclpy.signals import SignalHandlerOptions

from feedforward_recon.console.heap import share_heaps
from feedforward_recon.console.threads import use_one_thread
from feedforward_recon.errors import ReconError
from feedforward_recon.ros.node import CameraNode

STOP_POLL_S = 0.1
# `ros2 launch` sends SIGINT, after 5 s SIGTERM, after another 5 s SIGKILL.
END_S = 8.0
ANSWER_S = 0.3  # callers of services get their answers
IMPATIENT_S = 1.0  # terminal and launch both send the first SIGINT; a later one is meant


def _stopped_by_signals() -> threading.Event:
    """Set by SIGINT or SIGTERM; another SIGINT a second later ends the process at once."""
    stop, first_s = threading.Event(), [0.0]

    def handle(number: int, _: object) -> None:
        if stop.is_set() and number == signal.SIGINT \
                and time.monotonic() - first_s[0] > IMPATIENT_S:
            os._exit(130)  # saves go to a temporary folder: the map from before stays whole
        if not stop.is_set():
            first_s[0] = time.monotonic()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop


def _save(node: CameraNode, executor: SingleThreadedExecutor) -> None:
    """Wait for saves under way, or save what nobody saved; answer who waits for it."""
    node.save_at_the_end()
    end_s = time.monotonic() + END_S
    while node.saver.is_busy and time.monotonic() < end_s:
        executor.spin_once(timeout_sec=STOP_POLL_S)
    if node.saver.is_busy:
        node.saver.give_up(f'no time left after {END_S:g} s, the process ends')
    end_s = time.monotonic() + ANSWER_S
    while time.monotonic() < end_s:
        executor.spin_once(timeout_sec=STOP_POLL_S)


def run_camera_node(name: str, mode: str) -> None:
    """Spin a node until SIGINT or SIGTERM; ends the process with 0, or 1 for bad settings."""
    # Small matrices gain little from more, and the camera driver wants the other cores: on two
    # of them one thread halves the images that are left out (docs/experiments.md).
    use_one_thread()
    share_heaps()
    # Our own handlers: those of rclpy shut the context down while the executor waits on it.
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    stop = _stopped_by_signals()
    try:
        node = CameraNode(name, mode)
    except ReconError as error:
        get_logger(name).fatal(str(error))
        rclpy.try_shutdown()
        raise SystemExit(1) from None
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    while not stop.is_set() and rclpy.ok():
        executor.spin_once(timeout_sec=STOP_POLL_S)
    _save(node, executor)
    idle = node.close()
    executor.shutdown(timeout_sec=1.0)
    if not idle:
        # A thread inside a long computation cannot be stopped; the process ends all the same.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    node.destroy_node()
    rclpy.try_shutdown()
