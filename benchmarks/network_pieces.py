"""Where the time of `ffrecon map --model vggt` goes: preparation, parts of the network, mapping.

    python -m benchmarks.network_pieces --model vggt vgg-t3 --device cuda --out pieces.json
    python -m benchmarks.network_pieces --model vggt-tiny --device cpu --images 8 --size 128x96

A walk through a rendered room is mapped window by window. Where the weights of a model are not on
this machine, it has random ones: the network works as long, and the truth of the room takes the
place of its answer, so that mapping has as much to do. Such a row says nothing about accuracy.

Seconds of the whole walk: prepare (images to the size of the network), encoder, blocks,
camera_head, depth_head, other (the rest of the network), answer (poses and depth back to the
images), mapping (all else that `ffrecon map` does), memory (keyframes written to the fast weights
once more; vgg-t3 alone).
"""

from __future__ import annotations

import argparse
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.attention_gpu import header, save, size_hw
from feedforward_recon.config.network import WindowConfig
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.console.threads import one_thread
from feedforward_recon.errors import CheckpointError, ReconError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.localization.scene_network import NetworkMemory
from feedforward_recon.mapping.sources.windows import WindowPoses
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.model.configs import build
from feedforward_recon.model.predictor import NetworkPredictor, load_predictor
from feedforward_recon.model.vggt import Vggt
from feedforward_recon.session.offline import Run, map_frames
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Frame, Prediction

MODELS = ('vggt', 'vgg-t3')
ROOM, FIELD_OF_VIEW_DEG = 5, 70.0
Row = dict[str, Any]


class Pieces:
    """Seconds that a network and its parts take, added up over all calls."""

    def __init__(self, network: Vggt) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self._device = next(network.parameters()).device
        for name, part in (('network', network), ('encoder', network.aggregator.patch_embed),
                           ('aggregator', network.aggregator),
                           ('camera_head', network.camera_head),
                           ('depth_head', network.depth_head)):
            self._watch(name, part)

    def now(self) -> float:
        """The clock, once the device has done all that it was given."""
        if self._device.type == 'cuda':
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def named(self, whole: float) -> Row:
        """What is documented on top, of a run that took so long."""
        found = self.seconds
        parts = {name: found[name] for name in ('prepare', 'encoder', 'camera_head', 'depth_head',
                                                'answer')}
        parts['blocks'] = found['aggregator'] - found['encoder']
        parts['other'] = (found['network'] - found['aggregator'] - found['camera_head']
                          - found['depth_head'])
        return {**parts, 'mapping': whole - sum(parts.values()), 'seconds': whole}

    def _watch(self, name: str, part: nn.Module) -> None:
        def begin(*_: Any) -> None:
            self.began[name] = self.now()

        def end(*_: Any) -> None:
            self.ended[name] = self.now()
            self.seconds[name] += self.ended[name] - self.began[name]
        part.register_forward_pre_hook(begin)
        part.register_forward_hook(end)


class WatchedPredictor:
    """A network with a clock.

    truth: None, or frames with pose, depth and camera by `fingerprint` of their images: they take
    the place of what the network says.
    """

    def __init__(self, predictor: NetworkPredictor, truth: dict[int, Frame] | None) -> None:
        if not isinstance(predictor.network, Vggt):
            raise CheckpointError('expected a network of the kind of vggt, found '
                                  f'{type(predictor.network).__name__}; choose vggt or vgg-t3')
        self.predictor, self._truth = predictor, truth
        self.pieces, self.windows = Pieces(predictor.network), 0

    def predict(self, images: Sequence[np.ndarray], memory: Any = None, *, write: bool = True,
                keep: bool = True, K: np.ndarray | None = None) -> tuple[Prediction, Any]:
        """As `NetworkPredictor.predict`."""
        self.windows += 1
        began = self.pieces.now()
        try:
            said = self.predictor.predict(images, memory, write=write, keep=keep, K=K)
        except CheckpointError:  # random weights may say no camera at all
            if self._truth is None:
                raise
        ended, pieces = self.pieces.now(), self.pieces
        pieces.seconds['prepare'] += pieces.began['network'] - began
        pieces.seconds['answer'] += ended - pieces.ended['network']
        if self._truth is None:
            return said
        return true_answer([self._truth[fingerprint(image)] for image in images]), memory


def fingerprint(image: np.ndarray) -> int:
    """Of the pixels of an image."""
    return zlib.crc32(np.ascontiguousarray(image))


def true_answer(frames: Sequence[Frame]) -> Prediction:
    """What a network without errors says of frames with pose, depth and camera."""
    T = np.stack([frame.T_map_cam for frame in frames if frame.T_map_cam is not None])
    K = np.stack([frame.camera.K for frame in frames if frame.camera is not None])
    depth = np.stack([frame.depth for frame in frames if frame.depth is not None])
    return Prediction(inverse(T[0]) @ T, K, depth.astype(np.float32),
                      np.full(depth.shape, 2, np.float32))


def predictor_of(model: str, device: str) -> tuple[NetworkPredictor, bool]:
    """The network of a name, and whether its weights are those of a file."""
    try:
        return load_predictor(model, device=device), True
    except CheckpointError:
        torch.manual_seed(0)
        return NetworkPredictor(build(model, device=device), device), False


def rendered_walk(images: int, size_wh: tuple[int, int]) -> list[Frame]:
    """Frames of a walk through a room, with exact poses and depth."""
    room, camera = Room.generate(ROOM), Camera.from_fov(FIELD_OF_VIEW_DEG, size_wh)
    return list(render_walk(room, camera, room.walk(images, seed=1)))


def pieces_of(model: str, device: str, frames: Sequence[Frame], windows: WindowConfig) -> Row:
    """Seconds of each piece of mapping the images of the frames."""
    predictor, has_weights = predictor_of(model, device)
    images = [Frame(frame.stamp_ns, frame.image, camera=frame.camera) for frame in frames]
    truth = {fingerprint(frame.image): frame for frame in frames}
    # Libraries load and choose their kernels in a call that does not count.
    with suppress(CheckpointError):
        predictor.predict([frame.image for frame in frames[:windows.size]])
    watched = WatchedPredictor(predictor, None if has_weights else truth)
    config = MapperConfig()
    encoder = CompactEncoder.load(config=config.encoder)
    began = watched.pieces.now()
    with one_thread():
        run = map_frames(images, config, encoder, source=lambda _: WindowPoses(
            config, watched, encoder, windows=windows))
    parts = watched.pieces.named(watched.pieces.now() - began)
    return {'weights': 'of a file' if has_weights else 'random', 'images': len(frames),
            'tracked': len(run.scene.trajectory), 'windows': watched.windows, **parts,
            'memory': _memory_seconds(NetworkMemory(predictor, model), run, images)}


def _memory_seconds(memory: NetworkMemory, run: Run, frames: Sequence[Frame]) -> float | None:
    if memory.unsupported:
        return None
    began = time.perf_counter()
    with suppress(CheckpointError):  # it is written: what is missing is the file to name in a map
        memory.write(run.scene, frames, run.memory.points)
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write one row for each model."""
    options = _parser().parse_args(arguments)
    height, width = options.size
    frames, rows, failed = rendered_walk(options.images, (width, height)), dict[str, Row](), 0
    for model in options.model:
        try:
            row = pieces_of(model, options.device, frames, WindowConfig(options.window))
        except (ReconError, MemoryError) as error:
            row, failed = {'failed': str(error)}, 1
        rows[f'{model} {width}x{height} | {options.images} images'] = row
        print(model, {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()},
              flush=True)
        if options.out:
            save(options.out, header(options), rows)
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--model', nargs='+', default=list(MODELS), help='of the kind of vggt')
    add('--device', default='cuda')
    add('--images', type=int, default=64, help='of the walk')
    add('--window', type=int, default=32, help='images predicted together')
    add('--size', type=size_hw, default=(480, 640), metavar='WIDTHxHEIGHT')
    add('--out', type=Path, help='JSON file to write')
    add('--commit', default='', help='where there is no git')
    return parser


if __name__ == '__main__':
    sys.exit(main())
