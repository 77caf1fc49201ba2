"""``ffrecon localize``: find images in a saved map."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import typer

from feedforward_recon.console.options import (
    Config,
    Json,
    MapFolder,
    Set,
    Source,
    Weights,
    settings,
    takes_source_options,
)
from feedforward_recon.console.terminal import (
    DONE,
    REFUSED,
    note,
    print_json,
    print_table,
    progress_bar,
)
from feedforward_recon.console.threads import one_thread
from feedforward_recon.errors import ConfigError, InputError, MapError
from feedforward_recon.evaluation import RECALL_THRESHOLDS, LocalisationScore, localisation_score
from feedforward_recon.geometry.align import align_points_robust
from feedforward_recon.io import SourceOptions, open_source
from feedforward_recon.io.source import Source as FrameSource
from feedforward_recon.io.writers import check_place, localization_entries, write_entries
from feedforward_recon.session.map_folder import SavedMap, load_map
from feedforward_recon.types import Estimate, FloatArray, Frame

LISTED = 20


class Finder(Protocol):
    """Finds an image in a map."""

    def localize(self, frame: Frame) -> Estimate:
        """Pose, or NOT_LOCALISED with the reason."""
        ...


@dataclass(frozen=True)
class NetworkChoice:
    """The options of --model, as given."""

    model: str
    device: str
    weights: str
    precision: str
    refine: bool

    def __post_init__(self) -> None:
        """Refuse options of a network without one."""
        plain = self.device == 'cpu' and not (self.weights or self.precision) and self.refine
        if not (self.model or plain):
            raise ConfigError('expected --device, --weights, --precision and --no-refine beside a '
                              'network, found none; add --model')


Out = Annotated[Path | None, typer.Option('--out', '-o', help='Also write the JSON list here.',
                                          show_default=False)]
Align = Annotated[bool, typer.Option('--align', help='Before measuring errors, align the found '
                                     'poses with those of the source: needed unless the map '
                                     'was made with --poses given.')]
Model = Annotated[str, typer.Option('--model', help='Query the network that made the map with '
                                    '--model: its name.', metavar='NAME',
                                    rich_help_panel='Network')]
Device = Annotated[str, typer.Option('--device', help='Where the network runs: cpu, cuda, '
                                     'cuda:1.', metavar='NAME', rich_help_panel='Network')]
NetworkWeights = Annotated[str, typer.Option('--weights', help='File of weights, or a name of '
                                             '`ffrecon weights list`; default: what made the '
                                             'map.', metavar='FILE|NAME',
                                             rich_help_panel='Network')]
Precision = Annotated[str, typer.Option('--precision', help='full or fp8, as that network was '
                                        'used for the map; default: that.', metavar='full|fp8',
                                        rich_help_panel='Network')]
Refine = Annotated[bool, typer.Option('--refine/--no-refine', help='Let the landmarks of the map '
                                      'decide, with the pose of the network as a hint; or '
                                      'answer with its pose.', rich_help_panel='Network')]


@takes_source_options
def localize_command(map_: MapFolder, source: Source, options: SourceOptions, out: Out = None,
                     align: Align = False, json_: Json = False, config: Config = None,
                     set_: Set = None, encoder: Weights = None, model: Model = '',
                     device: Device = 'cpu', weights: NetworkWeights = '',
                     precision: Precision = '', refine: Refine = True) -> int:
    """Find images in a map: a pose with covariance, or the reason why there is none.

    Only reads the map (map.yaml and memory.safetensors are enough). The camera comes from the
    source or from --fx, --fov or --calibration; without any, the camera that made the map is
    assumed. If the source has poses, errors and recall are printed.

    With --model the images are shown to the network that made the map (ffrecon map --model vgg-t3
    or --attention ttt, hybrid), one by one and without writing. Its poses are hints, and the
    landmarks decide. With --no-refine its poses are the answers, with the status UNCERTAIN.

    --json prints a list with one entry per image: file, stamp_ns, status, T_map_cam (4x4 or
    null), inliers, score, ms. Exit code 1: no image was found in the map.

    Examples:
      ffrecon localize maps/kitchen photos/
      ffrecon localize maps/kitchen photo.jpg --fov 70 --json
      ffrecon localize maps/kitchen walk/ --align --out poses.json
      ffrecon localize maps/atrium photos/ --model vgg-t3 --device cuda
    """
    network = NetworkChoice(model, device, weights, precision, refine)
    if out is not None:
        check_place(out)
    saved = load_map(map_)
    chosen = settings(saved.info.config, config, set_)
    saved = replace(saved, info=replace(saved.info, config=chosen))
    images = _opened(source, options)
    if not (images.calibrated or model):
        note(f'no intrinsics in {images.name}: taking those of the camera that made the map')
    localizer: Finder
    if model:
        localizer = _network_localizer(saved, network, encoder)
    else:
        localizer = saved.localizer(saved.load_encoder(encoder))
    with nullcontext() if model else one_thread():
        answers, truth = _localize(None if model else saved, localizer, images)
    entries = localization_entries(answers)
    if out is not None:
        write_entries(out, entries)
    if json_:
        print_json(entries)
    else:
        _print_answers(saved, answers)
        if truth is not None:
            _print_score(score(answers, truth, align, saved.info.metres_per_unit is None))
    return DONE if any(answer.T_map_cam is not None for answer in answers) else REFUSED


def _network_localizer(saved: SavedMap, network: NetworkChoice, encoder: Path | None
                       ) -> Finder:
    from feedforward_recon.localization.scene_network import load_network_memory

    fast_weights = saved.fast_weights()
    if fast_weights is None:
        raise MapError(f'{saved.path}: expected a map with the fast weights of a network, found '
                       'none in it; map with --model vgg-t3 (or --attention ttt or hybrid), or '
                       'leave --model out')
    memory = load_network_memory(fast_weights, network.model, network.device, network.weights,
                                 network.precision)
    refiner = saved.localizer(saved.load_encoder(encoder)) if network.refine else None
    return memory.localizer(fast_weights, saved.memory.points, refiner)


def _localize(saved: SavedMap | None, localizer: Finder, images: FrameSource
              ) -> tuple[list[Estimate], FloatArray | None]:
    """Answers, and the true poses [N, 4, 4] where every image has one.

    saved: the map whose camera stands in for missing ones; None when a network sees them.
    """
    answers, truth = [], []
    with progress_bar('localising', len(images)) as bar:
        for frame in bar.over(images):
            if saved is not None:
                _check_camera(saved, frame)
            answers.append(localizer.localize(frame))
            if frame.T_map_cam is not None:
                truth.append(frame.T_map_cam)
    return answers, np.stack(truth) if len(truth) == len(answers) > 0 else None


def _check_camera(saved: SavedMap, frame: Frame) -> None:
    """Without intrinsics the map's camera stands in, if the image can come from it."""
    size_wh = (frame.image.shape[1], frame.image.shape[0])
    camera = saved.info.camera
    if frame.camera is None and camera.size_wh != size_wh:
        raise InputError(f'{frame.source}: expected camera intrinsics or an image of '
                         f'{camera.width}x{camera.height} like those of the map, found '
                         f'{size_wh[0]}x{size_wh[1]} without; give --fx or --fov')


def score(answers: Sequence[Estimate], truth: FloatArray, align: bool,
          with_scale: bool) -> LocalisationScore:
    """Errors of the answers to true poses [N, 4, 4].

    align: after the rigid transform (similarity when with_scale) that fits the found poses
    best; answers that disagree with the others hardly pull it.
    """
    poses = [answer.T_map_cam for answer in answers]
    found = np.flatnonzero([pose is not None for pose in poses])
    if align and len(found):
        centres = np.stack([pose[:3, 3] for pose in poses if pose is not None])
        fit = align_points_robust(centres, truth[found, :3, 3], with_scale=with_scale)
        poses = [None if pose is None else fit.apply_to_poses(pose) for pose in poses]
    return localisation_score(poses, truth)


def _print_answers(saved: SavedMap, answers: Sequence[Estimate]) -> None:
    found = [answer for answer in answers if answer.T_map_cam is not None]
    median_ms = np.median([answer.latency_ms for answer in answers]) if answers else 0.0
    for answer in answers[:LISTED]:
        print(_line(answer))
    if len(answers) > LISTED:
        print(f'... and {len(answers) - LISTED} more: --json or --out lists all')
    print(f'{len(found)} of {len(answers)} images found in {saved.path}, median '
          f'{median_ms:.0f} ms per image')


def _line(answer: Estimate) -> str:
    if answer.T_map_cam is None:
        return f'{answer.source}: {answer.status.value} ({answer.reason})'
    x, y, z = answer.T_map_cam[:3, 3]
    return (f'{answer.source}: x {x:.3f} y {y:.3f} z {z:.3f}, {answer.inliers} inliers, '
            f'score {answer.score:.2f}')


def _opened(path: Path, options: SourceOptions) -> FrameSource:
    """Single images: of all sizes, without what only mapping needs."""
    return open_source(path, replace(options, use_depth=False, use_stereo=False,
                                     mixed_sizes=True))


def _print_score(result: LocalisationScore) -> None:
    print_table('against the poses of the source', score_rows(result))


def score_rows(result: LocalisationScore) -> dict[str, str]:
    """The recall table for people."""
    rows = {'median error': f'{100 * result.median_m:.1f} cm, {result.median_deg:.2f} deg'}
    for (metres, degrees), share in zip(RECALL_THRESHOLDS, result.recall, strict=True):
        rows[f'within {100 * metres:g} cm and {degrees:g} deg'] = f'{100 * share:.1f} %'
    return rows
