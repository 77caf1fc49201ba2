"""Publishes the health of a node: /diagnostics once a second, its log when something changes."""

from __future__ import annotations

import time

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.utilities import get_rmw_implementation_identifier

from feedforward_recon.ros.convert import stamp_msg
from feedforward_recon.ros.diagnosis import Diagnosis, Transport, diagnose, noticed
from feedforward_recon.ros.diagnosis_log import DiagnosisLog, Line
from feedforward_recon.ros.diagnostics import diagnostic_status
from feedforward_recon.ros.host import Host
from feedforward_recon.ros.milestones import Milestones
from feedforward_recon.ros.tf_messages import NO_TF, TFMessage


class Reporting:
    """Diagnostics and log of one node, from its start to its end; on the executor's thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._transport = Transport.here(get_rmw_implementation_identifier())
        self._publisher = host.node.create_publisher(DiagnosticArray, '/diagnostics', 10)
        self._log, self._milestones = DiagnosisLog(), Milestones()

    def diagnose(self) -> list[Diagnosis]:
        """Why there is no pose, if there is none; most likely cause first."""
        host = self._host
        return diagnose(host.health, host.now_ns(), silence_s=host.config.silence_s,
                        transport=self._transport)

    def publish(self) -> None:
        """Once a second: look at the clock, publish the diagnostics, log what is new."""
        host, health = self._host, self._host.health
        health.use_sim_time = bool(host.node.get_parameter('use_sim_time').value)
        health.clock_running = host.now_ns() > 0
        if TFMessage is None:
            host.notice('NO_TF2_MSGS', NO_TF)
        now_ns, found = host.now_ns(), self.diagnose()
        message = DiagnosticArray(status=[diagnostic_status(health, found, now_ns)])
        message.header.stamp = stamp_msg(now_ns)
        self._publisher.publish(message)
        # While the node is not active only what happened is logged; why it could not be configured
        # is in the log already.
        for line in self._log.look(
                found if health.state == 'active' else noticed(health, now_ns), time.monotonic()):
            self._write(line)

    def _write(self, line: Line) -> None:
        logger = self._host.log  # which wants each severity on a line of its own
        if line.level == 'ERROR':
            logger.error(line.text)
        elif line.level == 'WARNING':
            logger.warning(line.text)
        else:
            logger.info(line.text)

    def used_image(self) -> None:
        """The health is that after another image: log what happened for the first time."""
        for sentence in self._milestones.reached(self._host.health):
            self._host.log.info(sentence)

    def new_map(self) -> None:
        """What was logged of the old map is void."""
        self._milestones = Milestones()
        self._log.forget_status()

    def stop(self) -> None:
        """The node listens no longer, so diagnoses may or may not be over."""
        self._log.forget()
