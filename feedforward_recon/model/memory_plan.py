"""How much memory a window of images needs, worked out from sizes before a network sees it.

Running out of main memory ends the process without a word, so on a CPU the question comes first.
Beside its weights a call holds, for each image, tokens of one layer and of the levels that wait
for the heads, and dense maps; and the work of the few images that a head is given at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from feedforward_recon.errors import TooManyImagesError
from feedforward_recon.model.backbone import SPECIAL
from feedforward_recon.model.configs import Network
from feedforward_recon.model.da3 import Da3
from feedforward_recon.model.dpt import FRAMES_PER_CHUNK, DptConfig
from feedforward_recon.model.pi3 import Pi3
from feedforward_recon.model.ray_transformer import RayTransformer
from feedforward_recon.model.vggt import Vggt
from feedforward_recon.model.vit import PATCH, VitConfig

FLOAT = 4  # bytes
MEMORY = Path('/proc/meminfo')
LEVELS = 4
# Maps of the size of an image, with half of the features of a dense head, that exist at once: of
# each image of a chunk, and once for all of them. One view of VGGT-1B adds 0.31 GB.
HEAD_MAPS, SHARED_MAPS = 3, 2
WORK = 300_000_000  # bytes that encoder, blocks and libraries take for one chunk; measured
# Numbers for each pixel: the image; depth and confidence, or points in two frames and a logit;
# what is said of the image as it was given, as it is joined.
IMAGE, DEPTH, POINTS, ANSWER = 3, 2, 7, 4


@dataclass(frozen=True)
class WindowNeed:
    """Bytes that a window needs.

    fixed: of the network and its work. per_image: held for each image. per_worked: beside that,
    for each of those that a dense head is given at a time.
    """

    fixed: int
    per_image: int
    per_worked: int = 0

    def of(self, images: int) -> int:
        """Bytes for so many images."""
        worked = min(images, FRAMES_PER_CHUNK)
        return self.fixed + images * self.per_image + worked * self.per_worked

    def fits(self, available: int) -> int:
        """How many images there is room for."""
        free = available - self.fixed
        few = free // (self.per_image + self.per_worked)
        many = (free - FRAMES_PER_CHUNK * self.per_worked) // self.per_image
        return max(0, few if few < FRAMES_PER_CHUNK else many)


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, or of this machine (Linux); None where nothing says it."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = MEMORY.read_text(encoding='ascii').splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines
                 if line.startswith('MemAvailable')), None)


def window_need(network: Network, size_hw: Sequence[int], given_hw: Sequence[int], *,
                half: bool) -> WindowNeed | None:
    """What images need on a CPU, in a call whose memory is not kept.

    Weights count as well: mapped from their file, they are part of what the system calls free.

    size_hw: of the images as they are prepared; given_hw: before that. half: layers compute in
    two bytes. None for networks whose windows are small.
    """
    if isinstance(network, RayTransformer):
        return None
    vit, special, head = _shape(network)
    pixels = size_hw[0] * size_hw[1]
    row = (special + pixels // PATCH**2) * vit.dim
    # Tokens, and the same normed; keys, values and what was seen, which is joined from pieces.
    layer = row * (2 * FLOAT + 4 * (2 if half else FLOAT))
    waiting = FLOAT * row * (1 if head is None else 2 * LEVELS)
    maps = FLOAT * pixels * (IMAGE + (POINTS if head is None else DEPTH))
    answer = FLOAT * ANSWER * given_hw[0] * given_hw[1]
    of_head = 0 if head is None else FLOAT * pixels * head.features // 2
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    return WindowNeed(weights + WORK + SHARED_MAPS * of_head, layer + waiting + maps + answer,
                      HEAD_MAPS * of_head)


def check_room(need: WindowNeed, images: int, available: int | None) -> None:
    """Raises TooManyImagesError where the memory that is free is too little."""
    if available is not None and need.of(images) > available:
        raise TooManyImagesError(f'{images} images at once need {need.of(images) / 1e9:.1f} GB of '
                            f'memory, of which {available / 1e9:.1f} GB are free',
                            need.fits(available))


def _shape(network: Vggt | Pi3 | Da3) -> tuple[VitConfig, int, DptConfig | None]:
    """The encoder, special tokens of an image, and the dense head if it works on maps."""
    if isinstance(network, Pi3):
        return network.config.vit, network.config.registers, None
    if isinstance(network, Da3):
        return network.config.vit, 1, network.config.dpt
    return network.config.backbone.vit, SPECIAL, network.config.dpt
