"""``ffrecon reconstruct``: makes a map folder of photos in any order."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feedforward_recon.cli.mapping import summarise, summary_rows
from feedforward_recon.config.photos import PhotoConfig
from feedforward_recon.console.options import (
    Config,
    Json,
    NewMap,
    Overwrite,
    Set,
    Source,
    Weights,
    check_out,
    settings,
    takes_source_options,
)
from feedforward_recon.console.terminal import note, print_json, print_table, progress_bar
from feedforward_recon.console.threads import one_thread
from feedforward_recon.errors import InputError
from feedforward_recon.io import SourceOptions, open_source
from feedforward_recon.session.offline import Run

if TYPE_CHECKING:
    from feedforward_recon.reconstruction.comparisons import Mapped

Workers = Annotated[int, typer.Option('--workers', min=0, help='Processes of this machine that '
                                      'encode and compare images; 0: threads of this one.')]
ClusterAddress = Annotated[str, typer.Option(
    '--cluster', metavar='ADDRESS', show_default=False, help='Do that on a Ray cluster instead: '
    'host:port, or auto for the one that this machine belongs to.')]


@takes_source_options
def reconstruct_command(source: Source, options: SourceOptions, out: NewMap, workers: Workers = 0,
                        cluster_: ClusterAddress = '', overwrite: Overwrite = False,
                        json_: Json = False, config: Config = None, set_: Set = None,
                        encoder: Weights = None) -> None:
    """Reconstruct photos in any order, or a video; the map is like that of `ffrecon map`.

    Images are compared with those most like them, poses are put together along a tree of pairs,
    and refined with all that the images show in common. Without intrinsics, the focal length of
    one camera is guessed and refined. Images that share too little with the others get no pose,
    and the reason is said. Killed in the middle and started again, the command goes on with what
    it left in the folder OUT.partial.

    Examples:
      ffrecon reconstruct photos/ --out maps/church
      ffrecon reconstruct photos/ --fov 65 --out maps/church
      ffrecon reconstruct photos/ --set reconstruction.neighbours=30 --out maps/church
      ffrecon reconstruct photos/ --workers 8 --out maps/church
      ffrecon reconstruct photos/ --cluster auto --out maps/church
      ffrecon export maps/church --format colmap --out colmap/church
    """
    from dataclasses import replace

    from feedforward_recon.model.compact import CompactEncoder
    from feedforward_recon.session.partial import PartialWork
    from feedforward_recon.session.photos import reconstruct_frames

    chosen = settings(PhotoConfig(), config, set_)
    check_out(out, overwrite)
    frames = open_source(source, replace(options, mixed_sizes=True, use_depth=False,
                                         use_stereo=False))
    describing = CompactEncoder.load(encoder, chosen.encoder)
    target = out.expanduser().resolve()
    work = PartialWork(target.with_name(f'{target.name}.partial'), note)
    with one_thread(), _engine(workers, cluster_) as engine:
        run = reconstruct_frames(frames, chosen, describing, engine=engine, work=work,
                                 total=len(frames), progress=progress_bar)
    saved = run.save(out)
    work.remove()
    summary = {**summarise(run, saved), 'unregistered': _unregistered(run)}
    if json_:
        print_json(summary)
        return
    print_table(f'map in {saved.path}', summary_rows(summary))
    for reason, files in summary['unregistered'].items():
        note(f'no pose ({reason}): {", ".join(files)}')
    note(f'find new images in it: ffrecon localize {saved.path} IMAGES')


def _engine(workers: int, address: str) -> AbstractContextManager[Mapped]:
    from feedforward_recon.session.engines import cluster, processes, threads

    if workers and address:
        raise InputError('expected --workers or --cluster, found both; leave one out')
    if address:
        return cluster(address)
    return processes(workers) if workers else threads()


def _unregistered(run: Run) -> dict[str, list[str]]:
    """Images without a pose, by the reason."""
    found: dict[str, list[Any]] = {}
    for estimate in run.scene.estimates:
        if estimate.T_map_cam is None:
            found.setdefault(estimate.reason, []).append(estimate.source)
    return found
