"""``Shot``: one image, encoded, as pairs and tracks need it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.model import Encoder
from feedforward_recon.model.compact import CompactEncoder, scaled_down
from feedforward_recon.model.preprocess import PreparedImage
from feedforward_recon.types import Features, Frame

# Descriptors bear a roll of 30 degrees: docs/experiments.md, Photos.
ROLLS = 8


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
    of the photo before. camera_source: 'given', 'exif' or 'guessed'. content: names the pixels of
    the photo. prepared: as the network sees it that decodes pairs, if one does.
    """

    features: Features
    camera: Camera
    xy: np.ndarray
    rgb: np.ndarray
    gray: np.ndarray
    size_wh: tuple[int, int]
    stamp_ns: int = 0
    source: str = ''
    camera_source: str = 'given'
    content: str = ''
    prepared: PreparedImage | None = None

    def seen_by(self, camera: Camera) -> Shot:
        """The same image, taken by another camera."""
        return replace(self, camera=camera, xy=camera.normalise(self.features.keypoints))


def encoded_image(image: np.ndarray, encoder: Encoder) -> EncodedImage:
    """Encode an RGB image uint8 [H, W, 3] of the size that the encoder sees.

    Raises InputError for an image that is not RGB.
    """
    features = encoder.encode(image)
    limits = np.array(image.shape[1::-1]) - 1
    column, row = np.clip(np.rint(features.keypoints), 0, limits).astype(int).T
    return EncodedImage(features, image[row, column], cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


def taken_by(camera: Camera, encoded: EncodedImage, frame: Frame, content: str = '', *,
             camera_source: str = 'given') -> Shot:
    """The shot of a frame that was encoded, perhaps smaller; camera: at the size of the frame."""
    height, width = frame.image.shape[:2]
    camera = camera.resized(encoded.gray.shape[::-1])
    features = encoded.features
    return Shot(features, camera, camera.normalise(features.keypoints), encoded.rgb, encoded.gray,
                (width, height), frame.stamp_ns, frame.source, camera_source, content)


def shot_of(frame: Frame, camera: Camera, encoder: Encoder, max_pixels: int, *,
            camera_source: str = 'given') -> Shot:
    """Encode a frame, at the size of at most ``max_pixels`` that the encoder sees.

    Raises InputError for an image that is not RGB.
    """
    encoded = encoded_image(scaled_down(frame.image, max_pixels), encoder)
    return taken_by(camera, encoded, frame, camera_source=camera_source)


def seen_rolled(shot: Shot, encoder: CompactEncoder, roll: int) -> Features:
    """The features of a shot as seen by a camera that is rolled by ``roll`` eighths of a turn.

    The image turns to the left; its gray values describe it as well as its colours.
    """
    turn = cv2.getRotationMatrix2D((0.0, 0.0), 360.0 / ROLLS * roll, 1.0)
    size = np.array(shot.gray.shape[::-1])
    room = np.rint(np.abs(turn[:, :2]) @ size).astype(int)  # for all of the image
    turn[:, 2] = (room - 1) / 2 - turn[:, :2] @ ((size - 1) / 2)
    gray = cv2.warpAffine(shot.gray, turn, room.tolist(), borderValue=float(shot.gray.mean()))
    pixels = shot.features.keypoints @ turn[:, :2].T + turn[:, 2]
    return encoder.describe(cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), pixels)
