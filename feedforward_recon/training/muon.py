"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised before each step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from feedforward_recon.model.attention.fast_weights import orthogonalised

ITERATIONS = 5
ADAM_RMS = 0.2  # root mean square of a typical step of Adam, so that both share a learning rate


class Muon(torch.optim.Optimizer):
    """For the matrices inside transformer blocks; everything else needs another optimiser.

    The factor 0.2 sqrt(max(rows, columns)) makes steps as large as those of AdamW (Liu et al.,
    "Muon is scalable for LLM training", 2025, sec. 2.2). Tall matrices whose rows are several
    times their columns are stacks of square ones (queries, keys, values) and treated as such.
    """

    def __init__(self, matrices: Iterable[torch.Tensor], momentum: float = 0.95,
                 weight_decay: float = 0.0) -> None:
        super().__init__(matrices, {'lr': 0.0, 'momentum': momentum,
                                    'weight_decay': weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step along the gradients; ``closure`` is not supported."""
        assert closure is None, 'closures are not supported'
        for group in self.param_groups:
            alike = defaultdict(list)
            for matrix in group['params']:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for matrices in alike.values():
                self._move(matrices, group)

    def _move(self, matrices: list[torch.Tensor], group: dict[str, Any]) -> None:
        """One step of matrices of one shape, at once."""
        pushes = []
        for matrix in matrices:
            assert matrix.grad is not None, 'only matrices with gradients come here'
            state = self.state[matrix]
            if not state:
                state['momentum'] = torch.zeros_like(matrix)
            state['momentum'].lerp_(matrix.grad, 1 - group['momentum'])
            pushes.append(matrix.grad.lerp(state['momentum'], group['momentum']))
        parts = _parts(torch.stack(pushes))
        size = ADAM_RMS * math.sqrt(max(parts.shape[-2:]))
        steps = size * orthogonalised(parts.bfloat16(), ITERATIONS).float()
        for matrix, step in zip(matrices, steps, strict=True):
            matrix.mul_(1 - group['lr'] * group['weight_decay'])
            matrix.sub_(group['lr'] * step.reshape(matrix.shape))


def _parts(stack: torch.Tensor) -> torch.Tensor:
    """Matrices [n, 3 c, c] as [n, 3, c, c]; others as they are."""
    rows, columns = stack.shape[-2:]
    return stack.unflatten(1, (3, columns)) if rows == 3 * columns else stack
