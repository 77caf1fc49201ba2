"""Pixels to the bytes of compressed messages; the inverse of `feedforward_recon.io.images`."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from feedforward_recon.io.images import COMPRESSED_DEPTH_HEADER, MILLIMETRES_PER_METRE

JPEG_FORMAT = 'rgb8; jpeg compressed bgr8'
DEPTH_FORMAT = '16UC1; compressedDepth png'
JPEG_QUALITY = 95


def jpeg(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB [H, W, 3] as the bytes of a JPEG file."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode('.jpg', bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].ravel()


def compressed_depth(depth_m: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Depth [H, W] in metres as compressedDepth: millimetres in a PNG behind a short header."""
    millimetres = np.rint(np.where(depth_m > 0, depth_m, 0) * MILLIMETRES_PER_METRE)
    # What 16 bits cannot hold is no measurement, as in depth_image_proc.
    stored = np.where(millimetres > np.iinfo(np.uint16).max, 0, millimetres).astype(np.uint16)
    # Kind 0: no quantisation of inverse depth, so its two parameters mean nothing.
    header = np.frombuffer(COMPRESSED_DEPTH_HEADER.pack(0, 0.0, 0.0), np.uint8)
    return np.concatenate([header, cv2.imencode('.png', stored)[1].ravel()])
