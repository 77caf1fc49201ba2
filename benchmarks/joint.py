"""One pass over up to a thousand images, and the map that is made of it: seconds and memory.

The first images of the kitchen, from the folder to a saved map, as `ffrecon reconstruct --joint`
does it. The kitchen has 500 images: of more, the others are the same images cut to nine tenths of
each side at places of their own, as of a second walk of a camera that sees less. Every row is a
process of its own, so that its peak memory is its own.

    python -m benchmarks.run_all joint          all rows -> results
    python -m benchmarks.joint 64               one row, as JSON
    python -m benchmarks.joint 64 --model tiny --attention ttt --weights FILE
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import KITCHEN, REPOSITORY, Clock, data_root, precise_poses
from benchmarks.scoring import trajectory_error
from feedforward_recon.config.photos import PhotoConfig, ReconstructionConfig
from feedforward_recon.console.threads import one_thread
from feedforward_recon.io import SourceOptions, open_source
from feedforward_recon.model.predictor import load_predictor
from feedforward_recon.session.photos import reconstruct_frames
from feedforward_recon.types import Frame

COUNTS = 64, 128, 256, 512, 1000
MODEL = 'tiny-ttt'
KEPT = 0.9  # of each side of an image of the second walk
JOINT = PhotoConfig(reconstruction=ReconstructionConfig(decoder='joint'))
Row = dict[str, Any]


class Walks:
    """So many images of the kitchen, read one by one; beyond its end cut ones (see above)."""

    def __init__(self, count: int) -> None:
        folder = data_root() / KITCHEN
        self._source = open_source(folder, SourceOptions(use_depth=False, use_stereo=False))
        self._truth, self._count = precise_poses(folder), count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Frame]:
        walk = len(self._source)
        for start in range(0, self._count, walk):
            rng = np.random.default_rng(start)
            for number, frame in zip(range(start, min(self._count, start + walk)), self._source,
                                     strict=False):
                posed = replace(frame, stamp_ns=number,
                                T_map_cam=self._truth.get(Path(frame.source).name))
                yield cut(posed, rng) if start else posed


def cut(frame: Frame, rng: np.random.Generator) -> Frame:
    """The frame without its rim, which is not as broad on all sides."""
    assert frame.camera is not None
    height, width = (int(KEPT * side) for side in frame.image.shape[:2])
    top, left = (int(rng.integers(side - kept + 1)) for side, kept in
                 zip(frame.image.shape[:2], (height, width), strict=True))
    camera = replace(frame.camera, width=width, height=height, cx=frame.camera.cx - left,
                     cy=frame.camera.cy - top)
    image = np.ascontiguousarray(frame.image[top:top + height, left:left + width])
    return replace(frame, image=image, camera=camera)


def measure(count: int, model: str = MODEL, attention: str | None = None,
            weights: str | None = None) -> Row:
    """One row: seconds by part, CPU time and peak memory of this process, errors of the map."""
    frames, predictor = Walks(count), load_predictor(model, attention, weights=weights)
    clock = Clock()
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        run = reconstruct_frames(frames, JOINT, predictor=predictor, total=count)[0]
        saving = Clock()
        run.save(Path(folder) / 'map')
        saving.stop()
    clock.stop()
    return {'images': count, 'registered': len(run.scene.trajectory), 'model': model,
            'error': trajectory_error(run.scene.trajectory, run.truth, 'sim3'),
            'seconds': clock.seconds, 'cpu_seconds': clock.cpu_seconds,
            'parts': {**run.seconds, 'saving': saving.seconds},
            'peak_mb': 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def in_own_process(count: int, options: Sequence[str] = ()) -> Row:
    """``measure`` in a new interpreter."""
    command = [sys.executable, '-m', 'benchmarks.joint', str(count), *options]
    result = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
                            check=True, env={**os.environ, 'PYTHONPATH': str(REPOSITORY)})
    return json.loads(result.stdout)


def exponent(rows: Sequence[Row], key: str) -> float:
    """Slope p of the best fit time = c * images^p (least squares of the logarithms)."""
    images, seconds = (np.log([row[k] for row in rows]) for k in ('images', key))
    return float(np.polyfit(images, seconds, 1)[0])


def run() -> Iterator[tuple[str, Row]]:
    """All rows, and how time grows over them."""
    rows = []
    for count in COUNTS:
        rows.append(in_own_process(count))
        yield f'{count} images | {MODEL}', rows[-1]
    yield f'growth | {MODEL}', {'exponent': exponent(rows, 'seconds'),
                                'cpu_exponent': exponent(rows, 'cpu_seconds'),
                                'peak_mb': max(row['peak_mb'] for row in rows)}


def main() -> None:
    """One row as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('count', type=int)
    parser.add_argument('--model', default=MODEL)
    parser.add_argument('--attention')
    parser.add_argument('--weights')
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == '__main__':
    main()
