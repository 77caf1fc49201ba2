"""Photos as textures: what painted ones alone never show."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from feedforward_recon.errors import InputError

# Of the largest crop of a face's shape, how much is taken at least.
SMALLEST_CROP = 0.3


def photo_files(folder: str | Path) -> list[Path]:
    """The *.jpg files of a folder, by name.

    Raises InputError when there is none.
    """
    files = sorted(Path(folder).glob('*.jpg'))
    if not files:
        raise InputError(f'expected *.jpg photos in {folder}, found none; give another --photos')
    return files


def photo_crop(rng: np.random.Generator, photo: Path, h: int, w: int) -> NDArray[np.float32]:
    """A random crop of a photo, half of the time mirrored, as a texture [h, w, 3] RGB in 0..1.

    Raises InputError for a file that is no image.
    """
    image = cv2.imread(str(photo))
    if image is None:
        raise InputError(f'expected an image in {photo}, found something else; remove the file')
    rows, columns = image.shape[:2]
    scale = min(rows / h, columns / w) * rng.uniform(SMALLEST_CROP, 1)
    height, width = (max(int(scale * side), 1) for side in (h, w))
    top, left = rng.integers((rows - height + 1, columns - width + 1))
    crop = image[top:top + height, left:left + width, ::-1]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    way = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
    resized = cv2.resize(np.ascontiguousarray(crop), (w, h), interpolation=way)
    return resized.astype(np.float32) / np.float32(255)
