"""Which pixels of one view another one sees, from exact depth and poses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from feedforward_recon.model.pose_encoding import rigid_inverse

NEAREST_M = 1e-6  # a point nearer than this is behind the camera


@dataclass(frozen=True)
class PosedDepth:
    """Views without distortion: depth [..., H, W] (0: unknown), K [..., 3, 3], poses [..., 4, 4].

    The principal point counts from pixel centres at integers; T_world_cam in units of the depth.
    """

    depth: torch.Tensor
    K: torch.Tensor
    T_world_cam: torch.Tensor


@dataclass(frozen=True)
class Covisible:
    """Where the pixels of one view are in another one.

    pixels [..., H, W, 2]: (column, row) there; z [..., H, W]: depth there, negative behind that
    camera; seen bool [..., H, W]: the other view sees the same point.
    """

    pixels: torch.Tensor
    z: torch.Tensor
    seen: torch.Tensor


def covisible(one: PosedDepth, other: PosedDepth, tolerance: float = 0.01) -> Covisible:
    """Pixels of ``one`` [..., H, W] in ``other``, as far as its depth agrees.

    tolerance: of the depth there, relative. 1/z is interpolated, which is exact on planes; so
    within a pixel of an edge points may count as hidden. What moves between the views is not
    known here: leave out the pixels of `RenderedViews.moving`.
    """
    points = _points_in(one, other)
    z = points[..., 2]
    focal, centre = _focal_and_centre(other.K)
    pixels = points[..., :2] / z.clamp(min=NEAREST_M)[..., None] * focal + centre
    last = pixels.new_tensor(other.depth.shape[:-3:-1]) - 1
    inside = ((pixels >= 0) & (pixels <= last)).all(-1) & (z > NEAREST_M) & (one.depth > 0)
    inverse_depth = _sampled(torch.where(other.depth > 0, 1 / other.depth, 0),
                             2 * pixels / last - 1)
    return Covisible(pixels, z, inside & ((z * inverse_depth - 1).abs() < tolerance))


def _points_in(one: PosedDepth, other: PosedDepth) -> torch.Tensor:
    """The points of one view [..., H, W, 3] in the camera frame of another one.

    Without matrix products, which training may have set to half precision.
    """
    T = (rigid_inverse(other.T_world_cam.double()) @ one.T_world_cam.double()).to(one.depth)
    height, width = one.depth.shape[-2:]
    v, u = torch.meshgrid(torch.arange(height).to(one.depth), torch.arange(width).to(one.depth),
                          indexing='ij')
    focal, centre = _focal_and_centre(one.K)
    rays = (torch.stack([u, v], -1) - centre) / focal
    points = torch.cat([rays, torch.ones_like(rays[..., :1])], -1) * one.depth[..., None]
    R, t = T[..., None, None, :3, :3], T[..., None, None, :3, 3]
    return (R * points[..., None, :]).sum(-1) + t


def _focal_and_centre(K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Focal lengths and principal points [..., 1, 1, 2] of K [..., 3, 3], pixels."""
    return K.diagonal(dim1=-2, dim2=-1)[..., None, None, :2], K[..., None, None, :2, 2]


def _sampled(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Bilinear values [..., H, W] at places [..., h, w, 2] in -1..1 from centre to centre."""
    flat = F.grid_sample(values.reshape(-1, 1, *values.shape[-2:]),
                         places.reshape(-1, *places.shape[-3:]), align_corners=True)
    return flat.reshape(places.shape[:-1])
