"""Running a node: one executor thread, and an orderly end on SIGINT and SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import threading

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.logging import get_logger
from rclpy.signals import SignalHandlerOptions

from feedforward_recon.errors import ReconError
from feedforward_recon.heap import share_heaps
from feedforward_recon.ros.node import CameraNode
from feedforward_recon.threads import use_one_thread

STOP_POLL_S = 0.1


def run_camera_node(name: str, mode: str) -> None:
    """Spin a node until it is told to end; ends the process with 0, or 1 for bad settings."""
    # Small matrices gain little from more, and the camera driver wants the other cores: on two
    # of them one thread halves the images that are left out (docs/experiments.md).
    use_one_thread()
    share_heaps()
    # Our own handlers: those of rclpy take the context away while it is being waited on.
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
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
    idle = node.close()
    executor.shutdown(timeout_sec=1.0)
    if not idle:
        # A thread deep in a kernel cannot be asked to stop, and must not hold up the robot.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    node.destroy_node()
    rclpy.try_shutdown()
