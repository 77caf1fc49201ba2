"""What a global attention looks like: sizes shared by all variants, then options of each."""

from __future__ import annotations

from dataclasses import dataclass, field

CPU_CHUNK_TOKENS = 1024
GPU_CHUNK_TOKENS = 20 * 37 * 37


@dataclass(frozen=True)
class TttOptions:
    """VGG-T3. hidden: width of the fast network as a multiple of the head dimension."""

    hidden: int = 4
    steps: int = 1
    newton_schulz: int = 5


@dataclass(frozen=True)
class SparseOptions:
    """Speed3R. window: side of a block in patches; kept: blocks that each block reads.

    repeat_last: with fewer than ``kept`` blocks in the scene, count the last one as often as
    the published kernel does; otherwise each block counts once.
    visible_every: the first of so many frames each is read by all blocks beside those they
    choose, as in the form for VGGT; 0: none is.
    """

    window: int = 4
    kept: int = 32
    repeat_last: bool = False
    visible_every: int = 0


@dataclass(frozen=True)
class SparseLinearOptions:
    """Lite3R. window: side of a block in patches; kept: blocks that each block reads exactly.

    keep_ratio: the form that the published weights were trained with: every token reads this
    share of all tokens. It computes all N^2 scores; None keeps whole blocks instead, and the
        published 0.3 where the attention is called `lite3r`.
    """

    window: int = 8
    kept: int = 8
    keep_ratio: float | None = None


@dataclass(frozen=True)
class HybridOptions:
    """Ours. anchors: tokens per head that are stored exactly."""

    anchors: int = 256


@dataclass(frozen=True)
class AttentionConfig:
    """Shape of a global attention.

    name: a key of ATTENTION. special: tokens in front of the patches of each frame.
    qk_norm: LayerNorm of queries and keys per head (eps 1e-5); `ttt` and `hybrid` have none.
    round_qk: give normalised queries and keys the dtype of the values before the rotation.
    one_place: turn all patches as if they lay at (1, 1); blocks and convolutions still know
        where they are.
    chunk_tokens: frames are processed together up to about this many tokens; None: what fits
        a cache on a CPU, and what VGG-T3 uses elsewhere.
    """

    dim: int
    heads: int
    name: str = 'softmax'
    special: int = 5
    qk_norm: bool = True
    round_qk: bool = False
    one_place: bool = False
    chunk_tokens: int | None = None
    ttt: TttOptions = field(default_factory=TttOptions)
    sparse: SparseOptions = field(default_factory=SparseOptions)
    sparse_linear: SparseLinearOptions = field(default_factory=SparseLinearOptions)
    hybrid: HybridOptions = field(default_factory=HybridOptions)

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.dim // self.heads

    def frames_per_chunk(self, tokens_per_frame: int, device_type: str) -> int:
        """Frames that are processed together, at least one."""
        default = CPU_CHUNK_TOKENS if device_type == 'cpu' else GPU_CHUNK_TOKENS
        return max(1, (self.chunk_tokens or default) // tokens_per_frame)
