"""The joint pass shared by several processes, each with some of the images.

    torchrun --nproc-per-node=2 -m feedforward_recon.cli reconstruct photos/ --joint ..

The first process reads, asks and saves; the others wait for images, and help with the pass. Global
attentions share what they write (``distributed.sequence_parallel``), so that the answer is that of
one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from feedforward_recon.errors import ConfigError
from feedforward_recon.model.backbone import Demand
from feedforward_recon.model.distributed import (
    AcrossProcesses,
    predict_distributed,
    processes_started,
    sequence_parallel,
)
from feedforward_recon.model.joint import pass_alone
from feedforward_recon.model.joint_pass import ViewInputs
from feedforward_recon.model.joint_plan import chunk_of
from feedforward_recon.model.predictor import Answer, NetworkPredictor, read
from feedforward_recon.model.preprocess import stacked
from feedforward_recon.model.ray_transformer import CellMaps, RayTransformer
from feedforward_recon.model.seconds import Seconds
from feedforward_recon.model.vggt import Vggt

CPU = torch.device('cpu')
PATIENCE = timedelta(days=7)  # of processes that wait while the first one reads, or refines


class SharedPass:
    """The joint pass by all processes of the default group; the first one calls it.

    The others call ``help_out``.
    """

    def __init__(self, predictor: NetworkPredictor) -> None:
        """Raises ConfigError without a process group, and for networks that cannot share."""
        if not isinstance(predictor.network, (RayTransformer, Vggt)):
            raise ConfigError('expected a network that several processes can share, of the kind '
                              f'of tiny or VGGT, found {type(predictor.network).__name__}; start '
                              'one process')
        self._predictor, self._exchange = predictor, AcrossProcesses()

    def __call__(self, views: ViewInputs, seconds: Seconds) -> CellMaps | Answer:
        """What the network says of all views. Raises ConfigError for fewer than processes."""
        count = dist.get_world_size()
        if len(views.images) < count:
            raise ConfigError('expected at least as many images as processes, found '
                              f'{len(views.images)} for {count}; start fewer')
        # One process decides: each would count the memory that is free to itself.
        chunk = chunk_of(self._predictor.network, views.size_hw, len(views.images))
        self._tell((views, chunk))
        return self._share(views, chunk, seconds)

    def help_out(self) -> None:
        """Take part in passes until the first process has no more of them."""
        while (told := self._heard()) is not None:
            self._share(*told, Seconds())

    def end(self) -> None:
        """There are no more passes."""
        self._tell(None)

    def _tell(self, told: tuple[ViewInputs, int] | None) -> None:
        dist.broadcast_object_list([told], 0, device=CPU)

    def _heard(self) -> tuple[ViewInputs, int] | None:
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, 0, device=CPU)
        return heard[0]

    @torch.inference_mode()
    def _share(self, views: ViewInputs, chunk: int, seconds: Seconds) -> CellMaps | Answer:
        rank, count = dist.get_rank(), dist.get_world_size()
        own = shares(len(views.images), count, chunk)[rank]
        part = ViewInputs([views.images[k] for k in own], views.K[own], has_first=rank == 0)
        network = self._predictor.network
        if isinstance(network, Vggt):
            with seconds.of('joint pass'):
                return self._with_cameras(network, part)
        with sequence_parallel(network):
            cells = pass_alone(self._predictor, part, seconds, chunk)
        with seconds.of('exchange'):
            return CellMaps(**{name: self._gathered(value) for name, value in vars(cells).items()})

    def _with_cameras(self, network: Vggt, part: ViewInputs) -> Answer:
        with self._predictor.precision():
            said, _ = predict_distributed(network, stacked(part.images),
                                          demand=Demand(points=False, memory=False))
        return tuple(self._gathered(x).float().cpu()  # type: ignore[return-value]
                     for x in read(said))

    def _gathered(self, values: torch.Tensor) -> torch.Tensor:
        """[1, n, ...] of each process as [1, N, ...]."""
        return self._exchange.concatenate(values.contiguous(), 1)


def shares(images: int, processes: int, chunk: int) -> list[np.ndarray]:
    """The images of each process: whole chunks where there are enough.

    So each chunk is what it is in one process, and its answer the same to the last bit.
    """
    starts = range(0, images, chunk)
    if len(starts) < processes:
        return np.array_split(np.arange(images), processes)
    return [np.concatenate([np.arange(start, min(start + chunk, images)) for start in own])
            for own in np.array_split(starts, processes)]


@contextmanager
def joined_processes(predictor: NetworkPredictor) -> Iterator[bool]:
    """Whether this process leads those that torchrun started; where it does not, it is done.

    A process alone leads itself. One that raises an error within has to end with it.
    """
    if processes_started() == 1:
        yield True
        return
    on_gpu = predictor.device.type == 'cuda'
    if on_gpu:
        torch.cuda.set_device(predictor.device)
    dist.init_process_group('cpu:gloo,cuda:nccl' if on_gpu else 'gloo', timeout=PATIENCE)
    shared, leads = SharedPass(predictor), dist.get_rank() == 0
    if not leads:
        shared.help_out()
    yield leads
    # Not after an error: others may wait within a pass. This process ends, and torchrun ends them.
    if leads:
        shared.end()
    dist.destroy_process_group()
