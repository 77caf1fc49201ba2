"""Poses, points and lens that agree with all tracks: triangulation and adjustment by turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    error_px: of the observations of the tracks, [O]; angle_deg: between the rays of a point,
    [count]. Made by ``triangulated``.
    """

    T_map_cam: np.ndarray
    cameras: list[Camera]
    tracks: PointTracks
    points: np.ndarray
    error_px: np.ndarray
    angle_deg: np.ndarray


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
    return with_tracks(structure, structure.tracks.select(structure.error_px < limit_px))


def sharpened(structure: Structure, grays: Sequence[np.ndarray]) -> Structure:
    """The structure with its observations aligned in the images."""
    return with_tracks(structure, patches_aligned(
        grays, structure.cameras, structure.T_map_cam, structure.tracks, structure.points))


def with_tracks(structure: Structure, tracks: PointTracks) -> Structure:
    """The same poses and cameras with the points of other tracks."""
    return triangulated(structure.T_map_cam, structure.cameras, tracks)


def triangulated(T_map_cam: np.ndarray, cameras: list[Camera], tracks: PointTracks) -> Structure:
    """Points from the rays of tracks, NaN where these are parallel."""
    T, xy = T_map_cam[tracks.image], _normalised(cameras, tracks)
    points, angle_deg = triangulate(T, xy, tracks.point, tracks.count)
    known = np.isfinite(points[tracks.point, 0])
    errors = ray_errors(T, xy, np.where(known[:, None], points[tracks.point], 0.0))
    focal = np.array([camera.fx for camera in cameras])
    return Structure(T_map_cam, cameras, tracks, points,
                     np.where(known, focal[tracks.image] * errors, np.inf), angle_deg)


def _normalised(cameras: Sequence[Camera], tracks: PointTracks) -> np.ndarray:
    """Normalised coordinates [O, 2] of all observations."""
    xy = np.zeros((len(tracks), 2))
    for image, rows in tracks.by_image():
        xy[rows] = cameras[image].normalise(tracks.px[rows])
    return xy


def _adjusted(structure: Structure, round_: Round, calibration: tuple[str, ...]) -> Structure:
    firm = structure.angle_deg[structure.tracks.point] > MIN_ANGLE_DEG
    part = with_tracks(structure, structure.tracks.select(
        firm & (structure.error_px < round_.limit_px)))
    chosen, T = part.tracks, structure.T_map_cam.copy()
    if not len(chosen):
        return structure
    images, pose_index = np.unique(chosen.image, return_inverse=True)
    focal = np.array([structure.cameras[image].fx for image in images])
    result = bundle_adjust(BundleProblem(
        T[images], np.nan_to_num(part.points), np.arange(len(images)) == 0, pose_index,
        chosen.point, _normalised(part.cameras, chosen), np.full(len(chosen), np.nan),
        (focal[0] / focal)[pose_index], float(focal[0]), robust_px=round_.robust_px,
        calibration=calibration), round_.steps)
    T[images] = result.T_map_cam
    cameras = structure.cameras if not calibration else [
        camera.with_lens(result.focal_scale, result.radial) for camera in structure.cameras]
    return triangulated(T, cameras, structure.tracks)
