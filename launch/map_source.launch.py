"""Map a recorded walk (rosbag2, folder or video) offline: direct reading, nothing dropped.

ros2 launch feedforward_recon map_source.launch.py source:=walk.mcap out:=maps/kitchen
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.substitutions import FindPackageShare


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments and run ``ffrecon map`` with them."""
    defaults = PathJoinSubstitution([FindPackageShare('feedforward_recon'), 'config',
                                     'mapping.yaml'])
    return LaunchDescription([
        DeclareLaunchArgument('source', description='bag, folder or video to map'),
        DeclareLaunchArgument('out', description='folder of the new map'),
        DeclareLaunchArgument('params_file', default_value=defaults,
                              description='YAML file of settings'),
        ExecuteProcess(cmd=['ffrecon', 'map', LaunchConfiguration('source'),
                            '--out', LaunchConfiguration('out'),
                            '--config', LaunchConfiguration('params_file')], output='screen'),
    ])
