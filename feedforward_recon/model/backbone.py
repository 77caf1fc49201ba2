"""The backbone of VGGT (Wang et al. 2025): frames apart, frames together, and so on.

Each image is encoded by DINOv2; one camera token and four registers are put before its
patches. Frame blocks attend within a frame, global blocks over all tokens of all frames.
A global block is the only place where frames meet, and so the only place where a scene is
remembered: its attention takes a state and returns one (see ``model/attention``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from feedforward_recon.model.layers import Block, BlockConfig, GlobalBlock
from feedforward_recon.model.rope import patch_positions
from feedforward_recon.model.vit import DinoV2, VitConfig, grid_of, normalised

REGISTERS = 4
SPECIAL = 1 + REGISTERS
AttentionFactory = Callable[[BlockConfig, int], nn.Module]


@dataclass(frozen=True)
class BackboneConfig:
    """Shape of the aggregator.

    levels: the pairs of blocks whose outputs the dense heads read; the camera head reads the
        last of them.
    """

    vit: VitConfig = field(default_factory=VitConfig)
    depth: int = 24
    levels: tuple[int, int, int, int] = (4, 11, 17, 23)

    @property
    def block(self) -> BlockConfig:
        """One frame or global block."""
        return BlockConfig(self.vit.dim, self.vit.heads, qk_norm=True)


@dataclass(frozen=True)
class Tokens:
    """What the heads read.

    levels: tokens [B, N, P, 2 C] of the chosen pairs: frame output, then global output.
    grid_hw: rows and columns of patches; the first P - h * w tokens are special.
    """

    levels: tuple[torch.Tensor, ...]
    grid_hw: tuple[int, int]

    @property
    def camera(self) -> torch.Tensor:
        """Camera tokens [B, N, 2 C] of the last level."""
        return self.levels[-1][:, :, 0]

    @property
    def patches(self) -> list[torch.Tensor]:
        """Patch tokens [B * N, h * w, 2 C] of each level."""
        count = self.grid_hw[0] * self.grid_hw[1]
        return [level[:, :, -count:].flatten(0, 1) for level in self.levels]


class Aggregator(nn.Module):
    """Images -> tokens that know of all frames, and of the scene's state."""

    def __init__(self, config: BackboneConfig, global_attention: AttentionFactory) -> None:
        super().__init__()
        self.config, dim = config, config.vit.dim
        self.patch_embed = DinoV2(config.vit)
        self.camera_token = nn.Parameter(1e-6 * torch.randn(1, 2, 1, dim))
        self.register_token = nn.Parameter(1e-6 * torch.randn(1, 2, REGISTERS, dim))
        self.frame_blocks = nn.ModuleList([Block(config.block) for _ in range(config.depth)])
        self.global_blocks = nn.ModuleList([
            GlobalBlock(config.block, global_attention(config.block, index))
            for index in range(config.depth)])

    def forward(self, images: torch.Tensor, states: Sequence[Any], *, write: bool,
                has_first: bool, offload: bool = False) -> tuple[Tokens, tuple[Any, ...]]:
        """Images [B, N, 3, H, W] in 0..1 and one state per global block -> tokens, states.

        has_first: frame 0 of these images is the first of the scene, whose camera is the
            world; queries and later chunks of a scene have none.
        offload: put what the heads will read into main memory.
        """
        batch, frames = images.shape[:2]
        grid_hw = grid_of(images)
        x = self._embed(images, has_first)  # [B * N, P, C]
        positions = patch_positions(grid_hw, SPECIAL, images.device)
        levels, after = [], []
        for index, (local, joint) in enumerate(
                zip(self.frame_blocks, self.global_blocks, strict=True)):
            x = seen_alone = local(x, positions)
            x = x.reshape(batch, frames * len(positions), -1)
            x, state = joint(x, states[index], positions=positions, frames=frames, write=write)
            x = x.reshape(batch * frames, len(positions), -1)
            after.append(state)
            if index in self.config.levels:
                level = torch.cat((seen_alone, x), -1).unflatten(0, (batch, frames))
                levels.append(level.cpu() if offload else level)
        return Tokens(tuple(levels), grid_hw), tuple(after)

    def _embed(self, images: torch.Tensor, has_first: bool) -> torch.Tensor:
        """Patch tokens with the special tokens before them, [B * N, P, C]."""
        patches = self.patch_embed(normalised(images).flatten(0, 1))
        special = torch.cat((self.camera_token, self.register_token), 2)  # [1, 2, 5, C]
        slots = torch.ones(images.shape[1], dtype=torch.long, device=images.device)
        if has_first:
            slots[0] = 0
        special = special[:, slots].expand(len(images), -1, -1, -1).flatten(0, 1)
        return torch.cat((special.to(patches.dtype), patches), 1)
