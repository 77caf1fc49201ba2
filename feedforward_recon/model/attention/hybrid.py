"""``hybrid``: fast weights, and a few tokens stored exactly.

What VGG-T3 (arXiv 2602.23361) names as future work: a linear memory is smooth and cannot
reproduce a sharp match, softmax can. Each head therefore also keeps the A tokens with the
largest learning rates, and its queries read them by softmax:
    out = f_W'(q) + tanh(gate) * sum_i p_i v_i,   p = softmax(0, tau q k_1, ..., tau q k_A).
The extra logit 0 with value 0 answers when no anchor fits (and when there is none yet). The
gate starts at 0, so a trained `ttt` layer is reproduced until the gate learns otherwise.
Choosing the A best of a union is order-free: (A of (A of X) + (A of Y)) = A of (X + Y). Frames
can be written in any order, but anchors, unlike sums, cannot be taken away again.
Left out: coverage. Near-identical frames may fill the anchors of a head.
Cost: that of `ttt` plus A pairs per token; state plus A (2 d + 1) numbers per head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from feedforward_recon.errors import InputError
from feedforward_recon.model.attention.base import State
from feedforward_recon.model.attention.config import AttentionConfig
from feedforward_recon.model.attention.fast_weights import KeyValueSamples, apply
from feedforward_recon.model.attention.ttt import (
    PatchLayout,
    TttAttention,
    TttState,
    sum_dtype,
    unit,
)


class AnchorTokens(NamedTuple):
    """Tokens kept per head: keys, values [B, h, A, d], scores [B, h, A] (-inf: free place)."""

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor

    def joined(self, other: AnchorTokens) -> AnchorTokens:
        """All places of both."""
        return AnchorTokens(*(torch.cat(pair, 2) for pair in zip(self, other, strict=True)))

    def best(self, count: int) -> AnchorTokens:
        """The ``count`` places with the highest scores."""
        scores, chosen = self.scores.topk(min(count, self.scores.shape[2]), dim=2)
        index = chosen[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        return AnchorTokens(self.keys.gather(2, index), self.values.gather(2, index), scores)


@dataclass(frozen=True)
class HybridState(TttState):
    """Gradient sums of `ttt`, and the anchors (see `AnchorTokens`)."""

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor

    @property
    def anchors(self) -> AnchorTokens:
        """The anchors."""
        return AnchorTokens(self.keys, self.values, self.scores)

    def __add__(self, other: HybridState) -> HybridState:  # type: ignore[override]
        sums = super().__add__(other)
        anchors = self.anchors.joined(other.anchors).best(self.scores.shape[2])
        return HybridState(sums.g0, sums.g1, sums.g2, *anchors)

    def __sub__(self, other: TttState) -> TttState:
        raise InputError('expected a state of sums alone, found anchors, which cannot be taken '
                         'away; map again without those frames')


class HybridAttention(TttAttention):
    """`ttt` plus anchors."""

    state_type: ClassVar[type[State]] = HybridState

    def __init__(self, config: AttentionConfig, layer_index: int = 0) -> None:
        super().__init__(config, layer_index)
        self.anchor_gate = nn.Parameter(torch.zeros(config.heads))
        self.anchor_log_tau = nn.Parameter(torch.full((config.heads,), 2.0))

    def empty_state(self, batch: int) -> HybridState:
        """No gradients, and all places free."""
        sums = super().empty_state(batch)
        shape = batch, self.config.heads, self.config.hybrid.anchors
        free = sums.g0.new_full(shape, -torch.inf)
        nothing = sums.g0.new_zeros(*shape, self.config.head_dim)
        return HybridState(sums.g0, sums.g1, sums.g2, nothing, nothing, free)

    def write(self, chunks: tuple[torch.Tensor, ...], state: HybridState,
              layout: PatchLayout) -> HybridState:
        """Add the gradient sums, and keep the best of old and new tokens as anchors."""
        count = self.config.hybrid.anchors
        candidates: list[AnchorTokens] = []

        def samples() -> Iterator[KeyValueSamples]:
            candidates.clear()  # a second step sees the same tokens again
            for chunk in chunks:
                sample = self.samples(chunk, layout)
                candidates.append(_candidates(sample).best(count))
                yield sample
        sums = self.learned(samples, state)
        local = AnchorTokens(*(torch.cat(column, 2) for column in zip(*candidates, strict=True)))
        new = AnchorTokens(*(self.exchange.concatenate(t.contiguous(), 2)
                             for t in local.best(count)))
        return HybridState(sums.g0, sums.g1, sums.g2, *state.anchors.joined(new).best(count))

    def readable(self, state: HybridState) -> Any:
        """FastWeights weights and anchors."""
        return super().readable(state), state.anchors

    def read(self, chunk: torch.Tensor, memory: Any,
             layout: PatchLayout) -> torch.Tensor:
        """Apply the fast network, and add what the anchors say."""
        weights, anchors = memory
        q = unit(self.raw_queries(chunk), layout.positions)
        tau = self.anchor_log_tau.exp()[:, None, None]
        said = read_anchors(q, anchors, tau)
        gate = self.anchor_gate.tanh()[:, None, None]
        return (apply(weights, q) + gate * said).to(chunk.dtype)


def read_anchors(q: torch.Tensor, anchors: AnchorTokens, tau: torch.Tensor) -> torch.Tensor:
    """Softmax over the anchors and one empty answer: queries [B, h, T, d] -> [B, h, T, d]."""
    free = anchors.scores.isneginf()[:, :, None]  # [B, h, 1, A]
    logits = (tau * (q @ anchors.keys.transpose(-1, -2))).masked_fill(free, -torch.inf)
    share = torch.cat((torch.zeros_like(logits[..., :1]), logits), -1).softmax(-1)
    return share[..., 1:] @ anchors.values


def _candidates(samples: KeyValueSamples) -> AnchorTokens:
    """All tokens of a chunk; the score is the sum of a token's rates."""
    dtype = sum_dtype(samples.v)
    return AnchorTokens(samples.k.to(dtype), samples.v.to(dtype), samples.rates.sum(0)[..., 0])

