"""The right camera of a stereo pair: its calibration, and its images as they arrive."""

from __future__ import annotations

from dataclasses import dataclass

from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.stereo import StereoRig
from feedforward_recon.io.stereo import right_pose
from feedforward_recon.ros.convert import calibration_of, camera_from_info, image_rgb
from feedforward_recon.types import FloatArray, RightImage

MISSING = ('expected CameraInfo of both cameras, found none for the right one; remap '
           'right/camera_info, or start the driver with the calibration of the pair')


@dataclass(frozen=True)
class RightArrival:
    """The right image of a moment, with its camera and T_left_right [4, 4] in metres."""

    image: Image | CompressedImage
    camera: Camera
    T_left_right: FloatArray

    def decoded(self, topic: str) -> RightImage:
        """The image as the core takes it. Raises InputError for damage and unknown encodings."""
        return RightImage(image_rgb(self.image, topic), self.camera, self.T_left_right)


class PairCalibration:
    """Where the right camera stands, from the CameraInfo of both cameras.

    rectified: the images are, so that P holds and R does not. problem: why there is no pair, ''
    if there is one.
    """

    def __init__(self, *, rectified: bool) -> None:
        self.problem = MISSING
        self._rectified = rectified
        self._left: CameraInfo | None = None
        self._right: CameraInfo | None = None
        self._found: tuple[Camera, FloatArray] | None = None

    @property
    def is_complete(self) -> bool:
        """Both calibrations have come."""
        return self._left is not None and self._right is not None

    def take_left(self, message: CameraInfo) -> None:
        """The calibration of the left camera."""
        if not _is_same(message, self._left):
            self._left = message
            self._judge()

    def take_right(self, message: CameraInfo) -> None:
        """The calibration of the right camera."""
        if not _is_same(message, self._right):
            self._right = message
            self._judge()

    def arrival(self, image: Image | CompressedImage | None) -> RightArrival | None:
        """A right image with its camera; None without, or while the pair is of no use."""
        return None if image is None or self._found is None \
            else RightArrival(image, *self._found)

    def _judge(self) -> None:
        self._found = None
        if self._left is None or self._right is None:
            self.problem = MISSING
            return
        try:
            left, right = (camera_from_info(message, self._rectified, f'{side} camera_info')
                           for message, side in ((self._left, 'left'), (self._right, 'right')))
            if left is None or right is None:
                raise InputError('expected two calibrated cameras, found an all-zero calibration; '
                                 'run camera_calibration for the pair')
            T_left_right = right_pose(calibration_of(self._left), calibration_of(self._right),
                                      rectified=self._rectified)
            StereoRig(left, right, T_left_right)
            self._found, self.problem = (right, T_left_right), ''
        except InputError as error:
            self.problem = str(error)


def _is_same(message: CameraInfo, before: CameraInfo | None) -> bool:
    """The same calibration, whatever its stamp."""
    return before is not None and all(
        list(getattr(message, name)) == list(getattr(before, name)) for name in 'dkrp') \
        and (message.width, message.height, message.distortion_model) == \
            (before.width, before.height, before.distortion_model)
