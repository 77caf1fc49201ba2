"""What a node consists of from configure to cleanup: images in, poses and the map out.

Inputs -> MapStart -> SessionRunner -> PosePublisher, MapView, health
"""

from __future__ import annotations

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.errors import ReconError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.ros.arrivals import Arrival
from feedforward_recon.ros.host import Host
from feedforward_recon.ros.inputs import InputHandlers, Inputs
from feedforward_recon.ros.late_poses import LateResult
from feedforward_recon.ros.map_start import FirstPose
from feedforward_recon.ros.map_view import MapView
from feedforward_recon.ros.outputs import MapOutputs, PoseOutputs
from feedforward_recon.ros.positioning import Positioning
from feedforward_recon.ros.reporting import Reporting
from feedforward_recon.ros.session_runner import ImageResult, SessionRunner
from feedforward_recon.ros.worker import Mailbox, Worker
from feedforward_recon.session.live import SessionInfo
from feedforward_recon.types import Estimate


class Pipeline:
    """Connects inputs, session and outputs; everything here is on the executor's thread.

    runner: the session and its worker. outputs: publishers of poses. inputs: None while the node
    is inactive. newest: the last image that arrived, None before the first.
    """

    def __init__(self, host: Host, positioning: Positioning, reporting: Reporting,
                 mailbox: Mailbox, fusing: Worker) -> None:
        """Load the networks, and the map to localise in or to go on with.

        Raises ReconError where that fails.

        fusing: the worker that fuses clouds.
        """
        self._host, self._positioning, self._reporting = host, positioning, reporting
        self.inputs: Inputs | None = None
        self.newest: Arrival | None = None
        self.runner = SessionRunner(host.config, mailbox, host.health, self)
        self.outputs = PoseOutputs(host.node, host.config.map_frame)
        self._map_outputs = MapOutputs(host.node, host.config.map_frame)
        self._view = MapView(host, positioning, self.runner, self._map_outputs, fusing)
        positioning.connect(self.runner, self.outputs)
        self.new_map(self.runner.session.info)

    # -- life ------------------------------------------------------------------------------

    def listen(self) -> None:
        """The node becomes active: subscribe to the camera."""
        host = self._host
        self.outputs.new_time_line()
        self._view.forget_cloud()
        self._positioning.start(host.config)
        self.inputs = Inputs(host.node, host.config, host.health, InputHandlers(
            self._on_frame, self._on_jump, self._on_calibration,
            self._positioning.take_odometry))

    def stop_listening(self) -> None:
        """Unsubscribe; images that wait are left out, what is being inferred ends by itself."""
        if self.inputs is not None:
            self.inputs.stop()
            self.inputs = None
            self._reporting.stop()
        self.runner.forget_images()

    def configure(self, config: NodeConfig) -> None:
        """Take over settings that changed while running."""
        if self.inputs is not None:
            self.inputs.configure(config)
        self.runner.change(lambda session: session.configure(config.mapper))

    def close(self) -> None:
        """Let go of session and publishers."""
        self.runner.close()
        self._view.close()
        self._positioning.disconnect()
        self.outputs.destroy()
        self._map_outputs.destroy()

    def new_map(self, info: SessionInfo) -> None:
        """Another map than before: what was known of the old one is void."""
        self._view.forget_cloud()
        self._host.health.new_map(info)
        self._reporting.new_map()
        self.outputs.new_time_line()
        self._positioning.new_map()

    def show_cloud(self) -> None:
        """Publish the whole cloud, when it is time."""
        self._view.show_cloud(self.newest.stamp_ns if self.newest else self._host.now_ns())

    # -- inputs ----------------------------------------------------------------------------

    def _on_frame(self, arrival: Arrival) -> None:
        self.newest = arrival
        if self._host.health.paused:
            return
        first = self._positioning.map_start.first_pose(arrival)
        if first is not None:
            self.runner.offer(arrival, first)

    def _on_jump(self, stamp_ns: int) -> None:
        self._positioning.jumped(stamp_ns)
        self.outputs.new_time_line()
        self.runner.forget_images()

    def _on_calibration(self, camera: Camera) -> None:
        session = self.runner.session

        def done(answer: tuple[str, SessionInfo] | None, _: Exception | None) -> None:
            text, info = answer or ('', session.info)
            self._host.notice('CALIBRATION_LATE', text)
            if text and not info.keyframes:
                self.new_map(info)

        self.runner.ask(lambda: (session.set_camera(camera), session.info), done)

    # -- results of the session ------------------------------------------------------------

    def pose_known(self, arrival: Arrival, estimate: Estimate, info: SessionInfo) -> None:
        """The pose of an image: publish it."""
        self._used(estimate, info)
        self._positioning.poses.measured(arrival, estimate, info)

    def image_used(self, arrival: Arrival, first: FirstPose, result: ImageResult) -> None:
        """The session is done with an image: publish what was not yet."""
        estimate, info = result.estimate, result.info
        self._host.health.frames += 1
        if info.mode == 'mapping' and info.keyframes:
            self._positioning.map_start.map_has(first)
        self._used(estimate, info)
        if estimate.T_map_cam is not None and not result.posed:
            self._positioning.poses.measured(arrival, estimate, info)
        if result.keyframes is not None:
            self._view.show(arrival, result.keyframes, info)

    def image_refused(self, error: Exception | None) -> None:
        """An image could not be used: say why."""
        self._host.health.refused += 1
        if isinstance(error, ReconError):
            self._host.notice('IMAGE_REFUSED', str(error))
        else:
            self._host.notice('INTERNAL_ERROR', f'an image could not be used: {error!r}')

    def poses_found(self, late: LateResult) -> None:
        """Poses of earlier images: publish them."""
        for arrival, estimate in late.poses:
            self.pose_known(arrival, estimate, late.info)
        if late.keyframes is not None:
            self._view.show(late.newest, late.keyframes, late.info)

    def _used(self, estimate: Estimate, info: SessionInfo) -> None:
        self._host.health.used_image(info, estimate)
        self._reporting.used_image()
