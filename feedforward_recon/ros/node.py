"""``CameraNode``: the lifecycle node behind mapping_node and localization_node.

    sensor topics -> Inputs -> Worker: decode, LiveSession.process -> Mailbox -> outputs, TF

It only translates. Everything ROS happens on the executor's thread, everything that infers on
one worker, saving and fusing clouds on another. Services answer when the worker has; nothing
waits in a callback.
"""

from __future__ import annotations

from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.console.heap import give_back_freed_memory
from feedforward_recon.errors import ReconError
from feedforward_recon.io.writers import recover
from feedforward_recon.ros import parameters
from feedforward_recon.ros.convert import conversion_paths
from feedforward_recon.ros.health import Health
from feedforward_recon.ros.host import STEADY, Host
from feedforward_recon.ros.map_saver import MapSaver
from feedforward_recon.ros.pipeline import Pipeline
from feedforward_recon.ros.positioning import Positioning
from feedforward_recon.ros.reporting import Reporting
from feedforward_recon.ros.services import Services
from feedforward_recon.ros.worker import Job, Mailbox, Worker

TIDY_S = 5.0  # between two times that freed memory goes back to the system
DONE, FAILED = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


class CameraNode(LifecycleNode):
    """Maps, or localises in a map, what one camera sees.

    saver: saves the map, so that whoever ends the process can wait for it.
    """

    def __init__(self, name: str, mode: str) -> None:
        """Declare parameters, timers and services; raises ConfigError for impossible settings."""
        super().__init__(name)
        self._host = Host(self, parameters.declare(self, NodeConfig, mode=mode), Health(
            self.get_fully_qualified_name(),
            use_sim_time=self.get_parameter('use_sim_time').value))
        self._host.parameters.on_change(self._on_parameters)
        self._pipeline: Pipeline | None = None  # from configure to cleanup
        self._mailbox = Mailbox(self)
        self._background = Worker('background', self._mailbox)  # writes maps, fuses clouds
        self._background.start()
        self.saver = MapSaver(self._background, self.get_logger(), self._host.notice)
        self._positioning = Positioning(self._host)
        self._reporting = Reporting(self._host)
        self._service_handlers = Services(self._host, self._positioning, self.saver,
                                          self._reporting, lambda: self._pipeline)
        self.create_timer(1.0, self._report, clock=STEADY)
        self.create_timer(TIDY_S, self._tidy, clock=STEADY)
        self.create_timer(0.2, self._watch, clock=STEADY)
        self._log_conversions()
        if self._host.config.autostart:
            self._starter = self.create_timer(0.05, self._autostart, clock=STEADY)

    def _log_conversions(self) -> None:
        self._host.health.conversions = conversion_paths()
        for library, path in self._host.health.conversions.items():
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
        """Load the networks, and the map to localise in or to go on with."""
        config = self._host.config
        if config.map and recover(config.map):
            self.get_logger().warning(f'{config.map}: a process died while it saved here; the map '
                                      'from before is back')
        try:
            self._pipeline = Pipeline(self._host, self._positioning, self._reporting,
                                      self._mailbox, self._background)
        except ReconError as error:
            self.get_logger().error(str(error))
            self._host.health.reason = str(error)
            return FAILED
        self.saver.take(self._pipeline.runner, config.autosave_s)
        if config.mode == 'mapping':
            self.saver.announce(config.map, config.autosave_s, fresh=config.fresh)
        self._host.parameters.locked = True
        self._enter('inactive')
        return DONE

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Listen to the camera."""
        self._host.health.active_since_ns = self._host.now_ns()
        if self._pipeline is not None:
            self._pipeline.listen()
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
        self._host.health.reason = ''
        self._enter('unconfigured')
        return DONE

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End from any state."""
        self._drop()
        self._enter('finalized')
        return DONE

    def _stop_listening(self) -> None:
        if self._pipeline is not None:
            self._pipeline.stop_listening()
        self._positioning.stop()

    def _drop(self) -> None:
        """Let go of everything that configure made; late results are not listened to."""
        self.save_at_the_end()
        self.saver.drop()
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
        self._host.parameters.locked = False

    def _enter(self, state: str) -> None:
        self._host.health.state = state
        self.get_logger().info(state)

    def save_at_the_end(self) -> None:
        """Stop listening, and save what mapping made and nobody saved."""
        self._stop_listening()
        self.saver.save_at_the_end(self._host.config.map, self._host.config.autosave_s)

    def close(self) -> bool:
        """End the threads; False when one is still busy after two seconds."""
        self._stop_listening()
        runner = None if self._pipeline is None else self._pipeline.runner
        workers = [self._background] if runner is None else [runner.worker, self._background]
        ended = all(worker.stop(timeout_s=2.0) for worker in workers)
        return ended and not (runner is not None and runner.is_busy)

    # -- parameters and timers -------------------------------------------------------------

    def _on_parameters(self, config: NodeConfig) -> None:
        if self._pipeline is not None:
            self._pipeline.configure(config)
        self._positioning.configure(config)

    def _report(self) -> None:
        """Once a second: publish the diagnostics, publish the whole cloud, save the map."""
        config, health = self._host.config, self._host.health
        health.tf_mode, health.tf_missing = self._positioning.tf_state()
        if self._pipeline is not None:
            health.dropped = self._pipeline.runner.dropped
        self._reporting.publish()
        if self._pipeline is not None:
            self._pipeline.show_cloud()
        self.saver.tick(config.map, config.autosave_s)

    def _tidy(self) -> None:
        self._background.ask(Job(give_back_freed_memory, lambda *_: None))

    def _watch(self) -> None:
        """Look at results of the workers, should a signal be missed, and at the publishers."""
        self._mailbox.empty()
        if self._pipeline is not None and self._pipeline.inputs is not None:
            self._pipeline.inputs.watch()
