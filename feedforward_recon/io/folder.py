"""Folders of images: with a cameras.json, plain, or a single image file.

``cameras.json`` holds ``frames``, each with file, timestamp (s or null), K (3x3 or null),
distortion, T_world_camera (4x4 or null), depth (file or null) and, for stereo, camera. A set
with the cameras left and right is a stereo pair when it has ``stereo_baseline_m`` (rectified
images) or ``T_left_right`` (4x4, metres) beside ``frames``.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.io.exif import exif_camera
from feedforward_recon.io.images import decode_compressed, decode_depth_image, depth_in_metres
from feedforward_recon.io.source import (
    SECOND_NS,
    UNSTAMPED_STEP_NS,
    Source,
    SourceOptions,
    calibrated_camera,
    calibration_of_file,
    check_stamps,
    checked_size,
    distortion_model,
)
from feedforward_recon.io.stereo import (
    LEFT,
    RIGHT,
    RightEntry,
    beside,
    paired_files,
    pose_in_json,
    right_pose,
)
from feedforward_recon.types import FloatArray, Frame, RightImage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

log = logging.getLogger(__name__)
IMAGE_SUFFIXES = frozenset({'.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm',
                            '.pgm'})
ROTATION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ImageEntry:
    """One image of a folder, not read yet; K [3, 3] belongs to the image's own size.

    camera: instead of K and distortion. right: the other half of a stereo pair.
    """

    image: Path
    stamp_ns: int
    depth: Path | None = None
    K: FloatArray | None = None
    distortion: tuple[float, ...] = ()
    T_map_cam: FloatArray | None = None
    camera: Camera | None = None
    right: RightEntry | None = None


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
        self._exif_is_broken = False  # of an image so far
        _check_entries(root, entries, options)
        self.has_depth = options.use_depth and all(e.depth is not None for e in entries)
        self.has_right = options.use_stereo and any(e.right is not None for e in entries)
        self.has_poses = all(e.T_map_cam is not None for e in entries)
        self.calibrated = options.has_camera or all(e.K is not None or e.camera is not None
                                                    for e in entries)

    @property
    def entries(self) -> Sequence[ImageEntry]:
        """What is known of all images without reading them, before step and max_frames."""
        return self._entries

    @property
    def total(self) -> int:
        """Images in the folder."""
        return len(self._entries)

    def _read(self, indices: range) -> Iterator[Frame]:
        data, image = b'', None
        for entry in (self._entries[index] for index in indices):
            before, data = data, _bytes(entry.image)
            if image is None or data != before:  # links to one file follow each other
                image = decode_compressed(data, str(entry.image))
            yield self._frame(entry, data, image)

    def _frame(self, entry: ImageEntry, data: bytes, image: NDArray[np.uint8]) -> Frame:
        size_wh = (image.shape[1], image.shape[0])
        camera, camera_source = self._camera(entry, size_wh), 'given'
        if camera is None and self.options.use_exif:
            camera, camera_source = self._exif_camera(entry, data, size_wh), 'exif'
        return Frame(entry.stamp_ns, image, self._depth(entry), camera,
                     entry.image.relative_to(self._root).as_posix(), entry.T_map_cam,
                     self._right(entry.right), camera_source)

    def _right(self, entry: RightEntry | None) -> RightImage | None:
        if entry is None or not self.options.use_stereo:
            return None
        image = decode_compressed(_bytes(entry.image), str(entry.image))
        camera = self._camera(entry, (image.shape[1], image.shape[0]))
        if camera is None:
            raise InputError(f'{entry.image}: expected the intrinsics of the right camera, found '
                             'none; give K, or use the left images alone (--mono)')
        return RightImage(image, camera, entry.T_left_right)

    def _depth(self, entry: ImageEntry) -> np.ndarray | None:
        if entry.depth is None or not self.options.use_depth:
            return None
        stored = decode_depth_image(_bytes(entry.depth), str(entry.depth))
        if self._invalid_depth and stored.dtype.kind == 'u':
            stored = np.where(stored == self._invalid_depth, 0, stored)
        return depth_in_metres(stored, self._units)

    def _camera(self, entry: ImageEntry | RightEntry, size_wh: tuple[int, int]) -> Camera | None:
        if entry.camera is not None:
            return checked_size(entry.camera, size_wh, str(entry.image))
        if self.options.has_camera or entry.K is None:
            return self.options.camera_for(size_wh)
        return Camera.from_matrix(entry.K, size_wh, entry.distortion,
                                  distortion_model(entry.distortion))

    def _exif_camera(self, entry: ImageEntry, data: bytes, size_wh: tuple[int, int]
                     ) -> Camera | None:
        try:
            return exif_camera(data, size_wh)
        except InputError as error:
            if not self._exif_is_broken:
                log.warning('%s: %s; the focal length is guessed, here and wherever else EXIF is '
                            'broken', entry.image, error)
            self._exif_is_broken = True
            return None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f'{path}: expected a readable file, found {error.strerror}; check the '
                         'file and its permissions') from None


def _check_entries(root: Path, entries: Sequence[ImageEntry], options: SourceOptions) -> None:
    if not entries:
        raise InputError(f'{root}: expected images, found none; give a folder with images')
    for entry in entries:
        depth = entry.depth if options.use_depth else None
        right = entry.right.image if entry.right is not None and options.use_stereo else None
        for path in (entry.image, depth, right):
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


def is_pair(root: Path) -> bool:
    """A folder with the folders ``left`` and ``right``, and images in both."""
    return all((root / side).is_dir() and images_in(root / side) for side in (LEFT, RIGHT))


def plain_entries(images: Iterable[Path]) -> list[ImageEntry]:
    """Images in the given order, stamped by their index (100 ms apart)."""
    return [ImageEntry(path, index * UNSTAMPED_STEP_NS) for index, path in enumerate(images)]


def open_cameras_json(root: Path, options: SourceOptions) -> FolderSource:
    """Source of a folder with a cameras.json; of a stereo set, pairs or one camera's images.

    Raises InputError when the file is damaged or names files that are missing.
    """
    path = root / 'cameras.json'
    document = _document(path)
    everything = _frames_of(document, path)
    frames = _one_camera(everything, options.camera, path)
    stamped = [frame.get('timestamp') is not None for frame in frames]
    if any(stamped) and not all(stamped):
        raise InputError(f'{path}: expected a timestamp for every frame or for none, found '
                         f'{sum(stamped)} of {len(stamped)}; complete or remove them')
    entries = [_entry(path, index, frame) for index, frame in enumerate(frames)]
    T_left_right = pose_in_json(document, str(path))
    if T_left_right is not None and options.camera == LEFT:
        check_pose(T_left_right, f'{path}: T_left_right')
        entries = _with_right(entries, [frame for frame in everything
                                        if frame.get('camera') == RIGHT], T_left_right, path)
    return FolderSource(root, entries, options)


def _with_right(left: list[ImageEntry], frames: list[dict[str, Any]], T_left_right: FloatArray,
                path: Path) -> list[ImageEntry]:
    """Entries with the right image of the same stamp, where there is one."""
    found = [_entry(path, index, frame) for index, frame in enumerate(frames)]
    right = {e.stamp_ns: RightEntry(e.image, T_left_right, e.K, e.distortion) for e in found}
    return [replace(entry, right=right.get(entry.stamp_ns)) for entry in left]


def open_pair_folders(root: Path, options: SourceOptions) -> FolderSource:
    """Source of a folder with the folders ``left`` and ``right``.

    Calibration: left.yaml and right.yaml of ROS camera_calibration beside them; or the options'
    camera for both and its baseline, when the images are rectified.
    Raises InputError without a calibration, and when the images cannot be paired.
    """
    left, right = images_in(root / LEFT), images_in(root / RIGHT)
    entries = plain_entries(left)
    if not options.use_stereo or options.camera != LEFT:
        chosen = plain_entries(right) if options.camera == RIGHT else entries
        return FolderSource(root, chosen, options)
    cameras, T_left_right = _pair_calibration(root, options)
    others = paired_files(left, right, root)
    return FolderSource(root, [
        replace(entry, camera=cameras[0],
                right=None if other is None else RightEntry(other, T_left_right,
                                                            camera=cameras[1]))
        for entry, other in zip(entries, others, strict=True)], options)


def _pair_calibration(root: Path, options: SourceOptions
                      ) -> tuple[tuple[Camera | None, Camera | None], FloatArray]:
    """Both cameras (None: those of the options) and T_left_right."""
    if options.baseline_m is not None:
        return (None, None), beside(options.baseline_m)
    files = [root / f'{side}.yaml' for side in (LEFT, RIGHT)]
    if not all(file.is_file() for file in files):
        raise InputError(f'{root}: expected left.yaml and right.yaml (camera_calibration) beside '
                         'the folders left and right, found none; give them, or --fx and '
                         '--baseline of rectified images, or --mono')
    infos = [calibration_of_file(str(file)) for file in files]
    left, right = (calibrated_camera(info, str(file), rectified=options.rectified)
                   for info, file in zip(infos, files, strict=True))
    return (left, right), right_pose(*infos, rectified=options.rectified)


def _document(path: Path) -> Any:
    try:
        # Decimal keeps all digits of a time stamp; a float would lose nanoseconds.
        return json.loads(_bytes(path), parse_float=Decimal)
    except ValueError as error:
        raise InputError(f'{path}: expected JSON, found {error}; restore the file') from None


def _frames_of(document: Any, path: Path) -> list[dict[str, Any]]:
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
