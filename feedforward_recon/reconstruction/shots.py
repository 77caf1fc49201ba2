"""``Shot``: one image, encoded, as pairs and tracks need it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.model import Encoder
from feedforward_recon.model.compact import scaled_down
from feedforward_recon.types import Features, Frame


@dataclass(frozen=True)
class Photo:
    """A photo as it came: its stamp and name, and the number of the shot that shows it.

    Copies of one photo are one shot.
    """

    stamp_ns: int
    source: str
    shot: int


@dataclass(frozen=True)
class EncodedImage:
    """What an image says, whatever camera took it; fields as in ``Shot``."""

    features: Features
    rgb: np.ndarray
    gray: np.ndarray


@dataclass(frozen=True)
class Shot:
    """An encoded image.

    xy: normalised coordinates [N, 2] of the features; rgb: their colours uint8 [N, 3]; gray: the
    image uint8 [H, W]. Large images are seen at the size that the encoder sees; size_wh:
    of the photo before. is_guessed: nobody said what the camera is. content: names the pixels of
    the photo.
    """

    features: Features
    camera: Camera
    xy: np.ndarray
    rgb: np.ndarray
    gray: np.ndarray
    size_wh: tuple[int, int]
    stamp_ns: int = 0
    source: str = ''
    is_guessed: bool = False
    content: str = ''

    def seen_by(self, camera: Camera) -> Shot:
        """The same image, taken by another camera."""
        return replace(self, camera=camera, xy=camera.normalise(self.features.keypoints))

    def without_pixels(self) -> Shot:
        """The features alone, which is all that pairs of them need."""
        return replace(self, rgb=self.rgb[:0], gray=self.gray[:0, :0])


def encoded_image(image: np.ndarray, encoder: Encoder) -> EncodedImage:
    """Encode an RGB image uint8 [H, W, 3] of the size that the encoder sees.

    Raises InputError for an image that is not RGB.
    """
    features = encoder.encode(image)
    limits = np.array(image.shape[1::-1]) - 1
    column, row = np.clip(np.rint(features.keypoints), 0, limits).astype(int).T
    return EncodedImage(features, image[row, column], cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


def taken_by(camera: Camera, encoded: EncodedImage, frame: Frame, content: str = '', *,
             is_guessed: bool = False) -> Shot:
    """The shot of a frame that was encoded, perhaps smaller; camera: at the size of the frame."""
    height, width = frame.image.shape[:2]
    camera = camera.resized(encoded.gray.shape[::-1])
    features = encoded.features
    return Shot(features, camera, camera.normalise(features.keypoints), encoded.rgb, encoded.gray,
                (width, height), frame.stamp_ns, frame.source, is_guessed, content)


def shot_of(frame: Frame, camera: Camera, encoder: Encoder, max_pixels: int, *,
            is_guessed: bool = False) -> Shot:
    """Encode a frame, at the size of at most ``max_pixels`` that the encoder sees.

    Raises InputError for an image that is not RGB.
    """
    encoded = encoded_image(scaled_down(frame.image, max_pixels), encoder)
    return taken_by(camera, encoded, frame, is_guessed=is_guessed)
