"""What every global attention shares: states, chunks over frames, exchange between processes.

Every variant follows one scheme, written down once in `QkvAttention.forward`: writing adds the
frames to the state, reading computes each token's output from the state alone. A frame that
writes is read back like any other, so the same call with ``write=False`` localises: its frames
see the scene, neither each other nor themselves, and the state that comes out is the object
that went in. Nothing of a scene is kept in a module.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from feedforward_recon.errors import InputError
from feedforward_recon.model.attention.config import AttentionConfig
from feedforward_recon.model.fp8 import linear_rows
from feedforward_recon.model.layers import full_precision
from feedforward_recon.model.rope import rotate

S = TypeVar('S', bound='State')


@dataclasses.dataclass(frozen=True)
class State:
    """State of one layer after writing a scene: named tensors, replaced and never changed."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, for saving."""
        return {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}

    @classmethod
    def from_tensors(cls: type[S], tensors: dict[str, torch.Tensor]) -> S:
        """The state that ``tensors`` came from."""
        return cls(**tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


class Layout(NamedTuple):
    """How the tokens of one frame lie: positions (y, x) [tokens, 2] or None, and their number."""

    positions: torch.Tensor | None
    tokens: int


class Exchange(Protocol):
    """How processes that hold different frames of one scene share what they write."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the tensors of all processes."""
        ...

    def concatenate(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The tensors of all processes one behind the other, in the order of the processes."""
        ...


class Alone:
    """The exchange of a single process (see `model.distributed` for several)."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def concatenate(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The tensor itself."""
        return tensor


class QkvAttention(nn.Module, ABC):
    """Base of the variants: projections with the official names, and the order of a call.

    A variant defines `empty_state`, `write` and `read`; also `prepared` and `readable` if
    something has to be derived from the layout or from the state once per call.
    """

    fixed_size: ClassVar[bool] = False
    state_type: ClassVar[type[State]]
    has_norms: ClassVar[bool] = True

    def __init__(self, config: AttentionConfig, layer_index: int = 0) -> None:
        super().__init__()
        del layer_index  # only initial fast weights differ between layers
        self.config = config
        self.exchange: Exchange = Alone()
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)
        if self.has_norms and config.qk_norm:
            self.q_norm: nn.Module = nn.LayerNorm(config.head_dim)
            self.k_norm: nn.Module = nn.LayerNorm(config.head_dim)
        elif self.has_norms:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor, state: Any, *, positions: torch.Tensor | None,
                frames: int, tokens_per_frame: int, write: bool) -> tuple[torch.Tensor, Any]:
        """Attend from each token to the scene.

        Args:
            x: tokens [B, frames * tokens_per_frame, C] after the first norm.
            state: what earlier calls wrote, or `empty_state(B)`.
            positions: (y, x) of the tokens of one frame, [tokens_per_frame, 2], or None.
            frames: number of frames in x.
            tokens_per_frame: special tokens first, then patches.
            write: add these frames to the scene before reading it.

        Returns:
            Tokens [B, T, C] and the state; with write=False the very state that came in.

        Raises:
            InputError: x does not hold that many frames, or nothing was written yet.
        """
        if x.shape[1] != frames * tokens_per_frame:
            raise InputError(f'expected {frames} frames of {tokens_per_frame} tokens, found '
                             f'{x.shape[1]} tokens; pass the counts that x was made with')
        layout = self.prepared(Layout(positions, tokens_per_frame))
        chunks = self._chunks(x, tokens_per_frame)
        if write:
            state = self.write(chunks, state, layout)
        memory = self.readable(state)
        out = [self.proj(merge_heads(self.read(chunk, memory, layout))) for chunk in chunks]
        return torch.cat(out, 1), state

    def _chunks(self, x: torch.Tensor, tokens_per_frame: int) -> tuple[torch.Tensor, ...]:
        """Pieces [B, n * tokens_per_frame, C] of whole frames."""
        frames = self.config.frames_per_chunk(tokens_per_frame, x.device.type)
        return x.split(frames * tokens_per_frame, 1)

    @abstractmethod
    def empty_state(self, batch: int) -> State:
        """The state of ``batch`` scenes of which nothing is known."""

    def prepared(self, layout: Layout) -> Any:
        """What `write` and `read` need to know of a frame, worked out once per call."""
        return layout

    @abstractmethod
    def write(self, chunks: tuple[torch.Tensor, ...], state: Any, layout: Any) -> State:
        """The state with the frames of all chunks added."""

    def readable(self, state: Any) -> Any:
        """What `read` needs; by default the state itself."""
        return state

    @abstractmethod
    def read(self, chunk: torch.Tensor, memory: Any, layout: Any) -> torch.Tensor:
        """Outputs [B, heads, T, head_dim] of the tokens of one chunk."""

    def raw_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Queries [B, h, T, d] as projected. Writing and reading each project what they need."""
        return self.split_heads(linear_rows(self.qkv, x, slice(0, self.config.dim)))

    def raw_keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, h, T, d] as projected."""
        keys_values = linear_rows(self.qkv, x, slice(self.config.dim, 3 * self.config.dim))
        k, v = keys_values.chunk(2, -1)
        return self.split_heads(k), self.split_heads(v)

    def turned(self, norm: nn.Module, x: torch.Tensor, positions: torch.Tensor | None,
               ) -> torch.Tensor:
        """Raw queries or keys [..., T, d] after norm and rotation."""
        y = norm(x if isinstance(norm, nn.Identity) else full_precision(x))
        y = y.to(x.dtype) if self.config.round_qk else y
        return y if positions is None else rotate(y, self.places(positions))

    def places(self, positions: torch.Tensor) -> torch.Tensor:
        """Where tokens count as lying when they are turned, of where they lie [..., 2]."""
        return positions.clamp(max=1) if self.config.one_place else positions

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, h * d] -> [B, h, T, d]."""
        return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)

    def no_tokens(self, *shape: int) -> torch.Tensor:
        """Zeros with device of the projections and dtype of their biases, which are never fp8."""
        return self.proj.bias.new_zeros(shape)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """[B, h, T, d] -> [B, T, h * d]."""
    return x.transpose(1, 2).flatten(2)


def append(old: torch.Tensor, new: torch.Tensor, dim: int) -> torch.Tensor:
    """``new`` behind ``old``, in the dtype of the first that was written.

    Raises InputError when frames of another size were written before.
    """
    if old.shape[dim] and old.shape[dim + 1:] != new.shape[dim + 1:]:
        raise InputError(f'expected frames as large as those of the scene, found blocks of '
                         f'{list(new.shape[dim + 1:])} instead of {list(old.shape[dim + 1:])}; '
                         'resize all images of a scene alike')
    return torch.cat((old, new.to(old.dtype)), dim) if old.shape[dim] else new


def require_written(count: int) -> None:
    """Raises InputError if a growing memory holds nothing that could be read."""
    if not count:
        raise InputError('expected a state that frames were written to, found an empty one; '
                         'map with write=True before localising with write=False')


def join(pieces: Iterator[tuple[torch.Tensor, ...]], dim: int) -> tuple[torch.Tensor, ...]:
    """Tuples of tensors, each place concatenated along ``dim``."""
    return tuple(torch.cat(column, dim) for column in zip(*pieces, strict=True))
