"""`ros2 run feedforward_recon mapping_node`: maps what a camera sees."""

from __future__ import annotations

from feedforward_recon.ros.run import run_camera_node


def main() -> None:
    """Run the node until SIGINT or SIGTERM."""
    run_camera_node('mapping_node', 'mapping')


if __name__ == '__main__':
    main()
