"""From a frame as it came to a checked ``View``: sizes, camera, depth, sharpness."""

from __future__ import annotations

import logging
from dataclasses import replace

import cv2
import numpy as np

from feedforward_recon.config.schema import TrackingConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.stereo import StereoRig
from feedforward_recon.mapping.keyframes import View, sharpness
from feedforward_recon.mapping.scene_map import StartingMap
from feedforward_recon.mapping.stereo import StereoPair
from feedforward_recon.types import Frame, RightImage

log = logging.getLogger(__name__)
IN_METRES = ('depth', 'stereo', 'given poses')  # scale sources of maps in sensor metres
# Depth cameras see little below 0.3 m and stereo little beyond 50 m: where nearly all of an image
# is nearer, or half of it farther, its numbers are in another unit.
NEAREST_M, FARTHEST_M = 0.5, 100.0
WRONG_UNIT = ('cannot be in metres (16-bit depth: millimetres), so the map would have a wrong '
              'scale')


class Preparation:
    """Checks frames against the first one and fills in what an uncalibrated source lacks.

    camera: of the newest frame; camera_source: 'given', 'guessed', 'refined' or 'predicted'.
    sensor: what the map has its metres from: 'depth' images, 'stereo' pairs, or 'given poses' of
    the map that is continued; '' without. Decided by the first frame, or by that map.
    """

    def __init__(self, config: TrackingConfig, start: StartingMap | None = None) -> None:
        self.config = config
        self.camera: Camera | None = None
        self.camera_source = 'given'
        self.sensor = ''
        if start is not None and start.gauge.scale_source in IN_METRES:
            self.sensor = start.gauge.scale_source
        self._start = start
        self._is_straight = False  # the newest frame says that its camera has no distortion
        self._warned: set[str] = set()
        self._rig: StereoRig | None = None
        self._shift = 0.0  # by which inverse depths of the pair are too large, 1/m

    @property
    def metric(self) -> bool:
        """The map is in metres."""
        return bool(self.sensor)

    def view(self, frame: Frame, index: int) -> View:
        """The frame in the form that all steps share.

        Raises InputError for images that are not RGB, or whose size, camera or depth disagree.
        """
        check_rgb(frame)
        image = frame.image
        size_wh = (image.shape[1], image.shape[0])
        if self.camera is None:
            self._take_first(frame, size_wh)
        camera = self._checked_camera(frame, size_wh)
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return View(index, frame.stamp_ns, image, gray, camera, self._depth(frame),
                    sharpness(gray), frame.source, frame.T_map_cam, self.metric,
                    self.camera_source != 'guessed' or frame.camera is not None,
                    self._stereo(frame, gray))

    def gains_depth(self, frame: Frame) -> bool:
        """The first frames came without depth, this one has it: a map may still be metric."""
        return (self.camera is not None and not self.metric and self._start is None
                and bool(sensor_of(frame)))

    def take_scale(self, frame: Frame) -> None:
        """The map has its metres from what this frame brings."""
        self.sensor = sensor_of(frame)

    def adopt(self, camera: Camera, source: str) -> None:
        """Use a camera that was 'refined' or 'predicted' for the frames that come without one."""
        self.camera, self.camera_source = camera, source

    @property
    def open_calibration(self) -> tuple[str, ...]:
        """What of the calibration may be refined (``geometry.refine``).

        The focal length of a camera that was guessed; else radial distortion, of one that came
        without any, or the shift of a stereo pair, whose images were rectified.
        """
        if self.camera_source != 'given':
            return ('focal',)
        if self._rig is not None:
            return ('shift',)
        return ('radial',) if self._is_straight else ()

    def adopt_calibration(self, camera: Camera, shift: float, refined: tuple[str, ...]) -> None:
        """Use what was refined for the frames to come: a camera, and a shift beyond the last."""
        self._shift += shift
        if 'focal' in refined:
            self.adopt(camera, 'refined')
        elif 'radial' in refined:
            self.camera = camera

    def _take_first(self, frame: Frame, size_wh: tuple[int, int]) -> None:
        if self._start is None:
            self.take_scale(frame)
        self.camera = frame.camera
        if frame.camera is None and self._start is not None:
            self.camera = self._start.camera  # given, by the map
        elif frame.camera is not None and self._start is not None:
            self.camera = frame.camera.with_distortion_of(self._start.camera)
        elif frame.camera is None:
            self.camera = Camera.from_fov(self.config.guessed_fov_deg, size_wh)
            self.camera_source = 'guessed'

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
        self._is_straight = frame.camera.model == 'plumb_bob' and not frame.camera.is_distorted
        self.camera = frame.camera.with_distortion_of(self.camera)
        return self.camera

    def _warn_once(self, sentence: str, source: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            log.warning(sentence, source)

    def _depth(self, frame: Frame) -> np.ndarray | None:
        """Depth with 0 wherever it is missing, not finite or too far; None without any."""
        if frame.depth is None:
            return None
        if not self.metric:
            self._warn_once('%s has depth, but the map began without and stays monocular; start a '
                            'new map to use it', frame.source)
            return None
        if frame.depth.shape != frame.image.shape[:2]:
            raise InputError(f'expected depth of the image size {frame.image.shape[:2]}, found '
                             f'{frame.depth.shape} in {frame.source}; align depth to the image')
        depth = frame.depth
        if is_in_another_unit(depth):
            self._warn_once(f'%s: the values of its depth {WRONG_UNIT}; check the unit of the '
                            'depth camera', frame.source)
        return usable_depth(depth, self.config)

    def _stereo(self, frame: Frame, gray: np.ndarray) -> StereoPair | None:
        """The pair that a frame is half of; None without a right image, or where depth is better.

        Raises InputError for a pair that does not fit together.
        """
        right = frame.right
        if right is None or frame.depth is not None:
            return None
        if not self.metric:
            self._warn_once('%s has a right image, but the map began without and stays monocular; '
                            'start a new map to use it', frame.source)
            return None
        check_rgb(replace(frame, image=right.image))
        if frame.camera is None or right.image.shape != frame.image.shape:
            raise InputError('expected the calibration of both cameras and images of one size, '
                             f'found {right.image.shape[1]}x{right.image.shape[0]} beside '
                             f'{frame.image.shape[1]}x{frame.image.shape[0]} in {frame.source}; '
                             'calibrate the pair')
        return StereoPair(gray, cv2.cvtColor(right.image, cv2.COLOR_RGB2GRAY),
                          self._rig_of(frame.camera, right), self.config.stereo_noise_px,
                          self.config.min_disparity_px, self._shift)

    def _rig_of(self, left: Camera, right: RightImage) -> StereoRig:
        """The rig of a pair; it is made anew only when the calibration changed."""
        rig = self._rig
        if rig is None or (rig.left, rig.right) != (left, right.camera) \
                or not np.array_equal(rig.T_left_right, right.T_left_right):
            self._rig = rig = StereoRig(left, right.camera, right.T_left_right)
        return rig


def sensor_of(frame: Frame) -> str:
    """What tells the metres of a frame: 'depth', 'stereo' or ''."""
    if frame.depth is not None:
        return 'depth'
    return '' if frame.right is None else 'stereo'


def usable_depth(depth: np.ndarray, config: TrackingConfig) -> np.ndarray | None:
    """Depth [H, W] with 0 wherever it is missing, not finite or too far; None without any."""
    with np.errstate(invalid='ignore'):
        good = (depth > 0) & (depth < config.max_depth_m)
    return np.where(good, depth, 0).astype(np.float32) if good.any() else None


def is_in_another_unit(depth: np.ndarray) -> bool:
    """Whether depth [H, W] cannot be in metres: nearly all of it too near, or half too far.

    Depth of less than a tenth of the image says nothing.
    """
    sample = depth[::4, ::4]
    seen = sample[np.isfinite(sample) & (sample > 0)]
    if len(seen) < max(0.1 * sample.size, 1):
        return False
    middle, far = np.percentile(seen, (50, 95))
    return bool(far < NEAREST_M or middle > FARTHEST_M)


def check_rgb(frame: Frame) -> None:
    """Raises InputError for an image that is not RGB."""
    image = frame.image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError('expected an RGB image uint8 [H, W, 3], found '
                         f'{image.dtype} {image.shape} in {frame.source}; convert it first')
