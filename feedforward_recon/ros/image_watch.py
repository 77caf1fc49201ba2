"""Judges pixels: images and depth that cannot be mapped, such as black or blurred ones."""

from __future__ import annotations

import cv2
import numpy as np

from feedforward_recon.mapping.preparation import is_in_another_unit

BLACK, WHITE, FLAT = 16, 239, 4  # gray levels: 98 % of the pixels below, above, within
# Mean absolute Laplacian over contrast, of cells of 4 x 4 pixels: their mean holds little of the
# noise and the rounding that make every blurred image look sharp. Of 290 images of 11 real sets
# one lies below; after a Gaussian blur of 8 px and noise of 2 gray levels all do, of 5 px 5 of 6.
BLURRED = 0.16
CELL = 4
FEW_DEPTHS = 0.01  # share of pixels below which a depth image holds no measurement


class ImageWatch:
    """Looks at the pixels: images and depth that cannot be mapped, and for how many frames.

    faults: fault now -> consecutive images with it. Codes: BLACK, WHITE, FLAT, BLURRED,
    REPEATED, DEPTH_EMPTY, DEPTH_UNIT.
    """

    def __init__(self) -> None:
        self.faults: dict[str, int] = {}
        self._before: np.ndarray | None = None

    def look(self, image: np.ndarray, depth: np.ndarray | None = None) -> None:
        """Judge one image [H, W, 3] uint8 and its depth [H, W], if any, in about a millisecond."""
        sample = np.ascontiguousarray(image[::4, ::4])
        now = {_picture_fault(image, sample)}
        if self._before is not None and np.array_equal(sample, self._before):
            now.add('REPEATED')
        if depth is not None and _measured_share(depth) < FEW_DEPTHS:
            now.add('DEPTH_EMPTY')
        if depth is not None and is_in_another_unit(depth):
            now.add('DEPTH_UNIT')
        self._before = sample
        self.faults = {code: self.faults.get(code, 0) + 1 for code in sorted(now - {''})}


def _picture_fault(image: np.ndarray, sample: np.ndarray) -> str:
    low, high = np.percentile(sample, (2, 98))
    if high < BLACK:
        return 'BLACK'
    if low > WHITE:
        return 'WHITE'
    if high - low < FLAT:
        return 'FLAT'
    height, width = image.shape[:2]
    middle = image[height // 4:height - height // 4, width // 4:width - width // 4, 1]
    cells = cv2.resize(middle.astype(np.float32), None, fx=1 / CELL, fy=1 / CELL,
                       interpolation=cv2.INTER_AREA)
    detail = np.abs(cv2.Laplacian(cells, cv2.CV_32F)).mean()
    return 'BLURRED' if detail < BLURRED * sample[..., 1].std() else ''


def _measured_share(depth: np.ndarray) -> float:
    sample = depth[::4, ::4]
    return float(np.mean(np.isfinite(sample) & (sample > 0)))
