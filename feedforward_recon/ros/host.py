"""What the parts of a node share: the ROS node they belong to, its settings and its health.

The parts know this, never the whole node; the node knows its parts.
"""

from __future__ import annotations

from dataclasses import dataclass

from rclpy.clock import Clock, ClockType
from rclpy.impl.rcutils_logger import RcutilsLogger
from rclpy.lifecycle import LifecycleNode

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.ros.health import Health
from feedforward_recon.ros.parameters import Parameters

STEADY = Clock(clock_type=ClockType.STEADY_TIME)


@dataclass(frozen=True)
class Host:
    """The node as its parts see it; used on the executor's thread."""

    node: LifecycleNode
    parameters: Parameters[NodeConfig]
    health: Health

    @property
    def config(self) -> NodeConfig:
        """The settings now in force."""
        return self.parameters.config

    @property
    def log(self) -> RcutilsLogger:
        """The log of the node."""
        return self.node.get_logger()

    def now_ns(self) -> int:
        """The node's clock in nanoseconds, simulated where it is."""
        return self.node.get_clock().now().nanoseconds

    def notice(self, code: str, sentence: str) -> None:
        """Note what happened, for the diagnostics and the log; '' is nothing."""
        if sentence:
            self.health.warn(code, sentence, self.now_ns())
