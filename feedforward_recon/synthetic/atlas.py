"""The textures of a room with their mip levels in one tensor, read by one list of indices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

# Levels that the longest texture of 2^16 texels may have.
MOST_LEVELS = 16


@dataclass(frozen=True)
class Atlas:
    """Mip pyramids of S faces, packed texel behind texel, so nothing bleeds over an edge.

    texels uint8 [T, 3] RGB. start int64 [S, L]: first texel of each level; size_wh int64
    [S, L, 2]; levels int64 [S]: how many there are, 0 for faces that are not in the atlas yet.
    """

    texels: torch.Tensor
    start: torch.Tensor
    size_wh: torch.Tensor
    levels: torch.Tensor

    @staticmethod
    def empty(faces: int, device: torch.device) -> Atlas:
        """An atlas for a number of faces without any texture."""
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)
        return Atlas(zeros(0, 3, dtype=torch.uint8), zeros(faces, MOST_LEVELS),
                     zeros(faces, MOST_LEVELS, 2), zeros(faces))

    def with_pyramids(self, pyramids: Mapping[int, list[NDArray]]) -> Atlas:
        """The atlas with more faces: index and levels uint8 [h, w, 3], the finest first."""
        if not pyramids:
            return self
        start, size_wh, levels = (field.cpu().clone()
                                  for field in (self.start, self.size_wh, self.levels))
        packed, place = [], len(self.texels)
        for face, images in pyramids.items():
            levels[face] = len(images)
            for level, image in enumerate(images):
                start[face, level] = place
                size_wh[face, level] = size_wh.new_tensor(image.shape[1::-1])
                packed.append(image.reshape(-1, 3))
                place += len(packed[-1])
        device = self.texels.device
        new = torch.from_numpy(np.concatenate(packed)).to(device)
        return replace(self, texels=torch.cat([self.texels, new]), start=start.to(device),
                       size_wh=size_wh.to(device), levels=levels.to(device))

    def trilinear(self, face: torch.Tensor, uv: torch.Tensor, level: torch.Tensor
                  ) -> torch.Tensor:
        """Colours float32 [N, 3] in 0..255 of faces [N] at uv [N, 2], 0..1 of width and height.

        level [N]: 0 the finest; blended between neighbouring levels, cut to those there are.
        """
        last = self.levels[face] - 1
        level = torch.minimum(level.clamp(min=0), last)
        finer = level.long()
        coarser = torch.minimum(finer + 1, last)
        weight = (level - finer)[:, None]
        return torch.lerp(self._bilinear(face, finer, uv), self._bilinear(face, coarser, uv),
                          weight)

    def _bilinear(self, face: torch.Tensor, level: torch.Tensor, uv: torch.Tensor
                  ) -> torch.Tensor:
        """Colours [N, 3] of one level of each face, continued beyond the edges."""
        size_wh = self.size_wh[face, level]
        last = size_wh - 1
        xy = torch.minimum((uv * size_wh - 0.5).clamp(min=0), last.float())
        low = xy.long()
        part = xy - low
        (x0, y0), (x1, y1) = low.unbind(-1), torch.minimum(low + 1, last).unbind(-1)
        start, width = self.start[face, level], size_wh[:, 0]
        across, down = part[:, :1], part[:, 1:]
        upper, lower = (torch.lerp(self.texels[start + y * width + x0].float(),
                                   self.texels[start + y * width + x1].float(), across)
                        for y in (y0, y1))
        return torch.lerp(upper, lower, down)
