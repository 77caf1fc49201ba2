"""``sparse_linear``: exact where it matters, linear for the rest.

Lite3R (arXiv 2605.11354), after SLA (arXiv 2509.24006); per head, q and k after norm and
rotation:
    out = A_kept + A_lin P,
    A_lin = phi(q) (sum_j phi(k_j)^T v_j) / (phi(q) . sum_j phi(k_j) + 1e-6),  phi = ELU + 1,
    A_kept = softmax(q k^T / sqrt(d)) v over the kept keys only;
P = `proj_lin` [d, d] is shared by the heads and starts near zero, so the layer starts as its
exact branch. (`lam` is in the checkpoints and unused.)
Two ways to keep keys. `keep_ratio`: each token keeps a share of all tokens, with all N^2 scores
computed; this is the published training form (the attention `lite3r`), and saves nothing.
Otherwise each block of tokens keeps a *fixed number* of blocks, ranked by their mean keys, and
nothing else is computed.
Every attention of a network can be replaced this way, as Lite3R does: the global ones by their
name in the configuration, those within images by `replace_local`.
Cost with blocks of b tokens, k kept: N (k b + 2 d) pairs, and N^2 / b^2 for the ranking, which
stays below the rest until N = k b^3. State: keys and values, and d (d + 1) numbers per head.
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
from feedforward_recon.model.attention.config import AttentionConfig, SparseLinearOptions
from feedforward_recon.model.latent_alignment import LatentAlignment
from feedforward_recon.model.layers import Attention


@dataclass(frozen=True)
class SparseLinearState(State):
    """M blocks, and the two sums of the linear branch.

    keys, values [B, h, M, size, d]; pooled_keys [B, h, M, d]; valid [M, size],
    in main memory;
    outer: sum phi(k)^T v, [B, h, d, d]; total: sum phi(k), [B, h, 1, d].
    """

    keys: torch.Tensor
    values: torch.Tensor
    pooled_keys: torch.Tensor
    valid: torch.Tensor
    outer: torch.Tensor
    total: torch.Tensor


class SparseLinearMemory(NamedTuple):
    """The state, and which places of its blocks hold a token (None: all)."""

    state: SparseLinearState
    valid: torch.Tensor | None


class SparseLinearAttention(QkvAttention):
    """Kept blocks plus linear attention."""

    state_type = SparseLinearState

    def __init__(self, config: AttentionConfig, layer_index: int = 0) -> None:
        super().__init__(config, layer_index)
        self.proj_lin = nn.Linear(config.head_dim, config.head_dim, bias=False)
        nn.init.normal_(self.proj_lin.weight, std=1e-3)
        self.lam = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def empty_state(self, batch: int) -> SparseLinearState:
        """A scene without blocks."""
        heads, d = self.config.heads, self.config.head_dim
        blocks, pooled = self.no_tokens(batch, heads, 0, 0, d), self.no_tokens(batch, heads, 0, d)
        sums = [self.no_tokens(batch, heads, rows, d) for rows in (d, 1)]
        return SparseLinearState(blocks, blocks, pooled, no_blocks(), *sums)

    def prepared(self, layout: Layout) -> Blocks:
        """How a frame is cut."""
        return cut(layout, self.config.special, self.config.sparse_linear.window,
                   self.qkv.weight.device)

    def write(self, chunks: tuple[torch.Tensor, ...], state: SparseLinearState,
              blocks: Blocks) -> SparseLinearState:
        """Append blocks and add to the sums."""
        outer, total = torch.zeros_like(state.outer), torch.zeros_like(state.total)
        pieces = []
        for chunk in chunks:
            k, v = self.raw_keys_values(chunk)
            k = self.turned(self.k_norm, k, blocks.tokens.positions)
            split = blocks.split(k)
            pieces.append((split.to(v.dtype), blocks.split(v), blocks.mean(split)))
            part = features(k)
            outer = outer + part.transpose(-1, -2) @ v
            total = total + part.sum(2, keepdim=True)
        new = [self.exchange.concatenate(t, 2) for t in join(iter(pieces), 2)]
        valid = blocks.valid.repeat(new[0].shape[2] // len(blocks.valid), 1)
        old = state.keys, state.values, state.pooled_keys
        keys, values, pooled = (append(a, b, 2) for a, b in zip(old, new, strict=True))
        return SparseLinearState(keys, values, pooled, append(state.valid.cpu(), valid, 0),
                                 state.outer + self.exchange.sum(outer),
                                 state.total + self.exchange.sum(total))

    def readable(self, state: SparseLinearState) -> SparseLinearMemory:
        """The state, unless it is empty."""
        require_written(len(state.valid))
        return SparseLinearMemory(state, padding(state.valid, state.keys.device))

    def read(self, chunk: torch.Tensor, memory: SparseLinearMemory,
             blocks: Blocks) -> torch.Tensor:
        """Exact branch plus projected linear branch."""
        q = self.turned(self.q_norm, self.raw_queries(chunk), blocks.tokens.positions)
        state = memory.state
        if self.config.sparse_linear.keep_ratio is not None:
            kept = self._kept_tokens(q, state, self.config.sparse_linear.keep_ratio)
        else:
            kept = self._kept_blocks(q, memory, blocks)
        mapped = features(q)
        linear = (mapped @ state.outer) / (mapped @ state.total.transpose(-1, -2) + 1e-6)
        return kept + self.proj_lin(linear)

    def _kept_blocks(self, q: torch.Tensor, memory: SparseLinearMemory,
                     blocks: Blocks) -> torch.Tensor:
        """Each block reads the blocks whose mean key fits its mean query best."""
        split, state = blocks.split(q), memory.state
        scores = blocks.mean(split) @ state.pooled_keys.transpose(-1, -2)  # [B, h, n, M]
        chosen = scores.topk(min(self.config.sparse_linear.kept, scores.shape[-1]), -1).indices
        return blocks.joined(read_blocks(split, state.keys, state.values, memory.valid, chosen))

    @staticmethod
    def _kept_tokens(q: torch.Tensor, state: SparseLinearState, ratio: float) -> torch.Tensor:
        """Each token reads the tokens that fit it best: all scores, then a mask."""
        keys, values = without_padding(state.valid, state.keys, state.values)
        scores = q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
        best, chosen = scores.topk(max(1, int(ratio * keys.shape[2])), -1)
        share = torch.zeros_like(scores).scatter(-1, chosen, best.softmax(-1))
        return share @ values


class LocalSparseLinear(SparseLinearAttention):
    """The same within single images or sequences: a drop-in for `model.layers.Attention`.

    Without positions (the encoder, the camera head) blocks are runs of tokens.
    """

    def forward(self, x: torch.Tensor,  # type: ignore[override]
                positions: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [B, T, C] -> [B, T, C]; every sequence is a scene of one frame."""
        out, _ = super().forward(x, self.empty_state(len(x)), positions=positions, frames=1,
                                 tokens_per_frame=x.shape[1], write=True)
        return out

    def prepared(self, layout: Layout) -> Blocks:
        """How a sequence is cut."""
        special = 0 if layout.positions is None else self.config.special
        return cut(layout, special, self.config.sparse_linear.window, self.qkv.weight.device)


def replace_local(model: nn.Module, options: SparseLinearOptions, special: int = 5) -> nn.Module:
    """Put a `LocalSparseLinear` with the same weights in the place of each `Attention`.

    special: tokens in front of the patches where patches have positions. Latent alignment, whose
    latents are images and no patches, stays as it is. Returns the model.
    """
    aligning = {id(part) for module in model.modules() if isinstance(module, LatentAlignment)
                for part in module.modules()}
    for path, old in list(model.named_modules()):
        if type(old) is Attention and id(old) not in aligning:
            config = AttentionConfig(old.config.dim, old.config.heads, 'sparse_linear', special,
                                     qk_norm=old.config.qk_norm, round_qk=old.config.round_qk,
                                     sparse_linear=options)
            with old.qkv.weight.device:
                new = LocalSparseLinear(config)
            for name, part in old.named_children():
                setattr(new, name, part)
            parent, _, name = path.rpartition('.')
            setattr(model.get_submodule(parent), name, new.train(old.training))
    return model


def features(x: torch.Tensor) -> torch.Tensor:
    """phi(x) = ELU(x) + 1, positive."""
    return F.elu(x) + 1
