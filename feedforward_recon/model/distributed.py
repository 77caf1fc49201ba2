"""One scene on several processes: each holds some of the frames.

Frames meet only in global attention, and every variant writes through an `Exchange`
(`attention/base.py`): `ttt` adds up its gradient sums (786 432 numbers per layer and step at
the size of VGGT-1B, whatever the number of frames), the others pass on their states.
Everything else is local to a frame, except VGGT's camera head, which needs the camera tokens of
all frames: `predict_distributed` gathers them, so that poses are global. (pi3 has no such head:
inside `sequence_parallel` an ordinary call will do.) Latent alignment passes on one vector of each
image. The result equals that of one process.

`DistributedCollectionNetwork` does the same for photos of which a network is asked about a few
at a time: images are encoded, and windows decoded, by all processes, each its share.

`ffrecon reconstruct --joint` shares its pass this way (`joint_processes`); nodes do not. Run under
torchrun; `gloo` on CPU, `nccl` on GPU. Inference only: gradients of a loss do not flow between
processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from feedforward_recon.errors import ConfigError
from feedforward_recon.model.attention.registry import joint_attentions
from feedforward_recon.model.backbone import EVERYTHING, Demand
from feedforward_recon.model.collection import CollectionNetwork
from feedforward_recon.model.latent_alignment import LatentAlignment
from feedforward_recon.model.network_state import NetworkState
from feedforward_recon.model.predictor import Answer, NetworkPredictor
from feedforward_recon.model.preprocess import PreparedImage
from feedforward_recon.model.vggt import Reconstruction, Vggt


def processes_started() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get('WORLD_SIZE', '1'))


def processes_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', processes_started()))


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process under torchrun, one for each; any other device is shared."""
    if device.type != 'cuda' or device.index is not None or 'LOCAL_RANK' not in os.environ:
        return device
    return torch.device('cuda', int(os.environ['LOCAL_RANK']))


class AcrossProcesses:
    """The exchange between the processes of a group (None: all of them)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError('expected an initialised process group, found none; start with '
                              'torchrun and call torch.distributed.init_process_group')
        self.group = group

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over processes."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def concatenate(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The tensors of all processes along ``dim``, where their sizes may differ."""
        count = dist.get_world_size(self.group)
        size = torch.tensor([tensor.shape[dim]], device=tensor.device)
        sizes = [torch.empty_like(size) for _ in range(count)]
        dist.all_gather(sizes, size, group=self.group)
        longest = int(max(sizes))
        padded = tensor.new_zeros(*tensor.shape[:dim], longest, *tensor.shape[dim + 1:])
        padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        parts = [torch.empty_like(padded) for _ in range(count)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part.narrow(dim, 0, int(length))
                          for part, length in zip(parts, sizes, strict=True)], dim)


def predict_distributed(model: Vggt, images: torch.Tensor, group: dist.ProcessGroup | None = None,
                        demand: Demand = EVERYTHING) -> tuple[Reconstruction, NetworkState]:
    """One scene whose frames are spread over the processes of a group, in order of rank.

    images: the frames of this process, [B, N, 3, H, W]; rank 0 has the first of the scene.
    demand: what is wanted of them; frames are counted from the first of this process.
    Returns what they show, in the world of the first frame of all, and the memory of the whole
    scene, the same on every process. With latent alignment the frames of all are the collection.
    """
    exchange, rank = AcrossProcesses(group), dist.get_rank(group)
    empty = model.empty_memory(len(images))
    with sequence_parallel(model, group):
        tokens, states = model.aggregator(images, empty.states, write=True,
                                          has_first=rank == 0, demand=demand)
    own, device = images.shape[1], tokens.camera.device
    counts = exchange.concatenate(torch.tensor([own], device=device), 0)
    start = int(counts[:rank].sum())
    with torch.autocast(device.type, enabled=False):
        cameras = exchange.concatenate(tokens.camera.float(), 1)
        encodings = model.camera_head(cameras)[:, :, start:start + own]
        memory = NetworkState(states, cameras) if demand.memory else empty
        return model.read_out(tokens, encodings, demand), memory


def own_frames(frames: torch.Tensor, dim: int = 1,
               group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The share of this process: consecutive frames along ``dim``, sizes differ by at most 1."""
    return frames.tensor_split(dist.get_world_size(group), dim)[dist.get_rank(group)]


def gather_frames(tensor: torch.Tensor, dim: int = 1,
                  group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """What all processes hold of a tensor with frames along ``dim``, in the order of frames."""
    return AcrossProcesses(group).concatenate(tensor, dim)


class DistributedCollectionNetwork(CollectionNetwork):
    """A collection that the processes of a group encode and decode together.

    Each is given all images, must make the same calls, and has all answers; the tokens of all
    images are on every process.
    """

    def __init__(self, predictor: NetworkPredictor, *, align: bool = False,
                 group: dist.ProcessGroup | None = None) -> None:
        """Raises as ``CollectionNetwork``, and ConfigError without a process group."""
        super().__init__(predictor, align=align)
        self._exchange, self._group = AcrossProcesses(group), group

    def encoded(self, placed: Sequence[PreparedImage]) -> torch.Tensor:
        """Tokens [N, T, C] of images of one size, of which each process encodes its share.

        Raises ConfigError where there are fewer images than processes.
        """
        count = dist.get_world_size(self._group)
        if len(placed) < count:
            raise ConfigError(f'expected at least as many images as processes, found {len(placed)}'
                              f' for {count}; start fewer')
        own = own_frames(torch.arange(len(placed)), 0, self._group)
        with sequence_parallel(self.network, self._group):
            patches = super().encoded([placed[k] for k in own.tolist()])
        return self._exchange.concatenate(patches, 0)

    def decoded(self, patches: torch.Tensor, grid_hw: tuple[int, int]) -> Answer:
        """What windows of tokens [B, N, T, C] show, of which each process decodes its share."""
        count = dist.get_world_size(self._group)
        # As many each, the first ones twice if need be: none is without a window.
        rows = torch.arange(-(-len(patches) // count) * count) % len(patches)
        said = super().decoded(patches[own_frames(rows, 0, self._group)], grid_hw)
        return tuple(self._exchange.concatenate(x, 0)[:len(patches)]  # type: ignore[return-value]
                     for x in said)


@contextmanager
def sequence_parallel(model: nn.Module,
                      group: dist.ProcessGroup | None = None) -> Iterator[nn.Module]:
    """Within this context the global attentions of ``model`` write for all processes.

    Latent alignment aligns the images of all. Every process must make the same calls. Raises
    ConfigError without a process group.
    """
    exchange = AcrossProcesses(group)
    layers: list[Any] = [*joint_attentions(model), *(
        layer for layer in model.modules() if isinstance(layer, LatentAlignment))]
    before = [layer.exchange for layer in layers]
    try:
        for layer in layers:
            layer.exchange = exchange
        yield model
    finally:
        for layer, previous in zip(layers, before, strict=True):
            layer.exchange = previous
