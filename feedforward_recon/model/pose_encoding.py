"""Cameras as nine numbers: translation, quaternion (x, y, z, w) and two fields of view.

The network's quaternion is not normalised; the rotation divides by its squared length. Fields
of view are in radians, (vertical, horizontal), and reach from edge to edge; the principal point
is (W / 2, H / 2), the middle of an image whose coordinates start at its corner. Where pixel
centres are integers, as everywhere else in this package, the same point is
((W - 1) / 2, (H - 1) / 2): `centres_at_integers` goes from one to the other. Whether the pose
is T_cam_world (VGGT) or T_world_cam (DA3) is the network's affair: nothing here depends on it.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def matrix_from_quat(quat_xyzw: torch.Tensor) -> torch.Tensor:
    """Rotations [..., 3, 3] of quaternions [..., 4] of any length but zero."""
    x, y, z, w = quat_xyzw.unbind(-1)
    s = 2 / (quat_xyzw * quat_xyzw).sum(-1)
    rows = (1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w),
            s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w),
            s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y))
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def quat_from_matrix(R: torch.Tensor) -> torch.Tensor:
    """Unit quaternions [..., 4] (x, y, z, w >= 0) of rotations [..., 3, 3].

    Each row of the symmetric matrix 4 q q^T determines q; the one with the largest diagonal
    is divided by the root of that entry, which is far from zero (Shepperd's method).
    """
    r = [[R[..., i, j] for j in range(3)] for i in range(3)]
    xx, yy, zz = r[0][0], r[1][1], r[2][2]
    xy, xz, yz = r[0][1] + r[1][0], r[0][2] + r[2][0], r[1][2] + r[2][1]
    xw, yw, zw = r[2][1] - r[1][2], r[0][2] - r[2][0], r[1][0] - r[0][1]
    rows = (1 + xx - yy - zz, xy, xz, xw, xy, 1 - xx + yy - zz, yz, yw,
            xz, yz, 1 - xx - yy + zz, zw, xw, yw, zw, 1 + xx + yy + zz)
    outer = torch.stack(rows, -1).unflatten(-1, (4, 4))
    diagonal = outer.diagonal(dim1=-2, dim2=-1)
    best = diagonal.argmax(-1)[..., None]
    row = outer.gather(-2, best[..., None].expand(*best.shape, 4))[..., 0, :]
    quat = row / (2 * diagonal.gather(-1, best).sqrt())
    return torch.where(quat[..., 3:] < 0, -quat, quat)


def intrinsics_from_fov(fov_hw: torch.Tensor, size_hw: tuple[int, int],
                        smallest: float = 0.0) -> torch.Tensor:
    """K [..., 3, 3] of fields of view [..., 2] (vertical, horizontal) in radians.

    smallest: lower limit of tan(fov / 2), so that a field of view of 0 stays finite.
    """
    height, width = size_hw
    tangents = (fov_hw / 2).tan().clamp(min=smallest) if smallest else (fov_hw / 2).tan()
    K = fov_hw.new_zeros(*fov_hw.shape[:-1], 3, 3)
    K[..., 0, 0] = width / 2 / tangents[..., 1]
    K[..., 1, 1] = height / 2 / tangents[..., 0]
    K[..., 0, 2], K[..., 1, 2], K[..., 2, 2] = width / 2, height / 2, 1
    return K


def decode_cameras(encoding: torch.Tensor, size_hw: tuple[int, int],
                   smallest_tangent: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Poses [..., 4, 4] and K [..., 3, 3] of pose encodings [..., 9]."""
    pose = homogeneous(matrix_from_quat(encoding[..., 3:7]), encoding[..., :3])
    return pose, intrinsics_from_fov(encoding[..., 7:], size_hw, smallest_tangent)


def centres_at_integers(K: torch.Tensor) -> torch.Tensor:
    """K [..., 3, 3] in coordinates where pixel centres are integers, of a decoded one."""
    shift = torch.zeros_like(K)
    shift[..., :2, 2] = 0.5
    return K - shift


def encode_cameras(pose: torch.Tensor, K: torch.Tensor,
                   size_hw: tuple[int, int]) -> torch.Tensor:
    """Pose encodings [..., 9] of poses [..., 4, 4] and K [..., 3, 3]."""
    focal_yx = torch.stack((K[..., 1, 1], K[..., 0, 0]), -1)
    half_size = focal_yx.new_tensor(size_hw) / 2
    fov_hw = 2 * torch.atan(half_size / focal_yx)
    return torch.cat((pose[..., :3, 3], quat_from_matrix(pose[..., :3, :3]), fov_hw), -1)


def unprojected(depth: torch.Tensor, T_cam_world: torch.Tensor,
                K: torch.Tensor) -> torch.Tensor:
    """World points [..., H, W, 3] of z-depths [..., H, W].

    VGGT's authors find these usually better than the points of its point head. As they do, the
    index of a pixel is taken for its coordinate whatever K counts from.
    """
    height, width = depth.shape[-2:]
    v, u = torch.meshgrid(torch.arange(height).to(depth), torch.arange(width).to(depth),
                          indexing='ij')
    pixels = torch.stack((u, v), -1)
    centre, focal = K[..., :2, 2], K.diagonal(dim1=-2, dim2=-1)[..., :2]
    rays = (pixels - centre[..., None, None, :]) / focal[..., None, None, :]
    points_cam = torch.cat((rays, torch.ones_like(rays[..., :1])), -1) * depth[..., None]
    R, t = T_cam_world[..., None, None, :3, :3], T_cam_world[..., None, None, :3, 3]
    return ((points_cam - t)[..., None, :] @ R)[..., 0, :]  # R^T (x - t)


def homogeneous(R: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Transforms [..., 4, 4] from rotations [..., 3, 3] and translations [..., 3]."""
    top = torch.cat((R, t[..., None]), -1)
    bottom = F.pad(torch.zeros_like(t), (0, 1), value=1.0)[..., None, :]
    return torch.cat((top, bottom), -2)


def rigid_inverse(T: torch.Tensor) -> torch.Tensor:
    """Inverse of rigid transforms [..., 4, 4]."""
    R_inv = T[..., :3, :3].transpose(-1, -2)
    return homogeneous(R_inv, -(R_inv @ T[..., :3, 3, None])[..., 0])
