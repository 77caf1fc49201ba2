"""Bundle adjustment of parts of the map: free and fixed keyframes, and outliers afterwards.

The solver is ``geometry.refine`` (Triggs et al. 2000).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.bundle_rows import BundleProblem
from feedforward_recon.geometry.radial import straightened
from feedforward_recon.geometry.refine import bundle_adjust
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.stereo_shift import from_this_pair, shift_inv_depth

# Times outlier_px: there, at 9 px, an observation has 3 % of its weight left (Cauchy, robust_px),
# so it is a mismatch rather than something yet to be pulled in; chosen by hand.
CULL_FACTOR = 3.0
# Errors of a depth camera are alike over whole surfaces (the lens, what reflects how much): they
# do not average out over a map, and in its refinement a depth weighs ALIKE squared times less than
# where the camera is now. A Kinect is trusted to 0.1 per metre with 8, and to 0.013 here and now;
# rendered depth keeps 0.004 (docs/experiments.md, The finished map).
ALIKE = 8.0
MAX_DEPTH_NOISE = 0.1  # 1/m: beyond, depth hardly says more than the scale
MAD_TO_STD = 1.4826  # of a normal distribution
FIRM_VIEWS = 4  # keyframes; two of them fix a landmark as well as its depth does
ENOUGH_DEPTHS = 200  # observations, for a median within a tenth
# Observations whose landmarks are refined in one piece, while frames wait: the longest piece of a
# loop closure took 54 ms (docs/experiments.md, A loop closed in pieces).
POINTS_PIECE = 5000


def refine_window(map_: GrowingMap, config: MapperConfig, *, poses_fixed: bool = False) -> None:
    """Bundle adjustment of the newest keyframes; covisible older ones stay fixed.

    poses_fixed: only landmarks are refined, all poses stay.
    """
    window, count = config.refine.window, len(map_)
    free = np.arange(max(1, count - window), count)
    newest = np.unique(map_.landmarks.seen_landmark[
        map_.landmarks.seen_keyframe >= count - window])
    shared = map_.landmarks.shared(newest, count)
    shared[free] = 0
    fixed = np.argsort(-shared, kind='stable')[:config.refine.window_fixed]
    fixed = fixed[shared[fixed] > 0]
    if not poses_fixed and not len(fixed):
        fixed, free = free[:1], free[1:]
    if poses_fixed:
        free, fixed = free[:0], np.concatenate([free, fixed])
    _refine(map_, config, free, fixed, newest, config.refine.window_steps)


def adjust_newest(map_: GrowingMap, keyframes: int, settings: Sequence[MapperConfig]) -> None:
    """Refine the newest ``keyframes``, once with each of the settings.

    Older keyframes that share landmarks stay fixed.
    """
    for config in settings:
        refine = replace(config.refine, window=keyframes, window_steps=config.refine.global_steps)
        refine_window(map_, replace(config, refine=refine))


def refine_points(map_: GrowingMap, config: MapperConfig) -> Iterator[None]:
    """Refine all landmarks from all their views, poses held, in pieces of bounded cost.

    The map may grow between the pieces.
    """
    views = map_.landmarks.views() * map_.landmarks.has_point
    piece = np.cumsum(views) // POINTS_PIECE
    for number in np.unique(piece[views > 0]):
        ids = np.flatnonzero((piece == number) & (views > 0))
        _refine(map_, config, np.zeros(0, int), np.arange(len(map_)), ids,
                config.refine.loop_steps)
        yield


def refine_all(map_: GrowingMap, config: MapperConfig, *, calibration: tuple[str, ...] = (),
               poses_fixed: bool = False) -> float:
    """Bundle adjustment of the whole map (at most ``refine.max_keyframes`` are free).

    calibration: what of it is refined as well, as in ``geometry.refine``; 'shift' is that of the
    stereo pair of this session. Returns by how much its inverse depths were too large, 1/m.
    """
    count = len(map_)
    free = np.arange(count if poses_fixed else max(1, count - config.refine.max_keyframes), count)
    fixed = np.arange(count - len(free))
    ids = np.flatnonzero(map_.landmarks.has_point)
    return _refine(map_, config, free, fixed, ids, config.refine.global_steps, calibration)


def _refine(map_: GrowingMap, config: MapperConfig, free: np.ndarray, fixed: np.ndarray,
            ids: np.ndarray, steps: int, calibration: tuple[str, ...] = ()
            ) -> float:
    problem, rows, ids = bundle_problem(map_, config, free, fixed, ids, calibration)
    if problem is None:
        return 0.0
    result = bundle_adjust(problem, steps)
    used = np.concatenate([free, fixed])
    map_.T_map_cam[used] = result.T_map_cam
    map_.landmarks.set_points_map(ids, result.points, map_.T_map_cam)
    if 'focal' in calibration or 'radial' in calibration:
        change_lens(map_, result.focal_scale, result.radial)
    if 'shift' in calibration:
        shift_inv_depth(map_, result.inv_depth_shift)
    # Beyond the tracking threshold: an observation that ties the window to an old place may
    # disagree until the loop is closed, and must not be lost before.
    _cull(map_, rows[result.residual > CULL_FACTOR * config.tracking.outlier_px], ids)
    return result.inv_depth_shift


def bundle_problem(map_: GrowingMap, config: MapperConfig, free: np.ndarray,
                   fixed: np.ndarray, ids: np.ndarray, calibration: tuple[str, ...] = ()
                   ) -> tuple[BundleProblem | None, np.ndarray, np.ndarray]:
    """Bundle adjustment of landmarks ``ids`` and keyframes, with its rows and landmarks.

    Poses in the order of ``free``, then ``fixed``. The problem is None where no landmark can be
    refined.
    """
    table, used = map_.landmarks, np.concatenate([free, fixed])
    ids = ids[table.has_point[ids]]
    local = np.full(len(map_), -1)
    local[used] = np.arange(len(used))
    rows = np.flatnonzero(table.mask(ids)[table.seen_landmark]
                          & (local[table.seen_keyframe] >= 0))
    # One view without depth says nothing about a point.
    weight = 1 + np.isfinite(table.seen_inv_depth[rows])
    firm = np.bincount(table.seen_landmark[rows], weight, len(table)) >= 2
    rows = rows[firm[table.seen_landmark[rows]]]
    if not len(rows):
        return None, rows, ids
    ids, point_index = np.unique(table.seen_landmark[rows], return_inverse=True)
    # Errors count in pixels of the image that saw them, whatever its camera.
    fx = np.array([keyframe.camera.fx for keyframe in map_.keyframes])
    problem = BundleProblem(
        map_.T_map_cam[used], table.points_map(ids, map_.T_map_cam),
        np.arange(len(used)) >= len(free), local[table.seen_keyframe[rows]], point_index,
        table.seen_xy[rows], table.seen_inv_depth[rows],
        table.seen_sigma[rows] * (fx[-1] / fx)[table.seen_keyframe[rows]], fx[-1],
        _depth_noise(map_, table.seen_keyframe[rows]),
        config.refine.robust_px, calibration, from_this_pair(map_)[table.seen_keyframe[rows]])
    return problem, rows, ids


def _depth_noise(map_: GrowingMap, keyframes: np.ndarray) -> np.ndarray:
    """Standard deviation of 1/z [O] in observations by keyframes [O]."""
    noise = max(map_.depth_noise, min(ALIKE * map_.depth_spread, MAX_DEPTH_NOISE))
    of_each = [noise if k.inv_depth_noise is None else k.inv_depth_noise
               for k in map_.keyframes]
    return np.array(of_each)[keyframes]


def _cull(map_: GrowingMap, bad_rows: np.ndarray, ids: np.ndarray) -> None:
    """Drop outlier observations, and positions of landmarks with too few others."""
    table = map_.landmarks
    table.forget(bad_rows)
    rows = np.flatnonzero(table.mask(ids)[table.seen_landmark])
    weight = 1 + np.isfinite(table.seen_inv_depth[rows])
    support = np.bincount(table.seen_landmark[rows], weight, len(table))[ids]
    table.alive[ids[support == 0]] = False
    table.point_cam[ids[support == 1]] = np.nan


def calibrate_depth(map_: GrowingMap) -> None:
    """Measure how far depth images are from the landmarks (``GrowingMap.depth_spread``).

    Landmarks of few views agree with any depth, so they do not count.
    """
    table = map_.landmarks
    firm = table.has_point & (table.views() >= FIRM_VIEWS)
    images = np.array([k.inv_depth_noise is None for k in map_.keyframes])
    rows = np.flatnonzero(firm[table.seen_landmark] & images[table.seen_keyframe]
                          & np.isfinite(table.seen_inv_depth))
    if len(rows) < ENOUGH_DEPTHS:
        return
    points = table.points_map(table.seen_landmark[rows], map_.T_map_cam)
    z_axis = map_.T_map_cam[table.seen_keyframe[rows], :3, 2]
    z = ((points - map_.T_map_cam[table.seen_keyframe[rows], :3, 3]) * z_axis).sum(1)
    error = 1 / z - table.seen_inv_depth[rows]
    map_.depth_spread = MAD_TO_STD * float(np.median(np.abs(error - np.median(error))))


def change_lens(map_: GrowingMap, focal_scale: float, radial: float) -> None:
    """All cameras get another lens, and what was seen through it lies where it says now."""
    for keyframe in map_.keyframes:
        keyframe.camera = keyframe.camera.with_lens(focal_scale, radial)
        keyframe.points_cam[:] = keyframe.camera.unproject(keyframe.features.keypoints,
                                                           keyframe.points_cam[:, 2])
        keyframe.cloud_cam[:, :2] = keyframe.cloud_cam[:, 2:] * straightened(
            keyframe.cloud_cam[:, :2] / (focal_scale * keyframe.cloud_cam[:, 2:]), (radial,))
    normalise_observations(map_)


def normalise_observations(map_: GrowingMap) -> None:
    """Normalised image points of all observations, from their pixels and cameras."""
    table = map_.landmarks
    by_keyframe = np.argsort(table.seen_keyframe, kind='stable')
    ends = np.searchsorted(table.seen_keyframe[by_keyframe], np.arange(len(map_) + 1))
    for keyframe, start, end in zip(map_.keyframes, ends[:-1], ends[1:], strict=True):
        rows = by_keyframe[start:end]
        table.seen_xy[rows] = keyframe.camera.normalise(table.seen_px[rows])
