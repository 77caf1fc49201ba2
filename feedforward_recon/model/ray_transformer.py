"""A small geometry transformer that knows its cameras: matches, depth and world points of views.

    frozen pyramid of the compact encoder (`ray_stem`) -> one token per patch of 16 px
      + the ray through the middle of the patch: intrinsics are given, not guessed
      -> frame block, global block, frame block, ... (attention of any variant, `attention/`)
      -> of each cell of 8 px: depth in its own camera, point in the world of the first view,
         how sure both are, and a descriptor; fine descriptors of each 4 px
      -> cell by cell which views show the same (`cell_matching`), and from that their poses
         (`geometry.view_graph`); views that match nothing are where their world points say.

In contrast to VGGT no head has to say a camera as seven numbers: what is learnt is where things
are, which carries over to rooms never seen, and poses follow from it in closed form. A query of a
scene that was written before has no other view to match: its pose comes from world points alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from feedforward_recon.errors import InputError
from feedforward_recon.model.backbone import EVERYTHING, AttentionFactory, Demand
from feedforward_recon.model.cell_matching import FineMatcher
from feedforward_recon.model.compact import CompactShape
from feedforward_recon.model.layers import Block, BlockConfig, GlobalBlock, empty_states
from feedforward_recon.model.ray_stem import (
    CELLS,
    PATCH,
    RayStem,
    StemMaps,
    as_maps,
    cell_pixels,
)
from feedforward_recon.model.rope import patch_positions

SPECIAL = 5  # tokens of a view beside its patches: what holds for all of it
FREQUENCIES = 6  # of the embedding of a ray
SHARPNESS = 1.6  # initial gain of queries and keys where views meet: matches stand out at once
LARGEST_LOG_CONFIDENCE = 6.0
NEAR_ZERO = 1e-4  # keeps the direction of a world point defined


@dataclass(frozen=True)
class RayConfig:
    """Shape of the network; stem: that of the compact encoder inside it."""

    dim: int = 192
    heads: int = 6
    depth: int = 5
    attention: str = 'softmax'
    stem: CompactShape = field(default_factory=CompactShape)

    @property
    def block(self) -> BlockConfig:
        """One frame or global block."""
        return BlockConfig(self.dim, self.heads, qk_norm=True, layer_scale=0.3)


@dataclass(frozen=True)
class CellMaps:
    """What the network says of the cells of B x N views, [..., h, w] each of 8 px; float32.

    log_depth: [B, N, h, w] of z. points: [B, N, h, w, 3] in the world of the first view.
    depth_confidence, points_confidence: [B, N, h, w], at least 1.
    descriptors: [B, N, D, h, w] of length 1. fine: [B, N, F, 2 h, 2 w] of length 1.
    """

    log_depth: torch.Tensor
    points: torch.Tensor
    depth_confidence: torch.Tensor
    points_confidence: torch.Tensor
    descriptors: torch.Tensor
    fine: torch.Tensor


@dataclass(frozen=True)
class RayState:
    """State of the network after writing a scene.

    states: one per global block, of the kind that its attention makes.
    view_tokens: float32 [B, S, C], one of each view written so far.
    """

    states: tuple[Any, ...]
    view_tokens: torch.Tensor

    @property
    def written(self) -> int:
        """Number of views."""
        return self.view_tokens.shape[1]


class RayTokens(nn.Module):
    """Maps of the stem, of so many columns, and intrinsics as tokens."""

    column_mean: torch.Tensor
    column_deviation: torch.Tensor

    def __init__(self, config: RayConfig, columns: int) -> None:
        super().__init__()
        dim = config.dim
        self.register_buffer('column_mean', torch.zeros(columns))
        self.register_buffer('column_deviation', torch.ones(columns))
        self.embed = nn.Linear(CELLS * columns, dim)
        self.ray_embed = nn.Linear(2 + 4 * FREQUENCIES, dim)
        self.special_tokens = nn.Parameter(0.5 * torch.randn(2, SPECIAL, dim))
        self.place = nn.Parameter(0.2 * torch.randn(2, dim))  # of the first view, of others

    def forward(self, seen: StemMaps, K: torch.Tensor, size_hw: torch.Size, *,
                has_first: bool) -> torch.Tensor:
        """Special tokens and patches [B, N, P, C] of the views that K [B, N, 3, 3] is of."""
        columns = (seen.columns - self.column_mean).div_(self.column_deviation)
        middles = cell_pixels((size_hw[0], size_hw[1]), K.device, PATCH)
        focal = K.diagonal(dim1=-2, dim2=-1)[..., None, :2]
        rays = (middles - K[..., None, :2, 2]) / focal  # [B, N, T, 2]
        patches = self.embed(columns.flatten(2)).unflatten(0, K.shape[:2]) \
            + self.ray_embed(_waves(rays))
        slots = torch.ones(K.shape[1], dtype=torch.long, device=K.device)
        if has_first:
            slots[0] = 0
        patches = patches + self.place[slots][:, None]
        special = self.special_tokens[slots].expand(len(K), -1, -1, -1)
        return torch.cat([special.to(patches.dtype), patches], 2)


class RayTransformer(nn.Module):
    """The network of `tiny`."""

    def __init__(self, config: RayConfig, global_attention: AttentionFactory) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.stem = RayStem(config.stem)
        self.tokens = RayTokens(config, self.stem.channels)
        self.frame_blocks = nn.ModuleList([Block(config.block) for _ in range(config.depth)])
        # Where views meet, a place in the image means nothing: all patches lie at one place.
        joint = replace(config.block, one_place=True)
        self.global_blocks = nn.ModuleList([
            GlobalBlock(joint, global_attention(joint, index)) for index in range(config.depth)])
        self.norm = nn.LayerNorm(2 * dim)
        self.geometry = nn.Linear(2 * dim, CELLS * 7)
        self.describe = nn.Linear(2 * dim, CELLS * config.stem.dim)
        self.fine_matcher = FineMatcher(self.stem.fine_channels)
        self.log_sharpness = nn.Parameter(torch.tensor(3.0))
        self._start_well()

    def forward(self, images: torch.Tensor, K: torch.Tensor, state: RayState | None = None, *,
                write: bool = True, demand: Demand = EVERYTHING) -> tuple[CellMaps, RayState]:
        """Images [B, N, 3, H, W] in 0..1 with K [B, N, 3, 3] -> their cells, the state after.

        K: in pixels of the images, whose centres are integers. With ``write=False`` the state
        given is returned as it is. An empty state makes the first image the world. Raises
        InputError for images whose sides are not multiples of a patch.
        """
        _check(images)
        state = self.empty_state(len(images)) if state is None else state
        seen = self.stem(images.flatten(0, 1))
        grid_hw = images.shape[-2] // PATCH, images.shape[-1] // PATCH
        x = self.tokens(seen, K, images.shape[-2:], has_first=not state.written)
        levels, states = self._joined(x, grid_hw, state.states, write, demand)
        cells = self.cells_of(levels[:, :, SPECIAL:], seen.descriptors.unflatten(0, x.shape[:2]),
                              self.fine_matcher.described(seen.fine).unflatten(0, x.shape[:2]),
                              grid_hw)
        if not (write and demand.memory):
            return cells, state
        views = levels[:, :, 0, self.config.dim:].float()
        return cells, RayState(states, torch.cat([state.view_tokens, views], 1))

    def empty_state(self, batch: int = 1) -> RayState:
        """The state of a scene of which nothing was written."""
        return RayState(empty_states(self.global_blocks, batch),
                        self.norm.weight.new_zeros(batch, 0, self.config.dim))

    def _joined(self, x: torch.Tensor, grid_hw: tuple[int, int], states: tuple[Any, ...],
                write: bool, demand: Demand) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """Tokens [B, N, P, C] -> [B, N, P, 2 C], of the last frame and global block; states."""
        batch, views = x.shape[:2]
        positions = patch_positions(grid_hw, SPECIAL, x.device)
        after, alone = list(states), x
        for index, (local, joint) in enumerate(
                zip(self.frame_blocks, self.global_blocks, strict=True)):
            alone = local(x.flatten(0, 1), positions).unflatten(0, (batch, views))
            x, state = joint(alone.flatten(1, 2), states[index], write=write,
                             positions=positions, frames=views)
            x = x.unflatten(1, (views, -1))
            if demand.memory:
                after[index] = state
        return torch.cat([alone, x], -1), tuple(after)

    def cells_of(self, levels: torch.Tensor, frozen: torch.Tensor, fine: torch.Tensor,
                 grid_hw: tuple[int, int]) -> CellMaps:
        """What the patches [B, N, T, 2 C] say, of the last frame and global block side by side.

        frozen: descriptors [B, N, T, CELLS, D] of the stem; fine: [B, N, F, 2 h, 2 w], as they
        are handed on.
        """
        tokens = self.norm(levels)
        said = as_maps(self.geometry(tokens).float().unflatten(-1, (CELLS, -1)), grid_hw)
        learnt = self.describe(tokens).float().unflatten(-1, (CELLS, -1))
        direction = F.normalize(said[:, :, 1:4] + NEAR_ZERO, dim=2)
        sure = 1 + said[:, :, 5:].clamp(max=LARGEST_LOG_CONFIDENCE).exp()
        points = (direction * said[:, :, 4:5].exp()).movedim(2, -1)
        return CellMaps(said[:, :, 0], points, sure[:, :, 0], sure[:, :, 1],
                        as_maps(F.normalize(frozen + learnt, dim=-1), grid_hw), fine)

    @torch.no_grad()
    def _start_well(self) -> None:
        """Initial values for a short training: descriptors are those of the stem."""
        for block in self.global_blocks:
            attention = cast(GlobalBlock, block).attn
            for name in ('q_norm', 'k_norm'):
                norm = getattr(attention, name, None)
                if isinstance(norm, nn.LayerNorm):  # fast weights compare unit vectors instead
                    norm.weight.fill_(SHARPNESS)
        self.geometry.weight.mul_(0.5)
        self.describe.weight.zero_()
        self.describe.bias.zero_()


def _waves(rays: torch.Tensor) -> torch.Tensor:
    """Rays [..., 2] with sines and cosines of them, [..., 2 + 4 FREQUENCIES]."""
    scales = math.pi / 2 * 2.0 ** torch.arange(FREQUENCIES, device=rays.device)
    angles = rays[..., None] * scales
    return torch.cat([rays, angles.sin().flatten(-2), angles.cos().flatten(-2)], -1)


def _check(images: torch.Tensor) -> None:
    if images.ndim != 5 or images.shape[2] != 3 or not images.is_floating_point() or \
            images.shape[-1] % PATCH or images.shape[-2] % PATCH:
        raise InputError('expected images of floats [B, N, 3, H, W] whose sides are multiples of '
                         f'{PATCH} px, found {images.dtype} {list(images.shape)}; prepare them '
                         'with preprocess')
