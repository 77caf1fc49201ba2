"""``JointPlan``: whether one pass over N images fits the memory, worked out before it begins.

All memory of a pass is proportional to the number of images: tokens, what the heads are given and
what they say; beside that, what the images of one chunk need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from feedforward_recon.errors import ConfigError
from feedforward_recon.model.attention.registry import joint_attentions
from feedforward_recon.model.configs import Network
from feedforward_recon.model.distributed import processes_here
from feedforward_recon.model.fp8 import network_bytes
from feedforward_recon.model.memory_plan import available_bytes
from feedforward_recon.model.predictor import OFFLOAD_VIEWS, width_of
from feedforward_recon.model.ray_stem import CELL, FINE_STRIDE
from feedforward_recon.model.ray_stem import PATCH as RAY_PATCH
from feedforward_recon.model.ray_transformer import SPECIAL, RayTransformer
from feedforward_recon.model.vit import PATCH

FLOAT = 4  # bytes
RGB = 3  # bytes of a pixel
# Numbers that the heads say of a cell: depth, point, two confidences; and of a pixel.
OF_CELL, OF_PIXEL = 6, 2
FINE = 32  # channels of the fine descriptors
# Bytes of work for each pixel of the images of a chunk: the pyramid of the stem, or the hidden
# layers of blocks and heads; measured, rounded up.
WORK_PER_PIXEL = 2_000
# Of an image while its poses are found: six pairs of 700 matches of cells, and of 300 rows of
# equations, twice.
MATCHED = 600_000
LEVELS = 4  # of tokens that wait for the dense heads of a network that says pixels
DEEP = 12  # copies of the tokens of a layer in networks that do not work in their place


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes needed at a place: fixed, and for each image; available: free ones, None unknown."""

    place: str
    fixed: int
    per_image: int
    available: int | None

    def of(self, images: int) -> int:
        """Bytes for so many images."""
        return self.fixed + images * self.per_image

    @property
    def fits(self) -> float:
        """How many images there is room for."""
        if self.available is None:
            return math.inf
        return max(0, (self.available - self.fixed) // self.per_image)


@dataclass(frozen=True)
class JointPlan:
    """One pass over so many images.

    chunk: images that are worked on at a time. processes: that share the images. needs: at each
    place where memory may run out.
    """

    images: int
    chunk: int
    processes: int
    needs: tuple[MemoryNeed, ...] = field(default_factory=tuple)

    def __str__(self) -> str:
        """The plan in words."""
        memory = ' and '.join(f'{need.of(self.images) / 1e9:.1f} GB of {need.place} memory'
                              + _free(need) for need in self.needs)
        processes = f', shared by {self.processes} processes' if self.processes > 1 else ''
        return (f'one pass over {self.images} images, {self.chunk} at a time{processes}: '
                f'expected to need {memory}')

    def check(self) -> None:
        """Raises ConfigError where the memory that is free is too little."""
        short = [need for need in self.needs if need.fits < self.images]
        if not short:
            return
        need = min(short, key=lambda need: need.fits)
        raise ConfigError(
            f'expected {need.of(self.images) / 1e9:.1f} GB of {need.place} memory for one pass '
            f'over {self.images} images, found {(need.available or 0) / 1e9:.1f} GB free; '
            f'{int(need.fits)} images would fit: give fewer (--step, --max-frames), or more '
            'memory')


def joint_plan(network: Network, images: int, size_hw: Sequence[int], processes: int = 1,
               kept: int = 0) -> JointPlan:
    """The plan of a pass over images of a size as they are prepared.

    kept: bytes of main memory for each image beside the pass.
    """
    device, chunk = next(network.parameters()).device, chunk_of(network, size_hw, images)
    fixed, per_image = pass_bytes(network, size_hw, chunk, processes)
    waiting, host = _waiting_bytes(network, size_hw), available_bytes(torch.device('cpu'))
    kept += MATCHED if isinstance(network, RayTransformer) else 0
    if device.type == 'cpu':
        here = processes_here() if processes > 1 else 1
        need = here * (per_image + waiting) + kept + (here - 1) * _pixels(size_hw) * RGB
        fixed = here * (fixed + network_bytes(network))
        needs: tuple[MemoryNeed, ...] = (MemoryNeed('main', fixed, need, host),)
    else:
        outside = processes == 1 and images > OFFLOAD_VIEWS
        needs = (MemoryNeed(str(device), fixed, per_image + (0 if outside else waiting),
                            available_bytes(device)),
                 MemoryNeed('main', 0, kept + _answer_bytes(network, size_hw)
                            + (waiting if outside else 0), host))
    return JointPlan(images, chunk, processes, needs)


def chunk_of(network: Network, size_hw: Sequence[int], images: int) -> int:
    """How many images are worked on at a time.

    As many as the attention takes, and a quarter of the free memory.
    """
    device = next(network.parameters()).device
    chunk = joint_attentions(network)[0].config.frames_per_chunk(_tokens(network, size_hw),
                                                                 device.type)
    free = available_bytes(device)
    room = chunk if free is None else free // (4 * _pixels(size_hw) * WORK_PER_PIXEL)
    return max(1, min(chunk, images, room))


def pass_bytes(network: Network, size_hw: Sequence[int], chunk: int, processes: int = 1
               ) -> tuple[int, int]:
    """Bytes of one pass where the network is: fixed, and for each image, for each process.

    Of several processes each holds its share of the tokens, and all that is said.
    """
    tokens, work = _token_bytes(network, size_hw), chunk * _pixels(size_hw) * WORK_PER_PIXEL
    # A state that grows holds keys and values of all images on each process.
    grows = 0 if fixed_size(network) else 2 * tokens
    if isinstance(network, RayTransformer):
        cells, of_stem = _pixels(size_hw) // CELL ** 2, network.config.stem.dim
        given = FLOAT * (cells * of_stem + FINE * _pixels(size_hw) // FINE_STRIDE ** 2)
        share = math.ceil((2 * tokens + given) / processes)
        said = FLOAT * cells * (of_stem + OF_CELL)
        gathered = given if processes > 1 else 0
        return work, share + said + gathered + grows
    return work, math.ceil(DEEP * tokens / processes) + grows


def fixed_size(network: Network) -> bool:
    """Whether the state of a scene never grows, so that time is linear in the images."""
    return all(layer.fixed_size for layer in joint_attentions(network))


def _waiting_bytes(network: Network, size_hw: Sequence[int]) -> int:
    """Of an image: tokens that wait for dense heads, and what those say; beside ``pass_bytes``."""
    if isinstance(network, RayTransformer):
        return 0
    return 2 * LEVELS * _token_bytes(network, size_hw) + _answer_bytes(network, size_hw)


def _answer_bytes(network: Network, size_hw: Sequence[int]) -> int:
    """Of what is kept of an image after the pass."""
    values = _pixels(size_hw) * OF_PIXEL
    return FLOAT * (values // CELL ** 2 if isinstance(network, RayTransformer) else values)


def _pixels(size_hw: Sequence[int]) -> int:
    return size_hw[0] * size_hw[1]


def _token_bytes(network: Network, size_hw: Sequence[int]) -> int:
    return FLOAT * _tokens(network, size_hw) * width_of(network)


def _tokens(network: Network, size_hw: Sequence[int]) -> int:
    """Of one image."""
    if isinstance(network, RayTransformer):
        return size_hw[0] * size_hw[1] // (RAY_PATCH ** 2) + SPECIAL
    return size_hw[0] * size_hw[1] // (PATCH ** 2) + SPECIAL


def _free(need: MemoryNeed) -> str:
    return '' if need.available is None else f' ({need.available / 1e9:.1f} GB free)'
