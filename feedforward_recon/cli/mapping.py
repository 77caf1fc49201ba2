"""``ffrecon map``: makes a map folder of a camera walk."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.console.options import (
    Config,
    Json,
    NetworkOptions,
    Overwrite,
    Set,
    Source,
    Weights,
    check_out,
    settings,
    takes_model_options,
    takes_source_options,
)
from feedforward_recon.console.terminal import (
    bytes_text,
    note,
    print_json,
    print_table,
    progress_bar,
)
from feedforward_recon.console.threads import one_thread
from feedforward_recon.errors import ConfigError, DegenerateError, InputError
from feedforward_recon.io import SourceOptions, open_source, require_cameras
from feedforward_recon.io.source import Source as FrameSource
from feedforward_recon.localization.network_localizer import SavedFastWeights
from feedforward_recon.mapping.sources import GivenPoses
from feedforward_recon.model import Encoder
from feedforward_recon.session.map_folder import (
    KEYFRAMES,
    MEMORY,
    WRITER,
    SavedMap,
    check_map_output,
    load_map,
)
from feedforward_recon.session.offline import Run, map_frames
from feedforward_recon.types import Status


class Poses(str, Enum):
    """Where camera poses come from."""

    ESTIMATED = 'estimated'
    GIVEN = 'given'


Out = Annotated[Path | None, typer.Option('--out', '-o', help='Map folder to write.',
                                          show_default=False)]
Into = Annotated[Path | None, typer.Option('--into', help='Instead of --out: a map to go on with. '
                                           'Images are located in it, then extend it.',
                                           show_default=False)]
Mono = Annotated[bool, typer.Option('--mono', help='Do not use depth, even where there is '
                                    'some. The map then has no metric scale.')]
PosesOption = Annotated[Poses, typer.Option('--poses', help='given: take the poses that come '
                                            'with the source as they are, and map only.')]


@takes_model_options
@takes_source_options
def map_command(source: Source, options: SourceOptions, network: NetworkOptions,
                out: Out = None, into: Into = None, mono: Mono = False,
                poses: PosesOption = Poses.ESTIMATED, overwrite: Overwrite = False,
                json_: Json = False, config: Config = None, set_: Set = None,
                encoder: Weights = None) -> None:
    """Map a camera walk, or go on with a map; the scene memory has a fixed size.

    Reads image folders (with cameras.json; TUM RGB-D; 7-Scenes; plain), videos and ROS 2 bags.
    With depth the map is in metres; without it, the scale is unknown. Missing intrinsics are
    guessed and refined. If the source has poses, they are used to measure the error, not to
    map (unless --poses given).

    A feed-forward network (--model) maps windows of images at once and aligns each window with
    the map. Images are found in such maps with the shipped encoder, as in all others.

    With --into the camera is located in a saved map, and the map grows from there. Its axes, its
    scale, and the settings of scene memory and encoder stay; poses.json and trajectory.tum are
    then those of this walk. Not with --model or --poses given.

    Examples:
      ffrecon map walk/ --out maps/kitchen
      ffrecon map tomorrow/ --into maps/kitchen
      ffrecon map walk.mp4 --fov 70 --out maps/hall
      ffrecon map drive.mcap --image-topic /camera/image_raw --out maps/yard
      ffrecon map walk/ --mono --set memory.slots=8000 --out maps/small
      ffrecon map walk/ --model vggt --device cuda --out maps/atrium
    """
    from feedforward_recon.model.compact import CompactEncoder

    chosen = settings(MapperConfig(), config, set_)
    folder, before = _folder(out, into, overwrite, network, poses)
    frames = open_source(source, _for_mapping(options, mono))
    _check_source(frames, poses)
    describing = before.load_encoder(encoder) if before else \
        CompactEncoder.load(encoder, chosen.encoder)
    fast_weights = None
    if network.feeds_forward:
        run, fast_weights = _map_windows(frames, network, poses, describing, chosen)
    else:
        with one_thread():
            run = map_frames(
                frames, chosen, describing, into=before, total=len(frames),
                progress=progress_bar, source=None if poses is Poses.ESTIMATED else
                lambda _: GivenPoses(chosen, describing))
    saved = run.save(folder, fast_weights)
    _report(run, saved, json_)


def _folder(out: Path | None, into: Path | None, overwrite: bool, network: NetworkOptions,
            poses: Poses) -> tuple[Path, SavedMap | None]:
    """Where the map goes, and the map to go on with, if any.

    Raises ConfigError, InputError or MapError, before any work.
    """
    if (out is None) == (into is None):
        raise ConfigError(f'expected one of --out and --into, found {"both" if out else "none"}; '
                          '--out writes a new map, --into goes on with one')
    if out is not None:
        check_out(out, overwrite)
        return out, None
    assert into is not None
    if network.feeds_forward or poses is Poses.GIVEN:
        raise ConfigError('expected features of the images to locate them in a map (--into), '
                          f'found {"--model" if network.feeds_forward else "--poses given"}; '
                          'leave it out, or map with --out')
    check_map_output(into)
    before = load_map(into)
    if before.fast_weights() is not None:
        note(f'{into}: the fast weights of its network are left out; they know nothing of what '
             'is added')
    return into, before


def _map_windows(frames: FrameSource, network: NetworkOptions, poses: Poses, encoder: Encoder,
                 config: MapperConfig) -> tuple[Run, SavedFastWeights | None]:
    from feedforward_recon.config.network import WindowConfig
    from feedforward_recon.localization.scene_network import NetworkMemory
    from feedforward_recon.mapping.sources.windows import WindowPoses
    from feedforward_recon.model.predictor import load_predictor

    if poses is Poses.GIVEN:
        raise ConfigError(f'expected poses that {network.model} may find, found --poses given; '
                          'leave one of --poses and --model out')
    windows = WindowConfig(network.window, network.anchors)
    predictor = load_predictor(network.model, network.attention or None, network.device,
                               network.weights or None, network.precision)
    run = map_frames(frames, config, encoder, total=len(frames), progress=progress_bar,
                     source=lambda _: WindowPoses(config, predictor, encoder, windows=windows,
                                                  refine=network.refine))
    memory = NetworkMemory(predictor, network.model, network.weights)
    if memory.unsupported:
        note(memory.unsupported)
    return run, memory.write(run.scene, frames, run.memory.points)


def _for_mapping(options: SourceOptions, mono: bool) -> SourceOptions:
    from dataclasses import replace

    return replace(options, use_depth=options.use_depth and not mono,
                   use_stereo=options.use_stereo and not mono)


def _check_source(source: FrameSource, poses: Poses) -> None:
    """Depth without intrinsics has no shape; given poses must be there."""
    if source.has_depth or source.has_right:
        require_cameras(source)
    if poses is Poses.GIVEN and not source.has_poses:
        raise InputError(f'{source.name}: expected a pose for every image (--poses given), found '
                         'images without; leave the option out')


def _report(run: Run, saved: SavedMap, as_json: bool) -> None:
    summary = summarise(run, saved)
    if as_json:
        print_json(summary)
        return
    print_table(f'map in {saved.path}', summary_rows(summary))
    note(f'find new images in it: ffrecon localize {saved.path} IMAGES')


def summarise(run: Run, saved: SavedMap) -> dict[str, Any]:
    """The figures of a run, as ``--json`` prints them."""
    info = saved.info
    summary: dict[str, Any] = {
        'map': str(saved.path), 'frames': info.images, 'tracked': info.tracked,
        'unsure': sum(e.status is Status.UNCERTAIN for e in run.scene.estimates),
        'tracked_share': run.tracked_share, 'keyframes': info.keyframes, 'points': info.points,
        'loops': run.stats.loops, 'relocalised': run.stats.relocalised,
        'mapping_s': run.mapping_s, 'reading_s': run.reading_s, 'polish_s': run.polish_s,
        'sessions': info.sessions, 'memory_bytes': info.files[MEMORY]['bytes'],
        'keyframes_bytes': info.files[KEYFRAMES]['bytes'],
        'writer_bytes': info.files[WRITER]['bytes'],
        'metres_per_unit': info.metres_per_unit, 'scale_source': info.scale_source,
        'camera_source': info.camera_source, 'fx': info.camera.fx, 'error': None}
    if len(run.truth):
        summary['error'] = _error(run)
    return summary


def _error(run: Run) -> dict[str, float] | None:
    try:
        error = run.error()
    except (InputError, DegenerateError) as problem:
        note(f'no error against the poses of the source: {problem}')
        return None
    return {'ate_rmse': error.rmse, 'ate_median': error.median,
            'rotation_median_deg': error.rotation_median_deg, 'scale': error.scale,
            'straight_line_rmse': error.straight_line_rmse, 'path_length': error.path_length}


def summary_rows(summary: dict[str, Any]) -> dict[str, str]:
    """The table of a run for people."""
    unsure = f', {summary["unsure"]} not sure' if summary['unsure'] else ''
    table = {
        'frames': f'{summary["frames"]}, {100 * summary["tracked_share"]:.1f} % tracked{unsure}',
        'keyframes': f'{summary["keyframes"]}, {summary["loops"]} loops closed',
        'tracking and mapping': f'{summary["mapping_s"]:.1f} s '
                                f'(reading {summary["reading_s"]:.1f} s beside it)',
        'memory made ready': f'{summary["polish_s"]:.2f} s',
        'memory': f'{bytes_text(summary["memory_bytes"])}, all that localising needs',
        'to go on': f'{bytes_text(summary["writer_bytes"])} and '
                    f'{bytes_text(summary["keyframes_bytes"])} of keyframes',
        'scale': _scale_text(summary),
        'camera': f'{summary["camera_source"]}, fx {summary["fx"]:.1f} px'}
    error = summary['error']
    if error is not None:
        kind = 'Sim(3)' if summary['metres_per_unit'] is None else 'SE(3)'
        table[f'ATE after {kind}'] = (
            f'{100 * error["ate_rmse"]:.2f} cm, {error["rotation_median_deg"]:.2f} deg over '
            f'{error["path_length"]:.2f} m (a straight line: '
            f'{100 * error["straight_line_rmse"]:.1f} cm)')
    return table


def _scale_text(summary: dict[str, Any]) -> str:
    if summary['metres_per_unit'] is None:
        return 'unknown (neither depth nor a stereo pair)'
    return f'{summary["metres_per_unit"]:g} m per unit, from {summary["scale_source"]}'
