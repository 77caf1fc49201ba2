"""Poses, points and lens that agree with all tracks: triangulation and adjustment by turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from feedforward_recon.geometry.bundle_rows import BundleProblem
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.refine import bundle_adjust
from feedforward_recon.geometry.triangulate import ray_errors, triangulate
from feedforward_recon.reconstruction.subpixel import patches_aligned
from feedforward_recon.reconstruction.tracks import PointTracks

MIN_ANGLE_DEG = 1.5  # between rays of a point that counts


@dataclass(frozen=True)
class Round:
    """One turn: observations within limit_px of their points count, softly beyond robust_px."""

    limit_px: float
    robust_px: float
    steps: int


# Wide at first, since accumulated poses are off by many pixels; patches are good to a fifth of
# one. Tighter ones at the end chose what agreed with a wrong lens (docs/experiments.md, Photos).
ROUGH = (Round(16, 2.0, 4), Round(8, 2.0, 6), Round(4, 1.0, 10))
FINE = (Round(2, 0.4, 20),)


@dataclass(frozen=True)
class Structure:
    """Poses T_map_cam [N, 4, 4], cameras [N], tracks that agree with them, points [count, 3].

    error_px: of the observations of the tracks, [O].
    """

    T_map_cam: np.ndarray
    cameras: list[Camera]
    tracks: PointTracks
    points: np.ndarray
    error_px: np.ndarray


def refined(structure: Structure, rounds: Sequence[Round], calibration: tuple[str, ...] = ()
            ) -> Structure:
    """The structure after some rounds; all of its tracks may count again in each.

    calibration: what of the cameras is refined, as in ``geometry.refine``; the same for all.
    The first image that sees anything stays where it is.
    """
    for round_ in rounds:
        structure = _adjusted(structure, round_, calibration)
    return near(structure, rounds[-1].limit_px)


def near(structure: Structure, limit_px: float) -> Structure:
    """The structure with the observations within ``limit_px`` of their points."""
    tracks = structure.tracks.select(structure.error_px < limit_px)
    return triangulated(replace(structure, tracks=tracks))


def sharpened(structure: Structure, grays: Sequence[np.ndarray]) -> Structure:
    """The structure with its observations aligned in the images."""
    tracks = patches_aligned(grays, structure.cameras, structure.T_map_cam, structure.tracks,
                             structure.points)
    return triangulated(replace(structure, tracks=tracks))


def triangulated(structure: Structure) -> Structure:
    """The structure with points from the rays of its tracks, NaN where these are parallel."""
    tracks, T = structure.tracks, structure.T_map_cam[structure.tracks.image]
    xy = _normalised(structure)
    points, _ = triangulate(T, xy, tracks.point, tracks.count)
    return replace(structure, points=points, error_px=_errors_px(structure, xy, points))


def _adjusted(structure: Structure, round_: Round, calibration: tuple[str, ...]) -> Structure:
    xy, T = _normalised(structure), structure.T_map_cam
    points, angle_deg = triangulate(T[structure.tracks.image], xy, structure.tracks.point,
                                    structure.tracks.count)
    good = _errors_px(structure, xy, points) < round_.limit_px
    good &= angle_deg[structure.tracks.point] > MIN_ANGLE_DEG
    chosen = structure.tracks.select(good)
    if not len(chosen):
        return structure
    part = triangulated(replace(structure, tracks=chosen))
    images, pose_index = np.unique(chosen.image, return_inverse=True)
    focal = np.array([structure.cameras[image].fx for image in images])
    problem = BundleProblem(
        T[images], np.nan_to_num(part.points), np.arange(len(images)) == 0, pose_index,
        chosen.point, _normalised(part), np.full(len(chosen), np.nan),
        (focal[0] / focal)[pose_index], float(focal[0]), robust_px=round_.robust_px,
        calibration=calibration)
    result = bundle_adjust(problem, round_.steps)
    T = T.copy()
    T[images] = result.T_map_cam
    cameras = structure.cameras if not calibration else [
        camera.with_lens(result.focal_scale, result.radial) for camera in structure.cameras]
    return triangulated(replace(structure, T_map_cam=T, cameras=cameras))


def _normalised(structure: Structure) -> np.ndarray:
    """Normalised coordinates [O, 2] of all observations."""
    xy = np.zeros((len(structure.tracks), 2))
    for image, rows in structure.tracks.by_image():
        xy[rows] = structure.cameras[image].normalise(structure.tracks.px[rows])
    return xy


def _errors_px(structure: Structure, xy: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Reprojection errors [O], pixels; infinite behind the camera and without a point."""
    tracks = structure.tracks
    focal = np.array([camera.fx for camera in structure.cameras])
    known = np.isfinite(points[tracks.point, 0])
    shown = np.where(known[:, None], points[tracks.point], 0.0)
    errors = ray_errors(structure.T_map_cam[tracks.image], xy, shown)
    return np.where(known, focal[tracks.image] * errors, np.inf)
