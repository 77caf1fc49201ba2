"""Map, or localise, a recording as if the camera were here.

ros2 launch feedforward_recon replay.launch.py source:=walk.mcap
ros2 launch feedforward_recon replay.launch.py source:=synthetic:7 use_rviz:=true
ros2 launch feedforward_recon replay.launch.py bag:=drive image_topic:=/front/image_raw

``source`` plays only the camera, at the time of the recording; ``bag`` plays all topics of a
bag, with odometry and TF, through `ros2 bag play`.
"""

from launch.action import Action
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction
from launch.launch_context import LaunchContext
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from feedforward_recon.ros.camera_topics import CAMERA_TOPICS
from feedforward_recon.ros.launching import (
    PACKAGE,
    TRUTH,
    arguments,
    camera_node,
    environment,
    topic_argument,
)
from launch import LaunchDescription


def _player(context: LaunchContext) -> list[Action]:
    """What sends the images; refuses to guess between two sources."""
    source, bag = (context.launch_configurations[name] for name in ('source', 'bag'))
    if bool(source) == bool(bag):
        raise ValueError(f"expected one of source and bag, found source:='{source}' and "
                         f"bag:='{bag}'; give a folder, video, bag or synthetic:SEED")
    return [_from_bag(context) if bag else _from_source(context)]


def _from_source(context: LaunchContext) -> Action:
    packed = context.launch_configurations['image_transport'] == 'compressed'
    settings = {name: ParameterValue(LaunchConfiguration(name), value_type=type_)
                for name, type_ in (('source', str), ('rate', float), ('loop', bool))}
    return Node(
        package=PACKAGE, executable='player_node', name='player_node',
        namespace=LaunchConfiguration('namespace'), output='screen',
        parameters=[{**settings, 'publish_clock': True,
                     'image_transport': 'compressed' if packed else 'raw'}],
        remappings=[(topic, LaunchConfiguration(topic_argument(name)))
                    for name, topic in CAMERA_TOPICS.items()])


def _from_bag(context: LaunchContext) -> Action:
    loop = context.launch_configurations['loop'].lower() == 'true'
    return ExecuteProcess(
        cmd=['ros2', 'bag', 'play', LaunchConfiguration('bag'), '--clock', '--rate',
             LaunchConfiguration('rate'), *(['--loop'] if loop else [])], output='screen')


def generate_launch_description() -> LaunchDescription:
    """A player and a node that runs on its clock."""
    mode = LaunchConfiguration('mode')
    return LaunchDescription([
        DeclareLaunchArgument('source', default_value='',
                              description='folder, video or bag whose images are played, or '
                              'synthetic:SEED for a rendered room'),
        DeclareLaunchArgument('bag', default_value='',
                              description='bag whose topics are all played (ros2 bag play)'),
        DeclareLaunchArgument('rate', default_value='1.0',
                              description='speed relative to the recording; with source, 0 is '
                              'as fast as it is taken'),
        DeclareLaunchArgument('loop', default_value='false', choices=TRUTH,
                              description='start again at the end'),
        DeclareLaunchArgument('mode', default_value='mapping',
                              choices=['mapping', 'localization'],
                              description='what the node does with the images'),
        *arguments(mode, use_sim_time='true'), *environment(),
        # First: what it refuses ends the launch, and a node just started would outlive that.
        OpaqueFunction(function=_player), *camera_node(mode)])
