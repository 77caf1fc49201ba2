"""`ros2 run feedforward_recon localization_node`: finds a camera in a saved map."""

from __future__ import annotations

from feedforward_recon.ros.run import run_camera_node


def main() -> None:
    """Run the node until SIGINT or SIGTERM."""
    run_camera_node('localization_node', 'localization')


if __name__ == '__main__':
    main()
