"""A frame at the size the encoder looks at."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from feedforward_recon.types import Frame


def resized_frame(frame: Frame, long_side: int) -> Frame:
    """The frame with its longer side at ``long_side`` pixels; smaller frames stay as they are.

    The image is averaged over areas. Depth takes the nearest stored value: averaging would invent
    surfaces between near and far. The camera follows (distortion coefficients do not change).
    """
    height, width = frame.image.shape[:2]
    scale = long_side / max(width, height)
    if scale >= 1:
        return frame
    size_wh = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = np.asarray(cv2.resize(frame.image, size_wh, interpolation=cv2.INTER_AREA), np.uint8)
    depth = None if frame.depth is None else np.asarray(
        cv2.resize(frame.depth, size_wh, interpolation=cv2.INTER_NEAREST_EXACT), np.float32)
    camera = None if frame.camera is None else frame.camera.resized(size_wh)
    return replace(frame, image=image, depth=depth, camera=camera)
