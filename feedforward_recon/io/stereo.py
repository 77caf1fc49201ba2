"""Pairs of images: which right image belongs to which left one, and how the cameras stand.

Three places say how: a ``cameras.json`` with two cameras (stereo_baseline_m of rectified images,
or T_left_right), two YAML files of ROS camera_calibration beside folders ``left`` and ``right``,
and CameraInfo messages (R and P, see ``right_pose``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.stereo import from_rectification
from feedforward_recon.geometry.transforms import make_transform
from feedforward_recon.io.images import Calibration
from feedforward_recon.types import FloatArray

LEFT, RIGHT = 'left', 'right'


@dataclass(frozen=True)
class RightEntry:
    """The right image of a pair in a folder, not read yet.

    K [3, 3] and distortion belong to the image's own size. camera: instead of them.
    """

    image: Path
    T_left_right: FloatArray
    K: FloatArray | None = None
    distortion: tuple[float, ...] = ()
    camera: Camera | None = None


def right_pose(left: Calibration, right: Calibration, *, rectified: bool) -> FloatArray:
    """T_left_right [4, 4] of two calibrations: P of the right one holds -fx baseline.

    rectified: the images were, so that the rotations R are in them already. A pair without a
    baseline gets 0, which ``StereoRig`` refuses in one sentence.
    """
    p = np.asarray(right.p, float).reshape(-1, 4) if len(right.p) else np.zeros((3, 4))
    baseline_m = -float(p[0, 3]) / float(p[0, 0]) if p[0, 0] else 0.0
    if rectified:
        return beside(baseline_m)
    R_left, R_right = (np.asarray(info.r, float).reshape(3, 3) if np.any(info.r) else np.eye(3)
                       for info in (left, right))
    return from_rectification(R_left, R_right, baseline_m)


def beside(baseline_m: float) -> FloatArray:
    """T_left_right [4, 4] of a rectified pair."""
    return make_transform(np.eye(3), np.array([baseline_m, 0.0, 0.0]))


def pose_in_json(document: Mapping[str, Any], where: str) -> FloatArray | None:
    """T_left_right [4, 4] as a cameras.json says it; None if it does not.

    Raises InputError for values that are no rigid motion.
    """
    baseline_m, T = document.get('stereo_baseline_m'), document.get('T_left_right')
    try:
        if T is not None:
            T_left_right = np.array(T, float)
            if T_left_right.shape != (4, 4):
                raise ValueError(f'{list(T_left_right.shape)} numbers')
            return T_left_right
        return None if baseline_m is None else beside(float(baseline_m))
    except (TypeError, ValueError) as error:
        raise InputError(f'{where}: expected stereo_baseline_m in metres or T_left_right as 4x4, '
                         f'found {error}; correct the file') from None


def paired_files(left: Sequence[Path], right: Sequence[Path], root: Path) -> list[Path | None]:
    """The right image of each left one: of the same name, or else by their order.

    None where the right image is missing. Raises InputError when the names do not tell.
    """
    by_name = {path.stem: path for path in right}
    if any(path.stem in by_name for path in left):
        return [by_name.get(path.stem) for path in left]
    if len(left) != len(right):
        raise InputError(f'{root}: expected images of the same names in left and right, or as '
                         f'many in both, found {len(left)} and {len(right)}; name pairs alike')
    return list(right)
