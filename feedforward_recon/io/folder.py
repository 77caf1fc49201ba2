"""Folders of images: with a cameras.json, plain, or a single image file.

``cameras.json`` holds ``frames``, each with file, timestamp (s or null), K (3x3 or null),
distortion, T_world_camera (4x4 or null), depth (file or null) and, for stereo, camera.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.io.images import decode_compressed, decode_depth_image, depth_in_metres
from feedforward_recon.io.source import (
    SECOND_NS,
    UNSTAMPED_STEP_NS,
    Source,
    SourceOptions,
    check_stamps,
    distortion_model,
)
from feedforward_recon.types import FloatArray, Frame

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

IMAGE_SUFFIXES = frozenset({'.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm',
                            '.pgm'})
ROTATION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ImageEntry:
    """One image of a folder, not read yet; K [3, 3] belongs to the image's own size."""

    image: Path
    stamp_ns: int
    depth: Path | None = None
    K: FloatArray | None = None
    distortion: tuple[float, ...] = ()
    T_map_cam: FloatArray | None = None


class FolderSource(Source):
    """Image files listed beforehand; existence and stamps are checked when it is opened."""

    def __init__(self, root: Path, entries: Sequence[ImageEntry], options: SourceOptions,
                 depth_units_per_metre: float = 1000.0, invalid_depth: int = 0) -> None:
        """Refuse missing files and stamps that do not increase.

        depth_units_per_metre: what a stored depth value counts, unless the options say.
        invalid_depth: stored value, besides 0, that means no measurement.
        """
        super().__init__(str(root), options)
        self._root = root
        self._entries = entries
        self._units = options.depth_units_per_metre or depth_units_per_metre
        self._invalid_depth = invalid_depth
        _check_entries(root, entries, options.use_depth)
        self.has_depth = options.use_depth and all(e.depth is not None for e in entries)
        self.has_poses = all(e.T_map_cam is not None for e in entries)
        self.calibrated = options.has_camera or all(e.K is not None for e in entries)

    @property
    def total(self) -> int:
        """Images in the folder."""
        return len(self._entries)

    def _read(self, indices: range) -> Iterator[Frame]:
        return (self._frame(self._entries[index]) for index in indices)

    def _frame(self, entry: ImageEntry) -> Frame:
        image = decode_compressed(_bytes(entry.image), str(entry.image))
        size_wh = (image.shape[1], image.shape[0])
        return Frame(entry.stamp_ns, image, self._depth(entry), self._camera(entry, size_wh),
                     entry.image.relative_to(self._root).as_posix(), entry.T_map_cam)

    def _depth(self, entry: ImageEntry) -> np.ndarray | None:
        if entry.depth is None or not self.options.use_depth:
            return None
        stored = decode_depth_image(_bytes(entry.depth), str(entry.depth))
        if self._invalid_depth and stored.dtype.kind == 'u':
            stored = np.where(stored == self._invalid_depth, 0, stored)
        return depth_in_metres(stored, self._units)

    def _camera(self, entry: ImageEntry, size_wh: tuple[int, int]) -> Camera | None:
        if self.options.has_camera or entry.K is None:
            return self.options.camera_for(size_wh)
        return Camera.from_matrix(entry.K, size_wh, entry.distortion,
                                  distortion_model(entry.distortion))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f'{path}: expected a readable file, found {error.strerror}; check the '
                         'file and its permissions') from None


def _check_entries(root: Path, entries: Sequence[ImageEntry], use_depth: bool) -> None:
    if not entries:
        raise InputError(f'{root}: expected images, found none; give a folder with images')
    for entry in entries:
        for path in (entry.image, entry.depth if use_depth else None):
            if path is not None and not os.path.isfile(path):
                raise InputError(f'{path}: expected an image file, found none; restore it or '
                                 'remove it from the list')
    for before, after in pairwise(entries):
        check_stamps(before.stamp_ns, after.stamp_ns, str(after.image))


def natural_key(path: Path) -> list[tuple[bool, int, str]]:
    """Sort key that puts img2 before img10."""
    pieces = re.split(r'(\d+)', path.name)
    return [(not piece.isdigit(), int(piece) if piece.isdigit() else 0, piece)
            for piece in pieces if piece]


def images_in(folder: Path) -> list[Path]:
    """Image files of a folder in natural order; hidden files do not count."""
    return sorted((path for path in folder.iterdir()
                   if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.')),
                  key=natural_key)


def plain_entries(images: Iterable[Path]) -> list[ImageEntry]:
    """Images in the given order, stamped by their index (100 ms apart)."""
    return [ImageEntry(path, index * UNSTAMPED_STEP_NS) for index, path in enumerate(images)]


def open_cameras_json(root: Path, options: SourceOptions) -> FolderSource:
    """Source of a folder with a cameras.json; of a stereo set, one camera's images.

    Raises InputError when the file is damaged or names files that are missing.
    """
    path = root / 'cameras.json'
    frames = _one_camera(_frames_of(path), options.camera, path)
    stamped = [frame.get('timestamp') is not None for frame in frames]
    if any(stamped) and not all(stamped):
        raise InputError(f'{path}: expected a timestamp for every frame or for none, found '
                         f'{sum(stamped)} of {len(stamped)}; complete or remove them')
    entries = [_entry(path, index, frame) for index, frame in enumerate(frames)]
    return FolderSource(root, entries, options)


def _frames_of(path: Path) -> list[dict[str, Any]]:
    try:
        # Decimal keeps all digits of a time stamp; a float would lose nanoseconds.
        document = json.loads(_bytes(path), parse_float=Decimal)
    except ValueError as error:
        raise InputError(f'{path}: expected JSON, found {error}; restore the file') from None
    frames = document.get('frames') if isinstance(document, dict) else None
    if not isinstance(frames, list) or not all(isinstance(f, dict) for f in frames) or not frames:
        raise InputError(f'{path}: expected a list "frames" with one object per image, found '
                         'none; restore the file')
    return frames


def _one_camera(frames: list[dict[str, Any]], camera: str, path: Path) -> list[dict[str, Any]]:
    names = sorted({str(frame['camera']) for frame in frames if frame.get('camera') is not None})
    if not names:
        return frames
    if camera not in names:
        raise InputError(f'{path}: expected a camera of {names}, found {camera!r}; choose one')
    return [frame for frame in frames if frame.get('camera') == camera]


def _entry(path: Path, index: int, frame: dict[str, Any]) -> ImageEntry:
    root, where = path.parent, f'{path}: frame {index}'
    stamp, depth = frame.get('timestamp'), frame.get('depth')
    distortion = frame.get('distortion') or ()
    try:
        stamp_ns = index * UNSTAMPED_STEP_NS if stamp is None else stamp_from_seconds(stamp)
        return ImageEntry(root / frame['file'], stamp_ns, root / depth if depth else None,
                          _matrix(frame.get('K'), 3, where), tuple(map(float, distortion)),
                          _pose(frame.get('T_world_camera'), where))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f'{where}: expected file, timestamp, K, distortion, T_world_camera and '
                         f'depth, found {type(error).__name__}: {error}; correct the file'
                         ) from None


def stamp_from_seconds(text: Any) -> int:
    """Nanoseconds of decimal seconds, exactly; ``text`` is a str, int, float or Decimal.

    Raises ValueError when it is not a finite number.
    """
    try:
        return int((Decimal(text) * SECOND_NS).to_integral_value())
    except (InvalidOperation, OverflowError, TypeError):
        raise ValueError(f'expected seconds, found {text!r}') from None


def _matrix(values: Any, size: int, where: str) -> FloatArray | None:
    if values is None:
        return None
    matrix = np.array(values, float)
    if matrix.shape != (size, size) or not np.isfinite(matrix).all():
        raise InputError(f'{where}: expected a finite {size}x{size} matrix, found '
                         f'{list(matrix.shape)}; correct the file')
    return matrix


def _pose(values: Any, where: str) -> FloatArray | None:
    T_world_cam = _matrix(values, 4, where)
    if T_world_cam is not None:
        check_pose(T_world_cam, where)
    return T_world_cam


def check_pose(T: FloatArray, where: str) -> None:
    """Refuse a matrix [4, 4] that is no rigid motion.

    Raises InputError.
    """
    R = T[:3, :3]
    error = np.abs(R @ R.T - np.eye(3)).max()
    if error > ROTATION_TOLERANCE or np.linalg.det(R) < 0 or np.any(T[3] != (0, 0, 0, 1)):
        raise InputError(f'{where}: expected a rigid camera-to-world pose, found one whose '
                         f'rotation is off by {error:.2g}; correct the poses')
