"""``sparse``: look at everything coarsely, then exactly at what looked relevant.

Speed3R (arXiv 2603.08055), per head, blocks of 4x4 patches:
    compression  O_c = softmax(q' k'^T / sqrt(d)) v',   q', k', v' = block means of the raw
                 projections, then norm and rotation at the block's (truncated) mean position;
    selection    O_s = softmax(q k^T / sqrt(d)) v over the tokens of the 32 blocks with the
                 largest q' k'^T for the block of q;
    gate         out = s_0 * O_c + s_1 * O_s,   (s_0, s_1) = sigmoid(W x + b).
The published code has two independent gates from x (the paper writes one convex mix); weights
need the code's form. Indices carry no gradient. With every block selected and gates (0, 1) the
layer is exact attention.
The published model (pi3) has no special tokens. Where there are some (VGGT), they form one
block per frame that competes like any window, and their queries read every token, as the paper
says for VGGT. Its reference frames, the first and every hundredth, which all blocks read beside
what they choose, are `visible_every`.
Cost: N^2 / 256 + 512 N pairs: the quadratic part is small but there. State: about 2.1 N C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from feedforward_recon.model.attention.base import (
    Layout,
    QkvAttention,
    State,
    append,
    join,
    require_written,
)
from feedforward_recon.model.attention.blocks import (
    Blocks,
    cut,
    no_blocks,
    padding,
    read_blocks,
    without_padding,
)
from feedforward_recon.model.attention.config import AttentionConfig


@dataclass(frozen=True)
class SparseState(State):
    """M blocks.

    keys, values [B, h, M, size, d]; pooled_keys, pooled_values [B, h, M, d]; valid [M, size],
    in main memory.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pooled_keys: torch.Tensor
    pooled_values: torch.Tensor
    valid: torch.Tensor


class SparseMemory(NamedTuple):
    """The blocks, which of their places hold a token (None: all), and what special tokens read.

    tokens: keys and values [B, h, N, d], without padding if there are special tokens.
    """

    blocks: SparseState
    valid: torch.Tensor | None
    tokens: tuple[torch.Tensor, torch.Tensor]


class SparseAttention(QkvAttention):
    """Compression, selection, gate."""

    state_type = SparseState

    def __init__(self, config: AttentionConfig, layer_index: int = 0) -> None:
        super().__init__(config, layer_index)
        gate = nn.Linear(config.dim, 2 * config.heads)
        nn.init.zeros_(gate.weight)
        with torch.no_grad():  # at first mostly the exact branch
            gate.bias.unflatten(0, (-1, 2)).copy_(gate.bias.new_tensor([-1.0, 1.0]))
        self.gate = nn.Sequential(gate)

    def empty_state(self, batch: int) -> SparseState:
        """A scene without blocks."""
        heads, d = self.config.heads, self.config.head_dim
        blocks, pooled = self.no_tokens(batch, heads, 0, 0, d), self.no_tokens(batch, heads, 0, d)
        return SparseState(blocks, blocks, pooled, pooled, no_blocks())

    def prepared(self, layout: Layout) -> Blocks:
        """How a frame is cut."""
        return cut(layout, self.config.special, self.config.sparse.window,
                   self.qkv.weight.device)

    def write(self, chunks: tuple[torch.Tensor, ...], state: SparseState,
              blocks: Blocks) -> SparseState:
        """Append the blocks of each frame."""
        def projected(chunk: torch.Tensor) -> tuple[torch.Tensor, ...]:
            k, v = self.raw_keys_values(chunk)
            pooled_k, pooled_v = (blocks.mean(blocks.split(t)) for t in (k, v))
            keys = self.turned(self.k_norm, k, blocks.tokens.positions).to(v.dtype)
            pooled_keys = self.turned(self.k_norm, pooled_k, blocks.positions)
            return blocks.split(keys), blocks.split(v), pooled_keys, pooled_v
        new = [self.exchange.concatenate(t, 2) for t in join(map(projected, chunks), 2)]
        old = state.keys, state.values, state.pooled_keys, state.pooled_values
        valid = blocks.valid.repeat(new[0].shape[2] // len(blocks.valid), 1)
        k, v, pooled_k, pooled_v = (append(a, b, 2) for a, b in zip(old, new, strict=True))
        return SparseState(k, v, pooled_k, pooled_v, append(state.valid.cpu(), valid, 0))

    def readable(self, state: SparseState) -> SparseMemory:
        """The state, and its tokens without padding for the queries that read them all."""
        require_written(len(state.valid))
        blocks = state.keys, state.values
        keys, values = (without_padding(state.valid, *blocks) if self.config.special
                        else (x.flatten(2, 3) for x in blocks))
        return SparseMemory(state, padding(state.valid, state.keys.device), (keys, values))

    def read(self, chunk: torch.Tensor, memory: SparseMemory, blocks: Blocks) -> torch.Tensor:
        """Both branches, gated per token and head."""
        coarse, exact, _ = self.branches(chunk, memory, blocks)
        gate = self.gate(chunk).sigmoid().unflatten(-1, (self.config.heads, 2)).transpose(1, 2)
        return gate[..., :1] * coarse + gate[..., 1:] * exact

    def branches(self, chunk: torch.Tensor, memory: SparseMemory, blocks: Blocks,
                 ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compression and selection [B, h, T, d], and the chosen blocks [B, h, blocks, k]."""
        raw = self.raw_queries(chunk)
        pooled = self.turned(self.q_norm, blocks.mean(blocks.split(raw)), blocks.positions)
        coarse = F.scaled_dot_product_attention(pooled, memory.blocks.pooled_keys,
                                                memory.blocks.pooled_values)
        coarse = coarse[..., None, :].expand(-1, -1, -1, blocks.order.shape[1], -1)
        chosen = self._chosen(pooled @ memory.blocks.pooled_keys.transpose(-1, -2),
                              len(blocks.order))
        q = blocks.split(self.turned(self.q_norm, raw, blocks.tokens.positions))
        exact = self._exact(q, memory, chosen, blocks)
        return blocks.joined(coarse), blocks.joined(exact), chosen

    def _chosen(self, scores: torch.Tensor, per_frame: int) -> torch.Tensor:
        """Indices of the blocks with the highest scores, best first; before them those all see."""
        total, kept = scores.shape[-1], self.config.sparse.kept
        visible = self._visible(total, per_frame, scores.device)
        if len(visible):
            scores = scores.index_fill(-1, visible, -torch.inf)
        chosen = scores.topk(min(kept, total - len(visible)), -1).indices
        if self.config.sparse.repeat_last and total < kept:
            chosen = F.pad(chosen, (0, kept - total), value=total - 1)
        return torch.cat([visible.expand(*chosen.shape[:-1], -1), chosen], -1)

    def _visible(self, total: int, per_frame: int, device: torch.device) -> torch.Tensor:
        """Indices of the blocks of the frames that everyone sees."""
        every = self.config.sparse.visible_every
        if not every:
            return torch.zeros(0, dtype=torch.long, device=device)
        frames = torch.arange(0, total // per_frame, every, device=device)
        return (frames[:, None] * per_frame + torch.arange(per_frame, device=device)).flatten()

    def _exact(self, q: torch.Tensor, memory: SparseMemory, chosen: torch.Tensor,
               blocks: Blocks) -> torch.Tensor:
        """Selection for windows of patches, full attention for special tokens."""
        count, first = self.config.special, min(self.config.special, 1)
        state, frames = memory.blocks, q.unflatten(2, (-1, len(blocks.order)))
        windows = chosen.unflatten(2, (-1, len(blocks.order)))[:, :, :, first:].flatten(2, 3)
        exact = read_blocks(frames[:, :, :, first:].flatten(2, 3), state.keys, state.values,
                            memory.valid, windows)
        if not count:
            return exact
        everything = F.scaled_dot_product_attention(frames[:, :, :, 0, :count].flatten(2, 3),
                                                    *memory.tokens)
        everything = F.pad(everything.unflatten(2, (frames.shape[2], 1, count)),
                           (0, 0, 0, q.shape[3] - count))
        return torch.cat((everything, exact.unflatten(2, (frames.shape[2], -1))), 3).flatten(2, 3)
