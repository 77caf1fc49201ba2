"""Map what a camera sees.

ros2 launch feedforward_recon mapping.launch.py image_topic:=/camera/image_raw map:=~/maps/home
"""

from feedforward_recon.ros.launching import arguments, camera_node, environment
from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    """The mapping node with the arguments that nav2 has too."""
    return LaunchDescription([*arguments('mapping'), *environment(), *camera_node('mapping')])
