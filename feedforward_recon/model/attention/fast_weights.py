"""The mathematics of `ttt`: a small network per head that is trained while it is used.

FastWeights network of a head (VGG-T3, "Test-Time Training for Transformers at scale of 3D scenes",
arXiv 2602.23361, sec. 3; kernel of LaCT, arXiv 2505.23884): a SwiGLU without biases,
    f_W(x) = (SiLU(x w0) * (x w2)) w1,      w0, w2 [d, m], w1 [m, d].
Its inner objective is how well f_W(k_t) aligns with v_t, weighted per token and matrix:
    J_r = sum_t rate_{r,t} <f_W(k_t), v_t>,  r = 0, 1, 2.
`gradients` is dJ_r/dw_r in closed form; being sums over tokens, they add up over frames,
chunks and processes. `advanced` makes one step of ascent along the orthogonalised gradient
(Muon, Jordan et al. 2024) and gives every column its initial norm back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # quintic of Muon: singular values -> about [0.7, 1.13]


class FastWeights(NamedTuple):
    """The three matrices of a fast network, or anything of their shapes, e.g. gradients.

    w0, w2 [..., d, m] and w1 [..., m, d].
    """

    w0: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor


class KeyValueSamples(NamedTuple):
    """What is learned from a chunk: keys and values [..., T, d], rates [3, ..., T, 1]."""

    k: torch.Tensor
    v: torch.Tensor
    rates: torch.Tensor


def apply(w: FastWeights, x: torch.Tensor) -> torch.Tensor:
    """f_W(x) for x [..., T, d]."""
    return (torch.nn.functional.silu(x @ w.w0) * (x @ w.w2)) @ w.w1


def gradients(w: FastWeights, samples: KeyValueSamples) -> FastWeights:
    """dJ_r/dw_r of one chunk, summed over its tokens."""
    k, v, rates = samples
    gate, up = k @ w.w0, k @ w.w2  # [..., T, m]
    down = v @ w.w1.transpose(-1, -2)
    silu = torch.nn.functional.silu(gate)
    return FastWeights((rates[0] * k).transpose(-1, -2) @ _through_silu(down * up, gate),
                       (silu * up).transpose(-1, -2) @ (rates[1] * v),
                       (rates[2] * k).transpose(-1, -2) @ (down * silu))


def _through_silu(slope: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Slope times the derivative of SiLU at x; in one pass where no gradient is recorded."""
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(slope, x)
    sigmoid = x.sigmoid()
    return slope * sigmoid * (1 + x * (1 - sigmoid))


def summed_gradients(w: FastWeights, chunks: Iterable[KeyValueSamples]) -> FastWeights:
    """Gradients of all chunks at the same weights, accumulated in float64.

    So the sum, rounded to float32, is that of the same chunks in any order or grouping.
    """
    total: FastWeights | None = None
    for samples in chunks:
        part = FastWeights(*(g.double() for g in gradients(w, samples)))
        total = part if total is None else FastWeights(*map(torch.add, total, part))
    assert total is not None, 'a call has at least one chunk'
    return total


def orthogonalised(matrix: torch.Tensor, iterations: int) -> torch.Tensor:
    """Newton-Schulz: matrices [..., rows, columns] with singular values brought near 1."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.transpose(-1, -2) if tall else matrix
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(iterations):
        square = x @ x.transpose(-1, -2)
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.transpose(-1, -2) if tall else x


def column_norms(w: torch.Tensor) -> torch.Tensor:
    """Norms [..., 1, out] over the inputs of each unit."""
    return torch.linalg.vector_norm(w, dim=-2, keepdim=True)


def advanced(w: FastWeights, gradient: FastWeights, initial: FastWeights,
             iterations: int = 5) -> FastWeights:
    """One step from ``w``; columns get the norms that they have in ``initial``."""
    def step(weight: torch.Tensor, slope: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        moved = weight + orthogonalised(slope.to(weight.dtype), iterations)
        return moved / (column_norms(moved) + 1e-5) * column_norms(first)
    return FastWeights(*map(step, w, gradient, initial))
