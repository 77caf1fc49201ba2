"""Images of any size -> the input of a network, in the way its weights were trained.

Each network scales images to about half a megapixel with sides that are multiples of a patch.
VGGT and pi3 were trained on Pillow's filters, which differ visibly from OpenCV's; they are
written here as one small matrix per axis. Every result says where each pixel came from, so
that intrinsics found by the network can be brought back to the image as it was.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from feedforward_recon.errors import InputError
from feedforward_recon.model.vit import PATCH

log = logging.getLogger(__name__)
Image = NDArray[np.uint8]
WHITE = 255
PI3_PIXELS = 255_000


@dataclass(frozen=True)
class PreparedImage:
    """An image [H, W, 3] for the network and where it came from.

    A pixel p (x, y) of the original lies at (p + 0.5) * scale_xy - 0.5 + offset_xy.
    """

    image: Image
    scale_xy: tuple[float, float]
    offset_xy: tuple[int, int] = (0, 0)

    def original_K(self, K: NDArray[np.floating]) -> NDArray[np.floating]:
        """K [3, 3] of the original image, of the K that the network found in this one."""
        scale, offset = np.array(self.scale_xy), np.array(self.offset_xy)
        out = np.array(K, float)
        out[:2, 2] = (out[:2, 2] + 0.5 - offset) / scale - 0.5
        out[0, :2] /= scale[0]
        out[1, 1] /= scale[1]
        return out


    def prepared_K(self, K: NDArray[np.floating]) -> NDArray[np.floating]:
        """K [3, 3] of this image, of that of the original."""
        scale, offset = np.array(self.scale_xy), np.array(self.offset_xy)
        out = np.array(K, float)
        out[:2, 2] = (out[:2, 2] + 0.5) * scale - 0.5 + offset
        out[0, :2] *= scale[0]
        out[1, 1] *= scale[1]
        return out


def crop(images: Sequence[NDArray], size: int = 518) -> list[PreparedImage]:
    """VGGT's default: width ``size``; rows beyond ``size`` are cut off on both sides."""
    placed = []
    for image in map(checked_rgb, images):
        height, width = image.shape[:2]
        rows = _to_patch(height * size / width)
        resized = _resized(image, (rows, size), bicubic)
        start = max(0, (rows - size) // 2)
        placed.append(replace(resized, image=resized.image[start:start + size],
                              offset_xy=(0, -start)))
    return padded_to_common_size(placed)


def match_pixels(images: Sequence[NDArray], pixels: int = PI3_PIXELS,
                 patches: int = 1) -> list[PreparedImage]:
    """The way of pi3: all images at one size of about ``pixels``, chosen from the first.

    patches: sides are multiples of so many patches; Speed3R was trained with 4.
    """
    arrays, unit = [checked_rgb(image) for image in images], patches * PATCH
    height, width = arrays[0].shape[:2]
    factor = (pixels / (width * height)) ** 0.5 / unit
    columns, rows = round(width * factor), round(height * factor)
    while columns * rows * unit**2 > pixels:
        if columns / max(rows, 1) > width / height:
            columns -= 1
        else:
            rows -= 1
    if not rows or not columns:
        raise _too_small(f'an image of {width}x{height}')
    return [_resized(image, (rows * unit, columns * unit), lanczos) for image in arrays]


def whole_patches(images: Sequence[NDArray], pixels: int, patch: int) -> list[PreparedImage]:
    """The way of `tiny`: at most so many pixels, sides multiples of a patch, shape kept.

    What is left over at the longer side is cut off on both sides.
    """
    height, width = checked_rgb(images[0]).shape[:2]
    rows, columns = _nearest_shape(height / width, pixels // patch ** 2)
    factor = patch * max(rows / height, columns / width)
    return [_cut_to(checked_rgb(image), factor, (patch * rows, patch * columns))
            for image in images]


def _nearest_shape(aspect: float, patches: int) -> tuple[int, int]:
    """Rows and columns of patches, nearest in shape; of equally near ones the most patches."""
    fewest = patches - patches // 8
    shapes = [(rows, columns) for rows in range(1, patches + 1)
              for columns in range(-(-fewest // rows), patches // rows + 1)]
    return min(shapes, key=lambda shape: (abs(math.log(shape[0] / shape[1] / aspect)),
                                          -shape[0] * shape[1]))


def _cut_to(image: Image, factor: float, size_hw: tuple[int, int]) -> PreparedImage:
    height, width = image.shape[:2]
    full = max(size_hw[0], round(height * factor)), max(size_hw[1], round(width * factor))
    resized = _opencv_resized(image, full, enlarge=factor > 1)
    top, left = (full[0] - size_hw[0]) // 2, (full[1] - size_hw[1]) // 2
    return PreparedImage(resized[top:top + size_hw[0], left:left + size_hw[1]],
                         (full[1] / width, full[0] / height), (-left, -top))


def longest_side(images: Sequence[NDArray], size: int = 504) -> list[PreparedImage]:
    """The way of DA3: longest side ``size``, other side to the nearest patch, smallest crop."""
    placed = []
    for image in map(checked_rgb, images):
        factor = size / max(image.shape[:2])
        first = tuple(max(1, round(side * factor)) for side in image.shape[:2])
        second = tuple(PATCH * int(side / PATCH + 0.5) for side in first)
        if not all(second):
            raise _too_small(f'an image of {image.shape[1]}x{image.shape[0]}')
        resized = _opencv_resized(_opencv_resized(image, first, enlarge=factor > 1), second,
                                  enlarge=any(b > a for a, b in zip(first, second, strict=True)))
        scale_y, scale_x = np.array(second) / image.shape[:2]
        placed.append(PreparedImage(resized, (scale_x, scale_y)))
    return _cropped_to_common_size(placed)


def padded_to_common_size(placed: list[PreparedImage]) -> list[PreparedImage]:
    """Images of several sizes with white around them, all of the size of the largest sides."""
    sizes = {p.image.shape[:2] for p in placed}
    if len(sizes) < 2:
        return placed
    common = common_size(placed)
    log.warning('images of %d sizes: white is put around them up to %dx%d', len(sizes),
                common[1], common[0])
    return [padded(p, common) for p in placed]


def common_size(placed: Sequence[PreparedImage]) -> tuple[int, int]:
    """Height and width that all of some images fit into."""
    heights, widths = zip(*(p.image.shape[:2] for p in placed), strict=True)
    return max(heights), max(widths)


def stacked(placed: Sequence[PreparedImage]) -> torch.Tensor:
    """Images of one size as float32 [1, N, 3, H, W] in 0..1.

    Raises InputError when there is none or the sizes differ.
    """
    sizes = {p.image.shape for p in placed}
    if len(sizes) != 1:
        raise InputError(f'expected images of one size, found {len(sizes)} sizes; prepare them '
                         'in one call')
    return torch.from_numpy(np.stack([p.image for p in placed])).permute(0, 3, 1, 2)[None] / 255


def checked_rgb(image: NDArray) -> Image:
    """An RGB image uint8 [H, W, 3]; transparent pixels [H, W, 4] are laid on white."""
    if image.ndim != 3 or image.shape[2] not in (3, 4) or image.dtype != np.uint8:
        raise InputError('expected an RGB or RGBA image uint8 [H, W, 3 or 4], found '
                         f'{image.dtype} {list(image.shape)}; convert it first')
    if image.shape[2] == 3:
        return image
    alpha = image[..., 3:].astype(np.float32) / 255
    blended = image[..., :3] * alpha + WHITE * (1 - alpha)
    return np.rint(blended).astype(np.uint8)


def bicubic(x: NDArray[np.floating]) -> NDArray[np.floating]:
    """Keys' cubic kernel with a = -0.5 (1981, eq. 15); zero beyond 2."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def lanczos(x: NDArray[np.floating]) -> NDArray[np.floating]:
    """Windowed sinc with three lobes; zero beyond 3."""
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


def resampled(image: Image, size_hw: Sequence[int],
              kernel: Callable[[NDArray], NDArray]) -> Image:
    """The image at another size as Pillow makes it; each pass is rounded to bytes.

    The horizontal pass comes first, as in the Pillow of the time when the networks were
    trained (newer ones choose the order by cost, which changes sharp edges a little).
    """
    across = np.tensordot(_weights(image.shape[1], size_hw[1], kernel),
                          image.astype(np.float32), (1, 1))  # [W', H, 3]
    down = np.tensordot(_weights(image.shape[0], size_hw[0], kernel), _bytes(across), (1, 1))
    return _bytes(down).astype(np.uint8)


def _bytes(values: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.floor(values.clip(0, 255) + 0.5).astype(np.float32)


def _weights(size_in: int, size_out: int, kernel: Callable[[NDArray], NDArray],
             ) -> NDArray[np.float32]:
    """Matrix [out, in] of one axis; the kernel is widened when the axis shrinks."""
    scale = size_in / size_out
    centres = (np.arange(size_out) + 0.5) * scale
    distance = np.arange(size_in) + 0.5 - centres[:, None]
    weights = kernel(distance / max(scale, 1.0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _resized(image: Image, size_hw: Sequence[int],
             kernel: Callable[[NDArray], NDArray]) -> PreparedImage:
    rows, columns = size_hw
    height, width = image.shape[:2]
    return PreparedImage(resampled(image, size_hw, kernel), (columns / width, rows / height))


def _opencv_resized(image: Image, size_hw: Sequence[int], *, enlarge: bool) -> Image:
    if tuple(size_hw) == image.shape[:2]:
        return image
    method = cv2.INTER_CUBIC if enlarge else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, (size_hw[1], size_hw[0]), interpolation=method),
                      np.uint8)


def _to_patch(side: float) -> int:
    rounded = round(side / PATCH) * PATCH
    if not rounded:
        raise _too_small(f'a side of {side:.0f} px after scaling')
    return rounded


def _too_small(found: str) -> InputError:
    return InputError(f'expected images of at least one patch of {PATCH} px in each direction, '
                      f'found {found}; use less elongated images')


def padded(placed: PreparedImage, size_hw: Sequence[int]) -> PreparedImage:
    """White around the image, centred; an odd rest goes to the right and below."""
    (height, width), (rows, columns) = placed.image.shape[:2], size_hw
    top, left = (rows - height) // 2, (columns - width) // 2
    canvas = np.full((rows, columns, 3), WHITE, np.uint8)
    canvas[top:top + height, left:left + width] = placed.image
    x, y = placed.offset_xy
    return replace(placed, image=canvas, offset_xy=(x + left, y + top))


def _cropped_to_common_size(placed: list[PreparedImage]) -> list[PreparedImage]:
    sizes = {p.image.shape[:2] for p in placed}
    if len(sizes) < 2:
        return placed
    rows, columns = (min(size[axis] for size in sizes) for axis in (0, 1))
    log.warning('images of %d sizes: all are cut to %dx%d', len(sizes), columns, rows)
    return [_cropped(p, rows, columns) for p in placed]


def _cropped(placed: PreparedImage, rows: int, columns: int) -> PreparedImage:
    top, left = (placed.image.shape[0] - rows) // 2, (placed.image.shape[1] - columns) // 2
    x, y = placed.offset_xy
    return replace(placed, image=placed.image[top:top + rows, left:left + columns],
                   offset_xy=(x - left, y - top))
