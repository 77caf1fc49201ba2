"""Folders of two well-known RGB-D benchmarks: TUM RGB-D and 7-Scenes.

Neither folder holds the intrinsics; they are not guessed. Give --fx (--fy --cx --cy
--distortion) or a calibration file.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import make_transform, matrix_from_quat_xyzw
from feedforward_recon.io.folder import (
    FolderSource,
    ImageEntry,
    check_pose,
    natural_key,
    stamp_from_seconds,
)
from feedforward_recon.io.source import (
    SECOND_NS,
    SourceOptions,
    mutual_nearest,
    nearest,
    seconds,
)
from feedforward_recon.types import Trajectory

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

TUM_DEPTH_UNITS_PER_METRE = 5000.0
SEVEN_SCENES_INVALID_DEPTH = 65535
SEVEN_SCENES_RATE_HZ = 30
SEVEN_SCENES_GAP_NS = 10 * SECOND_NS


def open_tum(root: Path, options: SourceOptions) -> FolderSource:
    """Source of a TUM RGB-D folder: rgb.txt, and depth.txt and groundtruth.txt where present.

    Colour, depth and pose belong together when their stamps are nearest to each other and
    within 20 ms; colour images without depth are left out, as in the benchmark's associate.py.
    Raises InputError for unreadable lists and when nothing can be paired.
    """
    stamps_ns, images = _tum_list(root / 'rgb.txt')
    depths: list[Path | None] = [None] * len(images)
    kept = np.arange(len(images))
    if options.use_depth and (root / 'depth.txt').is_file():
        depth_stamps_ns, depth_images = _tum_list(root / 'depth.txt')
        partner = mutual_nearest(stamps_ns, depth_stamps_ns)
        kept = np.flatnonzero(partner >= 0)
        depths = [depth_images[index] for index in partner]
        if len(kept) == 0:
            raise InputError(f'{root}: expected depth within 20 ms of the colour images, found '
                             'none; check the time stamps or leave the depth out')
        if len(kept) < len(images):
            logger.warning('%s: %d of %d images have no depth within 20 ms and are left out',
                           root, len(images) - len(kept), len(images))
    poses = _tum_poses(root / 'groundtruth.txt', stamps_ns)
    entries = [ImageEntry(images[i], int(stamps_ns[i]), depths[i], T_map_cam=poses[i])
               for i in kept]
    return FolderSource(root, entries, options, TUM_DEPTH_UNITS_PER_METRE)


def _tum_rows(path: Path, columns: int) -> list[tuple[int, list[str]]]:
    """Stamps in ns and the other columns of a TUM list, in stamp order."""
    rows = []
    try:
        lines = path.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'{path}: expected a readable list, found {error}') from None
    for number, line in enumerate(lines, 1):
        words = line.split('#')[0].replace(',', ' ').split()
        if not words:
            continue
        try:
            if len(words) < columns:
                raise ValueError(f'{len(words)} columns')
            rows.append((stamp_from_seconds(words[0]), words[1:]))
        except ValueError as error:
            raise InputError(f'{path}: expected a time stamp and {columns - 1} more columns in '
                             f'line {number}, found {error}; correct the list') from None
    for (before, _), (after, _) in pairwise(rows):
        if after <= before:
            raise InputError(f'{path}: expected increasing time stamps, found {seconds(after)} '
                             f's after {seconds(before)} s; sort the list')
    if not rows:
        raise InputError(f'{path}: expected one line per image or pose, found none')
    return rows


def _tum_list(path: Path) -> tuple[NDArray[np.int64], list[Path]]:
    rows = _tum_rows(path, 2)
    return np.array([row[0] for row in rows]), [path.parent / row[1][0] for row in rows]


def _tum_poses(path: Path, stamps_ns: NDArray[np.int64]) -> list[np.ndarray | None]:
    if not path.is_file():
        return [None] * len(stamps_ns)
    truth = read_tum_trajectory(path)
    index = nearest(stamps_ns, truth.stamps_ns)
    return [truth.T_map_cam[i] if i >= 0 else None for i in index]


def read_tum_trajectory(path: Path) -> Trajectory:
    """Trajectory of a TUM file: lines of stamp tx ty tz qx qy qz qw.

    Raises InputError, naming the line, when it cannot be read.
    """
    rows = _tum_rows(path, 8)
    try:
        values = np.array([[float(word) for word in row[1][:7]] for row in rows])
        T_map_cam = make_transform(matrix_from_quat_xyzw(values[:, 3:]), values[:, :3])
    except (ValueError, InputError) as error:
        raise InputError(f'{path}: expected stamp tx ty tz qx qy qz qw, found {error}') from None
    return Trajectory(np.array([row[0] for row in rows]), T_map_cam)


def seven_scenes_sequences(root: Path) -> list[Path]:
    """Folders with 7-Scenes frames: the folder itself or its seq-XX; empty when neither."""
    candidates = [root, *sorted(root.glob('seq-*'), key=natural_key)]
    return [folder for folder in candidates if any(folder.glob('frame-*.color.*'))]


def open_seven_scenes(root: Path, options: SourceOptions) -> FolderSource:
    """Source of a 7-Scenes sequence, or of a scene with its sequences one after the other.

    Depth is in millimetres, 65535 and 0 mean none. In the official release the depth is NOT
    registered to the colour image and the poses are those of the depth camera, a few
    centimetres away: warp the depth first where that matters. There are no time stamps; frames
    are 1/30 s apart and sequences 10 s.
    Raises InputError when files are missing or a pose cannot be read.
    """
    entries: list[ImageEntry] = []
    for folder in seven_scenes_sequences(root):
        start_ns = entries[-1].stamp_ns + SEVEN_SCENES_GAP_NS if entries else 0
        images = sorted(folder.glob('frame-*.color.*'), key=natural_key)
        first = _frame_number(images[0])
        for image in images:
            offset = (_frame_number(image) - first) * SECOND_NS // SEVEN_SCENES_RATE_HZ
            stem = image.name.split('.')[0]
            entries.append(ImageEntry(image, start_ns + offset, folder / f'{stem}.depth.png',
                                      T_map_cam=_seven_scenes_pose(folder / f'{stem}.pose.txt')))
    return FolderSource(root, entries, options, invalid_depth=SEVEN_SCENES_INVALID_DEPTH)


def _frame_number(image: Path) -> int:
    digits = image.name.split('.')[0].removeprefix('frame-')
    if not digits.isdigit():
        raise InputError(f'{image}: expected a name like frame-000000.color.png')
    return int(digits)


def _seven_scenes_pose(path: Path) -> np.ndarray | None:
    """Camera-to-world [4, 4]; None without a file or where tracking had failed (not finite)."""
    if not path.is_file():
        return None
    try:
        T_world_cam = np.array(path.read_text().split(), float).reshape(4, 4)
    except (ValueError, OSError) as error:
        raise InputError(f'{path}: expected a 4x4 pose, found {error}') from None
    if not np.isfinite(T_world_cam).all():
        return None
    check_pose(T_world_cam, str(path))
    return T_world_cam
