"""``ffrecon reconstruct``: makes a map folder of photos in any order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from feedforward_recon.cli.mapping import summarise, summary_rows
from feedforward_recon.config.photos import PhotoConfig
from feedforward_recon.console.options import (
    Config,
    Json,
    NetworkOptions,
    NewMap,
    Overwrite,
    Set,
    Source,
    Weights,
    check_out,
    settings,
    takes_network,
    takes_source_options,
)
from feedforward_recon.console.terminal import note, print_json, print_table, progress_bar
from feedforward_recon.console.threads import one_thread
from feedforward_recon.errors import ConfigError, InputError
from feedforward_recon.io import SourceOptions, open_source
from feedforward_recon.io.source import Source as FrameSource
from feedforward_recon.session.offline import Run

if TYPE_CHECKING:
    from feedforward_recon.model.predictor import NetworkPredictor
    from feedforward_recon.reconstruction.comparisons import Mapped

Workers = Annotated[int, typer.Option('--workers', min=0, help='Processes of this machine that '
                                      'encode and compare images; 0: threads of this one.')]
ClusterAddress = Annotated[str, typer.Option(
    '--cluster', metavar='ADDRESS', show_default=False, help='Do that on a Ray cluster instead: '
    'host:port, or auto for the one that this machine belongs to.')]

_Engine: TypeAlias = 'AbstractContextManager[Mapped]'
Joint = Annotated[bool, typer.Option('--joint', help='The network sees all images in one pass '
                                     '(with --model; also under torchrun).')]


@takes_network
@takes_source_options
def reconstruct_command(source: Source, options: SourceOptions, network: NetworkOptions,
                        out: NewMap, workers: Workers = 0, cluster_: ClusterAddress = '',
                        joint: Joint = False, overwrite: Overwrite = False,
                        json_: Json = False, config: Config = None, set_: Set = None,
                        encoder: Weights = None) -> None:
    """Reconstruct photos in any order, or a video; the map is like that of `ffrecon map`.

    Images are compared with those most like them, poses are put together along a tree of pairs,
    and refined with all that the images show in common. Without intrinsics, the focal length is
    that of EXIF, or guessed, and refined if it is that of one camera. Images that share too
    little with the others get no pose, and the reason is said; of parts that nothing connects,
    each becomes a map, the largest at OUT. Killed in the middle and started again, the command
    goes on with what it left in the folder OUT.partial.

    With --model and reconstruction.decoder=transformer a feed-forward network says the motion and
    the depth of each pair, at the features that match. With --joint it sees all images in one
    pass, whose time is linear in their number for networks with ttt attention; whether they fit
    the memory is said before.

    Examples:
      ffrecon reconstruct photos/ --out maps/church
      ffrecon reconstruct photos/ --fov 65 --out maps/church
      ffrecon reconstruct photos/ --set reconstruction.neighbours=30 --out maps/church
      ffrecon reconstruct photos/ --model vggt --set reconstruction.decoder=transformer -o maps/a
      ffrecon reconstruct photos/ --joint --model tiny-ttt --out maps/church
      ffrecon reconstruct photos/ --workers 8 --out maps/church
      ffrecon reconstruct photos/ --cluster auto --out maps/church
      ffrecon export maps/church --format colmap --out colmap/church
    """
    from dataclasses import replace

    chosen = _chosen(settings(PhotoConfig(), config, set_), network, joint)
    check_out(out, overwrite)
    frames = open_source(source, replace(options, mixed_sizes=True, use_exif=True,
                                         use_depth=False, use_stereo=False))
    with _predictor(network) as (predictor, leads):
        if leads:
            summary = _made(frames, out, chosen, encoder, predictor,
                            partial(_engine, workers, cluster_))
            print_json(summary) if json_ else _tell(summary)


def _made(frames: FrameSource, out: Path, chosen: PhotoConfig, encoder: Path | None,
          predictor: NetworkPredictor | None, engine_of: Callable[[], _Engine]) -> dict[str, Any]:
    """The saved maps, in figures."""
    from feedforward_recon.model.compact import CompactEncoder
    from feedforward_recon.session.partial import PartialWork
    from feedforward_recon.session.photos import reconstruct_frames

    describing = CompactEncoder.load(encoder, chosen.encoder)
    work = PartialWork.beside(out, note)
    alone = nullcontext() if _decodes(chosen) else one_thread()
    with alone, engine_of() as engine:
        run, *others = reconstruct_frames(frames, chosen, describing, predictor=predictor,
                                          engine=engine, work=work, total=len(frames),
                                          progress=progress_bar, say=note)
    before = time.perf_counter()
    saved, beside = run.save(out), _saved_beside(out, others)
    work.remove()
    seconds = {**run.seconds, 'saving': time.perf_counter() - before}
    return {**summarise(run, saved), 'unregistered': _unregistered(run), 'others': beside,
            'seconds': seconds}


def _chosen(chosen: PhotoConfig, network: NetworkOptions, joint: bool) -> PhotoConfig:
    """The settings, with what --joint says. Raises ConfigError, before any work."""
    from dataclasses import replace

    from feedforward_recon.model.distributed import processes_started
    from feedforward_recon.reconstruction.decoders import check_decoder

    if joint and not network.feeds_forward:
        raise ConfigError('expected a feed-forward network beside --joint, found --model compact; '
                          'choose one that sees all images, such as --model tiny-ttt')
    if joint:
        chosen = replace(chosen, reconstruction=replace(chosen.reconstruction, decoder='joint'))
    check_decoder(chosen.reconstruction, network.feeds_forward)
    if processes_started() > 1 and chosen.reconstruction.decoder != 'joint':
        raise ConfigError(f'expected --joint in {processes_started()} processes, found it '
                          'missing; nothing else is shared, so start one process')
    return chosen


def _decodes(chosen: PhotoConfig) -> bool:
    """Whether a network computes pair by pair, on all cores."""
    return chosen.reconstruction.decoder == 'transformer'


def _tell(summary: dict[str, Any]) -> None:
    """The figures of a reconstruction, for people."""
    parts = ', '.join(f'{name} {seconds:.1f}' for name, seconds in summary['seconds'].items())
    print_table(f'map in {summary["map"]}', {**summary_rows(summary), 'seconds': parts})
    for reason, files in summary['unregistered'].items():
        note(f'no pose ({reason}): {", ".join(files)}')
    for path, images in summary['others'].items():
        note(f'{images} of these have a map of their own, {path}; ffrecon merge joins maps that '
             'show the same place')
    note(f'find new images in it: ffrecon localize {summary["map"]} IMAGES')


@contextmanager
def _predictor(network: NetworkOptions) -> Iterator[tuple[NetworkPredictor | None, bool]]:
    """The network, if there is one, and whether this process leads those that share it."""
    from feedforward_recon.model.configs import device_of
    from feedforward_recon.model.distributed import own_device
    from feedforward_recon.model.joint_processes import joined_processes
    from feedforward_recon.model.predictor import load_predictor

    if not network.feeds_forward:
        yield None, True
        return
    predictor = load_predictor(network.model, network.attention or None,
                               str(own_device(device_of(network.device))),
                               network.weights or None, network.precision)
    with joined_processes(predictor) as leads:
        yield predictor, leads


def _engine(workers: int, address: str) -> _Engine:
    from feedforward_recon.session.engines import cluster, processes, threads

    if workers and address:
        raise InputError('expected --workers or --cluster, found both; leave one out')
    if address:
        return cluster(address)
    return processes(workers) if workers else threads()


def _saved_beside(out: Path, runs: list[Run]) -> dict[str, int]:
    """Save maps as OUT-2, OUT-3, .., without replacing any; path and number of images of each."""
    saved: dict[str, int] = {}
    out = out.expanduser().resolve()
    names = (out.with_name(f'{out.name}-{number}') for number in count(2))
    for run in runs:
        path = next(name for name in names if not name.exists())
        saved[str(run.save(path).path)] = len(run.scene.trajectory)
    return saved


def _unregistered(run: Run) -> dict[str, list[str]]:
    """Images without a pose, by the reason."""
    found: dict[str, list[Any]] = {}
    for estimate in run.scene.estimates:
        if estimate.T_map_cam is None:
            found.setdefault(estimate.reason, []).append(estimate.source)
    return found
