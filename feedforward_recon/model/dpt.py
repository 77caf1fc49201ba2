"""Dense prediction head (Ranftl et al., "Vision transformers for dense prediction", 2021).

Four levels of tokens become maps at 4, 2, 1 and 1/2 times the patch grid and are fused from
coarse to fine. A sine-cosine embedding of the pixel's viewing direction, scaled by 0.1, is
added twice, so the head knows where in the image it is. Frames are independent, and should be
given a few at a time (`FRAMES_PER_CHUNK`): the maps are the network's largest tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from feedforward_recon.model.vit import PATCH

EMBEDDING_SCALE = 0.1
TAIL = 32
FRAMES_PER_CHUNK = 8


@dataclass(frozen=True)
class DptConfig:
    """Shape of a DPT head.

    dim_in: channels of the tokens; channels: of the four levels before fusion.
    rectify_skip: VGGT's residual units add the *rectified* input, because the official ReLU
        works in place; DA3's add the input itself.
    """

    dim_in: int = 2048
    features: int = 256
    channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    rectify_skip: bool = True


class ResidualConvUnit(nn.Module):
    """Two convolutions, each after a ReLU, around a skip connection."""

    def __init__(self, features: int, rectify_skip: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.rectify_skip = rectify_skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> the same shape."""
        rectified = F.relu(x)
        skip = rectified if self.rectify_skip else x
        return self.conv2(F.relu(self.conv1(rectified))) + skip


class FusionBlock(nn.Module):
    """Adds a finer map to the coarse one and enlarges the sum."""

    def __init__(self, config: DptConfig, has_skip: bool = True) -> None:
        super().__init__()
        if has_skip:
            self.resConfUnit1 = ResidualConvUnit(config.features, config.rectify_skip)
        self.resConfUnit2 = ResidualConvUnit(config.features, config.rectify_skip)
        self.out_conv = nn.Conv2d(config.features, config.features, 1)

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None,
                size_hw: Sequence[int]) -> torch.Tensor:
        """Coarse [B, C, h, w] and skip of the same size -> [B, C, *size_hw]."""
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        return self.out_conv(enlarged(self.resConfUnit2(x), size_hw))


class Scratch(nn.Module):
    """The fusion part, under the names of the original implementation."""

    def __init__(self, config: DptConfig, outputs: int) -> None:
        super().__init__()
        for level, channels in enumerate(config.channels, 1):
            self.add_module(f'layer{level}_rn',
                            nn.Conv2d(channels, config.features, 3, padding=1, bias=False))
            self.add_module(f'refinenet{level}', FusionBlock(config, level < 4))
        half = config.features // 2
        self.output_conv1 = nn.Conv2d(config.features, half, 3, padding=1)
        self.output_conv2 = nn.Sequential(nn.Conv2d(half, TAIL, 3, padding=1), nn.ReLU(),
                                          nn.Conv2d(TAIL, outputs, 1))


class DptHead(nn.Module):
    """Tokens of four layers -> as many channels per pixel as ``scratch`` puts out."""

    def __init__(self, config: DptConfig, scratch: Scratch) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.dim_in)
        self.projects = nn.ModuleList([nn.Conv2d(config.dim_in, c, 1) for c in config.channels])
        c0, c1, _, c3 = config.channels
        self.resize_layers = nn.ModuleList([
            nn.ConvTranspose2d(c0, c0, 4, 4), nn.ConvTranspose2d(c1, c1, 2, 2), nn.Identity(),
            nn.Conv2d(c3, c3, 3, 2, 1)])
        self.scratch = scratch

    def forward(self, levels: Sequence[torch.Tensor], grid_hw: tuple[int, int]) -> torch.Tensor:
        """Patch tokens of four layers, each [B, h * w, C] -> float32 [B, H, W, outputs]."""
        fused = self.fuse(self.level_maps(levels, grid_hw), 'refinenet{}')
        return self.per_pixel(fused, grid_hw)

    def level_maps(self, levels: Sequence[torch.Tensor],
                   grid_hw: tuple[int, int]) -> list[torch.Tensor]:
        """Four maps of ``features`` channels, fine to coarse."""
        maps = []
        for index, level in enumerate(levels):
            x = self.norm(level.to(self.norm.weight.dtype)).transpose(1, 2).unflatten(2, grid_hw)
            x = with_directions(self.projects[index](x), grid_hw)
            x = self.resize_layers[index](x)
            maps.append(self.scratch.get_submodule(f'layer{index + 1}_rn')(x))
        return maps

    def fuse(self, maps: list[torch.Tensor], name: str) -> torch.Tensor:
        """The fused map, twice as large as the finest of the four."""
        sizes = [[2 * side for side in maps[0].shape[2:]], *[m.shape[2:] for m in maps]]
        x = self.scratch.get_submodule(name.format(4))(maps[3], None, sizes[3])
        for level in (3, 2, 1):
            fusion = self.scratch.get_submodule(name.format(level))
            x = fusion(x, maps[level - 1], sizes[level - 1])
        return x

    def per_pixel(self, fused: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        """The outputs [B, H, W, outputs] of a fused map."""
        size_hw = [side * PATCH for side in grid_hw]
        x = enlarged(self.scratch.output_conv1(fused), size_hw)
        return self.scratch.output_conv2(with_directions(x, grid_hw)).permute(0, 2, 3, 1)


def enlarged(x: torch.Tensor, size_hw: Sequence[int]) -> torch.Tensor:
    """Bilinear resampling [B, C, h, w] -> [B, C, *size_hw]; corners stay corners."""
    return F.interpolate(x, size=list(size_hw), mode='bilinear', align_corners=True)


def with_directions(x: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
    """A map [B, C, h, w] of an image of that patch grid, plus its direction embedding."""
    table = direction_embedding(x.shape[2:], grid_hw[1] / grid_hw[0], x.shape[1], x.device)
    return x + EMBEDDING_SCALE * table.to(x.dtype)


def direction_embedding(size_hw: Sequence[int], aspect: float, channels: int,
                        device: torch.device | None = None) -> torch.Tensor:
    """Sines and cosines of pixel positions, float32 [channels, h, w].

    The image plane spans a diagonal of length 2 whatever the aspect W / H. The first half of
    the channels belongs to x, the second to y; each is (sines, cosines) at frequencies
    100^(-k / K), k < K = channels / 4.
    """
    height, width = size_hw
    diagonal = (aspect**2 + 1) ** 0.5
    rows = _axis_embedding(width, aspect / diagonal, channels // 4).to(device)
    columns = _axis_embedding(height, 1 / diagonal, channels // 4).to(device)
    return torch.cat((rows[:, None, :].expand(-1, height, -1),
                      columns[:, :, None].expand(-1, -1, width)))


def _axis_embedding(count: int, span: float, frequencies: int) -> torch.Tensor:
    """Embedding float32 [2 * frequencies, count] of pixel centres between -span and span."""
    end = span * (count - 1) / count
    centres = torch.linspace(-end, end, count, dtype=torch.float64)
    omega = 100.0 ** (-torch.arange(frequencies, dtype=torch.float64) / frequencies)
    angles = omega[:, None] * centres
    return torch.cat((angles.sin(), angles.cos())).float()
