"""Peak memory of a window of VGGT-1B on a CPU, with and without what it would remember.

Windows of mapping ask for cameras and depth alone; the keys and values of all their tokens in
every global block are of no use to them. Random images of 518x392 pixels are shown to the
predictor as mapping does. Weights are random, and all blocks of a kind share those of one: so the
figures are of the window alone, and machines with less than the 5 GB of all weights can measure
them. Every point runs in a process of its own; 4 views take a minute of CPU, 32 a quarter of
an hour.

    python -m benchmarks.window_memory                     all points -> results
    python -m benchmarks.window_memory 8 --forget          one point, as JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from benchmarks.common import REPOSITORY, Clock, forget_peak, memory_bytes, write_result
from feedforward_recon.errors import CheckpointError
from feedforward_recon.model.configs import build
from feedforward_recon.model.predictor import NetworkPredictor
from feedforward_recon.model.vggt import Vggt

MODEL, VIEWS, SIZE_HW = 'vggt-1b', (4, 32), (392, 518)
FORGET = '--forget'
Row = dict[str, Any]


def measure(views: int, *, keep: bool, model: str = MODEL,
            size_hw: tuple[int, int] = SIZE_HW) -> Row:
    """Peak memory beyond the network, and seconds, of one window."""
    predictor = NetworkPredictor(network_of_few_weights(model))
    images = np.random.default_rng(0).integers(0, 256, (views, *size_hw, 3), np.uint8)
    before = forget_peak()
    clock = Clock()
    with suppress(CheckpointError):  # random weights may say no camera at all
        predictor.predict(list(images), keep=keep)
    clock.stop()
    return {'views': views, 'peak_mb': (memory_bytes('VmHWM') - before) / 1e6,
            'seconds': clock.seconds, 'cpu_seconds': clock.cpu_seconds,
            'precision': str(predictor.half or torch.float32).removeprefix('torch.')}


def network_of_few_weights(model: str) -> Vggt:
    """A network of that size whose blocks of a kind are one and the same."""
    network = cast(Vggt, build(model, device='meta'))
    backbone = network.aggregator
    for blocks in (backbone.patch_embed.blocks, backbone.frame_blocks, backbone.global_blocks):
        for index in range(len(blocks)):
            blocks[index] = blocks[0]
    network.to_empty(device='cpu')
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    return network


def in_own_process(views: int, *, keep: bool) -> Row:
    """`measure` in a new interpreter."""
    command = [sys.executable, '-m', 'benchmarks.window_memory', str(views)]
    result = subprocess.run(command + [FORGET] * (not keep), cwd=REPOSITORY, check=True,
                            stdout=subprocess.PIPE, text=True,
                            env={**os.environ, 'PYTHONPATH': str(REPOSITORY)})
    return json.loads(result.stdout)


def run() -> Iterator[tuple[str, Row]]:
    """Each number of views both ways."""
    for views in VIEWS:
        for keep in (True, False):
            yield (f'{views} views | {"remembered" if keep else "forgotten"}',
                   in_own_process(views, keep=keep))


if __name__ == '__main__':
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]), keep=FORGET not in sys.argv)))
    else:
        write_result('window_memory', dict(run()))
