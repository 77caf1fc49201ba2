"""VGGT and its descendants: images in; cameras, depth, points and the state of the scene out.

Mapping is a forward pass that writes; localisation is the same pass with ``write=False``
against the state of an earlier one. The state is an argument and a return value: the
modules keep nothing of a scene.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from feedforward_recon.errors import InputError
from feedforward_recon.model.backbone import (
    EVERYTHING,
    Aggregator,
    AttentionFactory,
    BackboneConfig,
    Demand,
    Tokens,
)
from feedforward_recon.model.dpt import FRAMES_PER_CHUNK, DptConfig, DptHead, Scratch
from feedforward_recon.model.heads import CameraHead
from feedforward_recon.model.layers import empty_states, in_chunks
from feedforward_recon.model.network_state import NetworkState, state_of
from feedforward_recon.model.pose_encoding import decode_cameras, unprojected
from feedforward_recon.model.vit import size_of
from feedforward_recon.model.weights.checkpoints import KeyRules


@dataclass(frozen=True)
class VggtConfig:
    """Shape of the whole network.

    camera_depth: blocks of the camera head. attention: the variant in the global blocks.
    point_head: without it, points are those of depth and cameras.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    dpt: DptConfig = field(default_factory=DptConfig)
    camera_depth: int = 4
    attention: str = 'softmax'
    point_head: bool = True


@dataclass(frozen=True)
class Reconstruction:
    """What the network says about N images of size H x W; float32, unknown scale.

    M of the frames have dense maps: all, unless the caller wanted fewer (`backbone.Demand`).

    pose_encodings: [passes, B, N, 9], the last pass is the answer.
    T_cam_world: [B, N, 4, 4]; the world is the first camera written. K: [B, N, 3, 3] pixels.
    depth: [B, M, H, W] z-depth; points: [B, M, H, W, 3] in the world (M = 0 if not wanted).
    depth_confidence, points_confidence: [B, M, H, W], at least 1.
    """

    pose_encodings: torch.Tensor
    T_cam_world: torch.Tensor
    K: torch.Tensor
    depth: torch.Tensor
    depth_confidence: torch.Tensor
    points: torch.Tensor
    points_confidence: torch.Tensor


class Vggt(nn.Module):
    """The network of VGGT; VGG-T3 and `tiny` differ in sizes and in the global attention."""

    # Tracks are not needed here, and the mask token belongs to DINOv2's own training. VGG-T3's
    # short convolution was published under two names of one tensor.
    key_rules = KeyRules(
        ignored=(r'track_head\..*', r'aggregator\.patch_embed\.mask_token'),
        renamed=((r'\.short_conv_qkv\.2\.conf\.', '.short_conv_qkv.2.conv.'),))

    def __init__(self, config: VggtConfig, global_attention: AttentionFactory) -> None:
        super().__init__()
        self.config, dim = config, 2 * config.backbone.vit.dim
        self.aggregator = Aggregator(config.backbone, global_attention)
        self.camera_head = CameraHead(dim, depth=config.camera_depth)
        self.depth_head = DptHead(config.dpt, Scratch(config.dpt, outputs=2))
        if config.point_head:
            self.point_head = DptHead(config.dpt, Scratch(config.dpt, outputs=4))

    def empty_memory(self, batch: int = 1) -> NetworkState:
        """The state of a scene of which nothing was written."""
        states = empty_states(self.aggregator.global_blocks, batch)
        weight = self.camera_head.token_norm.weight
        return NetworkState(states, weight.new_zeros(batch, 0, len(weight)))

    def state_from(self, tensors: Mapping[str, torch.Tensor]) -> NetworkState:
        """The state that ``tensors`` were taken from (`NetworkState.tensors`).

        Raises InputError when they belong to another network.
        """
        return state_of(self.aggregator.global_blocks, self.config.attention, tensors)

    def forward(self, images: torch.Tensor, memory: NetworkState | None = None, *,
                write: bool = True, demand: Demand = EVERYTHING,
                ) -> tuple[Reconstruction, NetworkState]:
        """Images [B, N, 3, H, W] in 0..1 -> what they show and the memory after them.

        With ``write=False`` the memory given is returned as it is. An empty memory makes the
        first image the world. The images may lie in main memory, wherever the network is.
        With latent alignment they are the collection. Autocast, if any, is the caller's; the
        heads always run in float32. Raises InputError for images whose sides are not multiples
        of 14 px.
        """
        _check_images(images)
        memory = self.empty_memory(len(images)) if memory is None else memory
        tokens, states = self.aggregator(images, memory.states, write=write, demand=demand,
                                         has_first=not memory.camera_tokens.shape[1])
        return self._answer(tokens, states, memory, write, demand)

    @property
    def aligns(self) -> bool:
        """Whether there is latent alignment."""
        return self.config.backbone.alignment > 0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, N, 3, H, W] in 0..1 -> patch tokens [B, N, T, C] of each by itself.

        Raises InputError as `forward`.
        """
        _check_images(images)
        return self.aggregator.encode(images)

    def aligned(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch tokens [B, N, T, C] of B collections; the same without latent alignment."""
        return self.aggregator.aligned(patches)

    def decode(self, patches: torch.Tensor, grid_hw: tuple[int, int],
               demand: Demand = EVERYTHING) -> tuple[Reconstruction, NetworkState]:
        """What B windows [B, N, T, C] of encoded images show, each a scene of its own.

        grid_hw: rows and columns of patches. `forward` is ``decode(aligned(encode(images)))``.
        """
        memory = self.empty_memory(len(patches))
        tokens, states = self.aggregator.decode(patches, grid_hw, memory.states, write=True,
                                                has_first=True, demand=demand)
        return self._answer(tokens, states, memory, True, demand)

    def _answer(self, tokens: Tokens, states: tuple[Any, ...], memory: NetworkState, write: bool,
                demand: Demand) -> tuple[Reconstruction, NetworkState]:
        known = memory.camera_tokens.shape[1]
        with torch.autocast(tokens.camera.device.type, enabled=False):
            cameras = torch.cat((memory.camera_tokens,
                                 tokens.camera.to(memory.camera_tokens)), 1)
            answer = self.read_out(tokens, self.camera_head(cameras)[:, :, known:], demand)
        return answer, NetworkState(states, cameras) if write and demand.memory else memory

    def read_out(self, tokens: Tokens, encodings: torch.Tensor,
                 demand: Demand = EVERYTHING) -> Reconstruction:
        """The dense heads of the frames of ``tokens``, and the cameras [passes, B, N, 9]."""
        T_cam_world, K = decode_cameras(encodings[-1], size_of(tokens.grid_hw))
        cameras = [demand.of(x).flatten(0, 1) for x in (T_cam_world, K)]
        maps = in_chunks(partial(self._dense, tokens.grid_hw, demand.points),
                         (*cameras, *tokens.patches), FRAMES_PER_CHUNK,
                         place=demand.place(encodings.device))
        shape = tokens.levels[0].shape[:2]
        depth, depth_sure, *rest = (x.unflatten(0, shape) for x in maps)
        none = depth[:, :0]
        points, points_sure = rest or (none[..., None].expand(-1, -1, -1, -1, 3), none)
        return Reconstruction(encodings, T_cam_world, K, depth, depth_sure, points, points_sure)

    def _dense(self, grid_hw: tuple[int, int], with_points: bool, T_cam_world: torch.Tensor,
               K: torch.Tensor, *levels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Depth and its confidence of some frames; with points, these and theirs too."""
        levels = tuple(level.to(K.device) for level in levels)
        said = self.depth_head(levels, grid_hw)
        depth, sure = said[..., 0].exp(), 1 + said[..., 1].exp()
        if not with_points:
            return depth, sure
        if not self.config.point_head:
            return depth, sure, unprojected(depth, T_cam_world, K), sure
        said = self.point_head(levels, grid_hw)
        return depth, sure, _signed_expm1(said[..., :3]), 1 + said[..., 3].exp()


def _signed_expm1(x: torch.Tensor) -> torch.Tensor:
    return x.sign() * x.abs().expm1()


def _check_images(images: torch.Tensor) -> None:
    if images.ndim != 5 or images.shape[2] != 3 or not images.is_floating_point():
        raise InputError('expected images of floats [B, N, 3, H, W], found '
                         f'{images.dtype} {list(images.shape)}; prepare them with '
                         'preprocess.crop and preprocess.stacked')
