"""One pass of a `RayTransformer` over very many views, layer by layer.

    stem and tokens of some views at a time
      -> every layer: frame block, some views at a time, in the place of the tokens;
         all views write into the state of the layer; then each reads it, in its place
      -> the last layer hands the views that have read it to the heads

Every view has seen all others when the next layer begins, as in a call with all views at once, and
the result is the same. Beside the tokens of all views (once, and once after the norm while a layer
is written) and what is said of each cell in the end, only what a few views need exists. With an
attention of fixed size time is linear in the number of views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from feedforward_recon.model.attention.base import Layout, merge_heads
from feedforward_recon.model.preprocess import PreparedImage, stacked
from feedforward_recon.model.ray_stem import PATCH
from feedforward_recon.model.ray_transformer import SPECIAL, CellMaps, RayTransformer
from feedforward_recon.model.rope import patch_positions
from feedforward_recon.model.seconds import Seconds


@dataclass(frozen=True)
class ViewInputs:
    """Views of one size and their intrinsics K [N, 3, 3]; whether the first of all is theirs."""

    images: Sequence[PreparedImage]
    K: np.ndarray
    has_first: bool = True

    @property
    def size_hw(self) -> tuple[int, int]:
        """Of the images, in pixels."""
        height, width = self.images[0].image.shape[:2]
        return height, width

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size_hw[0] // PATCH, self.size_hw[1] // PATCH


class _Table:
    """Tensors of all of N views, filled some views at a time."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.columns: dict[str, torch.Tensor] = {}

    def put(self, start: int, **parts: torch.Tensor) -> None:
        """Tensors [n, ...] of views from ``start`` on."""
        for name, part in parts.items():
            if name not in self.columns:
                self.columns[name] = part.new_empty(self._count, *part.shape[1:])
            self.columns[name][start:start + len(part)] = part


def joint_cells(network: RayTransformer, views: ViewInputs, chunk: int, seconds: Seconds
                ) -> CellMaps:
    """What the network says of the cells of N views [1, N, ...] that it sees all together.

    chunk: views that are worked on at a time; the result hardly depends on it. Call it in
    inference mode, and where several processes hold shares of the views, within
    ``distributed.sequence_parallel``.
    """
    with seconds.of('stem'):
        known = _seen(network, views, chunk).columns
        patches = network.aligned(known.pop('patches')[None])
        tokens = network.tokens(patches, has_first=views.has_first)[0]
        del patches
    positions = patch_positions(views.grid_hw, SPECIAL, tokens.device)
    last = len(network.frame_blocks) - 1
    for index in range(last + 1):
        with seconds.of('joint pass'):
            local, joint = network.frame_blocks[index], network.global_blocks[index]
            tokens = local(tokens, positions, reuse=True)
            layer = _Layer(joint, tokens, positions, chunk)
            if index < last:
                for start in layer.starts:
                    tokens[start:start + chunk] = layer.read(start)
                del layer  # before the next one is written
    with seconds.of('heads'):
        return _said(network, layer, known['frozen'], known['fine'], views.grid_hw)


class _Layer:
    """A global block into whose state all views were written; it is read by some at a time."""

    def __init__(self, block: nn.Module, tokens: torch.Tensor, positions: torch.Tensor,
                 chunk: int) -> None:
        self.starts = range(0, len(tokens), chunk)
        self._block, self._tokens, self._chunk = block, tokens, chunk
        attention: Any = block.attn
        self._layout = attention.prepared(Layout(positions, len(positions)))
        self._normed = tuple(block.norm1(part).flatten(0, 1)[None]  # type: ignore[operator]
                             for part in tokens.split(chunk))
        state = attention.write(self._normed, attention.empty_state(1), self._layout)
        self._memory = attention.readable(state)

    def alone(self, start: int) -> torch.Tensor:
        """Tokens [n, P, C] of views that know of their own only."""
        return self._tokens[start:start + self._chunk]

    def read(self, start: int) -> torch.Tensor:
        """The tokens of the same views after the block."""
        block: Any = self._block
        alone = self.alone(start)
        seen = block.attn.read(self._normed[start // self._chunk], self._memory, self._layout)
        seen = block.attn.proj(merge_heads(seen)).unflatten(1, alone.shape[:2])[0]
        return block.refined(alone + block.ls1(seen))


def _seen(network: RayTransformer, views: ViewInputs, chunk: int) -> _Table:
    """Patches with rays [N, T, C], frozen: descriptors of the stem [N, T, CELLS, D], ``fine``."""
    device, table = network.norm.weight.device, _Table(len(views.images))
    for start in range(0, len(views.images), chunk):
        images = stacked(views.images[start:start + chunk]).to(device)
        K = torch.from_numpy(views.K[start:start + chunk]).float().to(device)[None]
        seen = network.encode(images)
        patches = network.tokens.along_rays(seen.patches[None], K, views.grid_hw)
        table.put(start, patches=patches[0], frozen=seen.descriptors, fine=seen.fine)
    return table


def _said(network: RayTransformer, layer: _Layer, frozen: torch.Tensor, fine: torch.Tensor,
          grid_hw: tuple[int, int]) -> CellMaps:
    """The heads of views that read the last layer, some at a time."""
    table, chunk = _Table(len(frozen)), layer.starts.step
    for start in layer.starts:
        levels = torch.cat([layer.alone(start), layer.read(start)], -1)[None, :, SPECIAL:]
        said = network.cells_of(levels, frozen[None, start:start + chunk],
                                fine[None, start:start + chunk], grid_hw)
        table.put(start, **{name: value[0] for name, value in vars(said).items()
                            if name != 'fine'})
    return CellMaps(**{name: value[None] for name, value in table.columns.items()},
                    fine=fine[None])
