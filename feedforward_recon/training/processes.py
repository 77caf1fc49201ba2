"""Training in one process or, under torchrun, in several that average their gradients."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process under torchrun, one for each; any other device is shared."""
    if device.type != 'cuda' or device.index is not None or 'LOCAL_RANK' not in os.environ:
        return device
    return torch.device('cuda', int(os.environ['LOCAL_RANK']))


class Processes:
    """All processes of a run; one without torchrun."""

    def __init__(self, device: torch.device) -> None:
        self.count = int(os.environ.get('WORLD_SIZE', '1'))
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
