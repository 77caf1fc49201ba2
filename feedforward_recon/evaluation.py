"""How good a trajectory or a set of localised images is, against ground truth.

Errors are those of Sturm et al., "A benchmark for the evaluation of RGB-D SLAM systems" (IROS
2012): the absolute trajectory error after one alignment, and the relative pose error over a
fixed number of frames. Orientations are aligned by their own mean: positions on a straight line
say nothing about the rotation around it. Beside them stands what blind guessing reaches: the best
straight line driven at constant speed. A figure near that line proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from feedforward_recon.errors import DegenerateError, InputError
from feedforward_recon.geometry.align import Alignment, align_orientations, align_points
from feedforward_recon.geometry.transforms import inverse, make_transform, pose_error
from feedforward_recon.types import FloatArray, Trajectory

ALIGNMENTS = ('none', 'se3', 'sim3')
# Pairs (metres, degrees) of the localisation table: what can be grasped, and what can be driven.
RECALL_THRESHOLDS = ((0.01, 1.0), (0.02, 2.0), (0.05, 5.0), (0.10, 10.0))

# Triples of poses that are tried for an alignment: where half of the poses are right, all of 300
# hold a wrong one with a chance of 1e-17, and 300 take 0.1 s.
CONSENSUS_SAMPLES = 300


@dataclass(frozen=True)
class TrajectoryError:
    """Absolute trajectory error of N matched poses, in the units of the ground truth.

    rotation_median_deg is measured after the orientations were aligned by their own mean, or
    not at all with alignment 'none'. scale: ground truth units per estimated unit. path_length:
    of the matched ground truth. straight_line_rmse: error of the best constant-velocity line
    through the same ground truth.
    """

    rmse: float
    mean: float
    median: float
    max: float
    rotation_median_deg: float
    scale: float
    matched: int
    path_length: float
    straight_line_rmse: float


@dataclass(frozen=True)
class RelativeError:
    """Relative pose error over steps of a fixed number of poses: root mean squares."""

    translation_rmse: float
    rotation_rmse_deg: float
    steps: int


@dataclass(frozen=True)
class LocalisationScore:
    """Errors of localised images; an image without an answer counts as infinitely wrong.

    median_m, median_deg: inf unless more than half of the images were localised.
    recall: share of all images within each pair of ``RECALL_THRESHOLDS``, 0..1.
    """

    queries: int
    localised: int
    median_m: float
    median_deg: float
    recall: tuple[float, ...]

    def within(self, metres: float, degrees: float) -> float:
        """Recall of one pair of ``RECALL_THRESHOLDS``."""
        return self.recall[RECALL_THRESHOLDS.index((metres, degrees))]


def associate(estimated: Trajectory, truth: Trajectory, max_gap_ns: int = 10_000_000
              ) -> tuple[Trajectory, Trajectory]:
    """Poses of both whose stamps agree to ``max_gap_ns``, one to one, ordered by time.

    Raises InputError when nothing matches.
    """
    truth = _sorted(truth)
    estimated = _sorted(estimated)
    if len(estimated) == 0 or len(truth) == 0:
        raise InputError(f'expected poses to compare, found {len(estimated)} estimated and '
                         f'{len(truth)} true ones; was the camera tracked?')
    right = np.minimum(np.searchsorted(truth.stamps_ns, estimated.stamps_ns), len(truth) - 1)
    left = np.maximum(right - 1, 0)
    gaps = np.abs(truth.stamps_ns[[left, right]] - estimated.stamps_ns)
    nearest, gap = np.where(gaps[0] <= gaps[1], left, right), gaps.min(0)
    kept = _one_to_one(nearest, gap, max_gap_ns)
    if len(kept) == 0:
        raise InputError(f'expected stamps that agree to {max_gap_ns / 1e6:g} ms, found the '
                         f'closest pair {gap.min() / 1e9:g} s apart; do the files belong to the '
                         'same walk?')
    return _taken(estimated, kept), _taken(truth, nearest[kept])


def absolute_trajectory_error(estimated: Trajectory, truth: Trajectory,
                              alignment: str = 'se3') -> TrajectoryError:
    """Distance of matched camera centres after one alignment of the whole trajectory.

    alignment: 'se3' (metric maps), 'sim3' (monocular) or 'none' (same frame already). Angles
    are measured after an alignment of the orientations alone, by their mean.

    Raises InputError without matches, DegenerateError when the camera centres leave the
    alignment undetermined (fewer than 3, or on a line).
    """
    if alignment not in ALIGNMENTS:
        raise InputError(f'expected an alignment of {ALIGNMENTS}, found {alignment!r}')
    estimated, truth = associate(estimated, truth)
    poses, scale = estimated.T_map_cam, 1.0
    if alignment != 'none':
        fit = align_points(estimated.positions, truth.positions, with_scale=alignment == 'sim3')
        R = align_orientations(poses[:, :3, :3], truth.T_map_cam[:, :3, :3]) @ poses[:, :3, :3]
        poses, scale = make_transform(R, fit.apply(estimated.positions)), fit.scale
    distance, angle_deg = pose_error(poses, truth.T_map_cam)
    return TrajectoryError(
        rmse=_rms(distance), mean=float(distance.mean()), median=float(np.median(distance)),
        max=float(distance.max()), rotation_median_deg=float(np.median(angle_deg)), scale=scale,
        matched=len(distance), path_length=path_length(truth),
        straight_line_rmse=straight_line_rmse(truth))


def distances_by_consensus(estimated: Trajectory, truth: Trajectory, *, with_scale: bool,
                           tolerance: float) -> tuple[Trajectory, FloatArray]:
    """Matched poses, and how far [N] each is off after the alignment that most agree with.

    Unlike least squares, a stretch of wrong poses cannot pull the alignment towards itself: that
    of three poses which brings most others within ``tolerance`` (ground truth units) is refined
    with those alone. A pose that is not finite is off by NaN. with_scale: by a similarity.

    Raises InputError without matches, DegenerateError when no three poses determine an alignment.
    """
    estimated, truth = associate(estimated, truth)
    source, target = estimated.positions, truth.positions
    rng, best = np.random.default_rng(0), np.zeros(0, int)
    finite = np.flatnonzero(np.isfinite(source).all(1))
    for _ in range(CONSENSUS_SAMPLES if len(finite) >= 3 else 0):
        rows = rng.choice(finite, 3, replace=False)
        agreeing = _agreeing(source, target, rows, with_scale, tolerance)
        best = max(best, agreeing, key=len)
    if len(best) < 3:
        raise DegenerateError(f'expected three poses that determine an alignment, found none '
                              f'among {len(source)}; let the camera move')
    for _ in range(3):
        more = _agreeing(source, target, best, with_scale, tolerance)
        best = more if len(more) >= len(best) else best
    fit = align_points(source[best], target[best], with_scale=with_scale)
    return estimated, _off(fit, source, target)


def _agreeing(source: np.ndarray, target: np.ndarray, rows: np.ndarray, with_scale: bool,
              tolerance: float) -> np.ndarray:
    """Rows that the alignment of some rows brings within ``tolerance``."""
    try:
        fit = align_points(source[rows], target[rows], with_scale=with_scale)
    except DegenerateError:
        return np.zeros(0, int)
    return np.flatnonzero(_off(fit, source, target) < tolerance)


def _off(fit: Alignment, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    with np.errstate(invalid='ignore'):
        return np.linalg.norm(fit.apply(source) - target, axis=1)


def relative_pose_error(estimated: Trajectory, truth: Trajectory, step: int = 1,
                        scale: float = 1.0) -> RelativeError:
    """Error of the motion over every ``step`` matched poses (drift; needs no alignment).

    scale: ground truth units per estimated unit, from ``absolute_trajectory_error``.

    Raises InputError when there are no ``step`` + 1 matches.
    """
    estimated, truth = associate(estimated, truth)
    if step < 1 or len(truth) <= step:
        raise InputError(f'expected more than {step} matched poses for steps of {step}, found '
                         f'{len(truth)}')
    poses = estimated.T_map_cam.copy()
    poses[:, :3, 3] *= scale
    moved = inverse(poses[:-step]) @ poses[step:]
    true_moved = inverse(truth.T_map_cam[:-step]) @ truth.T_map_cam[step:]
    # As evo does: the error is itself a motion, true^-1 @ estimated.
    error = inverse(true_moved) @ moved
    distance, angle_deg = pose_error(error, np.broadcast_to(np.eye(4), error.shape))
    return RelativeError(_rms(distance), _rms(angle_deg), len(distance))


def straight_line_rmse(truth: Trajectory) -> float:
    """Error of the straight line at constant velocity that fits the camera centres best."""
    seconds = (truth.stamps_ns - truth.stamps_ns[0]) / 1e9
    design = np.stack([np.ones(len(seconds)), seconds], 1)
    line, *_ = np.linalg.lstsq(design, truth.positions, rcond=None)
    return _rms(np.linalg.norm(design @ line - truth.positions, axis=1))


def path_length(trajectory: Trajectory) -> float:
    """Length of the path through the camera centres, map units."""
    return float(np.linalg.norm(np.diff(trajectory.positions, axis=0), axis=1).sum())


def localisation_score(T_map_cam: Sequence[FloatArray | None], truth: FloatArray
                       ) -> LocalisationScore:
    """Medians and recalls of answers (None: not localised) to true poses [N, 4, 4].

    Raises InputError when the counts differ or there are no queries.
    """
    if len(T_map_cam) != len(truth) or len(truth) == 0:
        raise InputError(f'expected one answer per query and at least one, found '
                         f'{len(T_map_cam)} answers to {len(truth)} queries')
    answered = np.array([pose is not None for pose in T_map_cam])
    errors = np.full((2, len(truth)), np.inf)
    if answered.any():
        found = np.stack([pose for pose in T_map_cam if pose is not None])
        errors[:, answered] = pose_error(found, np.asarray(truth)[answered])
    within = [np.mean((errors[0] <= metres) & (errors[1] <= degrees))
              for metres, degrees in RECALL_THRESHOLDS]
    medians = np.median(errors, 1)
    return LocalisationScore(len(truth), int(answered.sum()), float(medians[0]),
                             float(medians[1]), tuple(map(float, within)))


def _sorted(trajectory: Trajectory) -> Trajectory:
    return _taken(trajectory, np.argsort(trajectory.stamps_ns, kind='stable'))


def _taken(trajectory: Trajectory, index: np.ndarray) -> Trajectory:
    return Trajectory(trajectory.stamps_ns[index], trajectory.T_map_cam[index])


def _one_to_one(nearest: np.ndarray, gap: np.ndarray, max_gap_ns: int) -> np.ndarray:
    """Indices of the closest estimate of each true pose, within the gap, in order."""
    order = np.lexsort((gap, nearest))
    _, first = np.unique(nearest[order], return_index=True)
    best = order[first]
    return np.sort(best[gap[best] <= max_gap_ns])


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
