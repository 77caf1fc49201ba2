"""``ttt``: the scene is learned by a small network per head, of a size that never grows.

VGG-T3 (arXiv 2602.23361, sec. 3): global attention is replaced by a SwiGLU of fast weights
(`fast_weights.py`). *Writing* asks, at the initial weights W, how each token would like to
change them and adds that up: the state of a layer is the sum of gradients G = sum_t G_t(W), so
frames may be written in any order, in chunks, by several processes, and taken away again.
*Reading* makes the step W' = restore_norms(W + NewtonSchulz(G)) and applies f_W' to the
queries, one by one. The step is not additive, which is why sums are kept and not weights.

Per token: v passes a 3x3 depth-wise convolution over the patches of its frame, then q, k and v
pass SiLU, q and k are rotated and L2-normalised, and three learning rates per head come from
softplus(lr_fc(x) + c). More than one step per call (published evaluations use 2) needs the
gradient of *all* frames at the weights between: possible only for one write into an empty
state, whose further sums no longer add up with those of other states.

Left out: the frames' MLP branch in chunks (the backbone's business), momentum (unused there).
Cost: linear. Per token and head 6 d m multiplications to write in each step, 3 d m to read
(m = 4 d); state 3 d m numbers per head and step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from feedforward_recon.errors import InputError
from feedforward_recon.model.attention.base import Layout, QkvAttention, State, merge_heads
from feedforward_recon.model.attention.config import AttentionConfig
from feedforward_recon.model.attention.fast_weights import (
    FastWeights,
    KeyValueSamples,
    advanced,
    apply,
    summed_gradients,
)
from feedforward_recon.model.fp8 import widened_matrices
from feedforward_recon.model.rope import rotate

BASE_RATE = 0.01
RATE_OFFSET = math.log(math.expm1(BASE_RATE))  # softplus of it is BASE_RATE


@dataclass(frozen=True)
class TttState(State):
    """Gradient sums per step: g0, g2 [steps, B, h, d, m] and g1 [steps, B, h, m, d].

    Step 0 is taken at the initial weights and is what `+` and `-` work on; a further step
    belongs to exactly the frames it was computed from, so sums and differences drop it.
    """

    g0: torch.Tensor
    g1: torch.Tensor
    g2: torch.Tensor

    @property
    def steps(self) -> int:
        """Number of update steps that can be derived."""
        return len(self.g0)

    @property
    def is_blank(self) -> bool:
        """Nothing was written; values are read only where the layout in memory leaves it open."""
        return self.steps == 1 and (not any(self.g1.stride()) or not self.g1.any())

    def gradient(self, step: int) -> FastWeights:
        """The gradient sums of one step."""
        return FastWeights(self.g0[step], self.g1[step], self.g2[step])

    def __add__(self, other: TttState) -> TttState:
        return TttState(*map(torch.add, self._additive(), other._additive()))

    def __sub__(self, other: TttState) -> TttState:
        return TttState(*map(torch.sub, self._additive(), other._additive()))

    def _additive(self) -> FastWeights:
        return FastWeights(self.g0[:1], self.g1[:1], self.g2[:1])


class PatchLayout(NamedTuple):
    """Positions that turn the tokens of a frame, [tokens, 2], and rows and columns of patches."""

    positions: torch.Tensor
    grid_hw: tuple[int, int]


class ShortConv(nn.Module):
    """A 3x3 convolution of each channel over the patch grid; special tokens pass by.

    At first the identity: values are those of the network that the layer is put into.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        nn.init.dirac_(self.conv.weight, groups=dim)

    def forward(self, x: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        """Tokens of frames [F, P, C], patches last and row by row -> the same shape."""
        patches = grid_hw[0] * grid_hw[1]
        special, image = x.split((x.shape[1] - patches, patches), 1)
        maps = image.unflatten(1, grid_hw).permute(0, 3, 1, 2)
        mixed = self.conv(maps).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat((special, mixed), 1)


class TttAttention(QkvAttention):
    """FastWeights weights instead of attention; parameters and buffers as published for VGG-T3."""

    fixed_size = True
    has_norms = False
    state_type: ClassVar[type[State]] = TttState
    fp8_matrices: ClassVar[tuple[str, ...]] = ('w0', 'w1', 'w2')
    w0: torch.Tensor | nn.Module
    w1: torch.Tensor | nn.Module
    w2: torch.Tensor | nn.Module

    def __init__(self, config: AttentionConfig, layer_index: int = 0) -> None:
        super().__init__(config, layer_index)
        self.lr_fc = nn.Linear(config.dim, 3 * config.heads)
        self.short_conv_qkv = nn.ModuleList(
            (nn.Identity(), nn.Identity(), ShortConv(config.dim)))
        for name, value in initial_weights(config, layer_index)._asdict().items():
            self.register_buffer(name, value)

    @property
    def initial(self) -> FastWeights:
        """The fast weights that nothing was learned with."""
        return FastWeights(*map(widened_matrices, (self.w0, self.w1, self.w2)))

    def empty_state(self, batch: int) -> TttState:
        """No gradients: reading it gives what the initial weights give."""
        # One zero seen in all places: that nothing was written shows without reading values.
        return TttState(*(w.new_zeros((), dtype=sum_dtype(w)).expand(1, batch, *w.shape)
                          for w in self.initial))

    def prepared(self, layout: Layout) -> PatchLayout:
        """Raises InputError without positions, or when the patches do not fill a rectangle."""
        if layout.positions is None:
            raise InputError('expected positions of the patches for the convolution of values, '
                             'found None; pass those of one frame')
        return PatchLayout(self.places(layout.positions),
                           patch_grid_of(layout.positions, self.config.special))

    def write(self, chunks: tuple[torch.Tensor, ...], state: Any, layout: PatchLayout) -> Any:
        """Add the gradient sums of all chunks."""
        return self.learned(lambda: (self.samples(chunk, layout) for chunk in chunks), state)

    def learned(self, samples: Callable[[], Iterable[KeyValueSamples]],
                state: TttState) -> TttState:
        """The state with the samples of all chunks added.

        samples: called once per step; keeping all of them would take memory per frame.
        Raises InputError for several steps into a state that holds something: the later steps
        would need the tokens of those earlier frames again.
        """
        steps = self.config.ttt.steps
        if steps > 1 and not state.is_blank:
            raise InputError(f'expected an empty state for {steps} update steps, found one '
                             'that was written to; write all frames at once or use steps=1')
        weights, sums = self.initial, list[FastWeights]()
        for step in range(steps):
            if step:
                weights = self._advanced(weights, sums[-1])
            part = summed_gradients(weights, samples())
            total = FastWeights(*(self.exchange.sum(exact).to(kept.dtype) for exact, kept in
                                  zip(part, state.gradient(0), strict=True)))
            if step == 0:
                total = FastWeights(*map(torch.add, state.gradient(0), total))
            sums.append(total)
        return TttState(*(torch.stack(column) for column in zip(*sums, strict=True)))

    def readable(self, state: Any) -> Any:
        """The fast weights after the steps of the state."""
        weights = self.initial
        for step in range(state.steps):
            weights = self._advanced(weights, state.gradient(step))
        return weights

    def read(self, chunk: torch.Tensor, memory: Any,
             layout: PatchLayout) -> torch.Tensor:
        """Apply the fast network to the queries."""
        q = unit(self.raw_queries(chunk), layout.positions)
        return apply(memory, q).to(chunk.dtype)

    def samples(self, chunk: torch.Tensor, layout: PatchLayout) -> KeyValueSamples:
        """What the tokens of a chunk teach: keys, values and rates."""
        k, v = self.raw_keys_values(chunk)
        return KeyValueSamples(unit(k, layout.positions), F.silu(self._convolved(v, layout)),
                               self.rates(chunk))

    def rates(self, chunk: torch.Tensor) -> torch.Tensor:
        """Learning rates [3, B, h, T, 1], positive; output r * h + head of lr_fc is (r, head)."""
        logits = self.lr_fc(chunk)
        logits = logits.to(sum_dtype(logits)).unflatten(-1, (3, self.config.heads))
        return F.softplus(logits + RATE_OFFSET).permute(2, 0, 3, 1)[..., None]

    def _convolved(self, v: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        """Values [B, h, T, d] after the short convolution, frame by frame."""
        tokens = merge_heads(v)
        frames = tokens.reshape(-1, len(layout.positions), tokens.shape[-1])
        mixed = self.short_conv_qkv[2](frames, layout.grid_hw).reshape(tokens.shape)
        return self.split_heads(mixed)

    def _advanced(self, weights: FastWeights, gradient: FastWeights) -> FastWeights:
        return advanced(weights, gradient, self.initial, self.config.ttt.newton_schulz)


def unit(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Raw queries or keys after SiLU, rotation and L2 normalisation, in float32 or wider."""
    y = rotate(F.silu(x), positions)
    y = y.to(sum_dtype(y))
    return y / (torch.linalg.vector_norm(y, dim=-1, keepdim=True) + 1e-5)


def sum_dtype(x: torch.Tensor) -> torch.dtype:
    """Float32, or the dtype of x if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


@lru_cache(maxsize=64)
def patch_grid_of(positions: torch.Tensor, special: int) -> tuple[int, int]:
    """Rows and columns of the patches at positions[special:]; a GPU is asked for them once.

    Raises InputError when they do not fill a rectangle.
    """
    patches = positions[special:].cpu().numpy()
    rows, columns = patches.max(0) - patches.min(0) + 1
    if rows * columns != len(patches):
        raise InputError(f'expected patches that fill their grid, found {len(patches)} in '
                         f'{rows}x{columns}; check `special` (now {special})')
    return int(rows), int(columns)


def initial_weights(config: AttentionConfig, layer_index: int) -> FastWeights:
    """Random matrices N(0, 2 / inputs); never trained, and the same in every process."""
    generator = torch.Generator('cpu').manual_seed(layer_index)
    heads, d, m = config.heads, config.head_dim, config.ttt.hidden * config.head_dim

    def draw(inputs: int, outputs: int) -> torch.Tensor:
        sample = torch.randn(heads, inputs, outputs, generator=generator, device='cpu')
        return (sample * math.sqrt(2 / inputs)).to(torch.empty(0).device)
    return FastWeights(draw(d, m), draw(m, d), draw(d, m))
