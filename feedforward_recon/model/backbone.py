"""The backbone of VGGT (Wang et al. 2025): frames apart, frames together, and so on.

Each image is encoded by DINOv2; one camera token and four registers are put before its
patches. Frame blocks attend within a frame, global blocks over all tokens of all frames.
Between encoder and blocks, the images of a collection may be aligned (`latent_alignment`).
A global block is the only place where frames meet, and so the only place that keeps a state of
the scene: its attention takes a state and returns one (see ``model/attention``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from feedforward_recon.model.latent_alignment import LatentAlignment
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
        last of them. alignment: blocks of latent alignment before them; no official network
        has any.
    """

    vit: VitConfig = field(default_factory=VitConfig)
    depth: int = 24
    levels: tuple[int, int, int, int] = (4, 11, 17, 23)
    alignment: int = 0

    @property
    def block(self) -> BlockConfig:
        """One frame or global block."""
        return BlockConfig(self.vit.dim, self.vit.heads, qk_norm=True)

    @property
    def alignment_block(self) -> BlockConfig:
        """One block of latent alignment."""
        return BlockConfig(self.vit.dim, self.vit.heads, layer_scale=None)


@dataclass(frozen=True)
class Demand:
    """What is wanted of a call beside the cameras of all its frames; nothing else is kept.

    frames: indices of those whose depth (and points) are wanted; None: of all.
    points: in networks that say points apart from depth, those too.
    memory: what the frames added to the scene's memory; without, the memory given comes back,
        and a layer's state is gone when its frames have read it.
    offload: keep tokens that wait for the dense heads, and dense maps, in main memory, so that
        a GPU holds little more than the tokens of one layer.
    """

    frames: Sequence[int] | None = None
    points: bool = True
    memory: bool = True
    offload: bool = False

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The frames whose dense maps are wanted, of x [B, N, ...]."""
        return x if self.frames is None else x[:, list(self.frames)]

    def place(self, device: torch.device) -> torch.device:
        """Where results of a network on ``device`` are put."""
        return torch.device('cpu') if self.offload else device


EVERYTHING = Demand()


@dataclass(frozen=True)
class Tokens:
    """What the heads read.

    levels: tokens [B, M, P, 2 C] of the chosen pairs: frame output, then global output; of
        those frames whose dense maps are wanted.
    camera: camera tokens [B, N, 2 C] of the last level, of all frames.
    grid_hw: rows and columns of patches; the first P - h * w tokens are special.
    """

    levels: tuple[torch.Tensor, ...]
    camera: torch.Tensor
    grid_hw: tuple[int, int]

    @property
    def patches(self) -> list[torch.Tensor]:
        """Patch tokens [B * M, h * w, 2 C] of each level."""
        count = self.grid_hw[0] * self.grid_hw[1]
        return [level[:, :, -count:].flatten(0, 1) for level in self.levels]


class Levels:
    """Takes copies of what the heads will read, while the blocks go on in the same memory."""

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self._levels: list[torch.Tensor] = []
        self._camera: tuple[torch.Tensor, ...] = ()

    def begin(self, alone: torch.Tensor) -> None:
        """First half of a level: tokens [B, N, P, C] that know of their own frame only."""
        self._camera = (alone[:, :, 0].clone(),)
        wanted = self.demand.of(alone)
        level = wanted.new_empty((*wanted.shape[:-1], 2 * wanted.shape[-1]),
                                 device=self.demand.place(wanted.device))
        level[..., :wanted.shape[-1]] = wanted
        self._levels.append(level)

    def complete(self, joined: torch.Tensor) -> None:
        """Second half of the level: the same tokens after the block."""
        self._camera += (joined[:, :, 0].clone(),)
        self._levels[-1][..., joined.shape[-1]:] = self.demand.of(joined)

    def tokens(self, grid_hw: tuple[int, int]) -> Tokens:
        """All of it."""
        return Tokens(tuple(self._levels), torch.cat(self._camera, -1), grid_hw)


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
        if config.alignment:
            self.latent_alignment = LatentAlignment(config.alignment_block, config.alignment)

    def forward(self, images: torch.Tensor, states: Sequence[Any], *, write: bool,
                has_first: bool, demand: Demand = EVERYTHING,
                ) -> tuple[Tokens, tuple[Any, ...]]:
        """Images [B, N, 3, H, W] in 0..1 and one state per global block -> tokens, states.

        The images may lie in main memory. Beside the tokens of one layer and one chunk's work
        only what is asked for is kept.

        has_first: frame 0 of these images is the first of the scene, whose camera is the
            world; queries and later chunks of a scene have none.
        """
        x = self._with_special(self.aligned(self.encode(images)), has_first)
        return self._joined(x, grid_of(images), images.shape[:2], states, write, demand)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, N, 3, H, W] in 0..1 -> patch tokens [B, N, T, C] of each by itself."""
        return self.patch_embed(images.flatten(0, 1), normalised).unflatten(0, images.shape[:2])

    def aligned(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch tokens [B, N, T, C] of B collections; the same without latent alignment."""
        if not self.config.alignment:
            return patches
        return torch.stack([self.latent_alignment(collection) for collection in patches])

    def decode(self, patches: torch.Tensor, grid_hw: tuple[int, int], states: Sequence[Any], *,
               write: bool, has_first: bool, demand: Demand = EVERYTHING,
               ) -> tuple[Tokens, tuple[Any, ...]]:
        """As `forward`, of patch tokens [B, N, T, C], which stay as they are."""
        return self._joined(self._with_special(patches, has_first), grid_hw, patches.shape[:2],
                            states, write, demand)

    def _joined(self, x: torch.Tensor, grid_hw: tuple[int, int], shape: tuple[int, ...],
                states: Sequence[Any], write: bool, demand: Demand,
                ) -> tuple[Tokens, tuple[Any, ...]]:
        """All tokens [B * N, P, C], in whose place the blocks work, of B x N frames."""
        positions = patch_positions(grid_hw, SPECIAL, x.device)
        levels, after = Levels(demand), list(states)
        for index, (local, joint) in enumerate(
                zip(self.frame_blocks, self.global_blocks, strict=True)):
            x = local(x, positions, reuse=True)
            if index in self.config.levels:
                levels.begin(x.unflatten(0, shape))
            x, after[index] = joint(x.reshape(shape[0], -1, x.shape[-1]), states[index],
                                    positions=positions, frames=shape[1], write=write,
                                    keep=demand.memory, reuse=True)
            x = x.reshape(-1, len(positions), x.shape[-1])
            if index in self.config.levels:
                levels.complete(x.unflatten(0, shape))
        return levels.tokens(grid_hw), tuple(after)

    def _with_special(self, patches: torch.Tensor, has_first: bool) -> torch.Tensor:
        """Patch tokens [B, N, T, C] with the special tokens before them, [B * N, P, C]."""
        special = torch.cat((self.camera_token, self.register_token), 2)  # [1, 2, 5, C]
        slots = torch.ones(patches.shape[1], dtype=torch.long, device=patches.device)
        if has_first:
            slots[0] = 0
        special = special[:, slots].expand(len(patches), -1, -1, -1)
        return torch.cat((special.to(patches.dtype), patches), 2).flatten(0, 1)
