"""The global attentions at the size of VGGT-1B on a GPU: time, memory, speed-up over softmax.

Random weights and images (time does not depend on them), bfloat16 autocast with heads in
float32, as the published networks run. One call maps all views of a scene: encoder, frame and
global blocks, camera head, depth and points of every view. The scene's memory is not kept, for
any attention. Results are written after each point, and a later call goes on where one
stopped: points that are there already are not measured again. The exit code is 3 where
`--limit-s` left points for it. A point that does not fit into memory is written as such, and no
larger one is tried.

    python -m benchmarks.attention_gpu --variants ttt sparse --views 50 100 200
    python -m benchmarks.attention_gpu --table              only the table of what is there
    python -m benchmarks.attention_gpu --update             share of the peak of a ttt update
    torchrun --nproc-per-node 1 -m benchmarks.attention_gpu --check-processes
    python -m benchmarks.attention_gpu --device cpu --model vggt-tiny --views 4 8 --size 56x42
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import REPOSITORY, RESULTS
from benchmarks.ttt_update import update_row
from feedforward_recon.model.attention.config import TttOptions
from feedforward_recon.model.attention.registry import ATTENTION
from feedforward_recon.model.backbone import Demand
from feedforward_recon.model.configs import build
from feedforward_recon.model.predictor import is_out_of_memory
from feedforward_recon.model.vggt import Vggt

NAME = 'attention_gpu.json'
VIEWS = (50, 100, 200, 400, 700, 1000, 1500)
VARIANTS = ('ttt', 'sparse', 'sparse_linear', 'latent', 'hybrid', 'softmax')
REPEATED_BELOW_S, REPEATS = 20.0, 3
WARM_UP_VIEWS = 8
LEFT = 3  # exit code
KERNELS = {'flash': SDPBackend.FLASH_ATTENTION, 'cudnn': SDPBackend.CUDNN_ATTENTION}
Row = dict[str, Any]


class Phases:
    """Seconds that the parts of a network take: encoder, blocks, heads."""

    def __init__(self, network: Vggt) -> None:
        self._device = next(network.parameters()).device
        self._marks: list[float] = []
        backbone = network.aggregator
        self._handles = [backbone.patch_embed.register_forward_hook(self._mark),
                         backbone.register_forward_hook(self._mark)]

    def timed(self, call: Callable[[], Any]) -> Row:
        """Seconds of one call and of its parts."""
        self._marks = []
        self._mark()
        call()
        self._mark()
        start, encoded, joined, end = self._marks
        return {'seconds': end - start, 'encoder_s': encoded - start,
                'blocks_s': joined - encoded, 'heads_s': end - joined}

    def close(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()

    def _mark(self, *_: Any) -> None:
        if self._device.type == 'cuda':
            torch.cuda.synchronize(self._device)
        self._marks.append(time.perf_counter())


def measure(network: Vggt, views: int, options: argparse.Namespace) -> Row:
    """Time and peak memory of mapping ``views`` random images."""
    device = torch.device(options.device)
    place = 'cpu' if options.offload else device
    images = torch.rand(1, views, 3, *options.size, device=place,
                        generator=torch.Generator(place).manual_seed(views))
    demand = Demand(memory=False, offload=options.offload)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    phases, runs = Phases(network), list[Row]()
    try:
        with (torch.inference_mode(), _preferring(options.sdpa),
              torch.autocast(device.type, torch.bfloat16, enabled=not options.exact)):
            while len(runs) < REPEATS:
                runs.append(phases.timed(lambda: network(images, demand=demand)))
                if runs[0]['seconds'] > REPEATED_BELOW_S:
                    break
    finally:
        phases.close()
    row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == 'cuda' else None
    return {'views': views, **row, 'ms_per_view': 1e3 * row['seconds'] / views,
            'peak_gb': peak, 'runs': len(runs)}


def _preferring(kernel: str) -> AbstractContextManager[None]:
    """Exact attention by that kernel wherever it can: it knows no float32, which heads use."""
    if kernel not in KERNELS:
        return nullcontext()
    others = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    return sdpa_kernel([KERNELS[kernel], *others], set_priority=True)


def points(variant: str, options: argparse.Namespace, known: dict[str, Row],
           deadline: float) -> Iterator[tuple[str, Row]]:
    """The points of one variant that are not known yet, from few views to many."""
    wanted = [n for n in sorted(options.views) if key_of(variant, n, options) not in known]
    if not wanted:
        return
    network = network_of(variant, options)
    with torch.inference_mode():
        warm_up(network, options)
    last: Row | None = None
    for views in wanted:
        if last and time.monotonic() + _predicted(last, views) > deadline:
            print(f'{variant}: {views} views are left for another call', flush=True)
            options.left = True
            return
        try:
            last = measure(network, views, options)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            last = None
        if last is None:  # outside the handler, whose traceback holds the tensors
            yield key_of(variant, views, options), {'views': views, 'out_of_memory': True}
            return
        yield key_of(variant, views, options), last


def network_of(variant: str, options: argparse.Namespace) -> Vggt:
    """A network with random weights and that attention."""
    torch.manual_seed(0)
    steps = {'ttt': TttOptions(steps=options.ttt_steps)} if variant == 'ttt' else {}
    network = build(options.model, variant, device=options.device, **steps)
    assert isinstance(network, Vggt), 'a network of the VGGT kind'
    return network


def warm_up(network: Vggt, options: argparse.Namespace) -> None:
    """Let libraries load and choose their kernels."""
    images = torch.rand(1, WARM_UP_VIEWS, 3, *options.size, device=options.device)
    with torch.autocast(torch.device(options.device).type, torch.bfloat16):
        network(images, demand=Demand(memory=False))


def key_of(variant: str, views: int, options: argparse.Namespace) -> str:
    """What a point is called: everything that its time depends on."""
    notes = [f'{options.ttt_steps} steps'] if variant == 'ttt' and options.ttt_steps > 1 else []
    notes += [name for name in ('offload', 'exact') if getattr(options, name)]
    notes += [options.sdpa] if variant == 'softmax' and options.sdpa != 'default' else []
    height, width = options.size
    label = ', '.join([variant, *notes])
    return f'{options.model} {width}x{height} | {views} views | {label}'


def _predicted(last: Row, views: int) -> float:
    """Most seconds that the next point of a variant should take: the growth of softmax."""
    runs = REPEATS if last['seconds'] < REPEATED_BELOW_S else 1
    return 1.1 * runs * last['seconds'] * (views / last['views']) ** 2


# -- results -------------------------------------------------------------------------------


def header(options: argparse.Namespace) -> Row:
    """The machine, the versions and the commit."""
    found: Row = {'device': platform.processor() or platform.machine(),
                  'torch': torch.__version__, 'python': platform.python_version(),
                  'commit': options.commit or _output('git', 'rev-parse', '--short', 'HEAD'),
                  'date': time.strftime('%Y-%m-%d', time.gmtime())}
    if torch.device(options.device).type == 'cuda':
        query = 'nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'
        found |= {'device': torch.cuda.get_device_name(options.device),
                  'cuda': torch.version.cuda, 'driver': _output(*query)}
    return found


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True,
                                check=False)
    except OSError:
        return ''
    return result.stdout.strip()


def load(paths: list[Path]) -> dict[str, Row]:
    """All rows of the result files that exist."""
    rows: dict[str, Row] = {}
    for path in paths:
        if path.is_file():
            rows |= json.loads(path.read_text(encoding='utf-8'))['rows']
    return rows


def save(path: Path, provenance: Row, rows: dict[str, Row]) -> None:
    """Replace the file at once: it is whole whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix('.partial')
    content = {'provenance': provenance, 'rows': rows}
    partial.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    partial.replace(path)


def table(rows: dict[str, Row]) -> Iterator[str]:
    """One line per point: times, memory, and speed-up over softmax with as many views."""
    yield (f'{"point":<46} {"s":>8} {"encoder":>8} {"blocks":>8} {"heads":>8} {"ms/view":>8} '
           f'{"peak GB":>8} {"faster":>7}')
    for key, row in rows.items():
        if row.get('out_of_memory'):
            yield f'{key:<46} out of memory'
        elif 'seconds' in row:
            exact = rows.get(f'{key.rsplit(" | ", 1)[0]} | softmax', {}).get('seconds')
            faster = f'{exact / row["seconds"]:.1f}x' if exact else '-'
            parts = ' '.join(f'{row[name]:8.2f}' for name in
                             ('seconds', 'encoder_s', 'blocks_s', 'heads_s', 'ms_per_view'))
            peak = '-' if row['peak_gb'] is None else f'{row["peak_gb"]:.1f}'
            yield f'{key:<46} {parts} {peak:>8} {faster:>7}'
        else:
            yield f'{key:<46} ' + ', '.join(f'{name} {value}' for name, value in row.items())


# -- several processes ---------------------------------------------------------------------


def check_processes(options: argparse.Namespace) -> bool:
    """Under torchrun: frames on all processes give what one process gives."""
    import torch.distributed as dist

    from feedforward_recon.model.distributed import gather_frames, own_frames, predict_distributed
    on_gpu = torch.device(options.device).type == 'cuda'
    if on_gpu:
        options.device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(options.device)
    dist.init_process_group('nccl' if on_gpu else 'gloo')
    try:
        network = network_of(options.variants[0], options)
        images = torch.rand(1, min(options.views), 3, *options.size,
                            generator=torch.Generator().manual_seed(0)).to(options.device)
        with torch.inference_mode():
            alone, _ = network(images)
            shared, _ = predict_distributed(network, own_frames(images))
            worst = max(
                float((gather_frames(found, dim) - expected).abs().max() / expected.abs().max())
                for found, expected, dim in ((shared.depth, alone.depth, 1),
                                             (shared.T_cam_world, alone.T_cam_world, 1)))
        good = worst <= 1e-5
        if dist.get_rank() == 0:
            print(f'{dist.get_world_size()} processes, {dist.get_backend()}, '
                  f'{options.variants[0]}: largest relative difference {worst:.1e}, '
                  f'{"as it should be" if good else "TOO LARGE"}')
        return good
    finally:
        dist.destroy_process_group()


# -- command -------------------------------------------------------------------------------


def size_hw(text: str) -> tuple[int, int]:
    """Height and width of WIDTHxHEIGHT."""
    width, height = map(int, text.split('x'))
    return height, width


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--device', default='cuda')
    add('--model', default='vggt-1b')
    add('--variants', nargs='+', default=list(VARIANTS), choices=list(ATTENTION))
    add('--views', nargs='+', type=int, default=list(VIEWS))
    add('--size', type=size_hw, default=(392, 518), metavar='WIDTHxHEIGHT')
    add('--ttt-steps', type=int, default=1)
    add('--sdpa', default='default', choices=['default', *KERNELS],
        help='kernel of every exact attention; default: what torch chooses')
    add('--offload', action='store_true', help='tokens and maps wait in main memory')
    add('--exact', action='store_true', help='float32 instead of bfloat16')
    add('--limit-s', type=float, default=float('inf'),
        help='start no point that may end later than this')
    add('--out', type=Path, default=Path(os.environ.get('OUT', RESULTS)) / NAME)
    add('--commit', default='', help='where there is no git')
    add('--update', action='store_true', help='only the update of a ttt layer')
    add('--compile', action='store_true', help='with --update: its gradients compiled, too')
    add('--check-processes', action='store_true', help='under torchrun')
    add('--table', action='store_true', help='measure nothing')
    return parser.parse_args(arguments, argparse.Namespace(left=False))


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, print all of it."""
    deadline = time.monotonic()
    options = parsed(arguments)
    deadline += options.limit_s
    if options.check_processes:
        return 0 if check_processes(options) else 1
    rows = load([RESULTS / NAME, options.out])
    if not options.table:
        provenance = header(options)
        print(', '.join(f'{name} {value}' for name, value in provenance.items()), flush=True)
        for key, row in _measured(options, rows, deadline):
            rows[key] = row
            save(options.out, provenance, rows)
            print(key, {name: value for name, value in row.items() if value is not None},
                  flush=True)
    print('\n'.join(table(rows)))
    return LEFT if options.left else 0


def _measured(options: argparse.Namespace, rows: dict[str, Row],
              deadline: float) -> Iterator[tuple[str, Row]]:
    if options.update:
        network = network_of('ttt', options)
        for views in sorted(options.views):
            for compiled in {False, options.compile}:
                label = 'ttt update' + ', compiled' * compiled
                key = key_of('ttt', views, options).replace('| ttt', f'| {label}')
                yield key, update_row(network, views, options.size, compiled)
        return
    for variant in options.variants:
        yield from points(variant, options, rows, deadline)
        if torch.device(options.device).type == 'cuda':
            torch.cuda.empty_cache()


if __name__ == '__main__':
    sys.exit(main())
