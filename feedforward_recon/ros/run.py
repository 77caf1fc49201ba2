"""Running a node: one executor thread, and an orderly end on SIGINT and SIGTERM."""

from __future__ import annotations

import contextlib
import os
import sys

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.logging import get_logger

from feedforward_recon.errors import ReconError
from feedforward_recon.ros.node import CameraNode


def run_camera_node(name: str, mode: str) -> None:
    """Spin a node until it is told to end; ends the process with 0, or 1 for bad settings."""
    rclpy.init()
    try:
        node = CameraNode(name, mode)
    except ReconError as error:
        get_logger(name).fatal(str(error))
        rclpy.try_shutdown()
        raise SystemExit(1) from None
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    with contextlib.suppress(KeyboardInterrupt, ExternalShutdownException):
        executor.spin()
    idle = node.close()
    executor.shutdown(timeout_sec=1.0)
    if not idle:
        # A thread deep in a kernel cannot be asked to stop, and must not hold up the robot.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    node.destroy_node()
    rclpy.try_shutdown()
