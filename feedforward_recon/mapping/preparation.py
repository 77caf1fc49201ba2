"""From a frame as it came to a view the pipeline can trust: sizes, camera, depth, sharpness."""

from __future__ import annotations

import logging

import cv2
import numpy as np

from feedforward_recon.config import TrackingConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.mapping.keyframes import View, sharpness
from feedforward_recon.types import Frame

log = logging.getLogger(__name__)


class Preparation:
    """Checks frames against the first one and fills in what an uncalibrated source lacks.

    camera: of the newest frame; camera_source: 'given', 'guessed' or 'refined'.
    metric: frames carry depth, so the map is in metres; decided by the first frame.
    """

    def __init__(self, config: TrackingConfig) -> None:
        self.config = config
        self.camera: Camera | None = None
        self.camera_source = 'given'
        self.metric = False

    def view(self, frame: Frame, index: int) -> View:
        """The frame in the form that all steps share.

        Raises InputError for images that are not RGB, or whose size, camera or depth disagree.
        """
        check_rgb(frame)
        image = frame.image
        size_wh = (image.shape[1], image.shape[0])
        if self.camera is None:
            self._start(frame, size_wh)
        camera = self._checked_camera(frame, size_wh)
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return View(index, frame.stamp_ns, image, gray, camera, self._depth(frame),
                    sharpness(gray), frame.source, frame.T_map_cam)

    def refocus(self, camera: Camera) -> None:
        """Use a refined camera for the frames that come without one."""
        self.camera, self.camera_source = camera, 'refined'

    def _start(self, frame: Frame, size_wh: tuple[int, int]) -> None:
        self.metric = frame.depth is not None
        if frame.camera is not None:
            self.camera = frame.camera
            return
        fov_deg = self.config.guessed_fov_deg
        log.warning('no camera calibration: assuming a horizontal field of view of %.0f degrees '
                    'and refining it', fov_deg)
        self.camera, self.camera_source = Camera.from_fov(fov_deg, size_wh), 'guessed'

    def _checked_camera(self, frame: Frame, size_wh: tuple[int, int]) -> Camera:
        assert self.camera is not None
        if self.camera.size_wh != size_wh:
            raise InputError(f'expected images of {self.camera.width}x{self.camera.height} as '
                             f'before, found {size_wh[0]}x{size_wh[1]} in {frame.source}; '
                             'start a new map for another camera')
        if frame.camera is None or self.camera_source == 'refined':
            return self.camera
        if frame.camera.size_wh != size_wh:
            raise InputError(f'expected intrinsics for {size_wh[0]}x{size_wh[1]}, found them for '
                             f'{frame.camera.width}x{frame.camera.height} in {frame.source}; '
                             'give the calibration of this image size')
        self.camera = frame.camera
        return frame.camera

    def _depth(self, frame: Frame) -> np.ndarray | None:
        """Depth with 0 wherever it is missing, not finite or too far; None without any."""
        if frame.depth is None or not self.metric:
            return None
        depth = fitted_depth(frame)
        with np.errstate(invalid='ignore'):
            good = (depth > 0) & (depth < self.config.max_depth_m)
        return np.where(good, depth, 0).astype(np.float32) if good.any() else None


def fitted_depth(frame: Frame) -> np.ndarray:
    """Depth of a frame at the size of its image; another size is scaled to it (nearest).

    Raises InputError for depth whose sides are in another ratio: it shows something else.
    """
    assert frame.depth is not None
    (height, width), size_hw = frame.depth.shape, frame.image.shape[:2]
    if (height, width) == size_hw:
        return frame.depth
    if abs(width * size_hw[0] - height * size_hw[1]) > max(size_hw):
        raise InputError(f'expected depth with the sides of the image, {size_hw[1]}x{size_hw[0]} '
                         f'or scaled, found {width}x{height} in {frame.source}; register depth '
                         'to the image')
    return cv2.resize(frame.depth, size_hw[::-1], interpolation=cv2.INTER_NEAREST)


def check_rgb(frame: Frame) -> None:
    """Raises InputError for an image that is not RGB."""
    image = frame.image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError('expected an RGB image uint8 [H, W, 3], found '
                         f'{image.dtype} {image.shape} in {frame.source}; convert it first')
