"""Rasterising of many views at once with torch, on any device; the twin of `synthetic.render`.

Every rectangle that faces a camera covers a window of pixels. The windows of all views, one behind
the other, are one long list; each of its pixels bids for its place with 1/z and the number of the
rectangle in one integer, and the largest bid wins. So there is no loop over rectangles, and the
result does not depend on the order in which a GPU works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.synthetic.render import NEAR_M, SEAM_M, Surface, rays_of


@dataclass(frozen=True)
class RayBatch:
    """Rays (x, y, 1) of V cameras: x, y float32 [V, H, W].

    columns [V, 2, W], rows [V, 2, H]: smallest and largest x of each column, y of each row.
    """

    x: torch.Tensor
    y: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor

    @staticmethod
    def of(cameras: Sequence[Camera], device: torch.device) -> RayBatch:
        """Rays through the pixel centres; those of lenses that bend are looked up on the CPU."""
        if any(camera.is_distorted for camera in cameras):
            fields = zip(*((r.x, r.y, r.columns, r.rows) for r in map(rays_of, cameras)),
                         strict=True)
            return RayBatch(*(torch.from_numpy(np.stack(f)).to(device) for f in fields))
        width, height = cameras[0].size_wh
        numbers = [(c.fx, c.fy, c.cx, c.cy) for c in cameras]
        fx, fy, cx, cy = torch.tensor(numbers, dtype=torch.float64, device=device).T[..., None]
        x = ((torch.arange(width, device=device) - cx) / fx).float()
        y = ((torch.arange(height, device=device) - cy) / fy).float()
        shape = len(cameras), height, width
        return RayBatch(x[:, None, :].expand(shape), y[:, :, None].expand(shape),
                        x[:, None].expand(-1, 2, -1), y[:, None].expand(-1, 2, -1))


@dataclass(frozen=True)
class Rectangles:
    """S rectangles: corner, side_u, side_v float64 [S, 3] as in `Surface`, size_m [S, 2]."""

    corner: torch.Tensor
    side_u: torch.Tensor
    side_v: torch.Tensor
    size_m: torch.Tensor

    @staticmethod
    def of(surfaces: Sequence[Surface], device: torch.device) -> Rectangles:
        """The rectangles as tensors on a device."""
        fields = ('corner', 'side_u', 'side_v', 'size_m')
        return Rectangles(*(torch.from_numpy(np.stack([getattr(s, name) for s in surfaces]))
                            .to(device) for name in fields))

    def seen_from(self, T_cam_surface: torch.Tensor) -> SeenPlanes:
        """The planes and outlines in V cameras, of T_cam_surface float64 [V, S, 4, 4]."""
        R = T_cam_surface[..., :3, :3]
        corner, along_u, along_v = ((R @ p[:, :, None])[..., 0]
                                    for p in (self.corner, self.side_u, self.side_v))
        corner = corner + T_cam_surface[..., :3, 3]
        outline = torch.stack([corner, corner + along_u, corner + along_u + along_v,
                               corner + along_v], -2)
        u, v = along_u / self.size_m[:, :1], along_v / self.size_m[:, 1:]
        normal = torch.linalg.cross(u, v)
        distance = (normal * corner).sum(-1, keepdim=True)
        inverse_depth = normal / distance
        planes = [inverse_depth, *(side - (side * corner).sum(-1, keepdim=True) * inverse_depth
                                   for side in (u, v))]
        return SeenPlanes(torch.stack(planes, -2).float(), distance[..., 0], outline)


@dataclass(frozen=True)
class SeenPlanes:
    """S planes in V cameras as linear functions of the ray (x, y, 1).

    linear float32 [V, S, 3, 3]: rows 1/z, u/z, v/z, the latter in metres along the sides.
    distance [V, S]: of the camera to the plane, negative behind it. outline [V, S, 4, 3]: corners
    in the camera's frame.
    """

    linear: torch.Tensor
    distance: torch.Tensor
    outline: torch.Tensor


def rasterise_batch(rectangles: Rectangles, planes: SeenPlanes, rays: RayBatch
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest rectangle int32 [V, H, W] (-1 where there is none) and 1/z float32 [V, H, W]."""
    view, face, window = _windows(planes, rays)
    pair, pixel = _pixels_of(view, window, rays.x.shape)
    inverse_depth, u, v = along(planes.linear[view, face][pair], rays.x.flatten()[pixel],
                                rays.y.flatten()[pixel])
    length_u, length_v = rectangles.size_m.float()[face][pair].unbind(-1)
    seam = SEAM_M * inverse_depth
    seen = (inverse_depth > 0) & (u >= -seam) & (v >= -seam)
    seen &= (u <= length_u * inverse_depth + seam) & (v <= length_v * inverse_depth + seam)
    # Positive floats are ordered as their bits are; of equal ones the first rectangle wins.
    last = len(rectangles.corner) - 1
    bid = (inverse_depth.view(torch.int32).long() << 32) | (last - face)[pair]
    best = torch.zeros(rays.x.numel(), dtype=torch.int64, device=bid.device)
    best.scatter_reduce_(0, pixel, bid * seen, 'amax')
    nearest = torch.where(best > 0, last - (best & 0xffffffff), -1).int()
    return (nearest.view(rays.x.shape),
            (best >> 32).int().view(torch.float32).view(rays.x.shape))


def along(linear: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Three linear functions [..., 3, 3] of rays (x, y, 1): 1/z, u/z and v/z, each [...]."""
    a, b, c = linear.unbind(-1)
    return (a * x[..., None] + (b * y[..., None] + c)).unbind(-1)


def _windows(planes: SeenPlanes, rays: RayBatch
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P pairs of a view and a face that it may see: view [P], face [P], window [P, 4].

    window: first row, rows, first column, columns.
    """
    low, high = _bounds(planes.outline)
    first_column, columns = _reach(rays.columns, low[..., 0], high[..., 0])
    first_row, rows = _reach(rays.rows, low[..., 1], high[..., 1])
    facing = planes.distance >= 1e-4
    view, face = (facing & (rows > 0) & (columns > 0)).nonzero(as_tuple=True)
    window = torch.stack([first_row, rows, first_column, columns], -1)
    return view, face, window[view, face]


def _bounds(outline: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest (x/z, y/z) [..., 2] of polygons [..., 4, 3], cut at the near plane.

    Of a polygon behind it inf and -inf.
    """
    following = outline.roll(-1, -2)
    z, z_next = outline[..., 2], following[..., 2]
    front = z > NEAR_M
    cut = front != (z_next > NEAR_M)
    t = torch.where(cut, (NEAR_M - z) / (z_next - z), 0)[..., None]
    points = torch.cat([outline, outline + t * (following - outline)], -2)
    valid = torch.cat([front, cut], -1)[..., None]
    xy = points[..., :2] / points[..., 2:]
    return (torch.where(valid, xy, torch.inf).amin(-2),
            torch.where(valid, xy, -torch.inf).amax(-2))


def _reach(lines: torch.Tensor, low: torch.Tensor, high: torch.Tensor
           ) -> tuple[torch.Tensor, torch.Tensor]:
    """First line and number of lines [V, S] that may see low..high; lines [V, 2, N]."""
    meets = (lines[:, None, 1] >= low[..., None]) & (lines[:, None, 0] <= high[..., None])
    meets = meets.byte()
    first = meets.argmax(-1)
    end = meets.shape[-1] - meets.flip(-1).argmax(-1)
    return first, (end - first) * meets.amax(-1)


def _pixels_of(view: torch.Tensor, window: torch.Tensor, shape: Sequence[int]
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """All pixels of P windows in a row: number of the pair, and place in [V, H, W]."""
    top, rows, left, columns = window.unbind(-1)
    area = rows * columns
    pair = torch.repeat_interleave(area)
    within = torch.arange(len(pair), device=pair.device) - (area.cumsum(0) - area)[pair]
    width = columns[pair]
    row, column = within // width, within % width
    corner = (view * shape[1] + top) * shape[2] + left
    return pair, corner[pair] + row * shape[2] + column
