"""Depth Anything 3 (Lin et al. 2025): a plain DINOv2 whose later blocks alternate.

The first third of the blocks sees single frames. From `alt_start` on, blocks of odd index see
all of them, and the class token gives way to a camera token. One view, chosen by the network
itself (`reference_view`) unless poses are given, is processed first. Depth, rays and cameras
share one unknown scale; views are expressed in the frame of the reference view.

Images must already be normalised (`vit.normalised`), unless the configuration says that they
are taken as they are: so were the weights of Lite3R trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from feedforward_recon.model.backbone import (
    EVERYTHING,
    AttentionFactory,
    Demand,
    Levels,
    Tokens,
)
from feedforward_recon.model.dpt import FRAMES_PER_CHUNK, DptConfig
from feedforward_recon.model.dual_dpt import DualDptHead
from feedforward_recon.model.layers import (
    Block,
    BlockConfig,
    GlobalBlock,
    Mlp,
    empty_states,
    in_chunks,
)
from feedforward_recon.model.pose_encoding import decode_cameras, encode_cameras, rigid_inverse
from feedforward_recon.model.reference_view import choose, order_from, reordered
from feedforward_recon.model.rope import patch_positions
from feedforward_recon.model.vit import (
    PatchEmbed,
    VitConfig,
    grid_of,
    resampled_positions_by_factor,
    size_of,
)
from feedforward_recon.model.weights.checkpoints import KeyRules

SMALLEST_TANGENT = 1e-6
ENCODING = 9


@dataclass(frozen=True)
class Da3Config:
    """Shape of DA3.

    alt_start: first block that alternates. levels: blocks that the heads read.
    normalised: weights were trained on images with ImageNet's mean and deviation taken out, and
        not on images in 0..1 as they are.
    """

    vit: VitConfig = field(default_factory=lambda: VitConfig(registers=0))
    alt_start: int = 8
    levels: tuple[int, int, int, int] = (11, 15, 19, 23)
    dpt: DptConfig = field(default_factory=lambda: DptConfig(rectify_skip=False))
    attention: str = 'softmax'
    normalised: bool = True

    def block(self, index: int) -> BlockConfig:
        """The block of that index."""
        return BlockConfig(self.vit.dim, self.vit.heads, norm_eps=1e-6, layer_scale=1.0,
                           qk_norm=index >= self.alt_start, one_place=self.is_global(index))

    def is_global(self, index: int) -> bool:
        """True for the blocks that see all frames."""
        return index >= self.alt_start and index % 2 == 1


@dataclass(frozen=True)
class Da3Reconstruction:
    """What DA3 says about N images of H x W; float32, unknown scale.

    pose_encodings: [B, N, 9] of T_world_cam. T_cam_world: [B, N, 4, 4]. K: [B, N, 3, 3].
    depth, depth_confidence: [B, M, H, W]. rays: [B, M, h, w, 6] (direction, origin) on a grid
    of 8 rays per patch side; ray_confidence: [B, M, h, w]. M of the frames have dense maps:
    all, unless the caller wanted fewer (`backbone.Demand`).
    """

    pose_encodings: torch.Tensor
    T_cam_world: torch.Tensor
    K: torch.Tensor
    depth: torch.Tensor
    depth_confidence: torch.Tensor
    rays: torch.Tensor
    ray_confidence: torch.Tensor


class AlternatingVit(nn.Module):
    """DINOv2 without registers whose later blocks are turned, normed and alternate."""

    def __init__(self, config: Da3Config, global_attention: AttentionFactory) -> None:
        super().__init__()
        self.config, vit = config, config.vit
        self.patch_embed = PatchEmbed(vit.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, vit.dim))
        self.camera_token = nn.Parameter(1e-6 * torch.randn(1, 2, vit.dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + vit.grid**2, vit.dim))
        self.blocks = nn.ModuleList([self._block(i, global_attention) for i in range(vit.depth)])
        self.norm = nn.LayerNorm(vit.dim)

    def _block(self, index: int, global_attention: AttentionFactory) -> Block:
        block = self.config.block(index)
        if self.config.is_global(index):
            return GlobalBlock(block, global_attention(block, index))
        return Block(block)

    def forward(self, images: torch.Tensor, states: Sequence[Any], *, write: bool,
                has_first: bool, reference: str, camera_tokens: torch.Tensor | None = None,
                demand: Demand = EVERYTHING) -> tuple[Tokens, tuple[Any, ...]]:
        """Normalised images [B, N, 3, H, W] -> what the heads read, and the states.

        A level is the last output of a block that saw single frames, then its own. Nothing is
        normed yet. camera_tokens [B, N, C]: what is known of the cameras; the order of the
        views is then left alone.
        """
        shape, grid_hw, start = images.shape[:2], grid_of(images), self.config.alt_start
        x = self._embed(images)  # [B, N, P, C]
        positions = patch_positions(grid_hw, 1, x.device)
        chooses = camera_tokens is None and has_first and shape[1] > 2
        order = torch.arange(shape[1], device=x.device).expand(len(x), -1)
        levels, after = Levels(demand), list(states)
        for index, block in enumerate(self.blocks):
            if index == start - 1 and chooses:
                order = order_from(choose(x[:, :, 0], reference), shape[1])
                x = reordered(x, order)
            if index == start:
                x = self._with_cameras(x, camera_tokens, has_first)
            is_level, as_given = index in self.config.levels, order.argsort(-1)
            if isinstance(block, GlobalBlock):
                if is_level:
                    levels.begin(reordered(x, as_given))
                number = (index - start) // 2
                x, after[number] = block(x.flatten(1, 2), states[number], frames=shape[1],
                                         write=write, keep=demand.memory, positions=positions,
                                         reuse=True)
                x = x.unflatten(1, (shape[1], -1))
            else:
                turned = positions if index >= start else None
                x = block(x.flatten(0, 1), turned, reuse=True).unflatten(0, shape)
                if is_level:
                    levels.begin(reordered(x, as_given))
            if is_level:
                levels.complete(reordered(x, as_given))
        return levels.tokens(grid_hw), tuple(after)

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        table = resampled_positions_by_factor(self.pos_embed, grid_of(images))

        def embedded(part: torch.Tensor) -> tuple[torch.Tensor]:
            patches = self.patch_embed(part.to(self.cls_token.device))
            x = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), 1)
            return (x + table.to(x.dtype),)
        x, = in_chunks(embedded, (images.flatten(0, 1),), FRAMES_PER_CHUNK)
        return x.unflatten(0, images.shape[:2])

    def _with_cameras(self, x: torch.Tensor, camera_tokens: torch.Tensor | None,
                      has_first: bool) -> torch.Tensor:
        """The class token of each view gives way to what is known of its camera.

        By default that is a learned token, one for the first view and one for all others.
        """
        if camera_tokens is None:
            slots = torch.ones(x.shape[1], dtype=torch.long, device=x.device)
            if has_first:
                slots[0] = 0
            camera_tokens = self.camera_token[:, slots].expand(len(x), -1, -1)
        return torch.cat((camera_tokens[:, :, None].to(x.dtype), x[:, :, 1:]), 2)


class CameraDecoder(nn.Module):
    """Camera tokens -> pose encodings of T_world_cam."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim),
                                      nn.ReLU())
        self.fc_t, self.fc_qvec = nn.Linear(dim, 3), nn.Linear(dim, 4)
        self.fc_fov = nn.Sequential(nn.Linear(dim, 2), nn.ReLU())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, C] -> [B, N, 9]."""
        x = self.backbone(tokens)
        return torch.cat((self.fc_t(x), self.fc_qvec(x), self.fc_fov(x)), -1)


class CameraEncoder(nn.Module):
    """Known cameras -> the tokens that replace the learned ones."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pose_branch = Mlp(ENCODING, dim // 2, dim)
        self.token_norm, self.trunk_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.trunk = nn.ModuleList([Block(BlockConfig(dim, 16)) for _ in range(4)])

    def forward(self, encodings: torch.Tensor) -> torch.Tensor:
        """Encodings [B, N, 9] of T_world_cam -> [B, N, C]."""
        x = self.token_norm(self.pose_branch(encodings))
        for block in self.trunk:
            x = block(x)
        return self.trunk_norm(x)


class Da3(nn.Module):
    """The whole network."""

    key_rules = KeyRules(prefix='model.')

    def __init__(self, config: Da3Config, global_attention: AttentionFactory) -> None:
        super().__init__()
        self.config, dim = config, config.vit.dim
        self.backbone = nn.ModuleDict({'pretrained': AlternatingVit(config, global_attention)})
        self.head = DualDptHead(config.dpt)
        self.cam_enc, self.cam_dec = CameraEncoder(dim), CameraDecoder(2 * dim)

    @property
    def vit(self) -> AlternatingVit:
        """The backbone, under its name in the checkpoint."""
        return cast(AlternatingVit, self.backbone['pretrained'])

    def empty_memory(self, batch: int = 1) -> tuple[Any, ...]:
        """The states of a scene that nobody has seen, one per global block."""
        return empty_states(self.vit.blocks, batch)

    def forward(self, images: torch.Tensor, memory: Sequence[Any] | None = None, *,
                write: bool = True, reference: str = 'saddle_balanced',
                cameras: tuple[torch.Tensor, torch.Tensor] | None = None,
                demand: Demand = EVERYTHING) -> tuple[Da3Reconstruction, tuple[Any, ...]]:
        """Normalised images [B, N, 3, H, W] -> what they show, and the states after them.

        Without a memory, one of the images becomes the world. cameras: known T_cam_world
        [B, N, 4, 4] and K [B, N, 3, 3], if any. The images may lie in main memory.
        """
        size_hw, device = (images.shape[-2], images.shape[-1]), self.vit.cls_token.device
        known = None
        with torch.autocast(device.type, enabled=False):
            if cameras is not None:
                T_cam_world, K = cameras
                known = self.cam_enc(encode_cameras(rigid_inverse(T_cam_world), K, size_hw))
        states = self.empty_memory(len(images)) if memory is None else memory
        tokens, after = self.vit(images, states, write=write, has_first=memory is None,
                                 reference=reference, camera_tokens=known, demand=demand)
        with torch.autocast(device.type, enabled=False):
            return self._read_out(tokens, demand), after

    def head_inputs(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Patch tokens [..., h * w, 2 C]; only what came from the block itself is normed."""
        alone_and_own = (level[..., 1:, :].chunk(2, -1) for level in levels)
        return [torch.cat((alone, self.vit.norm(own)), -1) for alone, own in alone_and_own]

    def _read_out(self, tokens: Tokens, demand: Demand) -> Da3Reconstruction:
        device, shape = tokens.camera.device, tokens.levels[0].shape[:2]
        encodings = self.cam_dec(tokens.camera.to(self.vit.norm.weight.dtype))
        T_world_cam, K = decode_cameras(encodings, size_of(tokens.grid_hw), SMALLEST_TANGENT)
        maps = in_chunks(partial(self._dense, tokens.grid_hw, device),
                         [level.flatten(0, 1) for level in tokens.levels], FRAMES_PER_CHUNK,
                         place=demand.place(device))
        return Da3Reconstruction(encodings, rigid_inverse(T_world_cam), K,
                                 *(x.unflatten(0, shape) for x in maps))

    def _dense(self, grid_hw: tuple[int, int], device: torch.device,
               *levels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Depth and rays of some frames, each with its confidence."""
        moved = [level.to(device, self.vit.norm.weight.dtype) for level in levels]
        depth, rays = self.head(self.head_inputs(moved), grid_hw)
        return (depth[..., 0].exp(), 1 + depth[..., 1].exp(), rays[..., :6],
                1 + rays[..., 6].exp())
