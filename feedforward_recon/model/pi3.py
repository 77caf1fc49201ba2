"""pi3 (Wang et al., "Permutation-equivariant visual geometry learning", 2025).

No image is special: there is no first frame, no camera token and no pose encoding. Every
image gets a point map in its own camera, a confidence and a pose; changing the order of the
images changes the order of the answers and nothing else. The world and its scale are
arbitrary.

Speed3R (sparse global attention) uses the same network without registers, under its own names
of the decoder's blocks (`Pi3.key_rules`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from feedforward_recon.model.backbone import EVERYTHING, AttentionFactory, Demand
from feedforward_recon.model.layers import (
    Block,
    BlockConfig,
    GlobalBlock,
    empty_states,
    in_chunks,
    rows_per_chunk,
)
from feedforward_recon.model.pose_encoding import homogeneous
from feedforward_recon.model.rope import patch_positions
from feedforward_recon.model.vit import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PATCH,
    DinoV2,
    VitConfig,
    grid_of,
)
from feedforward_recon.model.weights.checkpoints import KeyRules

HEAD_DIM = 1024
CAMERA_DIM = 512


@dataclass(frozen=True)
class Pi3Config:
    """Shape of pi3; blocks of even index see one frame, blocks of odd index all of them.

    registers: learned tokens before the patches of each frame; without them positions start
        at 0 instead of 1.
    """

    vit: VitConfig = field(default_factory=VitConfig)
    depth: int = 36
    registers: int = 5
    attention: str = 'softmax'

    @property
    def block(self) -> BlockConfig:
        """One block of the decoder."""
        return BlockConfig(self.vit.dim, self.vit.heads, norm_eps=1e-6, qk_norm=True,
                           round_qk=True)


@dataclass(frozen=True)
class Pi3Reconstruction:
    """What pi3 says about N images of H x W; float32, arbitrary world and scale.

    M of the frames have dense maps: all, unless the caller wanted fewer (`backbone.Demand`).

    points_cam: [B, M, H, W, 3] in each camera, z forward; points: the same in the world.
    confidence_logit: [B, M, H, W], the sigmoid is the confidence. T_world_cam: [B, N, 4, 4].
    """

    points: torch.Tensor
    points_cam: torch.Tensor
    confidence_logit: torch.Tensor
    T_world_cam: torch.Tensor


class FrameDecoder(nn.Module):
    """A small transformer over the tokens of one frame, one for each kind of answer.

    Without LayerScale its residual stream is of half precision under autocast, as in the
    original.
    """

    def __init__(self, dim_in: int, dim_out: int, depth: int = 5) -> None:
        super().__init__()
        block = BlockConfig(HEAD_DIM, 16, norm_eps=1e-6, layer_scale=None)
        self.projects = nn.Linear(dim_in, HEAD_DIM)
        self.blocks = nn.ModuleList([Block(block) for _ in range(depth)])
        self.linear_out = nn.Linear(HEAD_DIM, dim_out)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Tokens [B, P, dim_in] -> [B, P, dim_out]."""
        x = self.projects(tokens)
        for block in self.blocks:
            x = block(x, positions)
        return self.linear_out(x)


class PixelHead(nn.Module):
    """A linear map of each token to the values of its 14x14 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(HEAD_DIM, channels * PATCH**2)

    def forward(self, tokens: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        """Patch tokens [B, h * w, C] -> [B, H, W, channels]."""
        maps = self.proj(tokens).transpose(1, 2).unflatten(2, grid_hw)
        return F.pixel_shuffle(maps, PATCH).permute(0, 2, 3, 1)


class ResidualMlp(nn.Module):
    """Three linear layers with ReLU around a skip connection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.res_conv1, self.res_conv2, self.res_conv3 = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        y = F.relu(self.res_conv2(F.relu(self.res_conv1(x))))
        return x + F.relu(self.res_conv3(y))


class PoseHead(nn.Module):
    """Patch tokens -> the pose of the camera."""

    def __init__(self, dim: int = CAMERA_DIM) -> None:
        super().__init__()
        self.res_conv = nn.ModuleList([ResidualMlp(dim), ResidualMlp(dim)])
        self.more_mlps = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim),
                                       nn.ReLU())
        self.fc_t, self.fc_rot = nn.Linear(dim, 3), nn.Linear(dim, 9)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, T, C] -> T_world_cam [B, 4, 4]."""
        for block in self.res_conv:
            tokens = block(tokens)
        x = self.more_mlps(tokens.mean(1))
        return homogeneous(nearest_rotation(self.fc_rot(x).unflatten(-1, (3, 3))), self.fc_t(x))


class Pi3(nn.Module):
    """The whole network."""

    image_mean: torch.Tensor
    image_std: torch.Tensor
    key_rules = KeyRules(
        renamed=((r'local_decoder\.(\d+)\.', lambda m: f'decoder.{2 * int(m[1])}.'),
                 (r'global_decoder\.(\d+)\.', lambda m: f'decoder.{2 * int(m[1]) + 1}.')),
        optional=('image_mean', 'image_std'))

    def __init__(self, config: Pi3Config, global_attention: AttentionFactory) -> None:
        super().__init__()
        self.config, dim = config, config.vit.dim
        self.encoder = DinoV2(config.vit)
        if config.registers:
            self.register_token = nn.Parameter(torch.randn(1, 1, config.registers, dim))
        self.decoder = nn.ModuleList([
            GlobalBlock(config.block, global_attention(config.block, index)) if index % 2
            else Block(config.block) for index in range(config.depth)])
        self.point_decoder = FrameDecoder(2 * dim, HEAD_DIM)
        self.conf_decoder = FrameDecoder(2 * dim, HEAD_DIM)
        self.camera_decoder = FrameDecoder(2 * dim, CAMERA_DIM)
        self.point_head, self.conf_head = PixelHead(3), PixelHead(1)
        self.camera_head = PoseHead()
        # Constants, but part of the checkpoint: they have values even on the device `meta`.
        for name, values in (('image_mean', IMAGENET_MEAN), ('image_std', IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values, device='cpu').view(1, 3, 1, 1))

    def empty_memory(self, batch: int = 1) -> tuple[Any, ...]:
        """The states of a scene that nobody has seen, one per global block."""
        return empty_states(self.decoder, batch)

    def forward(self, images: torch.Tensor, memory: Sequence[Any] | None = None, *,
                write: bool = True, demand: Demand = EVERYTHING,
                ) -> tuple[Pi3Reconstruction, tuple[Any, ...]]:
        """Images [B, N, 3, H, W] in 0..1 -> what they show, and the states after them.

        The images may lie in main memory. Every point map comes with its points in the world.
        """
        grid_hw, shape = grid_of(images), images.shape[:2]
        states = self.empty_memory(len(images)) if memory is None else tuple(memory)
        x = self._embed(images.flatten(0, 1))
        positions = patch_positions(grid_hw, self.config.registers, x.device,
                                    first=1 if self.config.registers else 0)
        last, after = self._decode(x, states, positions, shape, write, demand.memory)
        rows = rows_per_chunk(len(positions), x.device)
        T_world_cam, = in_chunks(partial(self._poses, positions), last, rows)
        T_world_cam = T_world_cam.unflatten(0, shape)
        wanted = [demand.of(t.unflatten(0, shape)) for t in last]
        maps = in_chunks(partial(self._dense, positions, grid_hw),
                         [t.flatten(0, 1) for t in (demand.of(T_world_cam), *wanted)],
                         rows, place=demand.place(x.device))
        points, points_cam, logit = (t.unflatten(0, wanted[0].shape[:2]) for t in maps)
        return Pi3Reconstruction(points, points_cam, logit, T_world_cam), after

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        """Encoded patches behind the registers, [B * N, P, C]."""
        patches = self.encoder(images, lambda x: (x - self.image_mean) / self.image_std)
        if not self.config.registers:
            return patches
        registers = self.register_token[0].expand(len(patches), -1, -1)
        return torch.cat((registers.to(patches.dtype), patches), 1)

    def _decode(self, x: torch.Tensor, states: Sequence[Any], positions: torch.Tensor,
                shape: Sequence[int], write: bool, keep: bool,
                ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[Any, ...]]:
        """The last two blocks' outputs, each [B * N, P, C], and the states."""
        after: list[Any] = []
        alone, (batch, frames) = x, shape
        for index, block in enumerate(self.decoder):
            if isinstance(block, GlobalBlock):
                x, state = block(x.reshape(batch, frames * len(positions), -1),
                                 states[len(after)], positions=positions, frames=frames,
                                 write=write, keep=keep, reuse=index + 1 < len(self.decoder))
                x = x.reshape(batch * frames, len(positions), -1)
                after.append(state)
            else:
                x = alone = block(x, positions, reuse=True)
        return (alone, x), tuple(after)

    def _decoded(self, decoder: FrameDecoder, positions: torch.Tensor,
                 last: Sequence[torch.Tensor]) -> torch.Tensor:
        """Patch tokens of some frames after one of the decoders, in the precision of heads."""
        x = decoder(torch.cat(list(last), -1), positions)[:, self.config.registers:]
        return x.to(self.conf_head.proj.bias.dtype)

    def _poses(self, positions: torch.Tensor, *last: torch.Tensor) -> tuple[torch.Tensor]:
        x = self._decoded(self.camera_decoder, positions, last)
        with torch.autocast(x.device.type, enabled=False):
            return (self.camera_head(x),)

    def _dense(self, positions: torch.Tensor, grid_hw: tuple[int, int],
               T_world_cam: torch.Tensor, *last: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Points in the world and in the camera, and confidence logits, of some frames."""
        x, sure = (self._decoded(decoder, positions, last)
                   for decoder in (self.point_decoder, self.conf_decoder))
        with torch.autocast(x.device.type, enabled=False):
            raw = self.point_head(x, grid_hw)
            z = raw[..., 2:].exp()
            points_cam = torch.cat((raw[..., :2] * z, z), -1)
            R, t = T_world_cam[:, None, :3, :3], T_world_cam[:, None, None, :3, 3]
            points = points_cam @ R.transpose(-1, -2) + t
            return points, points_cam, self.conf_head(sure, grid_hw)[..., 0]


def nearest_rotation(M: torch.Tensor) -> torch.Tensor:
    """Rotations [..., 3, 3] nearest to matrices whose rows are first brought to length 1."""
    U, _, Vt = torch.linalg.svd(F.normalize(M, dim=-1))
    signs = torch.ones_like(M[..., 0])
    signs[..., 2] = torch.linalg.det(U @ Vt)
    return U @ (signs[..., None] * Vt)


def fitted_intrinsics(points_cam: torch.Tensor) -> torch.Tensor:
    """K [..., 3, 3] that best explains point maps [..., H, W, 3], by linear least squares.

    pi3 predicts no intrinsics: pixel index u = fx x / z + cx is linear in (fx, cx), and so is
    v in (fy, cy). The principal point is free.
    """
    height, width = points_cam.shape[-3:-1]
    rays = (points_cam[..., :2] / points_cam[..., 2:]).flatten(-3, -2).double()  # [..., HW, 2]
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    pixels = torch.stack((u, v), -1).flatten(0, 1).to(rays)
    mean_ray, mean_pixel = rays.mean(-2, keepdim=True), pixels.mean(-2, keepdim=True)
    centred = rays - mean_ray
    focal = (centred * (pixels - mean_pixel)).sum(-2) / (centred**2).sum(-2)
    centre = mean_pixel - focal[..., None, :] * mean_ray
    K = rays.new_zeros(*rays.shape[:-2], 3, 3)
    K[..., 0, 0], K[..., 1, 1], K[..., 2, 2] = focal[..., 0], focal[..., 1], 1
    K[..., :2, 2] = centre[..., 0, :]
    return K.to(points_cam)


