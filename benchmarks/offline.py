"""Photos in any order: ours beside COLMAP, trees, refinement, no intrinsics, moving boxes."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.colmap_peer import PhotoPeer
from benchmarks.common import KITCHEN, Clock, data_root, load_frames, true_trajectory
from benchmarks.moving_scenes import HAPPENINGS, BoxPhotos, box_photos
from benchmarks.scoring import mean_entry, trajectory_error
from benchmarks.stress import false_poses
from feedforward_recon.config.photos import PhotoConfig, ReconstructionConfig
from feedforward_recon.console.threads import one_thread
from feedforward_recon.errors import ReconError
from feedforward_recon.evaluation import associate, localisation_score
from feedforward_recon.geometry.align import align_points
from feedforward_recon.io import SourceOptions, open_source
from feedforward_recon.mapping.scene_map import SceneMap
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.reconstruction.comparisons import compared
from feedforward_recon.reconstruction.pairs import CompactPairs
from feedforward_recon.reconstruction.parts import PhotoSet
from feedforward_recon.reconstruction.pipeline import assembled
from feedforward_recon.reconstruction.shots import shot_of
from feedforward_recon.session.map_folder import SavedMap, save_map
from feedforward_recon.session.merging import merge_maps
from feedforward_recon.session.offline import Run, map_frames
from feedforward_recon.session.photos import reconstruct_frames
from feedforward_recon.types import Frame, Trajectory

SETS = ('strecha_Herz-Jesus-P8', 'lund_door', 'strecha_Herz-Jesus-P25', 'llff_flower',
        'llff_room', 'llff_fortress', 'ngp_fox', 'tabletop_cup', KITCHEN)
STEP = {KITCHEN: 5}  # every so many images of a walk
PEERS = (('incremental', 'exhaustive'), ('global', 'exhaustive'), ('incremental', 'sequential'))
GROWTH = 62, 125, 250, 500  # images of one walk
SHARED = 50  # images of both halves
MOVING_SEEDS = (0, 1, 2, 3)
SEED = 0  # of the order of the images


def photos(name: str) -> list[Frame]:
    """The images of a set with a camera and a true pose, in an order that says nothing.

    Stamps are those of the order in the set.
    """
    step = STEP.get(name, 1)
    frames = load_frames(name, step=step, use_depth=False) if name == KITCHEN else list(
        open_source(data_root() / name, SourceOptions(mixed_sizes=True, step=step)))
    frames = [dataclasses.replace(frame, stamp_ns=index) for index, frame in enumerate(frames)
              if frame.camera is not None and frame.T_map_cam is not None]
    return [frames[index] for index in np.random.default_rng(SEED).permutation(len(frames))]


def run() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each set: ours with and without refinement, without intrinsics, and the peer."""
    for name in SETS:
        frames = photos(name)
        yield f'{name} | ours', ours(frames)
        yield f'{name} | ours, not refined', ours(frames, ReconstructionConfig(refine=False))
        yield f'{name} | ours, without intrinsics', without_intrinsics(frames)
        with tempfile.TemporaryDirectory() as folder:
            peer = PhotoPeer(frames, Path(folder))
            for mapper, matching in PEERS:
                estimated, clocks = peer.map(mapper, matching)
                yield (f'{name} | pycolmap {mapper}, {matching} matching',
                       entry(frames, estimated, clocks))


def run_trees() -> Iterator[tuple[str, dict[str, Any]]]:
    """Trees and costs of pairs: how deep, and how good what is accumulated along them."""
    for name in SETS:
        frames, config = photos(name), PhotoConfig()
        encoder = CompactEncoder.load(config=config.encoder)
        shots = [shot_of(frame, frame.camera, encoder, config.encoder.max_pixels)
                 for frame in frames if frame.camera]
        comparisons = compared(shots, CompactPairs(shots, encoder), config.reconstruction)
        for tree in ('shortest', 'spanning'):
            for cost in ('linear', 'square', 'angle'):
                chosen = ReconstructionConfig(tree=tree, cost=cost, refine=False)
                done = assembled(PhotoSet(shots, comparisons, chosen))[0]
                posed = [(shot.stamp_ns, T) for shot, T, registered in
                         zip(shots, done.part.accumulated, done.registered, strict=True)
                         if registered]
                depth = done.part.tree.depth
                yield f'{name} | {tree}, {cost}', {
                    **entry(frames, Trajectory.of(posed), []), 'depth': int(depth.max()),
                    'mean_depth': float(depth[done.part.tree.order].mean())}


def run_growth() -> Iterator[tuple[str, dict[str, Any]]]:
    """Time against the number of images: more and more of the kitchen walk, shuffled."""
    walk = load_frames(KITCHEN, use_depth=False)
    rng = np.random.default_rng(SEED)
    seconds = {}
    for count in GROWTH:
        frames = [dataclasses.replace(frame, stamp_ns=index)
                  for index, frame in enumerate(walk[:count])]
        row = ours([frames[index] for index in rng.permutation(count)])
        seconds[count] = row['cpu_seconds']
        slope = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0] \
            if len(seconds) > 1 else None
        yield f'{count} images | ours', {**row, 'exponent': slope}


def run_merge() -> Iterator[tuple[str, dict[str, Any]]]:
    """The kitchen as two halves that share 50 images, merged, beside a map made at once."""
    frames = load_frames(KITCHEN)
    known, unknown = frames[::2], frames[1::4]
    middle = len(known) // 2
    for sensor in ('RGB-D', 'monocular'):
        walk = known if sensor == 'RGB-D' else [dataclasses.replace(f, depth=None) for f in known]
        with tempfile.TemporaryDirectory() as folder, one_thread():
            whole = map_frames(walk).save(Path(folder) / 'whole')
            halves = [map_frames(part).save(Path(folder) / name) for name, part in
                      (('first', walk[:middle + SHARED // 2]),
                       ('second', walk[middle - SHARED // 2:]))]
            clock = Clock()
            merged = merge_maps(*halves)
            both = save_map(Path(folder) / 'both', merged.scene, merged.writer, merged.encoder,
                            merged.config)
            clock.stop()
            yield f'{KITCHEN} {sensor} | at once', merge_entry(whole, walk, unknown)
            yield f'{KITCHEN} {sensor} | two halves merged', {
                **merge_entry(both, walk, unknown), 'seconds': clock.seconds}


def run_moving() -> Iterator[tuple[str, dict[str, Any]]]:
    """Photos of rooms with boxes that move, and without: ours and the peer."""
    for happening, words in HAPPENINGS.items():
        rows: dict[str, dict[str, Any]] = {}
        for seed in MOVING_SEEDS:
            photos = box_photos(happening, seed)
            rows.setdefault('ours', {})[str(seed)] = moving_ours(photos, happening == 'moved')
            with tempfile.TemporaryDirectory() as folder:
                estimated, clocks = PhotoPeer(photos.frames, Path(folder)).map(*PEERS[0])
            rows.setdefault('pycolmap incremental, exhaustive matching', {})[str(seed)] = \
                moving_entry(photos.frames, estimated, clocks)
        for system, each in rows.items():
            yield f'{words} | {system}', mean_entry(each)


def moving_ours(photos: BoxPhotos, two_visits: bool) -> dict[str, Any]:
    """Errors, number of maps, and what shows boxes in the largest, refined and not."""
    runs, clock = reconstructed(photos.frames)
    rough, _ = reconstructed(photos.frames, ReconstructionConfig(refine=False))
    row = moving_entry(photos.frames, runs[0].scene.trajectory, [clock])
    return {**row, 'maps': len(runs), **on_boxes(runs[0].scene, photos.boxes, two_visits),
            'not_refined': on_boxes(rough[0].scene, photos.boxes, two_visits)}


def moving_entry(frames: list[Frame], estimated: Trajectory, clocks: list[Clock]
                 ) -> dict[str, Any]:
    """Errors after a similarity, and how many poses are false as in ``stress``."""
    nobody = np.zeros(0, np.int64)
    row = entry(frames, estimated, clocks)
    truth = Trajectory.of((frame.stamp_ns, frame.T_map_cam) for frame in frames)
    return {**row, 'false': false_poses(estimated, nobody, truth, 'sim3')}


def on_boxes(scene: SceneMap, boxes: np.ndarray, two_visits: bool) -> dict[str, float]:
    """Shares of a map that boxes [N, H, W] made: of its points, and of its observations.

    Wrong is a point of which half of the observations show a box; with two visits, one that
    shows a box in both: between them it moved.
    """
    assert scene.graph is not None
    table = scene.graph.arrays
    point, image = table['seen_landmark'], table['stamps_ns'][table['seen_keyframe']]
    column, row = np.rint(table['seen_px']).astype(int).T
    shows = boxes[image, row.clip(0, boxes.shape[1] - 1), column.clip(0, boxes.shape[2] - 1)]
    if two_visits:
        wrong = np.logical_and(*(np.bincount(point, shows & (image % 2 == visit)) > 0
                                 for visit in range(2)))
    else:
        wrong = np.bincount(point, shows) >= 0.5 * np.bincount(point)
    return {'wrong_points': float(wrong.mean()), 'shown': float(shows.mean()),
            'wrong_observations': float((shows & wrong[point]).mean())}


def merge_entry(saved: SavedMap, walk: list[Frame], unknown: list[Frame]) -> dict[str, Any]:
    """Error of the walk in a saved map, and how many other images are found in it."""
    metric = saved.info.metres_per_unit is not None
    stamps, first = np.unique(saved.trajectory().stamps_ns, return_index=True)
    estimated = Trajectory(stamps, saved.trajectory().T_map_cam[first])
    ours, theirs = associate(estimated, true_trajectory(walk))
    alignment = align_points(ours.positions, theirs.positions, with_scale=not metric)
    localizer = saved.localizer()
    answers = [localizer.localize(frame).T_map_cam for frame in unknown]
    placed = [None if T is None else alignment.apply_to_poses(T) for T in answers]
    truth = np.stack([f.T_map_cam for f in unknown if f.T_map_cam is not None])
    score = localisation_score(placed, truth)
    return {'images': len(walk), 'registered': len(ours), 'memory_bytes': saved.memory.nbytes,
            'error': trajectory_error(estimated, true_trajectory(walk),
                                      'se3' if metric else 'sim3'),
            'queries': len(unknown), 'median_m': score.median_m, 'recall': score.recall}


def ours(frames: list[Frame], config: ReconstructionConfig | None = None) -> dict[str, Any]:
    """From decoded images to a map with its memory."""
    try:
        runs, clock = reconstructed(frames, config)
    except ReconError as error:
        return {'images': len(frames), 'registered': 0, 'failed': str(error)}
    row = entry(frames, runs[0].scene.trajectory, [clock])
    return {**row, 'fx': runs[0].scene.keyframes[0].camera.fx}


def reconstructed(frames: list[Frame], config: ReconstructionConfig | None = None
                  ) -> tuple[list[Run], Clock]:
    """The maps of decoded images, and the time they took; raises as ``reconstruct_frames``."""
    clock = Clock()
    with one_thread():
        runs = reconstruct_frames(frames, PhotoConfig(
            reconstruction=config or ReconstructionConfig()))
    return runs, clock.stop()


def without_intrinsics(frames: list[Frame]) -> dict[str, Any]:
    """The same images, and how far the focal length that was found is from the given one."""
    camera = frames[0].camera
    assert camera is not None
    row = ours([dataclasses.replace(frame, camera=None) for frame in frames])
    return {**row, 'focal_error': abs(row['fx'] / camera.fx - 1) if 'fx' in row else None}


def entry(frames: list[Frame], estimated: Trajectory, clocks: list[Clock]) -> dict[str, Any]:
    """Errors after a similarity, also as a share of the extent of the true positions."""
    truth = Trajectory.of((frame.stamp_ns, frame.T_map_cam) for frame in frames)
    error = trajectory_error(estimated, truth, 'sim3')
    extent = float(np.linalg.norm(np.ptp(truth.positions, axis=0)))
    return {'images': len(frames), 'registered': len(estimated), 'error': error,
            'seconds': sum(clock.seconds for clock in clocks),
            'cpu_seconds': sum(clock.cpu_seconds for clock in clocks),
            'ate_of_extent': None if error is None else error['rmse'] / extent}
