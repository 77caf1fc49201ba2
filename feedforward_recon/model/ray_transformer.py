"""A small geometry transformer that knows its cameras: matches, depth and world points of views.

    frozen pyramid of the compact encoder (`ray_stem`) -> one token per patch of 16 px
      + the ray through the middle of the patch: intrinsics are given, not guessed
      -> where weights have it, images of a collection agree (`latent_alignment`)
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from feedforward_recon.errors import InputError
from feedforward_recon.model.backbone import EVERYTHING, AttentionFactory, Demand
from feedforward_recon.model.cell_matching import FineMatcher
from feedforward_recon.model.compact import CompactShape
from feedforward_recon.model.latent_alignment import LatentAlignment
from feedforward_recon.model.layers import Block, BlockConfig, GlobalBlock, empty_states
from feedforward_recon.model.network_state import NetworkState, state_of
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
    """Shape of the network.

    stem: that of the compact encoder inside it. alignment: blocks of latent alignment.
    """

    dim: int = 192
    heads: int = 6
    depth: int = 5
    attention: str = 'softmax'
    stem: CompactShape = field(default_factory=CompactShape)
    alignment: int = 0

    @property
    def block(self) -> BlockConfig:
        """One frame or global block."""
        return BlockConfig(self.dim, self.heads, qk_norm=True, layer_scale=0.3)

    @property
    def alignment_block(self) -> BlockConfig:
        """One block of latent alignment."""
        return BlockConfig(self.dim, self.heads, layer_scale=None)


@dataclass(frozen=True)
class EncodedViews:
    """What is computed of each of V images by itself, whatever took it.

    patches: [V, T, C] without rays. descriptors: [V, T, CELLS, D] of the stem, of length 1.
    fine: [V, F, H / 4, W / 4] of length 1.
    """

    patches: torch.Tensor
    descriptors: torch.Tensor
    fine: torch.Tensor

    def of(self, views: torch.Tensor) -> EncodedViews:
        """Some views, by their numbers [M]."""
        return EncodedViews(self.patches[views], self.descriptors[views], self.fine[views])

    @staticmethod
    def together(parts: Sequence[EncodedViews]) -> EncodedViews:
        """The views of all parts; nothing else of the stem stays in memory."""
        return EncodedViews(*(torch.cat([getattr(part, f.name) for part in parts])
                              for f in fields(EncodedViews)))


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

    def embedded(self, seen: StemMaps) -> torch.Tensor:
        """Patches [V, T, C] of V images, without rays."""
        columns = (seen.columns - self.column_mean).div_(self.column_deviation)
        return cast(torch.Tensor, self.embed(columns.flatten(2)))

    def along_rays(self, patches: torch.Tensor, K: torch.Tensor, grid_hw: tuple[int, int]
                   ) -> torch.Tensor:
        """Patches [B, N, T, C], each with its ray, of the views that K [B, N, 3, 3] is of."""
        middles = cell_pixels((PATCH * grid_hw[0], PATCH * grid_hw[1]), K.device, PATCH)
        focal = K.diagonal(dim1=-2, dim2=-1)[..., None, :2]
        rays = (middles - K[..., None, :2, 2]) / focal  # [B, N, T, 2]
        return patches + self.ray_embed(_waves(rays))

    def forward(self, patches: torch.Tensor, *, has_first: bool) -> torch.Tensor:
        """Special tokens and patches [B, N, P, C] of patches [B, N, T, C] of views."""
        batch, views = patches.shape[:2]
        slots = torch.ones(views, dtype=torch.long, device=patches.device)
        if has_first:
            slots[0] = 0
        patches = patches + self.place[slots][:, None]
        special = self.special_tokens[slots].expand(batch, -1, -1, -1)
        return torch.cat([special.to(patches.dtype), patches], 2)


class RayTransformer(nn.Module):
    """The network of `tiny`."""

    def __init__(self, config: RayConfig, global_attention: AttentionFactory) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.stem = RayStem(config.stem)
        self.tokens = RayTokens(config, self.stem.channels)
        if config.alignment:
            self.latent_alignment = LatentAlignment(config.alignment_block, config.alignment)
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

    def forward(self, images: torch.Tensor, K: torch.Tensor, state: NetworkState | None = None, *,
                write: bool = True, demand: Demand = EVERYTHING) -> tuple[CellMaps, NetworkState]:
        """Images [B, N, 3, H, W] in 0..1 with K [B, N, 3, 3] -> their cells, the state after.

        K: in pixels of the images, whose centres are integers. With ``write=False`` the state
        given is returned as it is. An empty state makes the first image the world. With latent
        alignment the images are the collection. Raises InputError for images whose sides are not
        multiples of a patch.
        """
        seen = self.encode(images)
        grid_hw = images.shape[-2] // PATCH, images.shape[-1] // PATCH
        patches = seen.patches.unflatten(0, K.shape[:2])
        patches = self.aligned(self.tokens.along_rays(patches, K, grid_hw))
        return self.decode(patches, seen, grid_hw, state, write=write, demand=demand)

    @property
    def aligns(self) -> bool:
        """Whether there is latent alignment."""
        return self.config.alignment > 0

    def encode(self, images: torch.Tensor) -> EncodedViews:
        """Images [B, N, 3, H, W] in 0..1, each by itself, as B N views. Raises as `forward`."""
        _check(images)
        seen = self.stem(images.flatten(0, 1))
        return EncodedViews(self.tokens.embedded(seen), seen.descriptors,
                            self.fine_matcher.described(seen.fine))

    def aligned(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches with rays [B, N, T, C] of B collections; the same without latent alignment."""
        if not self.config.alignment:
            return patches
        return torch.stack([self.latent_alignment(collection) for collection in patches])

    def decode(self, patches: torch.Tensor, seen: EncodedViews, grid_hw: tuple[int, int],
               state: NetworkState | None = None, *, write: bool = True,
               demand: Demand = EVERYTHING) -> tuple[CellMaps, NetworkState]:
        """As `forward`, of patches [B, N, T, C] with rays and what else was seen of B N views."""
        state = self.empty_state(len(patches)) if state is None else state
        x = self.tokens(patches, has_first=not state.written)
        levels, states = self._joined(x, grid_hw, state.states, write, demand)
        cells = self.cells_of(levels[:, :, SPECIAL:], seen.descriptors.unflatten(0, x.shape[:2]),
                              seen.fine.unflatten(0, x.shape[:2]), grid_hw)
        if not (write and demand.memory):
            return cells, state
        views = levels[:, :, 0, self.config.dim:].float()
        return cells, NetworkState(states, torch.cat([state.camera_tokens, views], 1))

    def empty_state(self, batch: int = 1) -> NetworkState:
        """The state of a scene of which nothing was written."""
        return NetworkState(empty_states(self.global_blocks, batch),
                        self.norm.weight.new_zeros(batch, 0, self.config.dim))

    def state_from(self, tensors: Mapping[str, torch.Tensor]) -> NetworkState:
        """The state that ``tensors`` were taken from (`NetworkState.tensors`).

        Raises InputError when they belong to another network.
        """
        return state_of(self.global_blocks, self.config.attention, tensors)

    def _joined(self, x: torch.Tensor, grid_hw: tuple[int, int], states: tuple[Any, ...],
                write: bool, demand: Demand) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """Tokens [B, N, P, C] -> [B, N, P, 2 C], of the last frame and global block; states."""
        batch, views = x.shape[:2]
        positions = patch_positions(grid_hw, SPECIAL, x.device)
        after, alone = list(states), x
        for index, (local, joint) in enumerate(
                zip(self.frame_blocks, self.global_blocks, strict=True)):
            alone = local(x.flatten(0, 1), positions).unflatten(0, (batch, views))
            x, after[index] = joint(alone.flatten(1, 2), states[index], positions=positions,
                                    frames=views, write=write, keep=demand.memory)
            x = x.unflatten(1, (views, -1))
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
