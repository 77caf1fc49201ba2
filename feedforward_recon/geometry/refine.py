"""Bundle adjustment in NumPy: keyframe poses, points and, if asked, the calibration.

Levenberg-Marquardt on reprojection errors and sensor inverse-depth errors with Cauchy weights,
iteratively re-weighted (Triggs et al., "Bundle Adjustment - A Modern Synthesis", 2000): the
residuals are in ``bundle_rows``, one step in ``normal_equations``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from feedforward_recon.errors import DegenerateError
from feedforward_recon.geometry.bundle_rows import (
    BundleProblem,
    BundleState,
    residuals,
    robust_cost,
)
from feedforward_recon.geometry.elimination import Elimination
from feedforward_recon.geometry.normal_equations import System, linearise, solve
from feedforward_recon.geometry.transforms import inverse, se3_exp

# What may be refined of the calibration, and how far it is expected to be off: the logarithm of a
# guessed focal length by a third, k of a lens that was called undistorted by a few hundredths, the
# shift of a pair by three standard deviations of one inverse depth: a pixel, where that is 0.3.
PRIOR_STD = {'focal': 0.3, 'radial': 0.05, 'shift': 3.0}


@dataclass(frozen=True)
class BundleResult:
    """Refined values; residual [O] in sigmas (inf behind the camera), costs before and after.

    focal_scale: times the focal length of before; radial: k beyond what was known;
    inv_depth_shift: by how much the ``shifted`` inverse depths are too large.
    """

    T_map_cam: np.ndarray
    points: np.ndarray
    focal_scale: float
    radial: float
    inv_depth_shift: float
    residual: np.ndarray
    cost_before: float
    cost_after: float


def bundle_adjust(problem: BundleProblem, steps: int) -> BundleResult:
    """Refine a problem with at most ``steps`` accepted or refused LM steps.

    The robust cost never increases; fixed poses are returned bit for bit.
    Raises DegenerateError when nothing holds the map in place (no fixed pose).
    """
    return [part for part in bundle_pieces(problem, steps) if part is not None][-1]


def bundle_pieces(problem: BundleProblem, steps: int) -> Iterator[BundleResult | None]:
    """``bundle_adjust`` in pieces, for callers with other things to do: None, .., the result."""
    if not problem.fixed.any():
        raise DegenerateError('expected at least one fixed keyframe, found none; fix the first '
                              'keyframe so that the map frame is determined')
    state = BundleState(inverse(problem.T_map_cam), problem.points.copy())
    if not len(problem.pose_index):
        yield BundleResult(problem.T_map_cam, problem.points, 1.0, 0.0, 0.0, np.zeros(0), 0.0,
                           0.0)
        return
    order = Elimination(problem)
    before = cost = _cost(problem, state)
    yield None
    damping, system = 1e-4, _linearised(problem, order, state)
    for _ in range(steps):
        yield None
        step = solve(order, system, damping)
        yield None
        # Where nothing fixes the scale, rounding can leave the system indefinite.
        trial = state if step is None else _moved(problem, order, state, step)
        new = np.inf if step is None else _cost(problem, trial)
        if new > cost:
            damping *= 10
            continue
        small = cost - new < 1e-4 * cost
        state, cost, damping = trial, new, max(damping / 5, 1e-9)
        if small:
            break
        system = _linearised(problem, order, state)
    poses = problem.T_map_cam.copy()
    poses[order.free] = inverse(state.T_cam_map[order.free])
    error = robust_cost(problem, residuals(problem, state))[2]
    yield BundleResult(poses, state.points, state.focal_scale, state.radial, state.shift,
                       error, before, cost)


def _cost(problem: BundleProblem, state: BundleState) -> float:
    off, information = _prior(problem, state)
    return (robust_cost(problem, residuals(problem, state))[0]
            + float(off @ information @ off) / 2)


def _prior(problem: BundleProblem, state: BundleState) -> tuple[np.ndarray, np.ndarray]:
    """What the calibration is off from before [m], and the information [m, m] of that."""
    off = {'focal': float(np.log(state.focal_scale)), 'radial': state.radial,
           'shift': state.shift}
    unit = {'shift': float(np.median(problem.depth_noise))}
    std = np.array([PRIOR_STD[name] * unit.get(name, 1.0) for name in problem.calibration])
    return np.array([off[name] for name in problem.calibration]), np.diag(std**-2)


def _linearised(problem: BundleProblem, order: Elimination, state: BundleState) -> System:
    """Normal equations of the observations and of what is expected of the calibration."""
    system = linearise(problem, order, state, residuals(problem, state))
    off, information = _prior(problem, state)
    return replace(system, calibration=system.calibration + np.column_stack(
        [information @ off, information]))


def _moved(problem: BundleProblem, order: Elimination, state: BundleState,
           step: tuple[np.ndarray, np.ndarray, np.ndarray]) -> BundleState:
    """The state after a step of free poses, points and the calibration."""
    xi, moved, change = step
    T_cam_map = state.T_cam_map.copy()
    T_cam_map[order.free] = se3_exp(xi) @ T_cam_map[order.free]
    by_name = dict(zip(problem.calibration, change.tolist(), strict=True))
    return BundleState(T_cam_map, state.points + moved,
                       state.focal_scale * np.exp(by_name.get('focal', 0.0) / state.focal_scale),
                       state.radial + by_name.get('radial', 0.0),
                       state.shift + by_name.get('shift', 0.0))
