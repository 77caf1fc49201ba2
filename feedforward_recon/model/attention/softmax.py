"""``softmax``: every token of every frame, stored and read exactly.

The attention of VGGT (Wang et al., CVPR 2025, sec. 3.2) and pi3: out = softmax(q k^T / sqrt(d)) v
over the tokens of all frames. The state is the list of rotated keys and values, as in the
caches of language models, so it grows with the scene.
Cost: N^2 pairs for N tokens in all; memory 2 N C numbers, and no score matrix (SDPA).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from feedforward_recon.model.attention.base import (
    Layout,
    QkvAttention,
    State,
    append,
    join,
    require_written,
)
from feedforward_recon.model.layers import attended


@dataclass(frozen=True)
class SoftmaxState(State):
    """Keys and values [B, h, N, d] of all tokens written so far."""

    keys: torch.Tensor
    values: torch.Tensor


class SoftmaxAttention(QkvAttention):
    """Full attention."""

    state_type = SoftmaxState

    def empty_state(self, batch: int) -> SoftmaxState:
        """A scene without tokens."""
        none = self.no_tokens(batch, self.config.heads, 0, self.config.head_dim)
        return SoftmaxState(none, none)

    def write(self, chunks: tuple[torch.Tensor, ...], state: SoftmaxState,
              layout: Layout) -> SoftmaxState:
        """Append keys and values."""
        def keys_values(chunk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            k, v = self.raw_keys_values(chunk)
            return self.turned(self.k_norm, k, layout.positions).to(v.dtype), v
        keys, values = (self.exchange.concatenate(t, 2)
                        for t in join(map(keys_values, chunks), 2))
        return SoftmaxState(append(state.keys, keys, 2), append(state.values, values, 2))

    def readable(self, state: SoftmaxState) -> SoftmaxState:
        """The state, unless it is empty."""
        require_written(state.keys.shape[2])
        return state

    def read(self, chunk: torch.Tensor, memory: SoftmaxState,
             layout: Layout) -> torch.Tensor:
        """Attend to every token."""
        q = self.turned(self.q_norm, self.raw_queries(chunk), layout.positions)
        return attended(q, memory.keys, memory.values)
