"""What every training run does at each step: batches, learning rate, and the step itself."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn

from feedforward_recon.training.processes import Processes

log = logging.getLogger(__name__)
B = TypeVar('B')
CLIP = 1.0
# The rate falls in a line over the last part of the schedule only: until then a run may be made
# longer or shorter (Hu et al., MiniCPM, 2024).
DECAY_SHARE, LEAST_RATE = 0.2, 0.02


def drawn_ahead(draw: Callable[[int], B], first: int, end: int) -> Iterator[B]:
    """``draw`` of the steps from first to before end, each while the one before it learns."""
    with ThreadPoolExecutor(1) as ahead:
        waiting = deque(ahead.submit(draw, step) for step in range(first, min(first + 1, end)))
        for step in range(first, end):
            batch = waiting.popleft().result()
            if step + 1 < end:
                waiting.append(ahead.submit(draw, step + 1))
            yield batch


def set_rate(optimisers: Sequence[torch.optim.Optimizer], highest: float, step: int, steps: int,
             warm_up: int) -> None:
    """A line up at first, and one down over the last part of so many steps."""
    warm = (step + 1) / max(1, warm_up)
    left = (steps - step) / max(1, DECAY_SHARE * steps)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group['lr'] = highest * min(1.0, warm, max(LEAST_RATE, left))


def follow_gradient(parameters: Sequence[nn.Parameter],
                    optimisers: Sequence[torch.optim.Optimizer], processes: Processes, step: int
                    ) -> float:
    """One step along the mean gradient of all processes, clipped; none where it is not finite.

    Returns its norm before it was clipped.
    """
    processes.average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, CLIP)
    if torch.isfinite(norm):
        for optimiser in optimisers:
            optimiser.step()
    else:
        log.warning('step %d: gradient is not finite, no step taken', step)
    return float(norm)


def freeze_but(network: nn.Module, names: Sequence[str]) -> None:
    """From now on only the parameters of these names learn."""
    network.requires_grad_(False)
    for name in names:
        network.get_parameter(name).requires_grad_(True)
