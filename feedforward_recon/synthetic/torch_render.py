"""A room on a device: batches of views with torch, as `Room.render` sees them one by one."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from feedforward_recon.model.pose_encoding import rigid_inverse
from feedforward_recon.synthetic.atlas import Atlas
from feedforward_recon.synthetic.render import LEVEL_BIAS
from feedforward_recon.synthetic.room import Room
from feedforward_recon.synthetic.torch_raster import (
    RayBatch,
    Rectangles,
    SeenPlanes,
    along,
    rasterise_batch,
)
from feedforward_recon.synthetic.views import RenderedViews, Shots

# Pixels that are worked on at once, about 0.5 KB each.
PIXELS_AT_ONCE = 2**22


class TorchRoom:
    """The rectangles of a room and the textures that were seen so far, on a device."""

    def __init__(self, room: Room, device: torch.device) -> None:
        self.room, self.device = room, device
        self.rectangles = Rectangles.of(room.surfaces, device)
        self.atlas = Atlas.empty(len(room.faces), device)

    def render(self, shots: Shots) -> RenderedViews:
        """The views of this room. Textures are painted on the CPU when they are first seen."""
        width, height = shots.cameras[0].size_wh
        at_once = max(PIXELS_AT_ONCE // (width * height), 1)
        T_cam_surface = self._surfaces_in_cameras(shots)
        parts = []
        for first in range(0, len(shots.cameras), at_once):
            views = slice(first, first + at_once)
            rays = RayBatch.of(shots.cameras[views], self.device)
            focal = torch.tensor([c.fx for c in shots.cameras[views]], device=self.device)
            parts.append(self._rendered(T_cam_surface[views], rays, focal))
        image, depth, surface = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return shots.finished(image, depth, surface)

    def _surfaces_in_cameras(self, shots: Shots) -> torch.Tensor:
        """T_cam_surface float64 [V, S, 4, 4]."""
        T_world_cam = torch.as_tensor(shots.T_world_cam, dtype=torch.float64, device=self.device)
        T_world_group = torch.from_numpy(shots.T_world_group).to(self.device)
        T_cam_group = rigid_inverse(T_world_cam)[:, None] @ T_world_group
        return T_cam_group[:, torch.from_numpy(shots.groups).to(self.device)]

    def _rendered(self, T_cam_surface: torch.Tensor, rays: RayBatch, focal: torch.Tensor
                  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        planes = self.rectangles.seen_from(T_cam_surface)
        nearest, inverse_depth = rasterise_batch(self.rectangles, planes, rays)
        self._paint(nearest)
        colours = self._shaded(nearest, planes, rays, focal)
        image = smoothed_edges(colours.permute(0, 3, 1, 2), nearest)
        depth = torch.where(inverse_depth > 0, 1 / inverse_depth, 0)
        return image.round().byte(), depth, nearest

    def _paint(self, nearest: torch.Tensor) -> None:
        """Bring the textures of faces that are seen for the first time into the atlas."""
        seen = nearest.unique().long()
        seen = seen[seen >= 0]
        new = seen[self.atlas.levels[seen] == 0].tolist()
        self.atlas = self.atlas.with_pyramids({face: self.room.texture(face) for face in new})

    def _shaded(self, nearest: torch.Tensor, planes: SeenPlanes, rays: RayBatch,
                focal: torch.Tensor) -> torch.Tensor:
        """Colours float32 [V, H, W, 3] in 0..255; `render.shade` says why."""
        face = nearest.long()
        view, row, column = (face >= 0).nonzero(as_tuple=True)
        face = face[view, row, column]
        x, y = rays.x[view, row, column], rays.y[view, row, column]
        inverse_depth, u, v = along(planes.linear[view, face], x, y)
        size_m = self.rectangles.size_m.float()
        uv = torch.stack([u, v], -1) / inverse_depth[:, None] / size_m[face]
        texels_per_m = self.atlas.size_wh[:, 0, 0] / size_m[:, 0]
        factor = (texels_per_m / (focal[:, None] * planes.distance)).float()[view, face]
        level = torch.log2(factor * (1 + x * x + y * y) / inverse_depth**2) + LEVEL_BIAS
        colours = torch.zeros(*nearest.shape, 3, device=self.device)
        colours[view, row, column] = self.atlas.trilinear(face, uv, level)
        return colours


def smoothed_edges(image: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """Float images [V, 3, H, W], blurred where nearest [V, H, W] changes, as `smooth_edges`."""
    across = nearest[:, :, 1:] != nearest[:, :, :-1]
    down = nearest[:, 1:] != nearest[:, :-1]
    edge = F.pad(across, (1, 0)) | F.pad(across, (0, 1)) | F.pad(down, (0, 0, 1, 0)) \
        | F.pad(down, (0, 0, 0, 1))
    weights = torch.exp(-torch.arange(-1, 2, device=image.device)**2 / (2 * 0.7**2))
    weights = weights / weights.sum()
    kernel = (weights[:, None] * weights).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(image, (1, 1, 1, 1), 'reflect'), kernel, groups=3)
    return torch.where(edge[:, None], blurred, image)
