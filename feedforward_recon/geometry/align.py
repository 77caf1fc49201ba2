"""The rigid or similarity transform between two sets of corresponding points.

Closed form: Umeyama, "Least-squares estimation of transformation parameters between two point
patterns" (PAMI 1991), eq. 34-43, with one weight per correspondence. Robust form: iteratively
re-weighted least squares with Huber or Cauchy weights, whose scale shrinks with the residuals,
so that it starts wide (nothing is an outlier yet) and ends at the noise of the inliers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from feedforward_recon.errors import DegenerateError, InputError
from feedforward_recon.geometry.transforms import make_transform, transform_points

# Spread across the line of the points, relative to the spread along it, below which the
# rotation around the line is noise: a tenth of a millimetre per metre.
MIN_SPREAD_RATIO = 1e-4
MAD_TO_STD = 1.4826  # standard deviation of a normal variable over its median absolute value

LOSSES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'huber': lambda r: 1 / np.maximum(r, 1.0),
    'cauchy': lambda r: 1 / (1 + r**2),
}


@dataclass(frozen=True)
class Alignment:
    """``x_target = T_target_source (scale * x_source)``.

    T_target_source: float64 [4, 4]. scale: target units per source unit, 1 for rigid.
    weights: float64 [N] in [0, 1], what each correspondence counted in the end.
    residuals: float64 [N] distances after alignment, target units, not weighted.
    """

    T_target_source: np.ndarray
    scale: float
    weights: np.ndarray
    residuals: np.ndarray

    def apply(self, points_source: np.ndarray) -> np.ndarray:
        """Points [..., N, 3] of the source in the target frame."""
        return transform_points(self.T_target_source, self.scale * np.asarray(points_source))

    def apply_to_poses(self, T_source_cam: np.ndarray) -> np.ndarray:
        """Camera poses [..., 4, 4] in the source frame as poses in the target frame."""
        poses = np.array(T_source_cam, float)
        poses[..., :3, 3] *= self.scale
        return self.T_target_source @ poses

    @property
    def rmse(self) -> float:
        """Weighted root mean square distance after alignment, target units."""
        return float(np.sqrt(np.average(self.residuals**2, weights=self.weights)))


def align_points(source: np.ndarray, target: np.ndarray, weights: np.ndarray | None = None,
                 *, with_scale: bool = False) -> Alignment:
    """Least-squares alignment of corresponding points [N, 3] (weighted Umeyama).

    weights: [N], not negative; they are divided by their maximum. with_scale: similarity
    instead of rigid.

    Raises InputError for arrays that do not correspond, DegenerateError when the points leave
    the transform undetermined: fewer than three, all in one place, or all on one line.
    """
    source, target, weights = _checked(source, target, weights)
    share = weights / weights.sum()
    mean_source, mean_target = share @ source, share @ target
    centred_source, centred_target = source - mean_source, target - mean_target
    rotation, trace = _rotation(centred_target.T @ (share[:, None] * centred_source))
    scale = 1.0
    if with_scale:
        scale = trace / float(share @ np.sum(centred_source**2, 1))  # eq. 42
    T = make_transform(rotation, mean_target - scale * rotation @ mean_source)
    residuals = np.linalg.norm(transform_points(T, scale * source) - target, axis=1)
    return Alignment(T, scale, weights, residuals)


def align_points_robust(source: np.ndarray, target: np.ndarray,
                        weights: np.ndarray | None = None, *, with_scale: bool = False,
                        loss: str = 'cauchy', noise: float = 0.0,
                        iterations: int = 50) -> Alignment:
    """Alignment that outliers cannot pull: iteratively re-weighted ``align_points``.

    weights: prior weights [N], multiplied into the robust ones. loss: 'huber' (convex, bounded
    pull) or 'cauchy' (the pull of an outlier vanishes; recovers up to about 40 % of gross
    ones). noise: expected distance of inliers in target units, the smallest scale of the loss;
    0 lets the residuals decide.

    Raises what ``align_points`` raises, and InputError for an unknown loss.
    """
    if loss not in LOSSES:
        raise InputError(f'expected a loss of {sorted(LOSSES)}, found {loss!r}')
    fit = align_points(source, target, weights, with_scale=with_scale)
    prior = fit.weights
    for _ in range(iterations):
        scale = max(MAD_TO_STD * weighted_median(fit.residuals, prior), noise)
        if scale <= np.finfo(float).eps * np.abs(target).max():
            return fit  # at least half of the points already fit exactly
        previous = fit
        robust = prior * LOSSES[loss](fit.residuals / scale)
        fit = align_points(source, target, robust, with_scale=with_scale)
        if np.allclose(fit.residuals, previous.residuals, rtol=0, atol=1e-6 * scale):
            break
    return fit


def align_orientations(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation [3, 3] that brings orientations [N, 3, 3] closest to target ones: ``R source``.

    Chordal mean of ``target source^T`` (Hartley et al., "Rotation averaging", IJCV 2013, sec.
    5.3). Unlike the rotation between positions it is well determined on a straight walk.
    """
    U, _, Vt = np.linalg.svd(np.einsum('nij,nkj->ik', target, source))
    U[:, 2] *= np.sign(np.linalg.det(U) * np.linalg.det(Vt))
    return U @ Vt


def _rotation(covariance: np.ndarray) -> tuple[np.ndarray, float]:
    """Rotation [3, 3] that maximises tr(R^T covariance), and the maximum (eq. 39-43)."""
    U, singular, Vt = np.linalg.svd(covariance)
    sign = np.sign(np.linalg.det(U) * np.linalg.det(Vt))  # -1: the best match is a mirror image
    # The optimum is unique only while the two smaller values do not cancel.
    if singular[0] == 0 or singular[1] + sign * singular[2] < MIN_SPREAD_RATIO**2 * singular[0]:
        raise DegenerateError('expected points that spread in two directions, found points in '
                              'one place, on one line or mirrored; use a walk that turns, or '
                              'more points')
    signs = np.array([1.0, 1.0, sign])
    return U @ (signs[:, None] * Vt), float(signs @ singular)


def _checked(source: np.ndarray, target: np.ndarray, weights: np.ndarray | None
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    source, target = np.asarray(source, float), np.asarray(target, float)
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 3:
        raise InputError('expected two arrays [N, 3] of corresponding points, found shapes '
                         f'{source.shape} and {target.shape}')
    weights = np.ones(len(source)) if weights is None else np.asarray(weights, float)
    if weights.shape != source.shape[:1] or not np.all(weights >= 0):
        raise InputError(f'expected {len(source)} weights that are not negative, found shape '
                         f'{weights.shape}' + (f', smallest {weights.min()}'
                                               if weights.size else ''))
    if not (np.all(np.isfinite(source)) and np.all(np.isfinite(target))):
        raise InputError('expected finite points, found NaN or infinity; drop those rows first')
    if np.count_nonzero(weights) < 3:
        raise DegenerateError('expected at least 3 correspondences of positive weight, found '
                              f'{np.count_nonzero(weights)}')
    return source, target, weights / weights.max()


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """The value [N] below which lies half of the weight [N]."""
    order = np.argsort(values)
    cumulated = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulated, 0.5 * cumulated[-1])])
