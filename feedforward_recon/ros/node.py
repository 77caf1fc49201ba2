"""``CameraNode``: the lifecycle node behind mapping_node and localization_node.

    sensor topics -> Inputs -> Worker: decode, LiveSession.process -> Mailbox -> Outputs, TF

It only translates. Everything ROS happens on the executor's thread, everything that infers on
one worker, saving and fusing clouds on another. Services (services.py) answer when the worker
has; nothing waits in a callback.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from nav_msgs.msg import Odometry
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.console.heap import give_back_freed_memory
from feedforward_recon.errors import InputError, ReconError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.io.images import scaled_depth
from feedforward_recon.io.writers import recover
from feedforward_recon.ros import parameters
from feedforward_recon.ros.causes import Cause
from feedforward_recon.ros.convert import conversion_paths, depth_metres, image_rgb, stamp_ns
from feedforward_recon.ros.health import Health
from feedforward_recon.ros.inputs import Arrival, Inputs
from feedforward_recon.ros.late import LatePoses, News
from feedforward_recon.ros.map_keeper import MapKeeper
from feedforward_recon.ros.outputs import Outputs
from feedforward_recon.ros.positioning import STEADY, FirstPose, Positioning
from feedforward_recon.ros.reporting import Reporting
from feedforward_recon.ros.services import Services
from feedforward_recon.ros.worker import FrameQueue, Job, Mailbox, Worker
from feedforward_recon.session.live import LiveSession, SessionInfo, session_of
from feedforward_recon.types import Estimate, Frame, Trajectory

TIDY_S = 5.0  # between two times that freed memory goes back to the system
DONE, FAILED = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


@dataclass(frozen=True)
class Answer:
    """What the worker made of one image; ``told``: its pose went out before."""

    estimate: Estimate
    info: SessionInfo
    keyframes: Trajectory | None
    told: bool


class CameraNode(LifecycleNode):
    """Maps, or localises in a map, what one camera sees."""

    def __init__(self, name: str, mode: str) -> None:
        super().__init__(name)
        self.parameters = parameters.declare(self, NodeConfig, mode=mode)
        self.parameters.on_change(self._on_parameters)
        self.health = Health(self.get_fully_qualified_name(),
                             use_sim_time=self.get_parameter('use_sim_time').value)
        self.session: LiveSession | None = None
        self.inputs: Inputs | None = None
        self.outputs: Outputs | None = None
        self.newest: Arrival | None = None
        self.mailbox = Mailbox(self)
        self.worker: Worker | None = None
        self.clerk = Worker('clerk', self.mailbox)
        self.clerk.start()
        self.keeper = MapKeeper(self.clerk, self.get_logger(), self.notice)
        self.queue: FrameQueue | None = None
        self.positioning = Positioning(self)
        self._answering = Services(self)
        self.reporting = Reporting(self)
        self._generation = 0
        self._cloud_due_s = 0.0
        self._cloud_running = False
        self._cloud_is_final = False  # that of a map which changes no more is out
        self.create_timer(1.0, self._report, clock=STEADY)
        self.create_timer(TIDY_S, self._tidy, clock=STEADY)
        self.create_timer(0.2, self._watch, clock=STEADY)
        self._say_what_is_used()
        if self.config.autostart:
            self._starter = self.create_timer(0.05, self._autostart, clock=STEADY)

    @property
    def config(self) -> NodeConfig:
        """The settings now in force."""
        return self.parameters.config

    def now_ns(self) -> int:
        """The node's clock, simulated where it is."""
        return self.get_clock().now().nanoseconds

    def notice(self, code: str, sentence: str) -> None:
        """Tell what happened: for a while in the diagnostics, and so once in the log."""
        if sentence:
            self.health.warn(code, sentence, self.now_ns())

    def _say_what_is_used(self) -> None:
        self.health.conversions = conversion_paths()
        for library, path in self.health.conversions.items():
            self.get_logger().info(f'{library}: {path}')

    # -- life cycle ------------------------------------------------------------------------

    def _autostart(self) -> None:
        self._starter.cancel()
        if self.trigger_configure() is DONE:
            self.trigger_activate()
        else:
            name = self.get_fully_qualified_name()
            self.get_logger().error(
                f'the node stays unconfigured; correct that (`ros2 param set {name} ...`), then '
                f'run `ros2 lifecycle set {name} configure` and the same with activate')

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the networks and, to localise, the map."""
        config = self.config
        if config.map and recover(config.map):
            self.get_logger().warning(f'{config.map}: a process died while it saved here; the map '
                                      'from before is back')
        try:
            session = session_of(config, self._wake)
        except ReconError as error:
            self.get_logger().error(str(error))
            self.health.reason = str(error)
            return FAILED
        self.session = session
        self.queue = FrameQueue(config.queue, config.queue_size)
        self._generation += 1
        generation = self._generation
        self._late = LatePoses(session, lambda news: self.mailbox.post(
            lambda: self._on_news(generation, news)))
        self.worker = Worker('worker', self.mailbox, self.queue, self._use,
                             lambda *answer: self._on_answer(generation, *answer),
                             self._late.work)
        self.worker.start()
        self.outputs = Outputs(self, config)
        self.new_map(session.info)
        self.keeper.take(session, self.worker, config.autosave_s)
        if config.mode == 'mapping':
            self.keeper.announce(config.map, config.autosave_s)
        self.parameters.locked = True
        self._enter('inactive')
        return DONE

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Listen to the camera."""
        self.health.active_since_ns = self.now_ns()
        if self.outputs is not None:
            self.outputs.new_time_line()
        self._cloud_is_final = False
        self.positioning.start(self.config)
        self.inputs = Inputs(self, self.config, self.health, on_frame=self._on_frame,
                             on_jump=self._on_jump, on_calibration=self._on_calibration,
                             on_odometry=self._on_odometry)
        result = super().on_activate(state)
        self._enter('active')
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop listening; the map stays. What is being inferred ends by itself."""
        self._stop_listening()
        self._enter('inactive')
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Forget the map, after it was saved if autosave_s says so."""
        self._drop()
        self.health.reason = ''
        self._enter('unconfigured')
        return DONE

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End from any state."""
        self._stop_listening()
        self._drop()
        self._enter('finalized')
        return DONE

    def _stop_listening(self) -> None:
        if self.inputs is not None:
            self.inputs.stop()
            self.inputs = None
            self.reporting.stop()
        if self.queue is not None:
            self.queue.clear()
        self.positioning.stop()

    def _drop(self) -> None:
        """Let go of everything that configure made; late answers are not listened to."""
        self._generation += 1
        self.save_at_the_end()
        self.keeper.drop()
        if self.worker is not None:
            self.worker.stop(timeout_s=0.0)
        if self.outputs is not None:
            self.outputs.destroy()
        self.worker = self.session = self.outputs = self.queue = self.newest = None
        self.parameters.locked = False

    def _wake(self) -> None:
        """A network has ended its work on its own thread: the worker takes over."""
        if self.worker is not None:
            self.worker.ask(Job(lambda: None, lambda *_: None))

    def _enter(self, state: str) -> None:
        self.health.state = state
        self.get_logger().info(state)

    def save_at_the_end(self) -> None:
        """Stop listening, and save what mapping made and nobody saved."""
        self._stop_listening()
        self.keeper.save_at_the_end(self.config.map, self.config.autosave_s)

    def close(self) -> bool:
        """End the threads; False when one is still busy after two seconds."""
        self._stop_listening()
        workers = [w for w in (self.worker, self.clerk) if w is not None]
        ended = all(w.stop(timeout_s=2.0) for w in workers)
        return ended and not (self.session is not None and self.session.info.is_busy)

    def _on_parameters(self, config: NodeConfig) -> None:
        if self.inputs is not None:
            self.inputs.configure(config)
        self.positioning.configure(config)
        session, worker = self.session, self.worker
        if session is not None and worker is not None:
            worker.ask(Job(lambda: session.configure(config.mapper), lambda *_: None))

    # -- images ----------------------------------------------------------------------------

    def _on_frame(self, arrival: Arrival) -> None:
        self.newest = arrival
        if self.health.paused or self.worker is None:
            return
        first = self.positioning.first_pose(arrival)
        if first is not None:
            self.worker.offer((arrival, first))

    def decode(self, arrival: Arrival) -> Frame:
        """The frame of a message; called on the worker. Raises InputError."""
        image, camera = image_rgb(arrival.image), arrival.camera
        size_wh = (image.shape[1], image.shape[0])  # compressed messages do not say
        if camera is not None and camera.size_wh != size_wh:
            raise InputError(f'expected a calibration for {size_wh[0]}x{size_wh[1]} images, found '
                             f'one for {camera.width}x{camera.height}; calibrate at this size')
        depth = None if arrival.depth is None else scaled_depth(
            depth_metres(arrival.depth), size_wh, self.health.inputs['depth'].topic)
        topic = self.health.inputs['image'].topic if 'image' in self.health.inputs else 'image'
        return Frame(arrival.stamp_ns, image, depth, camera, topic)

    def _use(self, item: tuple[Arrival, FirstPose]) -> Answer:
        """Worker: one image through the session."""
        arrival, first = item
        session = self.session
        assert session is not None
        frame, generation, told = self.decode(arrival), self._generation, []
        self.health.pictures.look(frame.image, frame.depth)

        def tell(estimate: Estimate) -> None:
            """The pose goes out now; making the frame a keyframe takes longer than tracking."""
            told.append(estimate)
            info = session.info
            self.mailbox.post(lambda: self._tell(generation, arrival, estimate, info))

        estimate = session.process(frame, first.T_map_cam, settle=self.config.queue == 'offline',
                                   on_pose=tell)
        self._late.used(arrival, estimate)
        keyframes = session.keyframe_poses() if estimate.is_keyframe else None
        return Answer(estimate, session.info, keyframes, bool(told))

    def _tell(self, generation: int, arrival: Arrival, estimate: Estimate, info: SessionInfo
              ) -> None:
        if generation == self._generation and self.outputs is not None:
            self._take_over(info, estimate)
            self.positioning.measured(arrival, estimate, info)

    def _on_answer(self, generation: int, item: tuple[Arrival, FirstPose] | None,
                   answer: Answer | None, error: Exception | None) -> None:
        if generation != self._generation or self.outputs is None:
            return
        if error is not None or answer is None or item is None:
            self._refused(error)
            return
        arrival, first = item
        self.health.frames += 1
        if answer.info.mode == 'mapping' and answer.info.keyframes:
            self.positioning.map_has(first)
        self._take_over(answer.info, answer.estimate)
        if answer.estimate.T_map_cam is not None and not answer.told:
            self.positioning.measured(arrival, answer.estimate, answer.info)
        if answer.keyframes is not None:
            self._show_map(arrival, answer.keyframes, answer.info)

    def _on_news(self, generation: int, news: News) -> None:
        if generation != self._generation or self.outputs is None:
            return
        for arrival, estimate in news.poses:
            self._take_over(news.info, estimate)
            self.positioning.measured(arrival, estimate, news.info)
        if news.keyframes is not None:
            self._show_map(news.newest, news.keyframes, news.info)

    def _refused(self, error: Exception | None) -> None:
        self.health.refused += 1
        if isinstance(error, ReconError):
            self.notice('IMAGE_REFUSED', str(error))
        else:
            self.notice('INTERNAL_ERROR', f'an image could not be used: {error!r}')

    def _take_over(self, info: SessionInfo, estimate: Estimate) -> None:
        health = self.health
        health.status, health.reason = estimate.status.value, estimate.reason
        health.mode, health.keyframes = info.mode, info.keyframes
        health.memory_bytes, health.window = info.memory_bytes, info.window
        health.scale_source, health.camera_source = info.scale_source, info.camera_source
        health.has_map = info.has_map
        self.reporting.used_image()

    def new_map(self, info: SessionInfo) -> None:
        """Another map than before: what was known of the old one is void."""
        self._cloud_is_final = False
        self.health.keyframes, self.health.mode = info.keyframes, info.mode
        self.health.status, self.health.reason = 'INITIALISING', ''
        self.health.has_map, self.health.scale_source = info.has_map, info.scale_source
        self.reporting.new_map()
        if self.outputs is not None:
            self.outputs.new_time_line()
        self.positioning.new_map()

    def posed(self, arrival: Arrival) -> None:
        """A pose went out: count it and how long it took since the image came."""
        self.health.latency.add((time.monotonic_ns() - arrival.arrived_ns) / 1e6)
        self.health.poses.add(self.now_ns())

    def _on_jump(self, stamp: int) -> None:
        self.positioning.jumped(stamp)
        if self.outputs is not None:
            self.outputs.new_time_line()
        if self.queue is not None:
            self.queue.clear()

    def _on_calibration(self, camera: Camera) -> None:
        session, worker = self.session, self.worker
        if session is None or worker is None:
            return

        def done(answer: tuple[str, SessionInfo] | None, _: Exception | None) -> None:
            text, info = answer or ('', session.info)
            self.notice('CALIBRATION_LATE', text)
            if text and not info.keyframes:
                self.new_map(info)

        worker.ask(Job(lambda: (session.set_camera(camera), session.info), done))

    def _on_odometry(self, message: Odometry) -> None:
        self.positioning.take_odometry(message, stamp_ns(message.header))

    # -- the map ---------------------------------------------------------------------------

    def _show_map(self, arrival: Arrival, keyframes: Trajectory, info: SessionInfo) -> None:
        assert self.outputs is not None
        shown = self.positioning.body_path(keyframes, arrival.frame_id, info.metres_per_unit)
        if self.outputs.wants('path'):
            self.outputs.path(shown, self.config.path_length)
        if self.outputs.wants('markers'):
            cameras = keyframes.transformed(np.eye(4), info.metres_per_unit or 1.0)
            self.outputs.markers(cameras.T_map_cam, arrival.stamp_ns)
        if self.outputs.wants('cloud'):
            self._fuse(arrival.stamp_ns, info.metres_per_unit, whole=False)

    def _fuse(self, stamp: int, metres_per_unit: float | None, *, whole: bool) -> None:
        """Gather a cloud on the worker, fuse it on the clerk, publish it here."""
        session, worker = self.session, self.worker
        if session is None or worker is None:
            return
        frozen = self.health.mode == 'localization'

        def fused(source: Any, error: Exception | None) -> None:
            if source is None:
                self._cloud_running = False
                return
            self.clerk.ask(Job(lambda: source.fused(metres_per_unit or 1.0), publish))

        def publish(cloud: Any, error: Exception | None) -> None:
            if whole:
                self._cloud_running = False
            if error is not None:
                self.notice('CLOUD', f'the cloud could not be made: {error}')
            elif self.outputs is not None:
                self.outputs.cloud(cloud, stamp, whole)
                self._cloud_is_final = whole and frozen and self.health.mode == 'localization'

        worker.ask(Job(lambda: session.cloud_source(newest_only=not whole), fused))

    def _publish_cloud_map(self) -> None:
        """The whole cloud, at its period, and only for somebody who listens.

        The topic is latched: that of a map in which the node localises is published once.
        """
        if self._cloud_is_final and self.health.mode == 'localization':
            return
        due = not self._cloud_running and time.monotonic() >= self._cloud_due_s
        if self.outputs is None or self.session is None or not due \
                or not self.outputs.wants('cloud_map'):
            return
        self._cloud_running = True
        self._cloud_due_s = time.monotonic() + self.config.cloud_period_s
        stamp = self.newest.stamp_ns if self.newest else self.now_ns()
        self._fuse(stamp, self.positioning.metres_per_unit, whole=True)

    # -- diagnostics -----------------------------------------------------------------------

    def _report(self) -> None:
        """Once a second: tell how the node is, and publish the whole cloud."""
        self.reporting.tell()
        self._publish_cloud_map()
        self.keeper.tick(self.config.map, self.config.autosave_s)

    def _tidy(self) -> None:
        self.clerk.ask(Job(give_back_freed_memory, lambda *_: None))

    def _watch(self) -> None:
        self.mailbox.empty()
        if self.inputs is not None:
            self.inputs.watch()

    def causes(self) -> list[Cause]:
        """Why there is no pose, if there is none."""
        return self.reporting.causes()
