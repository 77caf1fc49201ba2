"""Students of `tiny` beside their teacher: what their attentions cost, and what they lose.

    python -m benchmarks.run_all students                         # all that ships: the result
    python -m benchmarks.students accuracy NAME VIEWS [WEIGHTS]   # one row, as JSON
    python -m benchmarks.students cost NAME VIEWS [WEIGHTS]

Accuracy: windows of shuffled photos of the sets of benchmarks/pose_accuracy.py, of 8 images and of
ten times as many, on which nothing was trained. auc30: poses as users get them, from matches of
the network's descriptors; auc30_points: poses from its world points alone, which only know of the
other views through the joint attention; abs_rel: depth after one median scale, where it is known.
without: the teacher whose joint attentions say nothing, to see how much is due to them.
Cost: seconds and peak memory of one pass over that many images (``model.joint_pass``), in a
process of its own; softmax takes half an hour for 1024 images: `cost dense 1024` by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import (
    DRIVE,
    KITCHEN,
    REPOSITORY,
    Clock,
    forget_peak,
    load_frames,
    memory_bytes,
)
from benchmarks.pose_accuracy import (
    SETS,
    Answer,
    Errors,
    intrinsics,
    relative,
    resolved,
    windows_of,
)
from feedforward_recon.console.threads import one_thread
from feedforward_recon.model.attention.config import TttOptions
from feedforward_recon.model.backbone import Demand
from feedforward_recon.model.configs import load
from feedforward_recon.model.fp8 import network_bytes
from feedforward_recon.model.joint_pass import ViewInputs, joint_cells
from feedforward_recon.model.layers import GlobalBlock
from feedforward_recon.model.predictor import NetworkPredictor, preparation
from feedforward_recon.model.preprocess import stacked
from feedforward_recon.model.ray_cameras import geometry_of
from feedforward_recon.model.ray_transformer import RayTransformer
from feedforward_recon.model.seconds import Seconds
from feedforward_recon.types import Frame

WITHOUT, BFLOAT16 = 'without', 'sla, bfloat16'
# Of each system its network, and what is asked of it.
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    'dense': ('tiny', {}),
    WITHOUT: ('tiny', {}),
    'ttt': ('tiny-ttt', {}),
    'ttt, 2 steps': ('tiny-ttt', {'ttt': TttOptions(steps=2)}),
    'sparse': ('tiny-sparse', {}),
    'sla': ('tiny-sla', {}),
    BFLOAT16: ('tiny-sla', {}),
    'sla, fp8': ('tiny-sla', {'precision': 'fp8'}),
    'sla, fp8, trained': ('tiny-sla', {'precision': 'fp8'}),
    'hybrid': ('tiny-hybrid', {})}
UNSHIPPED = {'hybrid', 'sla, fp8, trained'}  # have weights of their own, which are given
VIEWS, WINDOWS = 8, 4
FEW, MANY = 24, 80  # views: three and ten times as many as in training
LARGE_SETS = {FEW: (KITCHEN, 'ngp_fox', DRIVE), MANY: (KITCHEN,)}  # that have so many images
PASSES, MOST_OF_SOFTMAX = (8, 64, 256, 1024), 256
COSTLY = ('ttt', 'sparse', 'sla', 'sla, fp8')
CHUNK = 5  # views
Row = dict[str, Any]


def opened(system: str, weights: str = '') -> NetworkPredictor:
    """The network of a system, with weights that ship or others."""
    name, options = SYSTEMS[system]
    predictor = NetworkPredictor(load(name, weights or None, **options))
    if system == WITHOUT:
        silence(predictor.network)
    predictor.half = torch.bfloat16 if system == BFLOAT16 else None
    return predictor


@torch.no_grad()
def silence(network: nn.Module) -> None:
    """Joint attentions answer 0: views know of themselves alone."""
    for block in network.modules():
        if isinstance(block, GlobalBlock):
            for parameter in block.attn.proj.parameters():
                parameter.zero_()


def accuracy(system: str, views: int, weights: str = '') -> Row:
    """A row per set, and means over the sets that have a figure."""
    predictor, rows = opened(system, weights), {}
    for name in LARGE_SETS.get(views, SETS):
        windows = windows_of(resolved(name), 1 if views == FEW else WINDOWS, views)
        rows[name] = set_row(predictor, windows)
    return {**_means(list(rows.values())), 'sets': rows}


def set_row(predictor: NetworkPredictor, windows: Sequence[list[Frame]]) -> Row:
    """Figures over the windows of one set."""
    matched, points = Errors(), Errors()
    for frames in windows:
        said = predictor.predict([frame.image for frame in frames], K=intrinsics(frames))[0]
        matched.add(frames, Answer(relative(said.T_world_cam), said.depth))
        points.add(frames, Answer(relative(from_points(predictor, frames))))
    row = matched.row()
    return {'auc30': row['auc30'], 'auc30_points': points.row()['auc30'],
            'abs_rel': row['abs_rel']}


@torch.inference_mode()
def from_points(predictor: NetworkPredictor, frames: Sequence[Frame]) -> np.ndarray:
    """Poses [N, 4, 4] from world points alone."""
    network = predictor.network
    assert isinstance(network, RayTransformer)
    placed = preparation(network)([frame.image for frame in frames])
    K = intrinsics(frames)
    assert K is not None
    own = torch.from_numpy(np.stack([image.prepared_K(K) for image in placed]))[None].float()
    with predictor.precision():
        cells, _ = network(stacked(placed), own, demand=Demand(memory=False))
    return geometry_of(cells, own, network, first=False).T_world_cam[0].double().numpy()


def _means(rows: Sequence[Row]) -> Row:
    known = {key: [row[key] for row in rows if row[key] is not None]
             for key in ('auc30', 'auc30_points', 'abs_rel')}
    return {key: float(np.mean(values)) if values else None for key, values in known.items()}


def cost(system: str, views: int, weights: str = '') -> Row:
    """Seconds and peak memory of one pass over images of the kitchen, each as often as needed."""
    network = opened(system, weights).network
    assert isinstance(network, RayTransformer)
    frames = load_frames(KITCHEN, use_depth=False)
    chosen = [frames[k % len(frames)] for k in range(views)]
    placed = preparation(network)([frame.image for frame in chosen])
    camera = chosen[0].camera
    assert camera is not None
    K = np.stack([image.prepared_K(camera.K) for image in placed])
    with torch.inference_mode():
        joint_cells(network, ViewInputs(placed[:2], K[:2]), CHUNK, Seconds())  # first-call costs
        before, clock = forget_peak(), Clock()
        joint_cells(network, ViewInputs(placed, K), CHUNK, Seconds())
        clock.stop()
    return {'views': views, 'seconds': clock.seconds, 'cpu_seconds': clock.cpu_seconds,
            'peak_mb': (memory_bytes('VmHWM') - before) / 1e6,
            'megabytes': network_bytes(network) / 1e6}


def in_own_process(what: str, system: str, views: int) -> Row:
    """A row from a new interpreter."""
    command = [sys.executable, '-m', 'benchmarks.students', what, system, str(views)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True,
                            env={**os.environ, 'PYTHONPATH': str(REPOSITORY)})
    return json.loads(result.stdout)


def run() -> Iterator[tuple[str, Row]]:
    """All rows."""
    shipped = [system for system in SYSTEMS if system not in UNSHIPPED]
    for views in (VIEWS, FEW, MANY):
        for system in shipped:
            yield f'{views} views | {system}', in_own_process('accuracy', system, views)
    for views in PASSES:
        for system in COSTLY if views > MOST_OF_SOFTMAX else ('dense', *COSTLY):
            yield f'pass over {views} views | {system}', in_own_process('cost', system, views)


def main(arguments: Sequence[str]) -> None:
    """One row as JSON."""
    what, system, views, *weights = arguments
    with one_thread():
        measure = {'accuracy': accuracy, 'cost': cost}[what]
        print(json.dumps(measure(system, int(views), *weights)))


if __name__ == '__main__':
    main(sys.argv[1:])
