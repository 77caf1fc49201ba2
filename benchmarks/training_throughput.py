"""How fast `ffrecon-train transformer` takes its steps: GFLOP/s of each core, views per second.

    python -m benchmarks.training_throughput                        # on rendered rooms and photos
    python -m benchmarks.training_throughput --photos posed/ --rooms views/ --threads 2
    python -m benchmarks.training_throughput --device cuda --out throughput.json
    python -m benchmarks.training_throughput --profile                    # where the time goes

A step is what training does with a batch: views as cameras take them, forward and backward pass
in bfloat16, both optimisers, the moving average. Operations are those of matrix products and
convolutions, a multiplication and an addition as two, as torch counts them. The batches are those
of the first steps of a training: windows of 2, 4 and 8 views in turn as they are drawn; drawing
them is not part of a step (it happens beside the one before), its seconds are given as draw_s.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.attention_gpu import header, save
from benchmarks.rendered_photos import write_scenes
from feedforward_recon.console.heap import keep_freed_memory
from feedforward_recon.training.transformer import TransformerTrainer, TransformerTraining
from feedforward_recon.training.windows import Windows

SCENES = 2  # rendered where no photos are given
Row = dict[str, Any]


def trainer_of(options: argparse.Namespace, folder: Path) -> TransformerTrainer:
    """A training that has not begun; what it writes goes to the folder."""
    photos, rooms = options.photos, options.rooms
    if photos is None:
        photos, rooms = folder / 'photos', folder / 'rooms'
        write_scenes(folder, SCENES)
    return TransformerTrainer(TransformerTraining(
        str(photos), str(folder / 'run'), rooms=str(rooms or ''), device=options.device,
        views_per_step=options.views_per_step, learning_rate=1e-5))


def batches_of(trainer: TransformerTrainer, count: int) -> Iterator[tuple[Windows, float]]:
    """The batches of the first steps, and the seconds that drawing each took."""
    for step in range(count):
        began = time.perf_counter()
        yield (trainer.stream.batch((step, 0, 0), trainer.settings.views_per_step),
               time.perf_counter() - began)


def measured(trainer: TransformerTrainer, windows: Windows, repeats: int) -> Row:
    """Operations of a step, and its seconds: medians over repeats."""
    with FlopCounterMode(display=False) as counted:
        trainer.learn([windows])
    runs = [_seconds(trainer, windows) for _ in range(repeats)]
    return {'images': windows.images.shape[0] * windows.images.shape[1],
            'gflop': counted.get_total_flops() / 1e9,
            'seconds': median(run[0] for run in runs),
            'cpu_seconds': median(run[1] for run in runs)}


def _seconds(trainer: TransformerTrainer, windows: Windows) -> tuple[float, float]:
    """Of the clock and of this process."""
    began = time.perf_counter(), time.process_time()
    trainer.learn([windows])
    if trainer.device.type == 'cuda':
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - began[0], time.process_time() - began[1]


def together(rows: Sequence[Row], cores: int) -> Row:
    """Rates over some batches."""
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    return {'batches': len(rows), 'gflop': total['gflop'] / len(rows),
            'seconds': total['seconds'] / len(rows), 'draw_s': total['draw_s'] / len(rows),
            'views_per_s': total['images'] / total['seconds'],
            'gflops_per_core': total['gflop'] / total['seconds'] / cores,
            'gflops_per_cpu_second': total['gflop'] / total['cpu_seconds']}


def run(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """A row for each number of views in a window, and one of all batches."""
    cores = torch.get_num_threads() if options.device == 'cpu' else 1
    rows: dict[int, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(options, Path(folder))
        for windows, draw_s in batches_of(trainer, options.batches):
            row = {**measured(trainer, windows, options.repeats), 'draw_s': draw_s}
            rows.setdefault(windows.images.shape[1], []).append(row)
    for views in sorted(rows):
        yield f'windows of {views}', together(rows[views], cores)
    yield 'all', together([row for some in rows.values() for row in some], cores)


def profiled(options: argparse.Namespace) -> str:
    """The operations of some steps that take most of the time."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(options, Path(folder))
        batches = [windows for windows, _ in batches_of(trainer, options.batches)]
        trainer.learn(batches[:1])
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for windows in batches:
                trainer.learn([windows])
    return found.key_averages().table(sort_by='self_cpu_time_total', row_limit=40)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the rates; write them where that is asked for."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if options.profile:
        print(profiled(options))
        return 0
    rows = {}
    for name, row in run(options):
        rows[name] = row
        print(f'{name:14}', ', '.join(f'{key} {value:.4g}' for key, value in row.items()))
    if options.out:
        save(options.out, header(options) | {'threads': options.threads}, rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--photos', type=Path, help='posed photos with tracks; default: rendered ones')
    add('--rooms', type=Path, help='folder of `ffrecon-train views`')
    add('--device', default='cpu')
    add('--threads', type=int, default=1, help='of the CPU')
    add('--batches', type=int, default=8)
    add('--repeats', type=int, default=3, help='timed steps of each batch')
    add('--views-per-step', type=int, default=32)
    add('--out', type=Path, help='JSON file to write')
    add('--commit', default='', help='where there is no git')
    add('--profile', action='store_true', help='print where the time goes instead')
    return parser


if __name__ == '__main__':
    sys.exit(main())
