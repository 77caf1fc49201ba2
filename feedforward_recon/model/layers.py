"""The parts that every transformer here is built from: attention, MLP, LayerScale, block.

Parameter names are those of the official checkpoints (`qkv`, `proj`, `q_norm`, `ls1.gamma`,
`fc1`, ...), so a state dict needs no translation. All biases are on, GELU is the exact one.

Sequences of a batch do not know of each other, so a block takes a few at a time: beyond its
input and output its memory does not grow with the number of frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from feedforward_recon.model.rope import rotate

CHUNK_TOKENS = 1 << 14
CPU_CHUNK_TOKENS = 1 << 12  # 70 MB of hidden layer in a block of 1024 channels
PIECE = 1 << 20  # pairs of tokens compared at once in training: 2 MB in bfloat16, a core's cache


@dataclass(frozen=True)
class BlockConfig:
    """Shape of one transformer block.

    norm_eps: of `norm1` and `norm2`; the norms of queries and keys always use 1e-5.
    qk_norm: LayerNorm of queries and keys per head, before the rotation.
    layer_scale: initial value of LayerScale, None for a block without it.
    round_qk: give normalised queries and keys the dtype of the values before the rotation
        (under autocast: bfloat16, and so bfloat16 angles); False leaves them in float32.
    one_place: global blocks turn all patches as if they lay at (1, 1), as in DA3.
    """

    dim: int
    heads: int
    mlp_ratio: int = 4
    norm_eps: float = 1e-5
    qk_norm: bool = False
    layer_scale: float | None = 0.01
    round_qk: bool = False
    one_place: bool = False

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.dim // self.heads


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """Float32, or x as it is if wider: so autocast norms it on GPUs, but not on CPUs."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al., "Going deeper with image transformers")."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]; float32 gammas keep the residual stream float32."""
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers around GELU."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim if out is None else out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., out]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Softmax self-attention with optional norms and rotation of queries and keys."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)
        if config.qk_norm:
            self.q_norm = nn.LayerNorm(config.head_dim)
            self.k_norm = nn.LayerNorm(config.head_dim)

    def project(self, x: torch.Tensor, positions: torch.Tensor | None,
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [B, heads, T, head_dim] of tokens [B, T, C]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.config.heads, -1))  # [B, T, 3, h, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.config.qk_norm:
            q, k = self.q_norm(full_precision(q)), self.k_norm(full_precision(k))
        if self.config.round_qk:
            q, k = q.to(v.dtype), k.to(v.dtype)
        if positions is not None:
            q, k = rotate(q, positions), rotate(k, positions)
        return q, k, v

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [B, T, C] -> [B, T, C]; positions [P, 2] as in `rope.rotate`."""
        q, k, v = self.project(x, positions)
        return self.proj(attended(q, k, v).transpose(1, 2).flatten(2))


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention of queries, keys and values [B, h, T, d].

    Training on a CPU, plain products of pieces take half of the time of the fused kernel, which is
    made for inference (d = 32, 200 to 1600 tokens); without gradients results do not depend on how
    many rows are computed together.
    """
    if torch.is_grad_enabled() and q.device.type == 'cpu':
        return _in_pieces(q, k, v)
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)


def _in_pieces(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`attended`, some heads at a time, or some rows of one head where that is too much."""
    shape, scaled = q.shape, q * q.shape[-1] ** -0.5
    q, k, v = (x.to(v.dtype).flatten(0, 1).contiguous() for x in (scaled, k, v))
    heads = max(1, PIECE // (q.shape[1] * k.shape[1]))
    rows = max(1, PIECE // (heads * k.shape[1]))
    pieces = zip(*(x.split(heads) for x in (q, k, v)), strict=True)
    return torch.cat([torch.cat([(some @ k.mT).softmax(-1) @ v for some in q.split(rows, 1)], 1)
                      for q, k, v in pieces]).unflatten(0, shape[:2])


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each scaled and added."""

    def __init__(self, config: BlockConfig, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = attention if attention is not None else Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = Mlp(config.dim, config.mlp_ratio * config.dim)
        self.ls1, self.ls2 = _layer_scale(config), _layer_scale(config)

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None, *,
                reuse: bool = False) -> torch.Tensor:
        """Tokens [B, T, C] -> [B, T, C]; with ``reuse`` in the place of x (see `in_chunks`)."""
        return in_chunks(lambda part: (self._both_steps(part, positions),), (x,),
                         rows_per_chunk(x.shape[1], x.device), into=x if reuse else None)[0]

    def _both_steps(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        return self.refined(x + self.ls1(self.attn(self.norm1(x), positions)))

    def refined(self, x: torch.Tensor) -> torch.Tensor:
        """The second step: each token by itself, [B, T, C] -> [B, T, C]."""
        return x + self.ls2(self.mlp(self.norm2(x)))


class GlobalBlock(Block):
    """A block whose attention joins all frames, and so reads and writes the scene's state."""

    attn: Any  # a `model.attention.base.QkvAttention`

    def forward(self, x: torch.Tensor, state: Any, *,  # type: ignore[override]
                positions: torch.Tensor, frames: int, write: bool, keep: bool = True,
                reuse: bool = False) -> tuple[torch.Tensor, Any]:
        """Tokens [B, frames * P, C] and a state -> tokens of the same shape and the state.

        positions: [P, 2] of the tokens of one frame. reuse: answer in the place of x.
        keep: without, what was written is gone once it was read, and the state given comes back.
        """
        seen, after = self.attn(self.norm1(x), state, positions=positions, frames=frames,
                                tokens_per_frame=len(positions), write=write)
        if not keep:
            after = state
        shape = x.shape
        x, seen = (t.unflatten(1, (frames, -1)).flatten(0, 1) for t in (x, seen))
        out, = in_chunks(lambda x, seen: (self.refined(x + self.ls1(seen)),), (x, seen),
                         rows_per_chunk(x.shape[1], x.device), into=x if reuse else None)
        return out.reshape(shape), after


def rows_per_chunk(tokens: int, device: torch.device) -> int:
    """How many rows [tokens, ...] are worked on together."""
    limit = min(CHUNK_TOKENS, CPU_CHUNK_TOKENS) if device.type == 'cpu' else CHUNK_TOKENS
    return max(1, limit // tokens)


def in_chunks(function: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor],
              rows: int, *, place: torch.device | None = None,
              into: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """``function`` of inputs [B, ...] whose rows do not know of each other, some at a time.

    Results are put where they stay as soon as they are known, so that beside them only what
    one chunk needs exists. Where gradients are recorded, chunks are simply joined.

    Args:
        function: tensors of some rows -> tensors of as many rows.
        inputs: anywhere; the function brings its share to where it works.
        rows: rows per chunk.
        place: device of the results; by default that of the function's.
        into: an input that nobody needs afterwards: the first result takes its place.

    Returns:
        The results of all rows.
    """
    total = len(inputs[0])
    chunks = (function(*(x[start:start + rows] for x in inputs))
              for start in range(0, max(total, 1), rows))
    if torch.is_grad_enabled() or total <= rows:
        joined = (torch.cat(column) if len(column) > 1 else column[0]
                  for column in zip(*chunks, strict=True))
        return tuple(x if place is None else x.to(place) for x in joined)
    start, found = 0, list[torch.Tensor]()
    for chunk in chunks:
        found = found or [_room_for(part, total, place, into if index == 0 else None)
                          for index, part in enumerate(chunk)]
        for whole, part in zip(found, chunk, strict=True):
            whole[start:start + len(part)] = part
        start += len(chunk[0])
    return tuple(found)


def _room_for(part: torch.Tensor, rows: int, place: torch.device | None,
              into: torch.Tensor | None) -> torch.Tensor:
    """A tensor for ``rows`` rows like those of ``part``: ``into`` if it is such a one."""
    like = part.new_empty((rows, *part.shape[1:]), device=place) if into is None else into
    if like.shape[1:] == part.shape[1:] and like.dtype == part.dtype:
        return like
    return _room_for(part, rows, place, None)


def empty_states(blocks: Iterable[nn.Module], batch: int) -> tuple[Any, ...]:
    """One state per global block among ``blocks``, of scenes that nobody has seen."""
    return tuple(block.attn.empty_state(batch) for block in blocks
                 if isinstance(block, GlobalBlock))


def _layer_scale(config: BlockConfig) -> nn.Module:
    if config.layer_scale is None:
        return nn.Identity()
    return LayerScale(config.dim, config.layer_scale)
