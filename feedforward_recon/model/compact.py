"""The ``compact`` encoder: keypoints, descriptors and confidence of one image on a CPU.

Idea: a small convolutional pyramid (strides 4, 8, 16, 32) is computed once; descriptors are
read only where they are needed, at corners. Each corner concatenates the four pyramid levels
at its sub-pixel position (a hypercolumn, Hariharan et al. 2015), and a point-wise MLP turns
that into an L2-normalised descriptor and a confidence. Corners come from the minimum
eigenvalue of the structure tensor (Shi and Tomasi 1994), so that the *position* is sub-pixel
exact and the network only has to say *which* point it is.
Cost at 640x480: about 4 GFLOP for the pyramid, 0.1 GFLOP for 1000 corners.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from feedforward_recon.config.schema import EncoderConfig
from feedforward_recon.errors import CheckpointError, InputError
from feedforward_recon.types import Features

STRIDES = (4, 8, 16, 32)
WEIGHTS_FILE = 'compact.safetensors'


@dataclass(frozen=True)
class CompactShape:
    """Widths of the network; stored in the weights file so that old files keep loading."""

    stem: int = 24
    widths: tuple[int, int, int, int] = (48, 64, 128, 160)
    depths: tuple[int, int, int, int] = (1, 2, 2, 2)
    head_dim: int = 192
    dim: int = 96
    words: int = 32


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_a = nn.BatchNorm2d(width)
        self.conv_b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_b = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> the same shape."""
        y = F.relu(self.norm_a(self.conv_a(x)))
        return F.relu(x + self.norm_b(self.conv_b(y)))


def _downsample(width_in: int, width_out: int) -> nn.Sequential:
    # Kernel 3, stride 2, padding 1 centres output i on input 2 i: pixel p of the image lies
    # at exactly p / stride of every level, which `_sample` relies on.
    return nn.Sequential(nn.Conv2d(width_in, width_out, 3, 2, 1, bias=False),
                         nn.BatchNorm2d(width_out), nn.ReLU())


class CompactNetwork(nn.Module):
    """Pyramid, point-wise head, and the visual words of the global descriptor."""

    words: torch.Tensor

    def __init__(self, shape: CompactShape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or CompactShape()
        self.stem = _downsample(3, shape.stem)
        previous = (shape.stem, *shape.widths[:-1])
        self.levels = nn.ModuleList([
            nn.Sequential(_downsample(w_in, w), *[ResidualBlock(w) for _ in range(depth)])
            for w_in, w, depth in zip(previous, shape.widths, shape.depths, strict=True)])
        self.head = nn.Sequential(
            nn.Linear(sum(shape.widths), shape.head_dim), nn.ReLU(),
            nn.Linear(shape.head_dim, shape.head_dim), nn.ReLU(),
            nn.Linear(shape.head_dim, shape.dim + 1))
        self.register_buffer('words', torch.zeros(shape.words, shape.dim))

    def pyramid(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images [B, 3, H, W] in 0..1 -> four maps [B, C_s, ceil(H / s), ceil(W / s)]."""
        return self.levels_of(images)[1]

    def levels_of(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The map of stride 2 before the pyramid, and the pyramid (see ``pyramid``)."""
        mean = images.mean((1, 2, 3), keepdim=True)
        std = images.std((1, 2, 3), keepdim=True)
        x = self.stem(((images - mean) / (std + 0.02)).to(next(self.stem.parameters()).dtype))
        first, maps = x, []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return first, maps

    def describe(self, maps: list[torch.Tensor],
                 pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Descriptors [B, N, D] and confidence logits [B, N] at pixels [B, N, 2]."""
        columns = [_sample(m, pixels, s) for m, s in zip(maps, STRIDES, strict=True)]
        out = self.head(torch.cat(columns, -1))
        return F.normalize(out[..., :-1], dim=-1), out[..., -1]

    def forward(self, images: torch.Tensor,
                pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Descriptors [B, N, D] and confidence logits [B, N] of images [B, 3, H, W]."""
        return self.describe([m.float() for m in self.pyramid(images)], pixels)


def _sample(feature_map: torch.Tensor, pixels: torch.Tensor, stride: int) -> torch.Tensor:
    """Bilinear values [B, N, C] of a map [B, C, h, w] at image pixels [B, N, 2]."""
    size = torch.tensor([feature_map.shape[-1], feature_map.shape[-2]], dtype=torch.float32)
    grid = 2 * (pixels / stride) / (size - 1).clamp(min=1) - 1
    values = F.grid_sample(feature_map, grid[:, None], align_corners=True,
                           padding_mode='border')
    return values[:, :, 0].transpose(1, 2)


def scaled_down(image: np.ndarray, pixels: int) -> np.ndarray:
    """An image uint8 [H, W, ...] with at most about so many pixels; itself if it has no more."""
    height, width = image.shape[:2]
    factor = min(1.0, float(np.sqrt(pixels / (height * width))))
    size = round(width * factor), round(height * factor)
    return image if size == (width, height) else cv2.resize(image, size,
                                                            interpolation=cv2.INTER_AREA)


def detect_corners(gray: np.ndarray, count: int, spacing_px: int) -> np.ndarray:
    """Sub-pixel Shi-Tomasi corners float32 [N <= count, 2] of a gray uint8 image."""
    corners = cv2.goodFeaturesToTrack(gray, count, 0.002, spacing_px, blockSize=5)
    if corners is None:
        return np.zeros((0, 2), np.float32)
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 8, 0.02)
    corners = cv2.cornerSubPix(gray, corners.astype(np.float32), (3, 3), (-1, -1), criteria)
    return corners.reshape(-1, 2)


class CompactEncoder:
    """The trained encoder, as mapping and localisation use it (protocol ``model.Encoder``)."""

    name = 'compact'

    def __init__(self, network: CompactNetwork, sha256: str,
                 config: EncoderConfig | None = None) -> None:
        self.network = _for_inference(network)
        self.sha256 = sha256
        self.config = config or EncoderConfig()
        self.dim = network.shape.dim

    @staticmethod
    def load(path: str | Path | None = None,
             config: EncoderConfig | None = None) -> CompactEncoder:
        """Load weights from ``path``, by default the ones shipped with the package.

        Raises CheckpointError when the file is missing, damaged or of another architecture.
        """
        file = Path(path) if path else shipped_compact()
        network = load_compact(file)
        return CompactEncoder(network, hashlib.sha256(file.read_bytes()).hexdigest(), config)

    @torch.inference_mode()
    def encode(self, image: np.ndarray, max_keypoints: int | None = None) -> Features:
        """Features of an RGB image uint8 [H, W, 3]; keypoints in pixels of that image."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InputError('expected an RGB image uint8 [H, W, 3], found '
                             f'{image.dtype} {image.shape}; convert it first')
        small, scale = self._resized(image)
        count = max_keypoints or self.config.max_keypoints
        gray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
        corners = detect_corners(gray, 3 * count // 2, self.config.spacing_px)
        if not len(corners):
            return self._nothing()
        descriptors, logits = self._describe(small, corners)
        best = torch.argsort(logits, descending=True, stable=True)[:count].numpy()
        keypoints = (corners[best] + 0.5) / scale - 0.5
        chosen = descriptors[best]
        confidence = torch.sigmoid(logits)[best]
        return Features(keypoints.astype(np.float32), chosen.numpy(), confidence.numpy(),
                        self._global(chosen, confidence).numpy())

    @torch.inference_mode()
    def describe(self, image: np.ndarray, pixels: np.ndarray) -> Features:
        """What is at pixels [N, 2] of an RGB image uint8 [H, W, 3], in this order."""
        small, scale = self._resized(image)
        at = ((pixels + 0.5) * scale - 0.5).astype(np.float32)
        descriptors, logits = self._describe(small, at)
        confidence = torch.sigmoid(logits)
        return Features(pixels.astype(np.float32), descriptors.numpy(), confidence.numpy(),
                        self._global(descriptors, confidence).numpy())

    def _resized(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The image with at most ``max_pixels`` pixels, and its scale (x, y)."""
        small = scaled_down(image, self.config.max_pixels)
        return small, np.array(small.shape[1::-1]) / image.shape[1::-1]

    def _describe(self, image: np.ndarray,
                  corners: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        maps = self.network.pyramid(tensor.contiguous(memory_format=torch.channels_last))
        pixels = torch.from_numpy(corners)[None]
        descriptors, logits = self.network.describe([m.float() for m in maps], pixels)
        return descriptors[0], logits[0]

    def _global(self, descriptors: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
        """VLAD over the shipped words (Jegou et al. 2010), intra-normalised: [W * D]."""
        words = self.network.words
        assign = torch.softmax(20 * descriptors @ words.T, -1) * confidence[:, None]  # [N, W]
        residual = assign.T @ descriptors - assign.sum(0)[:, None] * words
        return F.normalize(F.normalize(residual, dim=-1).flatten(), dim=0)

    def _nothing(self) -> Features:
        zeros = np.zeros((0, 2), np.float32)
        return Features(zeros, np.zeros((0, self.dim), np.float32), zeros[:, 0],
                        np.zeros(self.network.words.numel(), np.float32))


def _for_inference(network: CompactNetwork) -> CompactNetwork:
    """A copy with normalisation folded into the filters, which are bfloat16, channels last."""
    folded = copy.deepcopy(network).eval()
    for module in list(folded.modules()):
        if isinstance(module, ResidualBlock):
            _fold(module, 'conv_a', 'norm_a')
            _fold(module, 'conv_b', 'norm_b')
        elif isinstance(module, nn.Sequential) and isinstance(module[0], nn.Conv2d):
            _fold(module, '0', '1')
    for parameter in (*folded.stem.parameters(), *folded.levels.parameters()):
        layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
        parameter.data = parameter.data.to(torch.bfloat16, memory_format=layout)
    return folded


def _fold(module: nn.Module, conv: str, norm: str) -> None:
    """Make one convolution of two named layers."""
    filters, scale = getattr(module, conv), getattr(module, norm)
    setattr(module, conv, fuse_conv_bn_eval(filters, scale))
    setattr(module, norm, nn.Identity())


def save_compact(network: CompactNetwork, path: str | Path) -> None:
    """Write the weights in fp16, with the shape of the network in the header."""
    tensors = {k: (v.half() if v.is_floating_point() else v).contiguous()
               for k, v in network.state_dict().items()}
    shape = {k: repr(v) for k, v in asdict(network.shape).items()}
    save_file(tensors, str(path), metadata={'architecture': CompactEncoder.name, **shape})


def load_compact(path: Path) -> CompactNetwork:
    """Read a network that ``save_compact`` wrote; raises CheckpointError with the reason."""
    if not path.is_file():
        raise CheckpointError(f'expected encoder weights at {path}, found no file; reinstall '
                              'the package or train them with ffrecon-train encoder')
    try:
        with safe_open(str(path), 'pt') as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f'expected safetensors weights in {path}, found a damaged file '
                              f'({error}); fetch it again') from error
    network = CompactNetwork(_shape_from_header(header, path))
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f'{path} does not fit the compact encoder: {error}') from error
    return network


def _shape_from_header(header: dict[str, str], path: Path) -> CompactShape:
    if header.get('architecture') != CompactEncoder.name:
        raise CheckpointError(f'expected weights of the compact encoder in {path}, found '
                              f'architecture {header.get("architecture")!r}')
    def number(text: str) -> int | tuple[int, ...]:
        values = tuple(int(v) for v in text.strip('()').split(',') if v.strip())
        return values if text.startswith('(') else values[0]
    return CompactShape(**{k: number(v) for k, v in header.items()  # type: ignore[arg-type]
                           if k in CompactShape.__dataclass_fields__})


def shipped_compact() -> Path:
    """The weights that are shipped with the package."""
    return Path(str(resources.files('feedforward_recon.model.weights') / WEIGHTS_FILE))
