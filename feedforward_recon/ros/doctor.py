"""The command ``doctor``: why is there no pose? Looks at topics, clocks, TF and this machine.

    ros2 run feedforward_recon doctor --image-topic /camera/image_raw

Needs no mapping node; where one runs, its own report is shown too.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

import rclpy
import typer
from rclpy.executors import SingleThreadedExecutor
from rclpy.logging import LoggingSeverity
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.utilities import get_rmw_implementation_identifier, remove_ros_args
from std_srvs.srv import Trigger

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.config.schema import from_dict
from feedforward_recon.console.terminal import DONE, REFUSED, print_json, print_table, run, taught
from feedforward_recon.errors import InputError
from feedforward_recon.ros.arrivals import DEFAULT_FRAME, Arrival
from feedforward_recon.ros.convert import conversion_paths, depth_metres, image_rgb
from feedforward_recon.ros.diagnosis import Diagnosis, Transport, diagnose
from feedforward_recon.ros.diagnostics import report
from feedforward_recon.ros.frames import Frames
from feedforward_recon.ros.health import Health
from feedforward_recon.ros.inputs import InputHandlers, Inputs
from feedforward_recon.ros.tf_buffer import TransformBuffer
from feedforward_recon.ros.tf_messages import NO_TF, TFMessage

NAME = 'feedforward_recon_doctor'
LOOK_S, ANSWER_S = 0.2, 3.0
TOPICS = ('image', 'camera_info', 'depth', 'odom')
LIBRARIES = ('numpy', 'cv2', 'torch', 'scipy')
MISSING = 'missing'
VARIABLES = ('ROS_DISTRO', 'ROS_DOMAIN_ID', 'ROS_AUTOMATIC_DISCOVERY_RANGE',
             'ROS_LOCALHOST_ONLY', 'FASTDDS_DEFAULT_PROFILES_FILE',
             'FASTRTPS_DEFAULT_PROFILES_FILE', 'CYCLONEDDS_URI')


class Examination:
    """A node that listens for a while like a mapping node would, and maps nothing."""

    def __init__(self, node: Node, config: NodeConfig) -> None:
        self.node, self.config = node, config
        self.health = Health(NAME, state='active', status='TRACKING',
                             active_since_ns=self.now_ns)
        self.health.use_sim_time = node.get_parameter('use_sim_time').value
        self.inputs = Inputs(node, config, self.health, InputHandlers(on_frame=self._look))
        self.camera_frame = config.camera_frame or DEFAULT_FRAME
        self.transforms = TransformBuffer()
        self._subscribe_tf()
        self._executor = SingleThreadedExecutor(context=node.context)
        self._executor.add_node(node)

    @property
    def now_ns(self) -> int:
        """The clock of the node."""
        return self.node.get_clock().now().nanoseconds

    def listen(self, seconds: float) -> None:
        """Spin for so long (steady clock), looking at the publishers every LOOK_S."""
        end = time.monotonic() + seconds
        next_look = 0.0
        while (now := time.monotonic()) < end:
            if now >= next_look:
                self.inputs.watch()
                next_look = now + LOOK_S
            self._executor.spin_once(timeout_sec=min(LOOK_S, end - now))
        self.health.clock_running = self.now_ns > 0

    def _subscribe_tf(self) -> None:
        if TFMessage is None:
            self.health.warn('NO_TF2_MSGS', NO_TF, self.now_ns)
            return
        latched = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.node.create_subscription(TFMessage, '/tf', self._take_tf, 100)
        self.node.create_subscription(
            TFMessage, '/tf_static', lambda message: self._take_tf(message, True), latched)

    def _take_tf(self, message: Any, static: bool = False) -> None:
        for sentence in self.transforms.take(message.transforms, static):
            self.health.warn('TF_REFUSED', sentence, self.now_ns)

    def _look(self, arrival: Arrival) -> None:
        """Judge the pixels of a frame that a mapping node would use."""
        self.health.frames += 1
        self.camera_frame = arrival.frame_id
        try:
            depth = None if arrival.depth is None else depth_metres(
                arrival.depth, self.health.inputs['depth'].topic)
            self.health.pictures.look(
                image_rgb(arrival.image, self.health.inputs['image'].topic), depth)
        except InputError as error:
            self.health.warn('IMAGE_REFUSED', str(error), self.now_ns)

    def found(self, transport: Transport, seconds: float) -> list[Diagnosis]:
        """What is wrong with the graph and the inputs, most likely cause first."""
        frames = Frames(self.config, self.transforms)
        self.health.tf_mode = frames.mode(self.camera_frame)
        self.health.tf_missing = frames.missing(self.camera_frame)
        return [*_about_graph(self.node),
                *diagnose(self.health, self.now_ns, silence_s=min(3.0, seconds / 2),
                        transport=transport)]

    def ask_nodes(self) -> dict[str, dict[str, Any]]:
        """Reports of the mapping and localisation nodes that run, by the name of their service."""
        services = [name for name, types in self.node.get_service_names_and_types()
                    if name.endswith('/doctor') and 'std_srvs/srv/Trigger' in types]
        return {name: self._ask(name) for name in services}

    def _ask(self, service: str) -> dict[str, Any]:
        client: Any = self.node.create_client(Trigger, service)
        future = client.call_async(Trigger.Request())
        self._executor.spin_until_future_complete(future, timeout_sec=ANSWER_S)
        answer = future.result() if future.done() else None
        self.node.destroy_client(client)
        if answer is None:
            return {'level': 'ERROR', 'summary': f'no answer within {ANSWER_S:.0f} s',
                    'causes': [{'code': 'NODE_SILENT', 'sentence': f'{service} does not answer; '
                                'look at the log of the node or restart it'}]}
        return json.loads(answer.message)

    def close(self) -> None:
        """Stop listening."""
        self.inputs.stop()
        self._executor.remove_node(self.node)
        self._executor.shutdown()


def _about_graph(node: Node) -> Iterator[Diagnosis]:
    """What is wrong with the graph of nodes and topics."""
    others = [name for name in node.get_node_names() if name != node.get_name()]
    if not others:
        domain = os.environ.get('ROS_DOMAIN_ID', '0')
        yield Diagnosis('NO_NODES', f'no other ROS node is visible in domain {domain}; start '
                        'the camera driver, or compare ROS_DOMAIN_ID, the RMW implementation and '
                        'the network of the two terminals', True)
    if node.count_publishers('/clock') and not node.get_parameter('use_sim_time').value:
        yield Diagnosis('SIM_TIME_UNUSED', 'somebody publishes /clock but use_sim_time is false '
                        'here; run the nodes (and this doctor) with use_sim_time:=true')


def _about_transports(examination: Examination) -> Iterator[str]:
    """Notes on images that were found compressed where raw ones were asked for."""
    for kind in ('image', 'depth'):
        found = examination.health.inputs[kind].topic
        setting = getattr(examination.config, f'{kind}_transport')
        if setting == 'auto' and found != examination.node.resolve_topic_name(kind):
            yield (f'{kind}: only compressed ones are published, on {found}; the nodes find them '
                   f'with the parameter or launch argument {kind}_transport:=auto (the default) '
                   'or compressed, and the same topics as here')


def machine_facts(transport: Transport) -> dict[str, str]:
    """Middleware, library versions, limits and variables of this machine and terminal."""
    known = {'middleware': transport.rmw, 'Python': sys.version.split()[0]}
    known |= {name: _version(name) for name in LIBRARIES}
    if transport.rmem_max is not None:
        known['net.core.rmem_max'] = f'{transport.rmem_max} bytes'
    known |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return known


def _version(library: str) -> str:
    try:
        return importlib.import_module(library).__version__
    except ImportError as error:
        return f'{MISSING}: {error}'


def _about_libraries(machine: dict[str, str]) -> Iterator[Diagnosis]:
    for library in LIBRARIES:
        if machine[library].startswith(MISSING):
            yield Diagnosis('LIBRARY_MISSING', f'Python cannot import {library} '
                            f'({machine[library]}); install it for {sys.executable}', True)


Seconds = Annotated[float, typer.Option('--seconds', min=1.0, max=600.0,
                                        help='How long to listen.')]
Json = Annotated[bool, typer.Option('--json', help='One JSON object on stdout.')]
Compressed = Annotated[bool, typer.Option('--compressed', help='Look at <image>/compressed, also '
                                          'where raw images are published.')]
SimTime = Annotated[bool, typer.Option('--sim-time', help='Use the clock of a simulation or a '
                                       'bag (/clock).')]


def _topic(name: str) -> Any:
    return typer.Option(f'--{name.replace("_", "-")}-topic', metavar='TOPIC')


def doctor_command(
        image: Annotated[str, _topic('image')] = 'image',
        camera_info: Annotated[str, _topic('camera_info')] = 'camera_info',
        depth: Annotated[str, _topic('depth')] = 'depth',
        odom: Annotated[str, _topic('odom')] = 'odom',
        base_frame: Annotated[str, typer.Option()] = 'base_link',
        odom_frame: Annotated[str, typer.Option()] = 'odom',
        tf_mode: Annotated[str, typer.Option(help='As the parameter of the node.')] = 'auto',
        compressed: Compressed = False, sim_time: SimTime = False, seconds: Seconds = 5.0,
        json_: Json = False) -> int:
    """Find out why there is no pose: publishers, QoS, rates, stamps, calibration, TF, machine.

    Listens like a mapping node would, which does not have to run; where one runs, its own
    report is added. Exit code 1: something is wrong.

    Example:
      ros2 run feedforward_recon doctor --image-topic /camera/image_raw
    """
    remaps = dict(zip(TOPICS, (image, camera_info, depth, odom), strict=True))
    config = from_dict(NodeConfig, {
        'image_transport': 'compressed' if compressed else 'auto', 'base_frame': base_frame,
        'odom_frame': odom_frame, 'tf_mode': tf_mode, 'info_wait_s': min(2.0, seconds / 2)})
    context = rclpy.Context()
    rclpy.init(args=sys.argv, context=context)
    try:
        findings = examine(context, config, remaps, sim_time, seconds)
    finally:
        rclpy.try_shutdown(context=context)
    if json_:
        print_json(findings)
    else:
        _print(findings)
    return REFUSED if findings['causes'] else DONE


def examine(context: rclpy.Context, config: NodeConfig, remaps: dict[str, str], sim_time: bool,
            seconds: float) -> dict[str, Any]:
    """Listen and judge; returns the report of a node, with the environment and other nodes."""
    arguments = ['--ros-args', '-p', f'use_sim_time:={str(sim_time).lower()}']
    for name, topic in remaps.items():
        arguments += ['-r', f'{name}:={topic}'] if topic != name else []
    node = rclpy.create_node(NAME, context=context, cli_args=arguments)
    node.get_logger().set_level(LoggingSeverity.WARN)  # stdout is for the report
    transport = Transport.here(get_rmw_implementation_identifier())
    examination = Examination(node, config)
    try:
        examination.listen(seconds)
        nodes = examination.ask_nodes()
        found = examination.found(transport, seconds)
        notes = list(_about_transports(examination))
    finally:
        examination.close()
        node.destroy_node()
    machine = machine_facts(transport)
    health = replace(examination.health, conversions=conversion_paths())
    values = report(health, [*_about_libraries(machine), *found], examination.now_ns)
    kept = ('level', 'causes', 'inputs', 'camera_info', 'tf_mode', 'conversions', 'use_sim_time')
    findings = {key: values[key] for key in kept}
    findings['notes'] = notes
    for name, theirs in nodes.items():
        findings['causes'] += [{**cause, 'sentence': f'{name}: {cause["sentence"]}'}
                               for cause in theirs.get('causes', [])]
    return {**findings, 'environment': machine, 'nodes': nodes}


def _print(findings: dict[str, Any]) -> None:
    print_table('Inputs', {input_['topic']: _about_input(input_)
                           for input_ in findings['inputs'].values()})
    print_table('Conversions', findings['conversions'])
    print_table('Machine', findings['environment'])
    if findings['nodes']:
        print_table('Nodes', {name: f'{node["level"]}: {node["summary"]}'
                              for name, node in findings['nodes'].items()})
    if findings['notes']:
        print_table('To know', {f'{number}.': note
                                for number, note in enumerate(findings['notes'], 1)})
    if findings['causes']:
        print_table('Wrong, most likely cause first', {
            f'{number}. {cause["code"]}': cause['sentence']
            for number, cause in enumerate(findings['causes'], 1)})
    else:
        print_table('Nothing is wrong', {'images': 'arrive and can be used'})


def _about_input(input_: dict[str, Any]) -> str:
    """One input as a sentence."""
    if not input_['publishers'] and not input_['messages']:
        return 'nobody publishes it' + ('' if input_['needed'] else ' (not needed)')
    names = ', '.join(f'{p["node"]} ({p["reliability"]})' for p in input_['publishers'] or ())
    parts = [f'{input_["messages"]} messages, {input_["rate_hz"]:.1f} Hz, {input_["lost"]} lost',
             input_['size'], f'frame_id {input_["frame_id"]!r}' if input_['messages'] else '',
             f'clock - stamp {input_["clock_minus_stamp_s"]:.3f} s' if input_['messages'] else '']
    return f'{names}: ' + ', '.join(filter(None, parts))


app = typer.Typer(name='doctor', add_completion=False, pretty_exceptions_enable=False)
app.command(help=taught(doctor_command))(doctor_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: exit code 0, 1 (something is wrong) or 2 (bad arguments)."""
    given = remove_ros_args(sys.argv)[1:] if arguments is None else arguments
    return run(app, given)


if __name__ == '__main__':
    sys.exit(main())
