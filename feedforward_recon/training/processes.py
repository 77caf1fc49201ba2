"""Training in one process or, under torchrun, in several that average their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from feedforward_recon.model.distributed import processes_started


class Processes:
    """All processes of a run; one without torchrun."""

    def __init__(self, device: torch.device) -> None:
        self.count = processes_started()
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        self.rank = dist.get_rank() if self.count > 1 else 0

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the mean of all; parameters without a gradient have 0."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        dist.all_reduce(flat)
        start = 0
        for parameter in parameters:
            assert parameter.grad is not None, 'all have one'
            size = parameter.numel()
            parameter.grad.copy_(flat[start:start + size].view_as(parameter) / self.count)
            start += size
