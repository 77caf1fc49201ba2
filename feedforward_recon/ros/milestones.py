"""Lines for the log when a map has its first pose. Nothing here needs ROS."""

from __future__ import annotations

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.ros.health import Health

POSED = ('TRACKING', 'UNCERTAIN')


class Milestones:
    """What was reached with one map so far."""

    def __init__(self) -> None:
        self._reached: set[str] = set()

    def reached(self, health: Health) -> list[str]:
        """Sentences about what the newest image reached for the first time."""
        mode = health.mode
        if health.status not in POSED or mode in self._reached:
            return []
        self._reached.add(mode)
        if mode == 'localization':
            return ['the camera is found in the map for the first time']
        return [f'the map has started; camera: {health.camera_source}, scale: '
                f'{health.scale_source}']


def about_camera(camera: Camera) -> str:
    """A calibration in one line."""
    lens = f'{camera.model} distortion' if camera.distortion else 'no distortion'
    return (f'calibration of {camera.width}x{camera.height} images, focal length {camera.fx:.1f} '
            f'x {camera.fy:.1f} px, centre ({camera.cx:.1f}, {camera.cy:.1f}), {lens}')
