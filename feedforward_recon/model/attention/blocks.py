"""Blocks of neighbouring tokens: the unit in which the sparse variants choose what to read.

A block never joins two frames, so that permuting frames permutes blocks. Patches are cut into
windows of about side x side: the grid is divided evenly, which gives exactly side x side where
the sides of the grid are multiples of it, and little padding elsewhere. The special tokens of a
frame are a block of their own. Without positions, blocks are runs of consecutive tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from feedforward_recon.model.attention.base import Layout


@dataclass(frozen=True)
class Blocks:
    """The blocks of one frame.

    tokens: those of the frame, as they lie. order: index of the tokens of each block, [blocks,
    size]; places beyond the end of a short block repeat its first token. valid: [blocks, size],
    False at those places. place: where in the blocks each token went, [tokens.tokens].
    positions: mean position of each block, rounded towards zero as in Speed3R, [blocks, 2]
    (None without).
    """

    tokens: Layout
    order: torch.Tensor
    valid: torch.Tensor
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
        weights = self.valid / self.valid.sum(1, keepdim=True)  # [blocks, size]
        weights = weights.to(blocks.dtype)[:, None]
        return (weights @ blocks.unflatten(2, (-1, len(self.order)))).squeeze(-2).flatten(2, 3)


def cut(layout: Layout, special: int, side: int) -> Blocks:
    """The blocks of a frame with ``special`` tokens in front of its patches."""
    labels = _labels(layout, special, side)
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    size = int(counts.max())
    rank = torch.arange(size, device=labels.device).expand(len(counts), -1)
    valid = rank < counts[:, None]
    table = order[starts[:, None] + rank.where(valid, 0)]
    place = torch.empty_like(order)
    place[order] = torch.arange(table.numel(), device=labels.device)[valid.flatten()]
    positions = None
    if layout.positions is not None:
        total = (layout.positions[table] * valid[..., None]).sum(1)
        positions = torch.div(total, counts[:, None], rounding_mode='trunc')
    return Blocks(layout, table, valid, place, positions)


def _labels(layout: Layout, special: int, side: int) -> torch.Tensor:
    """The block of each token, [tokens]."""
    if layout.positions is None:
        patches = layout.tokens - special
        count = -(-patches // side**2)
        labels = torch.arange(patches) * count // patches
    else:
        cells = layout.positions[special:] - layout.positions[special:].amin(0)
        grid = cells.amax(0) + 1
        windows = -(-grid // side)
        row, column = (cells * windows // grid).unbind(-1)
        labels = row * windows[1] + column
    first = labels.new_zeros(special)
    return torch.cat((first, labels + min(special, 1)))


def padding(valid: torch.Tensor) -> torch.Tensor | None:
    """The mask ``valid`` if it excludes anything, else None; asked once per call."""
    return None if valid.all() else valid


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
