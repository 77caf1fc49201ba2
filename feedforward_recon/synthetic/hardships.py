"""What makes images hard to find again: blur, darkness, little contrast, distance, roll.

Each takes a frame with camera and pose and returns the frame that a worse moment would have
given; camera and pose stay true. Depth is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import make_transform, so3_exp
from feedforward_recon.types import Frame

BLUR_PX = 15  # length of the path of a point while the shutter is open; odd
DARK, DARK_NOISE = 0.12, 3.0  # share of the light, and noise in grey levels
FLAT, FLAT_NOISE = 0.15, 2.0  # share of the contrast, and noise in grey levels
ROLL_DEG = 30.0
GREY = 128.0


def blurred(frame: Frame, seed: int = 0) -> Frame:
    """The camera moved while the shutter was open, in a random direction."""
    angle = np.random.default_rng(seed).uniform(0, 180)
    kernel = np.zeros((BLUR_PX, BLUR_PX), np.float32)
    kernel[BLUR_PX // 2] = 1
    turn = cv2.getRotationMatrix2D(((BLUR_PX - 1) / 2,) * 2, angle, 1)
    turned = np.asarray(cv2.warpAffine(kernel, turn, kernel.shape), np.float32)
    path = np.divide(turned, float(turned.sum()))
    return _seen(frame, np.asarray(cv2.filter2D(frame.image, -1, path), np.uint8))


def dark(frame: Frame, seed: int = 0) -> Frame:
    """Little light: dark, and noisy beside that."""
    return _seen(frame, _noisy(frame.image * DARK, DARK_NOISE, seed))


def flat(frame: Frame, seed: int = 0) -> Frame:
    """Little texture is left: haze, or a wall in even light."""
    return _seen(frame, _noisy(GREY + FLAT * (frame.image - GREY), FLAT_NOISE, seed))


def farther(frame: Frame, seed: int = 0) -> Frame:
    """Everything half as large, as from twice the distance. The seed does not matter."""
    camera = _camera(frame)
    size = camera.width // 2, camera.height // 2
    half = replace(camera, width=size[0], height=size[1], fx=camera.fx / 2, fy=camera.fy / 2,
                   cx=(camera.cx + 0.5) / 2 - 0.5, cy=(camera.cy + 0.5) / 2 - 0.5)
    image = cv2.resize(frame.image[:2 * size[1], :2 * size[0]], size,
                       interpolation=cv2.INTER_AREA)
    return replace(_seen(frame, np.asarray(image)), camera=half)


def rolled(frame: Frame, seed: int = 0) -> Frame:
    """The camera turned about its axis; what the image did not show is black.

    The seed decides to which side. Distortion is taken as radial.
    """
    camera = _camera(frame)
    angle = np.deg2rad(ROLL_DEG) * np.random.default_rng(seed).choice([-1, 1])
    R = so3_exp(np.array([0.0, 0.0, angle]))
    K = camera.K
    image = cv2.warpPerspective(frame.image, K @ R.T @ np.linalg.inv(K), camera.size_wh)
    pose = None if frame.T_map_cam is None \
        else frame.T_map_cam @ make_transform(R, np.zeros(3))
    return replace(_seen(frame, np.asarray(image)), T_map_cam=pose)


HARDSHIPS: dict[str, Callable[[Frame, int], Frame]] = {
    'blur': blurred, 'dark': dark, 'low contrast': flat, 'twice the distance': farther,
    '30 degrees of roll': rolled}


def _camera(frame: Frame) -> Camera:
    assert frame.camera is not None, 'hardships need the camera of a frame'
    return frame.camera


def _seen(frame: Frame, image: NDArray[np.uint8]) -> Frame:
    return replace(frame, image=image, depth=None, right=None)


def _noisy(image: NDArray[np.floating], sigma: float, seed: int) -> NDArray[np.uint8]:
    grain = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.clip(np.rint(image + grain), 0, 255).astype(np.uint8)
