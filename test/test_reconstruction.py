"""Photos in any order become a map, and each bad input is a result or one sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import yaml
from PIL import ExifTags, Image

from feedforward_recon.cli import main
from feedforward_recon.config.photos import PhotoConfig, ReconstructionConfig
from feedforward_recon.config.schema import EncoderConfig, MemoryConfig
from feedforward_recon.console.options import settings
from feedforward_recon.errors import InputError, MapError
from feedforward_recon.evaluation import absolute_trajectory_error
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import pose_error, transform_points
from feedforward_recon.io.writers import write_entries
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.reconstruction import pipeline, registration
from feedforward_recon.reconstruction.comparisons import compared
from feedforward_recon.reconstruction.pairs import CompactPairs
from feedforward_recon.reconstruction.parts import PhotoSet
from feedforward_recon.reconstruction.pipeline import assembled, reconstruct
from feedforward_recon.reconstruction.shots import shot_of
from feedforward_recon.session import photo_reading as reading_module
from feedforward_recon.session import photos as photos_module
from feedforward_recon.session.engines import threads
from feedforward_recon.session.map_folder import load_map
from feedforward_recon.session.merging import merge_maps
from feedforward_recon.session.photo_cameras import guessed_camera
from feedforward_recon.session.photos import reconstruct_frames
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Frame, Trajectory

CAMERA = Camera.from_fov(70.0, (320, 240))
CONFIG = PhotoConfig(encoder=EncoderConfig(max_keypoints=800, spacing_px=5),
                     memory=MemoryConfig(slots=8000))
ENCODER = CompactEncoder.load(config=CONFIG.encoder)


def views(seed, count=14, camera=CAMERA):
    """Views of a room, in an order that says nothing; without depth."""
    room = Room.generate(seed)
    frames = [Frame(frame.stamp_ns, frame.image, camera=camera, T_map_cam=frame.T_map_cam,
                    source=f'{seed}_{index:02d}.png')
              for index, frame in enumerate(render_walk(room, camera, room.walk(
                  count, seed=0, fps=4.0), fps=4.0))]
    return [frames[k] for k in np.random.default_rng(0).permutation(count)]


@pytest.fixture(scope='module')
def photos():
    return views(5)


@pytest.fixture(scope='module')
def run(photos):
    return reconstruct_frames(photos, CONFIG)[0]


def error_of(run, frames):
    """ATE after a similarity, metres, and the median turn, degrees."""
    by_stamp = {frame.stamp_ns: frame.T_map_cam for frame in frames}
    trajectory = run.scene.trajectory
    truth = Trajectory(trajectory.stamps_ns, np.stack([by_stamp[s] for s in
                                                       trajectory.stamps_ns.tolist()]))
    order = np.argsort(trajectory.stamps_ns)
    error = absolute_trajectory_error(*(Trajectory(t.stamps_ns[order], t.T_map_cam[order])
                                        for t in (trajectory, truth)), 'sim3')
    return error.rmse, error.rotation_median_deg


def test_views_in_any_order_become_a_map(run, photos):
    assert len(run.scene.trajectory) == len(photos)
    rmse, turn_deg = error_of(run, photos)
    assert rmse < 0.01 and turn_deg < 0.15
    assert run.scene.metres_per_unit is None and run.scene.camera_source == 'given'
    np.testing.assert_allclose(run.scene.estimates[0].T_map_cam, np.eye(4), atol=1e-12)
    assert (np.diff(run.scene.trajectory.stamps_ns) > 0).all()
    assert [e.source for e in run.scene.estimates] == [f.source for f in photos]
    assert len(run.scene.cloud) > 100
    depth = [k.points_cam[k.has_point, 2] for k in run.scene.keyframes]
    assert 0.7 < np.median(np.concatenate(depth)) < 1.4  # the unit is the typical depth


def test_refinement_is_worth_its_time(run, photos):
    rough = reconstruct_frames(photos, PhotoConfig(
        encoder=CONFIG.encoder, memory=CONFIG.memory,
        reconstruction=ReconstructionConfig(refine=False)))[0]
    assert len(rough.scene.trajectory) == len(photos)
    assert error_of(run, photos)[0] < 0.3 * error_of(rough, photos)[0]


def test_the_result_does_not_depend_on_the_order_or_the_workers(run, photos):
    with threads(1) as engine:
        again = reconstruct_frames(photos, CONFIG, engine=engine)[0]
    assert np.array_equal(again.scene.trajectory.T_map_cam, run.scene.trajectory.T_map_cam)
    turned = reconstruct_frames(photos[::-1], CONFIG)[0]
    assert len(turned.scene.trajectory) == len(photos)
    assert error_of(turned, photos)[0] < 0.01


def test_what_does_not_belong_has_no_pose_and_a_reason(run, photos):
    black = Frame(10**12, np.zeros((240, 320, 3), np.uint8), camera=CAMERA, source='black.png')
    strangers = [Frame(10**12 + 1 + k, f.image, camera=CAMERA, source=f.source)
                 for k, f in enumerate(views(77, 3))]
    mixed = reconstruct_frames([black, *photos[:7], *strangers, *photos[7:]], CONFIG)[0]
    without = {e.source: e.reason for e in mixed.scene.estimates if e.T_map_cam is None}
    assert without == dict.fromkeys(['black.png', *(f.source for f in strangers)], 'NO_OVERLAP')
    assert error_of(mixed, photos)[0] < 0.01


def brighter(image):
    """As if another program had saved it: nearly the same bytes, but not quite."""
    return np.clip(image.astype(int) + 1, 0, 255).astype(np.uint8)


@pytest.mark.parametrize('saved', [np.copy, brighter])
def test_the_same_photo_twice_stands_in_one_place(photos, saved):
    copies = [Frame(10**12 + k, saved(f.image), camera=CAMERA, source=f'copy {f.source}')
              for k, f in enumerate(photos[:4])]
    scene = reconstruct_frames([*photos, *copies], CONFIG)[0].scene
    T = {e.source: e.T_map_cam for e in scene.estimates}
    assert all(pose is not None for pose in T.values())
    for copy, frame in zip(copies, photos, strict=False):
        distance, turn_deg = pose_error(T[copy.source], T[frame.source])
        assert distance < 2e-3 and turn_deg < 0.1


def test_photos_of_several_sizes_and_cameras_are_one_map(photos):
    small = Camera.from_fov(70.0, (240, 180))
    mixed = [Frame(f.stamp_ns, cv2.resize(f.image, small.size_wh, interpolation=cv2.INTER_AREA),
                   camera=small, source=f.source) if k % 3 == 0 else f
             for k, f in enumerate(photos)]
    run = reconstruct_frames(mixed, CONFIG)[0]
    assert len(run.scene.trajectory) == len(photos)
    assert error_of(run, photos)[0] < 0.02


def test_large_photos_are_seen_smaller_and_mapped_at_their_size(photos):
    large = Camera.from_fov(70.0, (960, 720))
    frames = [Frame(f.stamp_ns, cv2.resize(f.image, large.size_wh, interpolation=cv2.INTER_CUBIC),
                    camera=large, source=f.source) for f in photos]
    config = replace(CONFIG, encoder=replace(CONFIG.encoder, max_pixels=320 * 240))
    run = reconstruct_frames(frames, config)[0]
    assert error_of(run, photos)[0] < 0.01
    keyframe = run.scene.keyframes[0]
    assert keyframe.camera.size_wh == large.size_wh
    known = keyframe.has_point
    shown = keyframe.camera.project(keyframe.points_cam[known])
    assert np.linalg.norm(shown - keyframe.features.keypoints[known], axis=1).max() < 0.01
    assert keyframe.camera.fx == pytest.approx(large.fx, rel=0.01)
    localizer = Localizer(run.memory, run.encoder, camera=keyframe.camera)
    estimate = localizer.localize(frames[5])
    pose = {e.source: e.T_map_cam for e in run.scene.estimates}[frames[5].source]
    assert pose_error(estimate.T_map_cam, pose)[0] < 0.02


def test_an_image_that_few_points_agree_with_has_no_pose_and_no_landmarks(run, photos,
                                                                         monkeypatch):
    seen = np.array([estimate.inliers for estimate in run.scene.estimates])
    least = int(np.sort(seen)[4])
    monkeypatch.setattr(pipeline, 'MIN_OBSERVATIONS', least)
    again = reconstruct_frames(photos, CONFIG)[0]
    assert len(again.scene.trajectory) == len(photos)  # placed by points, as if it were blurred
    assert error_of(again, photos)[0] < 0.02
    monkeypatch.setattr(registration, 'MIN_INLIERS', 10**6)
    scene = reconstruct_frames(photos, CONFIG)[0].scene
    reasons = [estimate.reason for estimate in scene.estimates]
    assert reasons == ['TOO_FEW_SHARED' if count < least else '' for count in seen]
    table = scene.graph.arrays
    assert table['landmarks.anchor'].min() >= 0
    assert np.bincount(table['seen_landmark']).min() >= 2


def test_an_image_that_no_pair_places_is_placed_by_points(photos):
    shots = [shot_of(frame, CAMERA, ENCODER, CONFIG.encoder.max_pixels) for frame in photos]
    comparisons = compared(shots, CompactPairs(shots, ENCODER), CONFIG.reconstruction)
    for edge in [edge for edge in comparisons.pairs if 5 in edge]:
        del comparisons.pairs[edge]  # its matches are still known
    alone = assembled(PhotoSet(shots, comparisons, ReconstructionConfig(refine=False)))[0]
    assert not alone.registered[5] and alone.reasons[5] == 'NO_OVERLAP'
    done = assembled(PhotoSet(shots, comparisons, CONFIG.reconstruction))[0]
    assert done.registered.all()
    stamps = np.arange(len(photos))
    truth = np.stack([frame.T_map_cam for frame in photos])
    error = absolute_trajectory_error(Trajectory(stamps, done.structure.T_map_cam),
                                      Trajectory(stamps, truth), 'sim3')
    assert error.max < 0.03


def test_a_focal_length_that_nobody_gave_is_found(photos):
    bare = [Frame(f.stamp_ns, f.image, source=f.source) for f in photos]
    run = reconstruct_frames(bare, CONFIG)[0]
    assert len(run.scene.trajectory) == len(photos)
    assert run.scene.camera_source == 'refined'
    assert run.scene.keyframes[0].camera.fx == pytest.approx(CAMERA.fx, rel=0.02)
    assert abs(np.log(guessed_camera((320, 240)).fx / CAMERA.fx)) > 0.2  # the guess was far off


def test_a_focal_length_that_was_guessed_far_off_is_tried_again(photos, monkeypatch):
    bare = [Frame(f.stamp_ns, f.image, source=f.source) for f in photos]
    tried = []
    monkeypatch.setattr(reading_module, 'guessed_camera', lambda size_wh: CAMERA.with_lens(2.0, 0))
    monkeypatch.setattr(photos_module, 'reconstruct', lambda shots, *rest: (
        tried.append(shots[0].camera.fx), reconstruct(shots, *rest))[1])
    run = reconstruct_frames(bare, CONFIG)[0]
    assert len(tried) > 1 and tried[0] == pytest.approx(2 * CAMERA.fx)
    assert abs(np.log(tried[-1] / CAMERA.fx)) < 0.1
    assert run.scene.keyframes[0].camera.fx == pytest.approx(CAMERA.fx, rel=0.02)


def test_one_photo_is_refused(photos):
    with pytest.raises(InputError, match='at least two different images, found 1;'):
        reconstruct_frames(photos[:1], CONFIG)


def test_copies_of_one_photo_are_refused(photos):
    copies = [Frame(k, photos[0].image, camera=CAMERA, source=f'{k}.png') for k in range(200)]
    with pytest.raises(InputError, match='found 200 copies of one'):
        reconstruct_frames(copies, CONFIG)


def test_photos_that_share_nothing_are_refused(photos):
    with pytest.raises(MapError, match='found none among 2'):
        reconstruct_frames([photos[0], views(77, 3)[0]], CONFIG)


def test_two_photos_of_one_place_are_a_map():
    frames = sorted(views(5), key=lambda frame: frame.stamp_ns)[:2]
    scene = reconstruct_frames(frames, CONFIG)[0].scene
    assert len(scene.trajectory) == 2


@pytest.fixture(scope='module')
def folder(photos, tmp_path_factory):
    return as_files(photos, tmp_path_factory.mktemp('photos'))


def as_files(frames, folder):
    """A folder of the images alone, without intrinsics."""
    for frame in frames:
        cv2.imwrite(str(folder / frame.source), frame.image[..., ::-1])
    return folder


SETTINGS = ['--fov', '70', '--set', 'encoder.max_keypoints=800', '--set', 'encoder.spacing_px=5',
            '--set', 'memory.slots=8000']


def test_the_command_writes_a_map_that_images_are_found_in(folder, photos, tmp_path, capsys):
    assert main(['reconstruct', str(folder), *SETTINGS, '--out', str(tmp_path / 'map'),
                 '--json']) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary['frames'], summary['tracked'], summary['unregistered']) == (14, 14, {})
    assert summary['memory_bytes'] == load_map(tmp_path / 'map').info.files[
        'memory.safetensors']['bytes']
    localizer = load_map(tmp_path / 'map').localizer()
    poses = {entry['file']: np.array(entry['T_map_cam'])
             for entry in load_map(tmp_path / 'map').poses()}
    for frame in photos[::4]:
        estimate = localizer.localize(Frame(0, frame.image, source=frame.source))
        distance, turn_deg = pose_error(estimate.T_map_cam, poses[frame.source])
        assert distance < 0.02 and turn_deg < 0.5


def test_another_walk_goes_on_with_a_map_of_photos(folder, tmp_path):
    out = str(tmp_path / 'map')
    assert main(['reconstruct', str(folder), *SETTINGS, '--out', out, '--json']) == 0
    assert main(['map', str(folder), '--into', out, '--json']) == 0
    assert load_map(out).info.sessions == 2


def test_a_file_of_settings_may_have_those_of_photos(folder, tmp_path, capsys):
    file = tmp_path / 'photos.yaml'
    file.write_text('reconstruction: {neighbours: 6}\nmemory: {slots: 5000}\n')
    assert settings(PhotoConfig(), file, None).reconstruction.neighbours == 6
    file.write_text('reconstruction: {neighbors: 6}\n')
    assert main(['reconstruct', str(folder), '--config', str(file), '--out',
                 str(tmp_path / 'map')]) != 0
    assert 'photos.yaml: unknown setting reconstruction.neighbors; did you mean ' \
        'reconstruction.neighbours' in capsys.readouterr().err.replace('\n', ' ')


FILM_DIAGONAL_MM = np.hypot(36, 24)


def with_exif(folder, photos, focal_35_mm):
    """The photos as JPEGs; EXIF tells their 35 mm equivalents in turn, of 0 nothing."""
    folder.mkdir()
    for k, frame in enumerate(photos):
        block, value = Image.Exif(), focal_35_mm[k % len(focal_35_mm)]
        if value:
            block.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = value
        Image.fromarray(frame.image).save(folder / f'{k:02d}.jpg', exif=block, quality=95)
    return folder


def summary_of(capsys, folder, out, *more):
    assert main(['reconstruct', str(folder), *SETTINGS[2:], '--out', str(out), '--json',
                 *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_photos_of_which_some_have_exif_are_of_one_camera_that_is_refined(photos, tmp_path,
                                                                          capsys, monkeypatch):
    tried = []
    monkeypatch.setattr(photos_module, 'reconstruct', lambda shots, *rest: (
        tried.append([shot.camera.fx for shot in shots]), reconstruct(shots, *rest))[1])
    folder = with_exif(tmp_path / 'photos', photos, (25, 0, 0))
    summary = summary_of(capsys, folder, tmp_path / 'map')
    assert (summary['tracked'], summary['camera_source']) == (14, 'refined')
    assert tried == [[pytest.approx(25 / FILM_DIAGONAL_MM * 400)] * 14]
    assert summary['fx'] == pytest.approx(CAMERA.fx, rel=0.02)


def test_a_focal_length_of_exif_that_is_not_refined_is_said(photos, tmp_path, capsys):
    folder = with_exif(tmp_path / 'photos', photos, (25,))
    summary = summary_of(capsys, folder, tmp_path / 'map', '--set', 'reconstruction.refine=false')
    assert summary['camera_source'] == load_map(tmp_path / 'map').info.camera_source == 'exif'
    assert summary['fx'] == pytest.approx(25 / FILM_DIAGONAL_MM * 400)
    assert main(['info', str(tmp_path / 'map')]) == 0
    assert 'fx 231.1 px, exif' in capsys.readouterr().out


@pytest.fixture(scope='module')
def of_two_cameras(photos):
    """The photos, of which every third is of a camera that shows less."""
    narrow = CAMERA.cropped(40, 30, (240, 180))
    return [replace(f, image=f.image[30:210, 40:280], camera=narrow) if k % 3 == 0 else f
            for k, f in enumerate(photos)]


@pytest.mark.parametrize(('narrow_35_mm', 'narrow_px', 'camera_source'), [
    (33, 33 / FILM_DIAGONAL_MM * 300, 'exif'), (0, 240.0, 'guessed')])
def test_photos_of_several_cameras_keep_what_exif_says_of_each(
        of_two_cameras, tmp_path, capsys, narrow_35_mm, narrow_px, camera_source):
    folder = with_exif(tmp_path / 'photos', of_two_cameras, (narrow_35_mm, 25, 25))
    summary = summary_of(capsys, folder, tmp_path / 'map')
    assert (summary['tracked'], summary['camera_source']) == (14, camera_source)
    for k, entry in enumerate(load_map(tmp_path / 'map').poses()):
        expected = 25 / FILM_DIAGONAL_MM * 400 if k % 3 else narrow_px
        assert entry['camera'].fx == pytest.approx(expected)


@pytest.fixture(scope='module')
def two_cameras(of_two_cameras, tmp_path_factory):
    """A map of photos of two cameras, and of a copy of one."""
    frames = of_two_cameras
    copy = replace(frames[3], stamp_ns=10**12, source='copy.png')
    run = reconstruct_frames([*frames, copy], CONFIG)[0]
    assert len(run.scene.trajectory) == 15
    return run, run.save(tmp_path_factory.mktemp('two') / 'map')


def test_colmap_gets_each_image_with_its_own_camera(two_cameras, tmp_path):
    pycolmap = pytest.importorskip('pycolmap')
    run, saved = two_cameras
    out = tmp_path / 'colmap'
    assert main(['export', str(saved.path), '--format', 'colmap', '--out', str(out)]) == 0
    model = pycolmap.Reconstruction(out)
    images = {image.name: image for image in model.images.values()}
    assert len(images) == 15 and len(model.cameras) == 2
    for keyframe in run.scene.keyframes:
        image, known = images[keyframe.source], keyframe.has_point
        assert (image.camera.width, image.camera.height) == keyframe.camera.size_wh
        points = transform_points(keyframe.T_map_cam, keyframe.points_cam[known])
        shown = np.array([image.project_point(point) for point in points]) - 0.5
        error = np.linalg.norm(shown - keyframe.features.keypoints[known], axis=1)
        assert known.sum() > 50 and error.max() < 0.02
    first = next(e for e in run.scene.estimates if e.camera.width == 240)
    copy, original = images['copy.png'], images[first.source]
    assert copy.camera.width == 240 and original.camera_id == copy.camera_id


def test_merged_maps_keep_the_camera_of_each_image(two_cameras, run, tmp_path):
    other = run.save(tmp_path / 'one')
    merged = merge_maps(two_cameras[1], other).scene
    before = {entry['file']: entry['camera'] for entry in two_cameras[1].poses()}
    assert len({camera.size_wh for camera in before.values()}) == 2
    after = merged.estimates
    assert {e.source: e.camera for e in after[:15]} == before
    assert {e.camera.size_wh for e in after[15:]} == {(320, 240)}


def test_maps_saved_without_cameras_of_images_export_that_of_the_map(two_cameras, tmp_path):
    saved = two_cameras[1]
    entries = [{k: v for k, v in entry.items() if k != 'camera'}
               for entry in json.loads((saved.path / 'poses.json').read_text())]
    older = tmp_path / 'older'
    shutil.copytree(saved.path, older)
    write_entries(older / 'poses.json', entries)
    content = (older / 'poses.json').read_bytes()
    description = yaml.safe_load((older / 'map.yaml').read_text())
    description['files']['poses.json'] = {'bytes': len(content),
                                          'sha256': hashlib.sha256(content).hexdigest()}
    (older / 'map.yaml').write_text(yaml.safe_dump(description))
    assert {e['camera'] for e in load_map(older).poses()} == {saved.info.camera}


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (['--set', 'reconstruction.tree=oak'], 'shortest'),
    (['--set', 'reconstruction.neighbors=3'], 'did you mean reconstruction.neighbours'),
    (['--workers', '-1'], 'workers'),
])
def test_bad_options_are_one_sentence(folder, tmp_path, capsys, arguments, sentence):
    assert main(['reconstruct', str(folder), '--out', str(tmp_path / 'map'), *arguments]) != 0
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / 'map').exists()
