"""How time and memory of each global attention grow with the number of views.

A backbone of 192 channels (6 blocks of the encoder, 6 frame blocks, 6 global blocks; the dense
heads, which are linear whatever the attention, are left out) maps 64 to 1024 random images of
one size in one call. Every point runs in a process of its own, so that its peak memory is its own.

    python -m benchmarks.attention_scaling              all points -> results, plot
    python -m benchmarks.attention_scaling ttt 256      one point, as JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import REPOSITORY, Clock, forget_peak, memory_bytes, write_result
from feedforward_recon.model.attention.registry import ATTENTION, attention_factory
from feedforward_recon.model.backbone import Aggregator
from feedforward_recon.model.configs import config_of

VIEWS = (64, 128, 256, 512, 1024)
SIZE_HW = (98, 126)  # 63 patches and 5 special tokens per view
PLOT = REPOSITORY / 'docs' / 'attention_scaling.png'
Row = dict[str, Any]


def measure(name: str, views: int) -> Row:
    """Seconds and peak memory of mapping ``views`` images with that attention."""
    torch.manual_seed(0)
    backbone = Aggregator(config_of('vggt-tiny').backbone, attention_factory(name)).eval()
    images = torch.rand(1, views, 3, *SIZE_HW)
    states = [block.attn.empty_state(1) for block in backbone.global_blocks]  # type: ignore
    with torch.inference_mode():
        backbone(images[:, :2], states, write=True, has_first=True)  # first-call costs
        before = forget_peak()
        clock = Clock()
        _, states = backbone(images, states, write=True, has_first=True)
        clock.stop()
    peak = memory_bytes('VmHWM') - before
    return {'views': views, 'seconds': clock.seconds, 'cpu_seconds': clock.cpu_seconds,
            'ms_per_view': 1e3 * clock.cpu_seconds / views, 'peak_mb': peak / 1e6,
            'state_mb': sum(state.nbytes for state in states) / 1e6}


def in_own_process(name: str, views: int) -> Row:
    """`measure` in a new interpreter."""
    command = [sys.executable, '-m', 'benchmarks.attention_scaling', name, str(views)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True,
                            env={**os.environ, 'PYTHONPATH': str(REPOSITORY)})
    return json.loads(result.stdout)


def exponent(rows: list[Row], key: str = 'cpu_seconds') -> float:
    """Slope p of the best fit time = c * views^p (least squares of the logarithms)."""
    views, seconds = (np.log([row[k] for row in rows]) for k in ('views', key))
    return float(np.polyfit(views, seconds, 1)[0])


def run() -> Iterator[tuple[str, Row]]:
    """All points, view count by view count, what they say about growth, and the plot."""
    points: dict[str, list[Row]] = {name: [] for name in ATTENTION}
    for views in VIEWS:
        for name, own in points.items():
            own.append(in_own_process(name, views))
            yield f'{views} views | {name}', own[-1]
    exact = points['softmax'][-1]['cpu_seconds']
    for name, own in points.items():
        yield f'growth | {name}', {'exponent': exponent(own),
                                   'last_exponent': exponent(own[-2:]),
                                   'speed_up': exact / own[-1]['cpu_seconds']}
    plot(points)


def plot(points: dict[str, list[Row]], path: Path = PLOT) -> None:
    """Time per view and peak memory over the number of views."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
    for axis, key, label, ticks in (
            (axes[0], 'ms_per_view', 'CPU ms per view', (10, 20, 50, 100, 200)),
            (axes[1], 'peak_mb', 'peak memory beyond the model, MB', (30, 100, 300, 1000))):
        for name, own in points.items():
            axis.plot(VIEWS, [row[key] for row in own], 'o-', label=name)
        axis.set(xscale='log', yscale='log', xlabel='views', ylabel=label, xticks=VIEWS,
                 xticklabels=VIEWS, yticks=ticks, yticklabels=ticks)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        write_result('attention_scaling', dict(run()))
