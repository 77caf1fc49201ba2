"""Rigid (SE(3)) and similarity (Sim(3)) transforms as plain float64 [..., 4, 4] arrays.

Names cancel: ``T_a_c = T_a_b @ T_b_c``. A similarity is stored as the pair (scale, T) acting
as ``x_a = T_a_b (scale * x_b)``: rotations stay orthonormal and the scale is never hidden in
a matrix. Tangent vectors are [..., 6] = (translation part rho, rotation vector omega), as in
Sola et al., "A micro Lie theory for state estimation in robotics" (2018), eq. 172-180.
"""

from __future__ import annotations

import numpy as np

from feedforward_recon.errors import InputError

SMALL_ANGLE_RAD = 1e-4


def hat(omega: np.ndarray) -> np.ndarray:
    """Skew matrices [..., 3, 3] of vectors [..., 3]: ``hat(a) @ b = a x b``."""
    omega = np.asarray(omega, float)
    out = np.zeros((*omega.shape[:-1], 3, 3))
    out[..., 0, 1], out[..., 0, 2] = -omega[..., 2], omega[..., 1]
    out[..., 1, 0], out[..., 1, 2] = omega[..., 2], -omega[..., 0]
    out[..., 2, 0], out[..., 2, 1] = -omega[..., 1], omega[..., 0]
    return out


def _series(theta2: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """sin(t)/t, (1-cos t)/t^2 and (t-sin t)/t^3 of t^2, by Taylor series near zero."""
    theta = np.sqrt(theta2)
    small = theta < SMALL_ANGLE_RAD
    t = np.where(small, 1.0, theta)
    a = np.where(small, 1 - theta2 / 6, np.sin(t) / t)
    b = np.where(small, 0.5 - theta2 / 24, (1 - np.cos(t)) / t**2)
    c = np.where(small, 1 / 6 - theta2 / 120, (t - np.sin(t)) / t**3)
    return a, b, c


def so3_exp(omega: np.ndarray) -> np.ndarray:
    """Rotation matrices [..., 3, 3] of rotation vectors [..., 3] in radians (Rodrigues)."""
    W = hat(omega)
    a, b, _ = _series(np.sum(np.square(np.asarray(omega, float)), -1))
    return np.eye(3) + a[..., None, None] * W + b[..., None, None] * (W @ W)


def so3_log(R: np.ndarray) -> np.ndarray:
    """Rotation vectors [..., 3] in radians of rotation matrices [..., 3, 3]; |omega| <= pi."""
    q = quat_xyzw_from_matrix(R)
    q = np.where(q[..., 3:] < 0, -q, q)
    sin_half = np.linalg.norm(q[..., :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sin_half, q[..., 3:])
    tiny = sin_half < 1e-10
    return q[..., :3] * np.where(tiny, 2.0, angle / np.where(tiny, 1.0, sin_half))


def _left_jacobian(omega: np.ndarray) -> np.ndarray:
    W = hat(omega)
    _, b, c = _series(np.sum(np.square(np.asarray(omega, float)), -1))
    return np.eye(3) + b[..., None, None] * W + c[..., None, None] * (W @ W)


def se3_exp(xi: np.ndarray) -> np.ndarray:
    """Transforms [..., 4, 4] of tangents [..., 6] = (rho, omega)."""
    xi = np.asarray(xi, float)
    rho, omega = xi[..., :3], xi[..., 3:]
    t = np.einsum('...ij,...j->...i', _left_jacobian(omega), rho)
    return make_transform(so3_exp(omega), t)


def se3_log(T: np.ndarray) -> np.ndarray:
    """Tangents [..., 6] = (rho, omega) of transforms [..., 4, 4]."""
    omega = so3_log(T[..., :3, :3])
    rho = np.linalg.solve(_left_jacobian(omega), T[..., :3, 3, None])[..., 0]
    return np.concatenate([rho, omega], -1)


def make_transform(R: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Transforms [..., 4, 4] from rotations [..., 3, 3] and translations [..., 3]."""
    R, t = np.asarray(R, float), np.asarray(t, float)
    T = np.zeros((*np.broadcast_shapes(R.shape[:-2], t.shape[:-1]), 4, 4))
    T[..., :3, :3], T[..., :3, 3], T[..., 3, 3] = R, t, 1.0
    return T


def inverse(T: np.ndarray) -> np.ndarray:
    """Inverse of rigid transforms [..., 4, 4] (transpose, not a general inverse)."""
    R_inv = np.swapaxes(T[..., :3, :3], -1, -2)
    return make_transform(R_inv, -np.einsum('...ij,...j->...i', R_inv, T[..., :3, 3]))


def transform_points(T: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points [..., N, 3] moved by transforms [..., 4, 4]."""
    return points @ np.swapaxes(T[..., :3, :3], -1, -2) + T[..., None, :3, 3]


def rotation_angle_rad(R: np.ndarray) -> np.ndarray:
    """Angle [...] in [0, pi] of rotations [..., 3, 3]; exact near zero as well."""
    return np.linalg.norm(so3_log(R), axis=-1)


def pose_error(T_a: np.ndarray, T_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of the origins (map units) and angle (degrees) between poses [..., 4, 4]."""
    distance = np.linalg.norm(T_a[..., :3, 3] - T_b[..., :3, 3], axis=-1)
    R_delta = np.swapaxes(T_a[..., :3, :3], -1, -2) @ T_b[..., :3, :3]
    return distance, np.rad2deg(rotation_angle_rad(R_delta))


def quat_xyzw_from_matrix(R: np.ndarray) -> np.ndarray:
    """Unit quaternions [..., 4] (x, y, z, w) of rotations [..., 3, 3] (Shepperd's method)."""
    R = np.asarray(R, float)
    diag = np.diagonal(R, axis1=-2, axis2=-1)
    trace = diag.sum(-1)
    # Four candidates, each well conditioned where its own component is the largest.
    choices = np.concatenate([diag - (trace[..., None] - diag), trace[..., None]], -1)
    r = lambda i, j: R[..., i, j]  # noqa: E731
    x = np.stack([1 + choices[..., 0], r(0, 1) + r(1, 0), r(0, 2) + r(2, 0), r(2, 1) - r(1, 2)],
                 -1)
    y = np.stack([r(0, 1) + r(1, 0), 1 + choices[..., 1], r(1, 2) + r(2, 1), r(0, 2) - r(2, 0)],
                 -1)
    z = np.stack([r(0, 2) + r(2, 0), r(1, 2) + r(2, 1), 1 + choices[..., 2], r(1, 0) - r(0, 1)],
                 -1)
    w = np.stack([r(2, 1) - r(1, 2), r(0, 2) - r(2, 0), r(1, 0) - r(0, 1), 1 + choices[..., 3]],
                 -1)
    candidates = np.stack([x, y, z, w], -2)
    best = np.argmax(choices, -1)[..., None, None]
    q = np.take_along_axis(candidates, best, -2)[..., 0, :]
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def matrix_from_quat_xyzw(quat_xyzw: np.ndarray) -> np.ndarray:
    """Rotations [..., 3, 3] of quaternions [..., 4] (x, y, z, w); they need not be unit.

    Raises InputError for a quaternion of zero length.
    """
    q = np.asarray(quat_xyzw, float)
    norm = np.linalg.norm(q, axis=-1, keepdims=True)
    if np.any(norm < 1e-12) or not np.all(np.isfinite(q)):
        raise InputError('expected a quaternion of non-zero length, found '
                         f'{np.array2string(q.reshape(-1, 4)[0])}; check the pose source')
    x, y, z, w = np.moveaxis(q / norm, -1, 0)
    rows = [[1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def spanning_poses(T_map_cam: np.ndarray, count: int, unit: float) -> np.ndarray:
    """At most ``count`` of N poses, each in turn the one farthest from those before it.

    unit: distance (map units) that counts like one radian; the typical depth. The first pose is
    always the first, and the choice of fewer is the beginning of the choice of more.
    """
    centres, axes = T_map_cam[:, :3, 3], T_map_cam[:, :3, :3]
    chosen, nearest = [0], np.full(len(T_map_cam), np.inf)
    while len(chosen) < min(count, len(T_map_cam)):
        last = chosen[-1]
        turned = rotation_angle_rad(np.swapaxes(axes[last], -1, -2) @ axes)
        moved = np.linalg.norm(centres - centres[last], axis=1) / unit
        nearest = np.minimum(nearest, np.hypot(moved, turned))
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return np.array(chosen)


def nearest_poses(T_map_cam: np.ndarray, chosen: np.ndarray, unit: float) -> np.ndarray:
    """Of N poses, the place in ``chosen`` (indices [K]) of the most similar chosen one, [N].

    unit: as in ``spanning_poses``.
    """
    centres, axes = T_map_cam[:, :3, 3], T_map_cam[:, :3, :3]
    nearest, best = np.zeros(len(T_map_cam), int), np.full(len(T_map_cam), np.inf)
    for place, index in enumerate(chosen):
        turned = rotation_angle_rad(np.swapaxes(axes[index], -1, -2) @ axes)
        moved = np.linalg.norm(centres - centres[index], axis=1) / unit
        distance = np.hypot(moved, turned)
        closer = distance < best
        nearest[closer], best[closer] = place, distance[closer]
    return nearest
