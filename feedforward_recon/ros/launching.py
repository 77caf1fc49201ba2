"""What the launch files share: arguments with nav2's names, and a node made from them."""

from __future__ import annotations

import os
from pathlib import Path

from launch.action import Action
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.conditions import IfCondition
from launch.launch_context import LaunchContext
from launch.substitution import Substitution
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterFile, ParameterValue
from launch_ros.substitutions import FindPackageShare

from feedforward_recon.config.network import PRECISIONS
from feedforward_recon.model.weights.registry import is_path
from feedforward_recon.ros.camera_topics import CAMERA_TOPICS

PACKAGE = 'feedforward_recon'
# Relative, so that each robot's namespace holds its own tree; without one, /tf as ever.
TF = [('/tf', 'tf'), ('/tf_static', 'tf_static')]
INPUTS = ('image', 'camera_info', 'depth', 'right/image', 'right/camera_info', 'odom', 'imu')
# Left empty, these keep what params_file says.
SETTINGS = ('image_transport', 'depth_transport', 'map', 'model', 'attention', 'device', 'weights',
            'precision')
TRUTH = ['true', 'false', 'True', 'False']
TRANSPORTS = ['', 'raw', 'compressed', 'auto']
RESPAWN_DELAY_S = 2.0


def config_file(*name: str | Substitution) -> list[str | Substitution]:
    """A file of the installed folder config; the parts of its name are joined."""
    return [FindPackageShare(PACKAGE), '/config/', *name]


def arguments(mode: str | Substitution, use_sim_time: str = 'false') -> list[Action]:
    """The arguments of every launch file; mode: mapping or localization."""
    return [
        DeclareLaunchArgument('namespace', default_value='',
                              description='namespace of the node and of its relative topics'),
        DeclareLaunchArgument('use_sim_time', default_value=use_sim_time, choices=TRUTH,
                              description='take the time from /clock'),
        DeclareLaunchArgument('params_file', default_value=config_file(mode, '.yaml'),
                              description='YAML file with the parameters of the node'),
        DeclareLaunchArgument('autostart', default_value='true', choices=TRUTH,
                              description='configure and activate the node without being asked'),
        DeclareLaunchArgument('use_respawn', default_value='false', choices=TRUTH,
                              description='start the node again when it dies'),
        DeclareLaunchArgument('log_level', default_value='info',
                              choices=['debug', 'info', 'warn', 'error', 'fatal'],
                              description='least severe message that is shown'),
        DeclareLaunchArgument('use_rviz', default_value='false', choices=TRUTH,
                              description='show map, pose and image in RViz'),
        DeclareLaunchArgument('rviz_config', default_value=config_file(mode, '.rviz'),
                              description='RViz configuration'),
        DeclareLaunchArgument('image_topic', default_value=CAMERA_TOPICS['image'],
                              description='images; compressed ones are found beside it'),
        DeclareLaunchArgument('camera_info_topic', default_value=CAMERA_TOPICS['camera_info'],
                              description='calibration of the camera'),
        *_optional_topics(),
        DeclareLaunchArgument('image_transport', default_value='', choices=TRANSPORTS,
                              description='images raw, compressed, or whichever is published '
                              '(auto); empty: as in params_file'),
        DeclareLaunchArgument('depth_transport', default_value='', choices=TRANSPORTS,
                              description='the same for depth; empty: as in params_file'),
        DeclareLaunchArgument('map', default_value='',
                              description='folder of the map; empty: as in params_file'),
        DeclareLaunchArgument('fresh', default_value='', choices=['', *TRUTH],
                              description='start a new map also where map holds one; empty: as in '
                              'params_file'),
        DeclareLaunchArgument('model', default_value='',
                              description='network that maps; empty: as in params_file'),
        DeclareLaunchArgument('attention', default_value='',
                              description='attention of the network; empty: as in params_file'),
        DeclareLaunchArgument('device', default_value='',
                              description='where the network runs; empty: as in params_file'),
        DeclareLaunchArgument('weights', default_value='',
                              description='weights of the network; empty: as in params_file'),
        DeclareLaunchArgument('precision', default_value='', choices=['', *PRECISIONS],
                              description='how they are kept; empty: as in params_file'),
    ]


def topic_argument(name: str) -> str:
    """The launch argument of an input of the nodes, such as right/image: right_image_topic."""
    return f'{name.replace("/", "_")}_topic'


def _optional_topics() -> list[Action]:
    """The arguments of topics that a node can do without."""
    return [
        DeclareLaunchArgument('depth_topic', default_value=CAMERA_TOPICS['depth'],
                              description='depth registered to the images, where there is any'),
        DeclareLaunchArgument('right_image_topic', default_value=CAMERA_TOPICS['right/image'],
                              description='right images of a stereo pair, where there is one; '
                              'image_topic is the left one'),
        DeclareLaunchArgument('right_camera_info_topic',
                              default_value=CAMERA_TOPICS['right/camera_info'],
                              description='calibration of the right camera, baseline in P'),
        DeclareLaunchArgument('odom_topic', default_value='odom',
                              description='odometry of the robot, where there is any'),
        DeclareLaunchArgument('imu_topic', default_value='imu',
                              description='IMU, which tells where up is, where there is any'),
    ]


def environment() -> list[Action]:
    """Shared memory for whole images, unless the user brings a profile of their own."""
    actions: list[Action] = [SetEnvironmentVariable('RCUTILS_LOGGING_BUFFERED_STREAM', '1')]
    names = ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE')
    if not any(name in os.environ for name in names):
        # Fast DDS 3 (Kilted and later) renamed the variable and warns of the old one.
        old = os.environ.get('ROS_DISTRO') in ('humble', 'jazzy')
        actions.append(SetEnvironmentVariable(names[old], config_file('fastdds.xml')))
    return actions


def camera_node(mode: str | Substitution) -> list[Action]:
    """mapping_node or localization_node, and RViz if wanted."""
    name = [mode, '_node']
    return [OpaqueFunction(function=_node, args=[name]), _rviz()]


def _node(context: LaunchContext, name: list[str | Substitution]) -> list[Action]:
    given = {setting: context.launch_configurations[setting] for setting in SETTINGS
             if context.launch_configurations[setting]}
    for setting in ('map', 'weights'):  # the node may run in another folder
        if setting in given and (setting == 'map' or is_path(given[setting])):
            given[setting] = str(Path(given[setting]).expanduser().absolute())
    flags = {flag: ParameterValue(LaunchConfiguration(flag), value_type=bool)
             for flag in ('use_sim_time', 'autostart')}
    if context.launch_configurations['fresh']:
        flags['fresh'] = ParameterValue(LaunchConfiguration('fresh'), value_type=bool)
    texts = {setting: ParameterValue(value, value_type=str) for setting, value in given.items()}
    return [Node(
        package=PACKAGE, executable=name, name=name,
        namespace=LaunchConfiguration('namespace'), output='screen', emulate_tty=True,
        respawn=LaunchConfiguration('use_respawn'), respawn_delay=RESPAWN_DELAY_S,
        parameters=[ParameterFile(LaunchConfiguration('params_file'), allow_substs=True),
                    {**flags, **texts}],
        arguments=['--ros-args', '--log-level', LaunchConfiguration('log_level')],
        remappings=[*TF, *((topic, LaunchConfiguration(topic_argument(topic)))
                           for topic in INPUTS)])]


def _rviz() -> Action:
    use_sim_time = ParameterValue(LaunchConfiguration('use_sim_time'), value_type=bool)
    return Node(package='rviz2', executable='rviz2', namespace=LaunchConfiguration('namespace'),
                condition=IfCondition(LaunchConfiguration('use_rviz')), output='screen',
                arguments=['-d', LaunchConfiguration('rviz_config')],
                parameters=[{'use_sim_time': use_sim_time}], remappings=TF)
