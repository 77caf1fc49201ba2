"""The networks of this package behind one protocol: images in; cameras and depth out.

Each architecture is given images in the way it was trained, and what it says is brought back
to the pixels of the images as they were, to poses T_world_cam and to confidences above one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from feedforward_recon.errors import CheckpointError, InputError
from feedforward_recon.model.attention.sparse_linear import SparseLinearAttention
from feedforward_recon.model.backbone import Demand
from feedforward_recon.model.configs import Network, load
from feedforward_recon.model.da3 import Da3
from feedforward_recon.model.memory_plan import available_bytes, check_room, window_need
from feedforward_recon.model.pi3 import Pi3, fitted_intrinsics
from feedforward_recon.model.pose_encoding import centres_at_integers, rigid_inverse
from feedforward_recon.model.preprocess import (
    PreparedImage,
    crop,
    longest_side,
    match_pixels,
    stacked,
    whole_patches,
)
from feedforward_recon.model.ray_cameras import geometry_of, pixel_maps
from feedforward_recon.model.ray_stem import PATCH as RAY_PATCH
from feedforward_recon.model.ray_transformer import CellMaps, RayConfig, RayTransformer
from feedforward_recon.model.vggt import VggtConfig
from feedforward_recon.model.vit import PATCH, normalised
from feedforward_recon.types import Prediction

log = logging.getLogger(__name__)
OUT_OF_MEMORY = ('out of memory', 'not enough memory', "can't allocate memory",
                 'failed to allocate')
LONGEST_SIDE = 504
RAY_PIXELS = 49_152  # 256 x 192
USUAL_FOCAL = 0.87  # of the longer side
PIXELS = 255_000
HALF_FROM_DIM = 384
FIRST_WITH_TENSOR_CORES, FIRST_WITH_BFLOAT16 = 7, 8  # Volta, Ampere: major compute capability
OFFLOAD_VIEWS = 64  # 3 GB of tokens at the size of VGGT-1B and 518x392 pixels
Prepare = Callable[[Sequence[NDArray]], list[PreparedImage]]
Answer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class NetworkPredictor:
    """A network as a ``Predictor``.

    half: the dtype in which all but the heads computes, as the published networks are meant to;
        None: float32 throughout.
    """

    def __init__(self, network: Network, device: str | torch.device = 'cpu') -> None:
        self.network, self.device = network, torch.device(device)
        self._prepare = preparation(network)
        self.half = half_precision(network, self.device)
        log.info('%s computes in %s on %s', type(network).__name__, 'float32' if self.half is None
                 else f'{str(self.half).removeprefix("torch.")}, heads in float32,', self.device)

    def predict(self, images: Sequence[NDArray[np.uint8]], memory: Any = None, *,
                write: bool = True, keep: bool = True,
                K: NDArray[np.float64] | None = None) -> tuple[Prediction, Any]:
        """What images of one size show together (see ``model.Predictor``)."""
        check_images(images)
        placed = self._prepare(images)
        self._foresee(placed, images[0].shape[:2])
        given = usual_K(images[0].shape[:2]) if K is None else K
        if K is None and isinstance(self.network, RayTransformer):
            log.warning('no intrinsics are known: taking a focal length of %.0f px for granted',
                        given[0, 0])
        own = torch.from_numpy(np.stack([image.prepared_K(given) for image in placed]))[None]
        try:
            answer, memory = self._run(stacked(placed), own, memory, write, keep)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            answer = None
        if answer is None:  # outside the handler, whose traceback holds the tensors
            if self.device.type == 'cuda':
                torch.cuda.empty_cache()
            raise MemoryError(f'{len(images)} images at once are too many for {self.device}')
        return as_prediction(answer, placed, images[0].shape[:2]), memory

    def windows(self, images: torch.Tensor, K: torch.Tensor) -> Answer:
        """What B windows of prepared images [B, N, 3, H, W] in 0..1 show, each by itself.

        K: [B, N, 3, 3] of the prepared images.
        """
        return self._said(images, K, None, True, Demand(points=False, memory=False))[0]

    def _foresee(self, placed: Sequence[PreparedImage], given_hw: Sequence[int]) -> None:
        """Raises TooManyImagesError where main memory would run out, which ends the process."""
        if self.device.type != 'cpu':
            return
        need = window_need(self.network, placed[0].image.shape[:2], given_hw,
                           half=self.half is not None)
        if need is not None:
            check_room(need, len(placed), available_bytes(self.device))

    def together(self, images: torch.Tensor, K: torch.Tensor) -> Answer:
        """What all prepared images [1, N, 3, H, W] in 0..1 of one scene show; K [1, N, 3, 3]."""
        return self._said(images, K, None, True, self._demand(images.shape[1], False))[0]

    def _run(self, images: torch.Tensor, K: torch.Tensor, memory: Any, write: bool, keep: bool
             ) -> tuple[Answer, Any]:
        demand = self._demand(images.shape[1], keep)
        answer, after = self._said(images, K, memory, write, demand)
        said = tuple(x[0] for x in answer)
        return said, after if keep else memory  # type: ignore[return-value]

    @torch.inference_mode()
    def _said(self, images: torch.Tensor, K: torch.Tensor, memory: Any, write: bool,
              demand: Demand) -> tuple[Answer, Any]:
        if isinstance(self.network, RayTransformer):
            answer, memory = self._with_rays(self.network, images, K.float(), memory, write,
                                             demand)
        else:
            with self.precision():
                said, memory = self.network(as_taken(self.network, images), memory, write=write,
                                            demand=demand)
            answer = read(said)
        return tuple(x.float().cpu() for x in answer), memory  # type: ignore[return-value]

    def _with_rays(self, network: RayTransformer, images: torch.Tensor, K: torch.Tensor,
                   memory: Any, write: bool, demand: Demand) -> tuple[Answer, Any]:
        """Of a network that is told the intrinsics; poses follow from its cells."""
        images, K = images.to(self.device), K.to(self.device)
        with self.precision():
            cells, after = network(images, K, memory, write=write, demand=demand)
        return cells_answer(cells, K, network, first=memory is None), after

    def precision(self) -> torch.autocast:
        """The context in which the network computes; what it says is read outside.

        Weights are rounded where they are used: kept, they would take half as much again.
        """
        return torch.autocast(self.device.type, self.half or torch.bfloat16,
                              enabled=self.half is not None, cache_enabled=False)

    def _demand(self, count: int, keep: bool) -> Demand:
        """Depth alone; of many images on a GPU, what waits for the heads waits outside."""
        offload = self.device.type == 'cuda' and count > OFFLOAD_VIEWS
        if self.device.type == 'cuda':
            log.info('%d images on %s: tokens and depth wait in %s memory', count, self.device,
                     'main' if offload else 'its own')
        return Demand(points=False, memory=keep, offload=offload)


def as_taken(network: Network, images: torch.Tensor) -> torch.Tensor:
    """Images [B, N, 3, H, W] in 0..1 as a network takes them."""
    if isinstance(network, Da3) and network.config.normalised:
        return normalised(images)
    return images


def load_predictor(name: str, attention: str | None = None, device: str = 'cpu',
                   weights: str | Path | None = None, precision: str = 'full'
                   ) -> NetworkPredictor:
    """The network of a name, with its weights, on a device (`configs.load`)."""
    return NetworkPredictor(load(name, weights, attention=attention, device=device,
                                 precision=precision), device)


def half_precision(network: Network, device: torch.device) -> torch.dtype | None:
    """The dtype of two bytes that is faster there; None where float32 is as good.

    GPUs have one by their generation, CPUs bfloat16 where they have instructions for it. On a CPU
    a block of dimension 128 gains a fifth and one of 384 to 1024 a third to a half
    (docs/experiments.md); small networks keep the exact answer.
    """
    if device.type == 'cuda':
        found = half_of_generation(torch.cuda.get_device_capability(device)[0])
        return None if found == torch.float16 and _sums_tokens(network) else found
    wide = width_of(network) >= HALF_FROM_DIM
    pays = device.type == 'cpu' and wide and has_bfloat16_instructions()
    return torch.bfloat16 if pays else None


def half_of_generation(major: int) -> torch.dtype | None:
    """What GPUs of that major compute capability multiply in their tensor cores.

    bfloat16 has the range of float32. float16 ends at 65504: heads, norms, softmax, the residual
    stream where layers are scaled, and sums of fast weights stay in float32, as in bfloat16.
    """
    if major >= FIRST_WITH_BFLOAT16:  # before, PyTorch emulates it
        return torch.bfloat16
    return torch.float16 if major >= FIRST_WITH_TENSOR_CORES else None


def _sums_tokens(network: Network) -> bool:
    """Linear attention adds up all tokens of all images: more than float16 can count."""
    return any(isinstance(layer, SparseLinearAttention) for layer in network.modules())


def width_of(network: Network) -> int:
    """Channels of the tokens."""
    config = network.config
    if isinstance(config, RayConfig):
        return config.dim
    return (config.backbone if isinstance(config, VggtConfig) else config).vit.dim


def has_bfloat16_instructions() -> bool:
    """True if the CPU says that it multiplies bfloat16 itself (Linux; elsewhere False)."""
    try:
        words = set(Path('/proc/cpuinfo').read_text(encoding='utf-8').split())
    except OSError:
        return False
    return bool(words & {'avx512_bf16', 'amx_bf16', 'bf16'})  # bf16: of ARM


def preparation(network: Network) -> Prepare:
    """How images are brought to the size that a network was trained with."""
    if isinstance(network, Pi3):
        # Speed3R has no registers, and knows whole windows of patches only.
        return partial(match_pixels, pixels=PIXELS, patches=1 if network.config.registers else 4)
    if isinstance(network, RayTransformer):
        return partial(whole_patches, pixels=RAY_PIXELS, patch=RAY_PATCH)
    if isinstance(network, Da3):
        return partial(longest_side, size=LONGEST_SIDE)
    return partial(crop, size=PATCH * network.config.backbone.vit.grid)


def usual_K(size_hw: Sequence[int]) -> NDArray[np.float64]:
    """Intrinsics of a camera of which nothing is known: most see about 60 degrees across."""
    height, width = size_hw[:2]
    focal = USUAL_FOCAL * max(height, width)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])


def check_images(images: Sequence[NDArray]) -> None:
    """Raises InputError for images of several sizes or of less than one patch."""
    sizes = sorted({(image.shape[1], image.shape[0]) for image in images})
    if len(sizes) != 1:
        found = ', '.join(f'{width}x{height}' for width, height in sizes[:4]) or 'none'
        raise InputError(f'expected images of one size, found {found}; use the images of one '
                         'camera')
    if min(sizes[0]) < PATCH:
        raise InputError(f'expected images of at least {PATCH}x{PATCH} pixels, the patch of the '
                         f'network, found {sizes[0][0]}x{sizes[0][1]}; use larger images')


def is_out_of_memory(error: BaseException) -> bool:
    """True for the many ways in which allocating a tensor fails."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower()
                                                for text in OUT_OF_MEMORY))


def read(said: Any) -> Answer:
    """T_world_cam [B, N, 4, 4], K, depth and confidence [B, N, H, W] of any network's answer.

    Pixel centres are integers in K.
    """
    if hasattr(said, 'points_cam'):  # pi3 says points and a logit
        fitted = [fitted_intrinsics(image) for image in said.points_cam.unbind(1)]
        return (said.T_world_cam, torch.stack(fitted, 1), said.points_cam[..., 2],
                1 + said.confidence_logit.exp())
    K = centres_at_integers(said.K)
    return rigid_inverse(said.T_cam_world), K, said.depth, said.depth_confidence


def cells_answer(cells: CellMaps, K: torch.Tensor, network: RayTransformer, *, first: bool
                 ) -> Answer:
    """The answer of a network that is told K [B, N, 3, 3]; first: as for ``geometry_of``."""
    T, log_depth = geometry_of(cells, K, network, first=first)
    depth, sure = pixel_maps(log_depth, cells.depth_confidence)
    return T, K, depth, sure


def as_prediction(answer: Answer, placed: Sequence[PreparedImage],
                  size_hw: Sequence[int]) -> Prediction:
    """The answer about prepared images as one about the originals of height and width size_hw.

    Raises CheckpointError when the network does not describe cameras at all.
    """
    T, K, depth, confidence = (x.numpy() for x in answer)
    if not (np.isfinite(T).all() and np.isfinite(K).all() and (K[:, [0, 1], [0, 1]] > 0).all()):
        raise CheckpointError('expected cameras from the network, found values that are not '
                              'finite or no focal lengths; check that the weights belong to it')
    original_K = np.stack([image.original_K(k) for image, k in zip(placed, K, strict=True)])
    maps = [_back(image, d, c, size_hw)
            for image, d, c in zip(placed, depth, confidence, strict=True)]
    return Prediction(orthonormal(T.astype(float)), original_K,
                      np.stack([d for d, _ in maps]), np.stack([c for _, c in maps]))


def orthonormal(T: NDArray[np.floating]) -> NDArray[np.float64]:
    """Poses [N, 4, 4] whose rotations are exact in float64, not only in float32."""
    U, _, Vt = np.linalg.svd(T[:, :3, :3])
    out = np.array(T, float)
    out[:, :3, :3] = U @ Vt
    return out


def _back(image: PreparedImage, depth: NDArray, confidence: NDArray, size_hw: Sequence[int]
          ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Depth and confidence [h, w] at the size of the original, 0 where it was cut off."""
    good = np.isfinite(depth) & np.isfinite(confidence) & (depth > 0)
    (sx, sy), (left, top) = image.scale_xy, image.offset_xy
    to_prepared = np.array([[sx, 0, 0.5 * sx - 0.5 + left], [0, sy, 0.5 * sy - 0.5 + top]])
    size_wh = (int(size_hw[1]), int(size_hw[0]))

    def warped(values: NDArray, method: int) -> NDArray[np.float32]:
        return np.asarray(cv2.warpAffine(values, to_prepared, size_wh, flags=method |
                                         cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE),
                          np.float32)

    u, v = np.meshgrid(np.arange(size_wh[0]), np.arange(size_wh[1]))
    x, y = u * sx + to_prepared[0, 2], v * sy + to_prepared[1, 2]
    known = (x > -1) & (y > -1) & (x < depth.shape[1]) & (y < depth.shape[0])
    known &= warped(good.astype(np.float32), cv2.INTER_LINEAR) > 0.999
    filled = np.where(good, depth, 0).astype(np.float32)
    sure = np.where(good, confidence, 0).astype(np.float32)
    return (np.where(known, warped(filled, cv2.INTER_LINEAR), 0).astype(np.float32),
            np.where(known, warped(sure, cv2.INTER_LINEAR), 0).astype(np.float32))
