"""DINOv2 vision transformer (Oquab et al. 2023; registers: Darcet et al. 2024).

VGGT and pi3 use the version with registers as an encoder of single images; DA3 builds its
whole backbone from the same parts without registers. Patches are 14x14 pixels. The learned
position embedding belongs to a square grid and is resampled for every other grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from feedforward_recon.errors import InputError
from feedforward_recon.model.layers import Block, BlockConfig, in_chunks, rows_per_chunk

PATCH = 14
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VitConfig:
    """Shape of a DINOv2 encoder; ``grid`` is the side of its square position embedding."""

    dim: int = 1024
    heads: int = 16
    depth: int = 24
    grid: int = 37
    registers: int = 4

    @property
    def block(self) -> BlockConfig:
        """One block of the encoder."""
        return BlockConfig(self.dim, self.heads, norm_eps=1e-6, layer_scale=1.0)


class PatchEmbed(nn.Module):
    """A linear map of each 14x14 patch, as a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] -> patch tokens [B, h * w, C], row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class DinoV2(nn.Module):
    """Encoder of single images."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.dim)
        self.cls_token = _token(1, 1, config.dim)
        self.register_tokens = _token(1, config.registers, config.dim)
        self.pos_embed = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, 1 + config.grid**2, config.dim), std=0.02))
        self.blocks = nn.ModuleList([Block(config.block) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.apply(_initialise)

    def forward(self, images: torch.Tensor,
                prepare: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """Normalised images [B, 3, H, W] -> patch tokens [B, h * w, C].

        prepare: what is done to a few images at a time before they are encoded, such as
            `normalised`. The images may lie elsewhere than the encoder.
        """
        grid_hw, device = grid_of(images), self.cls_token.device
        table = resampled_positions(self.pos_embed, grid_hw)

        def encoded(part: torch.Tensor) -> tuple[torch.Tensor]:
            part = part.to(device)
            return (self._encoded(part if prepare is None else prepare(part), table),)
        return in_chunks(encoded, (images,), rows_per_chunk(grid_hw[0] * grid_hw[1], device))[0]

    def _encoded(self, images: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed(images)
        tokens = torch.cat((self.cls_token.expand(len(images), -1, -1), patches), 1)
        tokens = tokens + table.to(tokens.dtype)
        registers = self.register_tokens.expand(len(images), -1, -1)
        tokens = torch.cat((tokens[:, :1], registers, tokens[:, 1:]), 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 1 + self.config.registers:]


def grid_of(images: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of patches of images [..., H, W].

    Raises InputError when a side is not a positive multiple of the patch.
    """
    height, width = images.shape[-2:]
    if height % PATCH or width % PATCH or not height or not width:
        raise InputError(f'expected image sides that are multiples of {PATCH} px, found '
                         f'{width}x{height}; resize them with preprocess.crop or longest_side')
    return height // PATCH, width // PATCH


def size_of(grid_hw: tuple[int, int]) -> tuple[int, int]:
    """Height and width of images of that many rows and columns of patches."""
    return grid_hw[0] * PATCH, grid_hw[1] * PATCH


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Images [..., 3, H, W] in 0..1 with ImageNet's mean and deviation removed."""
    mean = images.new_tensor(IMAGENET_MEAN)[:, None, None]
    return (images - mean) / images.new_tensor(IMAGENET_STD)[:, None, None]


def resampled_positions(pos_embed: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
    """Position embedding [1, 1 + g * g, C] for another grid: float32 [1, 1 + h * w, C]."""
    side = round((pos_embed.shape[1] - 1) ** 0.5)
    if grid_hw == (side, side):
        return pos_embed
    maps = _as_map(pos_embed, side)
    maps = F.interpolate(maps, size=grid_hw, mode='bicubic', antialias=True)
    return _with_class_slot(pos_embed, maps)


def resampled_positions_by_factor(pos_embed: torch.Tensor,
                                  grid_hw: tuple[int, int]) -> torch.Tensor:
    """As `resampled_positions` in DINOv2's first form, which DA3 keeps.

    No antialiasing, and the factor (h + 0.1) / g, not the size, sets the sampling positions.
    """
    side = round((pos_embed.shape[1] - 1) ** 0.5)
    if grid_hw == (side, side):
        return pos_embed
    factor = ((grid_hw[0] + 0.1) / side, (grid_hw[1] + 0.1) / side)
    maps = F.interpolate(_as_map(pos_embed, side), scale_factor=factor, mode='bicubic')
    return _with_class_slot(pos_embed, maps)


def _as_map(pos_embed: torch.Tensor, side: int) -> torch.Tensor:
    return pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)


def _with_class_slot(pos_embed: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    return torch.cat((pos_embed[:, :1].float(), maps.flatten(2).transpose(1, 2)), 1)


def _token(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(*shape), std=1e-6))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
