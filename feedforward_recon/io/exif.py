"""The camera of a photo, by the focal length in its EXIF block."""

from __future__ import annotations

import io
import math
import struct
import warnings
from typing import TYPE_CHECKING, Any

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FILM_DIAGONAL_MM = math.hypot(36, 24)
UNIT_MM = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}  # FocalPlaneResolutionUnit
INCH = 2
PLAUSIBLE = (0.2, 20.0)  # focal lengths, in longer sides of the image


def exif_camera(data: bytes, size_wh: tuple[int, int]) -> Camera | None:
    """Undistorted camera of a JPEG at its stored size; None without a plausible focal length.

    Raises InputError for an EXIF block that cannot be read.
    """
    tags, longer = _exif_tags(data), max(size_wh)
    for focal_px in _focal_lengths_px(tags, size_wh):
        if PLAUSIBLE[0] * longer <= focal_px <= PLAUSIBLE[1] * longer:
            width, height = size_wh
            return Camera(width, height, focal_px, focal_px, (width - 1) / 2, (height - 1) / 2)
    return None


def _exif_tags(data: bytes) -> Mapping[int, Any]:
    """Tags of the Exif directory of a JPEG; none of other files.

    Pillow warns of damage where it does not raise, and goes on.
    """
    from PIL.ExifTags import IFD
    from PIL.Image import Exif
    from PIL.JpegImagePlugin import JpegImageFile  # Image.open would refuse 200 megapixels

    if not data.startswith(b'\xff\xd8'):
        return {}
    try:
        with warnings.catch_warnings(record=True) as damage:
            warnings.simplefilter('always')
            exif = Exif()
            exif.load(JpegImageFile(io.BytesIO(data)).info.get('exif', b''))
            tags = exif.get_ifd(IFD.Exif)
        if damage:
            raise ValueError(str(damage[0].message).strip())
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError,
            struct.error) as error:
        raise InputError(f'expected an EXIF block that can be read, found {error}') from None
    return tags


def _focal_lengths_px(tags: Mapping[int, Any], size_wh: tuple[int, int]) -> Iterator[float]:
    """What the tags say about the focal length, the best first; maybe nonsense.

    The 35 mm equivalent compares diagonals (CIPA DCG-001), whatever the shape of the sensor and
    however the camera was held. The resolution is that of the size that EXIF names.
    """
    from PIL.ExifTags import Base

    yield _number(tags, Base.FocalLengthIn35mmFilm) * math.hypot(*size_wh) / FILM_DIAGONAL_MM
    taken = max(_number(tags, Base.ExifImageWidth), _number(tags, Base.ExifImageHeight))
    unit_mm = UNIT_MM.get(tags.get(Base.FocalPlaneResolutionUnit, INCH), math.nan)
    per_mm = _number(tags, Base.FocalPlaneXResolution) / unit_mm
    yield (_number(tags, Base.FocalLength) * per_mm
           * (max(size_wh) / taken if taken > 0 else 1.0))


def _number(tags: Mapping[int, Any], tag: int) -> float:
    """The value of a tag; NaN where it is absent or no number."""
    try:
        return float(tags.get(tag, math.nan))
    except (TypeError, ValueError):
        return math.nan
