"""How a node tells how it is: /diagnostics once a second, and its log when something changes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.utilities import get_rmw_implementation_identifier

from feedforward_recon.ros.cause_log import CauseLog, Line
from feedforward_recon.ros.causes import Cause, Transport, causes, noticed
from feedforward_recon.ros.convert import stamp_msg
from feedforward_recon.ros.diagnostics import diagnostic_status
from feedforward_recon.ros.milestones import Milestones
from feedforward_recon.ros.tf_messages import NO_TF, TFMessage

if TYPE_CHECKING:
    from feedforward_recon.ros.node import CameraNode


class Reporting:
    """Diagnostics and log of one node, from its start to its end; on the executor's thread."""

    def __init__(self, node: CameraNode) -> None:
        self._node = node
        self._transport = Transport.here(get_rmw_implementation_identifier())
        self._publisher = node.create_publisher(DiagnosticArray, '/diagnostics', 10)
        self._cause_log, self._milestones = CauseLog(), Milestones()

    def causes(self) -> list[Cause]:
        """Why there is no pose, if there is none."""
        node = self._node
        return causes(node.health, node.now_ns(), silence_s=node.config.silence_s,
                      transport=self._transport)

    def tell(self) -> None:
        """Once a second: look at the node, publish the diagnostics, log what is new."""
        node, health = self._node, self._node.health
        health.use_sim_time = bool(node.get_parameter('use_sim_time').value)
        health.clock_running = node.now_ns() > 0
        if node.queue is not None:
            health.dropped = node.queue.dropped
        health.tf_mode, health.tf_missing = node.positioning.state()
        if TFMessage is None:
            node.notice('NO_TF2_MSGS', NO_TF)
        now_ns, found = node.now_ns(), self.causes()
        message = DiagnosticArray(status=[diagnostic_status(health, found, now_ns)])
        message.header.stamp = stamp_msg(now_ns)
        self._publisher.publish(message)
        # A node that is not active has no causes, but things happen to it; the log already has
        # why it could not be configured.
        for line in self._cause_log.look(
                found if health.state == 'active' else noticed(health, now_ns), time.monotonic()):
            self._log(line)

    def _log(self, line: Line) -> None:
        logger = self._node.get_logger()  # which wants each severity on a line of its own
        if line.level == 'ERROR':
            logger.error(line.text)
        elif line.level == 'WARNING':
            logger.warning(line.text)
        else:
            logger.info(line.text)

    def used_image(self) -> None:
        """The health tells of another image."""
        for sentence in self._milestones.reached(self._node.health):
            self._node.get_logger().info(sentence)

    def new_map(self) -> None:
        """What was told of the old map is void."""
        self._milestones = Milestones()
        self._cause_log.forget_status()

    def stop(self) -> None:
        """The node listens no longer, so nobody knows whether causes are over."""
        self._cause_log.forget()
