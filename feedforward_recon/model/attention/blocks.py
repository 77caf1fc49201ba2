"""Blocks of neighbouring tokens: the unit in which the sparse variants choose what to read.

A block never joins two frames, so that permuting frames permutes blocks. Patches are cut into
windows of about side x side: the grid is divided evenly, which gives exactly side x side where
the sides of the grid are multiples of it, and little padding elsewhere. The special tokens of a
frame are a block of their own. Without positions, blocks are runs of consecutive tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from feedforward_recon.model.attention.base import Layout


@dataclass(frozen=True)
class Blocks:
    """The blocks of one frame.

    tokens: those of the frame, as they lie. order: index of the tokens of each block, [blocks,
    size]; places beyond the end of a short block repeat its first token. valid: [blocks, size],
    False at those places; in main memory, so that nobody waits for a GPU to know it. shares:
    float32, of each token in the mean of its block. place: where in the blocks each token went,
    [tokens.tokens]. positions: mean position of each block, rounded towards zero as in Speed3R,
    [blocks, 2] (None without).
    """

    tokens: Layout
    order: torch.Tensor
    valid: torch.Tensor
    shares: torch.Tensor
    place: torch.Tensor
    positions: torch.Tensor | None

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens of whole frames [B, h, F * P, d] -> blocks [B, h, F * blocks, size, d]."""
        return x.unflatten(2, (-1, self.tokens.tokens))[:, :, :, self.order].flatten(2, 3)

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `split`."""
        frames = x.unflatten(2, (-1, len(self.order))).flatten(3, 4)
        return frames[:, :, :, self.place].flatten(2, 3)

    def mean(self, blocks: torch.Tensor) -> torch.Tensor:
        """Means [B, h, F * blocks, d] over the tokens of blocks [B, h, F * blocks, size, d]."""
        weights = self.shares.to(blocks.dtype)[:, None]  # [blocks, 1, size]
        return (weights @ blocks.unflatten(2, (-1, len(self.order)))).squeeze(-2).flatten(2, 3)


@lru_cache(maxsize=64)
def cut(layout: Layout, special: int, side: int, device: torch.device | None = None) -> Blocks:
    """The blocks of a frame with ``special`` tokens in front of its patches.

    device: where their indices are wanted; by default that of the positions. Layers and calls
    that know the same positions share the answer: a GPU is asked for them once.
    """
    known = layout.positions
    places = None if known is None else known.cpu().numpy()
    labels = _labels(places, layout.tokens, special, side)
    order, counts = labels.argsort(kind='stable'), np.bincount(labels)
    starts, rank = counts.cumsum() - counts, np.arange(counts.max())
    valid = rank < counts[:, None]
    table = order[starts[:, None] + np.where(valid, rank, 0)]
    place = np.empty_like(order)
    place[order] = np.flatnonzero(valid)
    device = device if known is None or device is not None else known.device
    with torch.inference_mode(False):  # a training may use them as well
        host = torch.from_numpy(valid)
        positions = None if places is None else torch.from_numpy(
            _means(places[table] * valid[..., None], counts[:, None])).to(device)
        shares = host / host.sum(1, keepdim=True)
        return Blocks(layout, torch.from_numpy(table).to(device), host, shares.to(device),
                      torch.from_numpy(place).to(device), positions)


def _labels(places: NDArray | None, tokens: int, special: int, side: int) -> NDArray:
    """The block of each token, [tokens]."""
    if places is None:
        patches = tokens - special
        count = -(-patches // side**2)
        labels = np.arange(patches) * count // patches
    else:
        cells = places[special:] - places[special:].min(0)
        grid = cells.max(0) + 1
        windows = -(-grid // side)
        row, column = (cells * windows // grid).T
        labels = row * windows[1] + column
    return np.concatenate((np.zeros(special, int), labels + min(special, 1)))


def _means(values: NDArray, counts: NDArray) -> NDArray:
    """Sums of integers [blocks, size, 2] over their counts [blocks, 1], rounded towards zero."""
    total = values.sum(1)
    return np.sign(total) * (np.abs(total) // counts)


def no_blocks() -> torch.Tensor:
    """The mask of a scene without blocks."""
    return torch.zeros(0, 0, dtype=torch.bool, device='cpu')


def padding(valid: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """The mask ``valid`` of the host on a device if it excludes anything, else None."""
    return None if valid.cpu().numpy().all() else valid.to(device, non_blocking=True)


def without_padding(valid: torch.Tensor, *blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tokens [B, h, N, d] of blocks [B, h, M, size, d] whose mask [M, size] the host knows."""
    held = np.flatnonzero(valid.cpu().numpy())
    flat = tuple(x.flatten(2, 3) for x in blocks)
    if len(held) == valid.numel():
        return flat
    index = torch.from_numpy(held).to(flat[0].device, non_blocking=True)
    return tuple(x[:, :, index] for x in flat)


def read_blocks(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                valid: torch.Tensor | None, chosen: torch.Tensor) -> torch.Tensor:
    """Each block of queries attends exactly to the tokens of the blocks chosen for it.

    Args:
        q: queries [B, h, n, size, d].
        keys: [B, h, M, size', d].
        values: [B, h, M, size', d].
        valid: which places of the M blocks hold a token, [M, size']; None: all of them.
        chosen: indices into the M blocks, [B, h, n, k].

    Returns:
        [B, h, n, size, d]; softmax(q k^T / sqrt(d)) v over k * size' tokens.
    """
    heads, total = q.shape[:2], keys.shape[2]
    offset = torch.arange(heads.numel(), device=q.device).view(*heads, 1, 1) * total
    flat = (chosen + offset).flatten()  # into [B * h * M]
    pairs = []
    for source in (keys, values):
        picked = source.flatten(0, 2).flatten(1).index_select(0, flat)
        pairs.append(picked.view(*chosen.shape[:3], -1, q.shape[-1]))  # [B, h, n, k * size', d]
    k, v = pairs
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if valid is not None:
        absent = ~valid[chosen].flatten(-2)[:, :, :, None]  # [B, h, n, 1, k * size']
        logits = logits.masked_fill(absent, -torch.inf)
    return logits.softmax(-1) @ v
