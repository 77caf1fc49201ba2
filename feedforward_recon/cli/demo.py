"""``ffrecon demo``: maps a synthetic room, localises in it, measures errors to exact truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from feedforward_recon.cli.mapping import summarise, summary_rows
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.console.options import Json
from feedforward_recon.console.terminal import (
    DONE,
    REFUSED,
    note,
    print_json,
    print_table,
    progress_bar,
)
from feedforward_recon.console.threads import one_thread
from feedforward_recon.evaluation import LocalisationScore, localisation_score
from feedforward_recon.geometry.align import align_points
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.session.map_folder import SavedMap, check_map_output, load_map
from feedforward_recon.session.offline import Run, map_frames
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Estimate, FloatArray

# Neither room is among those the encoder was trained on (seeds 1000 to 1149).
ROOM_SEED, OTHER_ROOM_SEED, WALK_SEED = 7, 8, 0
CAMERA = Camera.from_fov(68.0, (480, 360))
FRAMES, FPS, VIEWS, OTHER_VIEWS = 170, 7.0, 40, 20  # one slow turn around the room
MAX_ATE_M, MIN_RECALL_5CM = 0.03, 0.90
OVERVIEW = 'overview.png'

Out = Annotated[Path, typer.Option('--out', '-o', help='Map folder to write; an older demo '
                                   'there is replaced.')]


@dataclass(frozen=True)
class Found:
    """Answers of the map to views that were not mapped.

    held_out: answers to views of the mapped room; other_room: to views of another room.
    """

    held_out: list[Estimate]
    other_room: list[Estimate]
    score: LocalisationScore


def demo_command(out: Out = Path('out/demo'), json_: Json = False) -> int:
    """Map a synthetic room and find new views in it; no view of another room may be found.

    Renders a walk with exact truth (no download, no data), maps it image by image, saves the
    map, loads it and localises views that were not mapped, then views of a different room.
    Writes cloud.ply, trajectory.tum, the scene memory and a picture, overview.png. Exit code 1
    unless the trajectory error is below 3 cm, 90 % of the views are found within 5 cm, and no
    view of the other room is accepted.

    Examples:
      ffrecon demo
      ffrecon demo --out /tmp/room --json
    """
    from feedforward_recon.model.compact import CompactEncoder

    check_map_output(out)
    config = MapperConfig()
    encoder = CompactEncoder.load(config=config.encoder)
    room = Room.generate(ROOM_SEED)
    walk = room.walk(FRAMES, WALK_SEED, FPS)
    with one_thread():
        run = map_frames(render_walk(room, CAMERA, walk, fps=FPS), config, encoder,
                         total=len(walk), progress=progress_bar)
        saved = run.save(out)
        found = _query(load_map(out).localizer(encoder), run, room, walk)
    _draw(saved, run, found)
    summary = {**summarise(run, saved), **_findings(found)}
    summary['passed'] = all(passed for _, passed in _verdicts(summary))
    if json_:
        print_json(summary)
    else:
        _print(summary, saved)
    return DONE if summary['passed'] else REFUSED


def _query(localizer: Localizer, run: Run, room: Room, walk: list[NDArray[np.float64]]
           ) -> Found:
    """Localise views beside the walk, and views of another room."""
    views = room.held_out_views(walk, VIEWS, WALK_SEED)
    other = Room.generate(OTHER_ROOM_SEED)
    elsewhere = other.held_out_views(other.walk(FRAMES, WALK_SEED, FPS), OTHER_VIEWS, WALK_SEED)
    with progress_bar('localising', VIEWS + OTHER_VIEWS) as bar:
        held_out = [localizer.localize(frame)
                    for frame in bar.over(render_walk(room, CAMERA, views))]
        refused = [localizer.localize(frame)
                   for frame in bar.over(render_walk(other, CAMERA, elsewhere))]
    # The frame of the map against the room's, from the mapped walk alone.
    fit = align_points(run.scene.trajectory.positions, _true_centres(run))
    poses = [None if answer.T_map_cam is None else fit.apply_to_poses(answer.T_map_cam)
             for answer in held_out]
    return Found(held_out, refused, localisation_score(poses, np.stack(views)))


def _true_centres(run: Run) -> FloatArray:
    tracked = np.isin(run.truth.stamps_ns, run.scene.trajectory.stamps_ns)
    return run.truth.positions[tracked]


def _draw(saved: SavedMap, run: Run, found: Found) -> None:
    from feedforward_recon.console.viewer import save_overview

    poses = [answer.T_map_cam for answer in found.held_out if answer.T_map_cam is not None]
    save_overview(saved.path / OVERVIEW, run.scene.cloud, run.scene.trajectory, poses,
                  title='ffrecon demo')


def _findings(found: Found) -> dict[str, Any]:
    score = found.score
    return {
        'views': score.queries, 'localised': score.localised, 'median_m': score.median_m,
        'median_deg': score.median_deg, 'recall_5cm': score.within(0.05, 5.0),
        'median_ms': float(np.median([answer.latency_ms for answer in found.held_out])),
        'other_room_views': len(found.other_room),
        'other_room_accepted': sum(a.T_map_cam is not None for a in found.other_room)}


def _verdicts(summary: dict[str, Any]) -> list[tuple[str, bool]]:
    """What the demo has to reach, and whether it does."""
    error = summary['error']
    return [
        (f'ATE <= {100 * MAX_ATE_M:g} cm',
         error is not None and error['ate_rmse'] <= MAX_ATE_M),
        (f'{100 * MIN_RECALL_5CM:g} % of held-out views within 5 cm',
         summary['recall_5cm'] >= MIN_RECALL_5CM),
        ('the different room is refused', summary['other_room_accepted'] == 0)]


def _print(summary: dict[str, Any], saved: SavedMap) -> None:
    table = summary_rows(summary)
    table['held-out views'] = (
        f'{summary["localised"]} of {summary["views"]} found, median '
        f'{100 * summary["median_m"]:.1f} cm and {summary["median_deg"]:.2f} deg, '
        f'{100 * summary["recall_5cm"]:.0f} % within 5 cm, {summary["median_ms"]:.0f} ms each')
    table['a different room'] = (f'{summary["other_room_accepted"]} of '
                                 f'{summary["other_room_views"]} views accepted')
    print_table('ffrecon demo', table)
    for limit, reached in _verdicts(summary):
        print('ok  ' if reached else 'FAIL', limit)
    note(f'look at {saved.path / OVERVIEW}; map your own walk with: '
         'ffrecon map WALK --out MAP')
