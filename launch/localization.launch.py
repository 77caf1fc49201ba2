"""Find a camera in a saved map.

ros2 launch feedforward_recon localization.launch.py map:=~/maps/home
ros2 service call /localize std_srvs/srv/Trigger
"""

from feedforward_recon.ros.launching import arguments, camera_node, environment
from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    """The localization node with the arguments that nav2 has too."""
    return LaunchDescription([*arguments('localization'), *environment(),
                              *camera_node('localization')])
