"""``LocalizedStream``: a camera in a frozen memory, and single images beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from feedforward_recon.config.schema import TrackingConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.localization.follower import Follower
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.session.newest_memory import no_map
from feedforward_recon.types import Estimate, Frame


class LocalizedStream:
    """Follows a stream of images between answers of a localizer.

    hint: T_map_cam [4, 4] that is tried first where the memory is queried, None without.
    """

    def __init__(self, config: TrackingConfig) -> None:
        self.hint: np.ndarray | None = None
        self._config = config
        self._follower: Follower | None = None

    def process(self, frame: Frame, localizer: Localizer | None) -> Estimate:
        """Pose of the next image; ``work`` checks it against the memory."""
        if localizer is None:
            return no_map(frame)
        if self._follower is None or self._follower.localizer is not localizer:
            self._follower = Follower(localizer, self._config)
        estimate = self._follower.process(with_camera(frame, localizer.camera), self.hint)
        if estimate.T_map_cam is not None:
            self.hint = estimate.T_map_cam
        return estimate

    def work(self) -> bool:
        """A piece of querying the memory; False when nothing is left."""
        return self._follower is not None and self._follower.work()

    def forget(self) -> None:
        """The next image continues nothing: it is looked up in the memory."""
        if self._follower is not None:
            self._follower.forget()


def with_camera(frame: Frame, camera: Camera | None) -> Frame:
    """The frame with its own camera, or with that of the map.

    Raises InputError when the map's camera has another image size.
    """
    if frame.camera is not None or camera is None:
        return frame
    if camera.size_wh != (frame.image.shape[1], frame.image.shape[0]):
        raise InputError(f'expected intrinsics for {frame.image.shape[1]}x'
                         f'{frame.image.shape[0]} images, found none, and the map was made '
                         f'with {camera.width}x{camera.height}; give a calibration')
    return replace(frame, camera=camera)
