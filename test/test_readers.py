"""Sources: what is written to disk comes back, and bad input gives one sentence."""

import json
import shutil

import cv2
import numpy as np
import pytest

from feedforward_recon.errors import ConfigError, InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import quat_xyzw_from_matrix
from feedforward_recon.io import SourceOptions, open_source, require_cameras
from feedforward_recon.io.source import mutual_nearest, seconds

SETS = {'7scenes_redkitchen': 500, 'kitti_seq2': 51, 'llff_flower': 34, 'llff_fortress': 42,
        'llff_room': 41, 'lund_door': 12, 'ngp_fox': 50, 'strecha_Herz-Jesus-P25': 25,
        'strecha_Herz-Jesus-P8': 8, 'tabletop_cup': 77}


def write_rgb(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])


def write_depth(path, depth, units_per_metre):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.rint(depth * units_per_metre).astype(np.uint16))


def cameras_entry(index, frame):
    return {'file': f'images/{index}.png', 'timestamp': frame.stamp_ns / 1e9,
            'K': frame.camera.K.tolist(), 'distortion': [], 'depth': f'depth/{index}.png',
            'T_world_camera': frame.T_map_cam.tolist()}


@pytest.fixture(scope='module')
def pristine(tmp_path_factory, room_frames):
    folder = tmp_path_factory.mktemp('set')
    for index, frame in enumerate(room_frames):
        write_rgb(folder / f'images/{index}.png', frame.image)
        write_depth(folder / f'depth/{index}.png', frame.depth, 1000)
    entries = [cameras_entry(index, frame) for index, frame in enumerate(room_frames)]
    (folder / 'cameras.json').write_text(json.dumps({'frames': entries}))
    return folder


@pytest.fixture
def image_set(tmp_path, pristine):
    """A copy of the set that a test may damage."""
    return shutil.copytree(pristine, tmp_path / 'set')


def edit(folder, change):
    """Apply ``change`` to the list of frames in cameras.json."""
    path = folder / 'cameras.json'
    document = json.loads(path.read_text())
    change(document['frames'])
    path.write_text(json.dumps(document))


def assert_frames_equal(found, expected, depth_tolerance=0.0):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_allclose(a.depth, b.depth, rtol=1e-6, atol=depth_tolerance)
        np.testing.assert_allclose(a.T_map_cam, b.T_map_cam, atol=1e-6)
        assert a.stamp_ns == b.stamp_ns


# Folders with cameras.json


def test_a_set_comes_back(pristine, room_frames):
    source = open_source(str(pristine))
    assert_frames_equal(list(source), room_frames, depth_tolerance=0.00051)
    assert [f.camera for f in source] == [f.camera for f in room_frames]
    assert (source.has_depth, source.has_poses, source.calibrated) == (True, True, True)
    assert next(iter(source)).source == 'images/0.png'


def test_reading_again_and_in_slices_gives_the_same_frames(pristine):
    source = open_source(pristine)
    stamps = [f.stamp_ns for f in source]
    assert [f.stamp_ns for f in source] == stamps
    assert [f.stamp_ns for f in source.frames(2, 9, 3)] == stamps[2:9:3]
    assert [f.stamp_ns for f in source.frames(len(source))] == []
    with pytest.raises(ValueError, match='start'):
        source.frames(-1)


def test_step_and_max_frames_count_from_the_first(pristine):
    every = [f.stamp_ns for f in open_source(pristine)]
    source = open_source(pristine, SourceOptions(step=3, max_frames=2))
    assert len(source) == 2
    assert [f.stamp_ns for f in source] == every[::3][:2]


def test_stamps_keep_every_nanosecond(image_set):
    text = (image_set / 'cameras.json').read_text()
    document = json.loads(text)
    for index, frame in enumerate(document['frames']):
        frame['timestamp'] = f'@{index}'
    text = json.dumps(document)
    for index in range(len(document['frames'])):
        text = text.replace(f'"@{index}"', f'1700000000.12345678{index % 10}'
                            if index < 10 else f'170000000{index}.5')
    (image_set / 'cameras.json').write_text(text)
    stamps = [f.stamp_ns for f in open_source(image_set).frames(0, 10)]
    assert stamps == [1_700_000_000_123_456_780 + index for index in range(10)]


def test_frames_without_stamps_are_ordered_by_index(image_set):
    edit(image_set, lambda frames: [frame.update(timestamp=None) for frame in frames])
    stamps = np.array([f.stamp_ns for f in open_source(image_set)])
    np.testing.assert_array_equal(np.diff(stamps), 100_000_000)


def test_a_stereo_set_gives_one_camera(image_set):
    def alternate(frames):
        for index, frame in enumerate(frames):
            frame.update(camera='left' if index % 2 else 'right', timestamp=index // 2)
    edit(image_set, alternate)
    assert [f.source for f in open_source(image_set)] == [
        f'images/{index}.png' for index in range(1, 12, 2)]
    right = open_source(image_set, SourceOptions(camera='right'))
    assert next(iter(right)).source == 'images/0.png'
    with pytest.raises(InputError, match=r"'left', 'right'.*'top'"):
        open_source(image_set, SourceOptions(camera='top'))


def test_depth_can_be_left_unread(image_set):
    shutil.rmtree(image_set / 'depth')
    source = open_source(image_set, SourceOptions(use_depth=False))
    assert not source.has_depth
    assert all(frame.depth is None for frame in source)


@pytest.mark.parametrize(('options', 'camera'), [
    (SourceOptions(fx=100.0), Camera(160, 120, 100, 100, 79.5, 59.5)),
    (SourceOptions(fx=100.0, fy=90.0, cx=80.0, cy=61.0, distortion=(.1, .2, 0, 0)),
     Camera(160, 120, 100, 90, 80, 61, (.1, .2, 0, 0))),
    (SourceOptions(fx=100.0, distortion=(.1,) * 8),
     Camera(160, 120, 100, 100, 79.5, 59.5, (.1,) * 8, 'rational')),
    (SourceOptions(fx=100.0, distortion=(.1,) * 4, distortion_model='fisheye'),
     Camera(160, 120, 100, 100, 79.5, 59.5, (.1,) * 4, 'fisheye')),
    (SourceOptions(fov_deg=80.0), Camera.from_fov(80.0, (160, 120))),
])
def test_the_users_intrinsics_replace_those_of_the_source(pristine, options, camera):
    source = open_source(pristine, options)
    require_cameras(source)
    assert next(iter(source)).camera == camera


def test_a_calibration_file_of_ros_is_read(pristine, tmp_path):
    path = tmp_path / 'ost.yaml'
    path.write_text('image_width: 160\nimage_height: 120\ndistortion_model: plumb_bob\n'
                    'camera_matrix: {rows: 3, cols: 3, data: [99, 0, 81, 0, 98, 62, 0, 0, 1]}\n'
                    'distortion_coefficients: {rows: 1, cols: 5, data: [.1, 0, 0, 0, 0]}\n')
    frame = next(iter(open_source(pristine, SourceOptions(calibration=str(path)))))
    assert frame.camera == Camera(160, 120, 99, 98, 81, 62, (.1, 0, 0, 0, 0))
    for damaged, words in ((path.read_text().replace('160', '161'), '161x120'),
                           ('image_width: 160', 'KeyError'), ('{', 'camera_calibration YAML'),
                           (path.read_text().replace('99', '0'), 'fx = 0')):
        path.write_text(damaged)
        with pytest.raises(InputError, match=rf'ost\.yaml: expected.*{words}'):
            list(open_source(pristine, SourceOptions(calibration=str(path))))


@pytest.mark.parametrize('options', [
    {'fx': 1.0, 'fov_deg': 60.0}, {'cx': 5.0}, {'distortion': (0.1,)}, {'step': 0},
    {'max_frames': 0}, {'depth_units_per_metre': 0.0}, {'fov_deg': 60.0, 'calibration': 'x'}])
def test_contradicting_options_are_refused(options):
    with pytest.raises(ConfigError, match='expected'):
        SourceOptions(**options)


# Plain images


def test_plain_images_come_in_natural_order_without_camera(tmp_path, room_frames):
    for index in (10, 2, 1):
        write_rgb(tmp_path / f'img{index}.png', room_frames[index].image)
    (tmp_path / 'notes.txt').write_text('not an image')
    (tmp_path / '._img3.png').write_text('left behind by a Mac')
    source = open_source(tmp_path)
    assert [f.source for f in source] == ['img1.png', 'img2.png', 'img10.png']
    assert all(f.camera is None and f.depth is None and f.T_map_cam is None for f in source)
    with pytest.raises(InputError, match='intrinsics'):
        require_cameras(source)
    require_cameras(open_source(tmp_path, SourceOptions(fov_deg=70.0)))


def test_one_image_file_is_a_source(tmp_path, room_frames):
    write_rgb(tmp_path / 'one.png', room_frames[0].image)
    (frame,) = open_source(tmp_path / 'one.png')
    np.testing.assert_array_equal(frame.image, room_frames[0].image)
    assert frame.source == 'one.png'


def test_sizes_may_be_mixed_only_on_request(tmp_path, room_frames):
    write_rgb(tmp_path / '0.png', room_frames[0].image)
    write_rgb(tmp_path / '1.png', room_frames[1].image[:100])
    with pytest.raises(InputError, match=r'1\.png: expected 160x120 .* found 160x100'):
        list(open_source(tmp_path))
    options = SourceOptions(mixed_sizes=True, fov_deg=70.0)
    assert [f.camera.size_wh for f in open_source(tmp_path, options)] == [(160, 120), (160, 100)]


# TUM RGB-D


@pytest.fixture
def tum(tmp_path, room_frames):
    """A TUM folder whose depth is 7 ms late, with noise in the lists that is allowed."""
    lines = {'rgb': ['# colour images'], 'depth': [], 'groundtruth': ['# timestamp tx ty ...']}
    for index, frame in enumerate(room_frames):
        stamp_ns = frame.stamp_ns + 1_305_031_102_175_304_000
        write_rgb(tmp_path / f'rgb/{index}.png', frame.image)
        write_depth(tmp_path / f'depth/{index}.png', frame.depth, 5000)
        lines['rgb'].append(f'{seconds(stamp_ns)} rgb/{index}.png')
        lines['depth'].append(f'{seconds(stamp_ns + 7_000_000)} depth/{index}.png')
        pose = [*frame.T_map_cam[:3, 3], *quat_xyzw_from_matrix(frame.T_map_cam[:3, :3])]
        lines['groundtruth'].append(seconds(stamp_ns - 3_000_000) + ' '
                                    + ' '.join(f'{value:.9f}' for value in pose))
    for name, content in lines.items():
        (tmp_path / f'{name}.txt').write_text('\n'.join(content) + '\n')
    return tmp_path


def drop_line(path, number):
    lines = path.read_text().splitlines()
    del lines[number]
    path.write_text('\n'.join(lines))


def test_a_tum_folder_is_associated(tum, room_frames):
    source = open_source(tum)
    frames = list(source)
    assert [f.source for f in frames] == [f'rgb/{index}.png' for index in range(12)]
    for found, expected in zip(frames, room_frames, strict=True):
        np.testing.assert_allclose(found.depth, expected.depth, atol=0.00011)
        np.testing.assert_allclose(found.T_map_cam, expected.T_map_cam, atol=1e-6)
        assert found.stamp_ns == expected.stamp_ns + 1_305_031_102_175_304_000
    assert source.has_poses
    assert not source.calibrated


def test_tum_images_without_depth_are_left_out_and_said(tum, caplog):
    drop_line(tum / 'depth.txt', 4)
    assert [f.source for f in open_source(tum).frames(3, 6)] == [
        'rgb/3.png', 'rgb/5.png', 'rgb/6.png']
    assert '1 of 12 images have no depth' in caplog.text
    assert len(open_source(tum, SourceOptions(use_depth=False))) == 12


def test_tum_without_truth_or_depth_is_a_plain_walk(tum):
    (tum / 'groundtruth.txt').unlink()
    (tum / 'depth.txt').unlink()
    source = open_source(tum)
    assert len(source) == 12
    assert not source.has_poses
    assert not source.has_depth


@pytest.mark.parametrize(('name', 'content', 'words'), [
    ('rgb.txt', '1.0 rgb/0.png\n0.5 rgb/1.png\n', r'increasing.*0\.500000000 s after'),
    ('rgb.txt', 'one rgb/0.png\n', 'line 1'),
    ('rgb.txt', '1.0\n', 'line 1'),
    ('rgb.txt', '# nothing\n', 'one line per image'),
    ('rgb.txt', '1305031102.175304 rgb/none.png\n', r'none\.png: expected an image file'),
    ('depth.txt', '5.0 depth/0.png\n', 'within 20 ms'),
    ('groundtruth.txt', '5.0 0 0 0 0 0 0 0\n', r'groundtruth\.txt.*quaternion'),
    ('groundtruth.txt', '5.0 0 0 x 0 0 0 1\n', r'groundtruth\.txt'),
])
def test_damaged_tum_lists_are_refused(tum, name, content, words):
    (tum / name).write_text(content)
    with pytest.raises(InputError, match=words):
        open_source(tum)


def test_partners_are_nearest_to_each_other():
    rng = np.random.default_rng(0)
    a = np.cumsum(rng.integers(1_000_000, 50_000_000, 200))
    b = np.cumsum(rng.integers(1_000_000, 50_000_000, 200))
    partner = mutual_nearest(a, b)
    distance = np.abs(a[:, None] - b[None])
    for index, other in enumerate(partner):
        best = distance[index].argmin()
        mutual = distance[:, best].argmin() == index and distance[index, best] <= 20_000_000
        assert other == (best if mutual else -1)
    used = partner[partner >= 0]
    assert len(used) == len(set(used)) > 20


# 7-Scenes


@pytest.fixture
def seven_scenes(tmp_path, room_frames):
    for index, frame in enumerate(room_frames):
        folder = tmp_path / f'seq-0{1 + index // 8}'
        stem = f'frame-{index % 8:06d}'
        write_rgb(folder / f'{stem}.color.png', frame.image)
        depth = frame.depth.copy()
        depth[:10] = 65.535
        write_depth(folder / f'{stem}.depth.png', depth, 1000)
        np.savetxt(folder / f'{stem}.pose.txt', frame.T_map_cam)
    return tmp_path


def test_a_7scenes_scene_is_its_sequences_in_order(seven_scenes, room_frames):
    source = open_source(seven_scenes)
    frames = list(source)
    for found, expected in zip(frames, room_frames, strict=True):
        np.testing.assert_array_equal(found.image, expected.image)
        np.testing.assert_allclose(found.T_map_cam, expected.T_map_cam, atol=1e-9)
        assert not found.depth[:10].any()
        np.testing.assert_allclose(found.depth[10:], expected.depth[10:], atol=0.00051)
    gaps = np.diff([f.stamp_ns for f in frames])
    assert set(np.delete(gaps, 7)) <= {33_333_333, 33_333_334}
    assert gaps[7] == 10_000_000_000
    assert not source.calibrated
    assert len(open_source(seven_scenes / 'seq-02')) == 4


def test_7scenes_poses_may_be_lost_but_not_damaged(seven_scenes):
    pose = seven_scenes / 'seq-01/frame-000003.pose.txt'
    pose.write_text('nan ' * 16)
    assert next(open_source(seven_scenes).frames(3)).T_map_cam is None
    pose.write_text('1 0 0')
    with pytest.raises(InputError, match=r'000003\.pose\.txt: expected a 4x4 pose'):
        open_source(seven_scenes)
    pose.write_text('2 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1')
    with pytest.raises(InputError, match=r'000003\.pose\.txt: expected a rigid'):
        open_source(seven_scenes)


# Video


def write_video(path, frames, codec, fps=12.5):
    height, width = frames[0].image.shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (width, height))
    if not writer.isOpened():
        pytest.skip(f'this OpenCV cannot write {codec} video')
    for frame in frames:
        writer.write(frame.image[..., ::-1])
    writer.release()


@pytest.mark.parametrize(('name', 'codec'), [('walk.mp4', 'mp4v'), ('walk.avi', 'MJPG')])
def test_a_video_comes_back_with_its_times(tmp_path, room_frames, name, codec):
    write_video(tmp_path / name, room_frames, codec)
    source = open_source(tmp_path / name, SourceOptions(fov_deg=70.0))
    frames = list(source)
    assert len(source) == len(frames) == len(room_frames)
    np.testing.assert_allclose([f.stamp_ns for f in frames], np.arange(12) * 80_000_000, atol=1e6)
    for found, expected in zip(frames, room_frames, strict=True):
        assert np.abs(found.image.astype(int) - expected.image).mean() < 12
        assert found.camera == Camera.from_fov(70.0, (160, 120))


def test_video_slices_are_the_same_frames(tmp_path, room_frames):
    write_video(tmp_path / 'walk.avi', room_frames, 'MJPG')
    source = open_source(tmp_path / 'walk.avi')
    every = list(source)
    for found, expected in zip(source.frames(1, 10, 4), every[1:10:4], strict=True):
        np.testing.assert_array_equal(found.image, expected.image)
        assert (found.stamp_ns, found.source) == (expected.stamp_ns, expected.source)


@pytest.mark.parametrize('content', [b'', b'no video', b'\x00\x00\x00\x18ftypmp42' + b'\x01' * 99])
def test_what_is_no_video_is_refused(tmp_path, content):
    (tmp_path / 'walk.mp4').write_bytes(content)
    with pytest.raises(InputError, match=r'walk\.mp4: expected a video'):
        open_source(tmp_path / 'walk.mp4')


# Bad input: each gives one sentence that names the file


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match=r'nowhere: expected a folder, video or bag'):
        open_source(tmp_path / 'nowhere')
    with pytest.raises(InputError, match=r'expected images.*found nothing'):
        open_source(tmp_path)
    (tmp_path / 'readme.txt').write_text('x')
    with pytest.raises(InputError, match=r'expected images.*found readme\.txt'):
        open_source(tmp_path)


def test_ros1_bags_are_refused(tmp_path):
    (tmp_path / 'old.bag').write_bytes(b'#ROSBAG V2.0\n')
    with pytest.raises(InputError, match='rosbags-convert'):
        open_source(tmp_path / 'old.bag')


@pytest.mark.parametrize('text', ['{"frames": [', '[]', '{}', '{"frames": []}', '{"frames": [1]}',
                                  '\xff\xfe'])
def test_a_corrupted_cameras_json_is_refused(image_set, text):
    (image_set / 'cameras.json').write_bytes(text.encode('latin-1'))
    with pytest.raises(InputError, match=r'cameras\.json: expected'):
        open_source(image_set)


@pytest.mark.parametrize(('change', 'words'), [
    ({'file': None}, r'cameras\.json: frame 3'),
    ({'K': [[1, 2], [3, 4]]}, r'frame 3: expected a finite 3x3'),
    ({'K': 'fx'}, 'frame 3'),
    ({'timestamp': 'noon'}, 'frame 3'),
    ({'timestamp': None}, '11 of 12'),
    ({'distortion': 5}, 'frame 3'),
    ({'T_world_camera': np.zeros((4, 4)).tolist()}, 'frame 3: expected a rigid'),
    ({'T_world_camera': np.diag([1, 1, -1, 1]).tolist()}, 'frame 3: expected a rigid'),
    ({'file': 'images/none.png'}, r'none\.png: expected an image file'),
    ({'depth': 'depth/none.png'}, r'none\.png: expected an image file'),
    ({'timestamp': 0.01}, r'3\.png: expected a later time stamp.* s earlier'),
])
def test_damaged_entries_are_refused_when_opened(image_set, change, words):
    edit(image_set, lambda frames: frames[3].update(change))
    with pytest.raises(InputError, match=words):
        open_source(image_set)


def test_equal_stamps_are_refused(image_set):
    edit(image_set, lambda frames: frames[3].update(timestamp=frames[2]['timestamp']))
    with pytest.raises(InputError, match=r'3\.png.*the same one again'):
        open_source(image_set)


def test_a_truncated_image_is_refused(image_set):
    path = image_set / 'images/3.png'
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r'3\.png: expected a whole image, found one truncated'):
        list(open_source(image_set))


def test_changing_resolution_is_refused(image_set, room_frames):
    write_rgb(image_set / 'images/3.png', room_frames[3].image[:, :150])
    with pytest.raises(InputError, match=r'3\.png: expected 160x120 pixels like images/0\.png'):
        list(open_source(image_set))


@pytest.mark.parametrize(('depth', 'words'), [
    (np.ones((60, 100)), 'expected depth of 160x120 like the image, or scaled from that, found '
     '100x60'),
    (np.zeros((120, 160)), 'no valid value')])
def test_unusable_depth_is_refused(image_set, depth, words):
    write_depth(image_set / 'depth/3.png', depth, 1000)
    with pytest.raises(InputError, match=rf'images/3\.png: {words}|images/3\.png.*{words}'):
        list(open_source(image_set))


def test_nan_depth_is_refused(image_set):
    depth = np.full((120, 160), np.nan, np.float32)
    assert cv2.imwrite(str(image_set / 'depth/3.tiff'), depth)
    edit(image_set, lambda frames: frames[3].update(depth='depth/3.tiff'))
    with pytest.raises(InputError, match=r'images/3\.png.*no valid value'):
        list(open_source(image_set))


def test_an_unreadable_image_is_refused(image_set):
    (image_set / 'images/3.png').write_bytes(b'hello')
    with pytest.raises(InputError, match=r'3\.png: expected a readable image'):
        list(open_source(image_set))


# Real sets


@pytest.mark.parametrize('name', SETS)
def test_real_sets_open_with_all_their_frames(data_dir, name):
    source = open_source(data_dir / name)
    assert len(source) == SETS[name]
    assert source.calibrated
    assert source.has_poses
    first, last = (next(source.frames(index)) for index in (0, len(source) - 1))
    assert first.image.shape == last.image.shape
    assert first.camera.size_wh == first.image.shape[1::-1]
    assert (first.depth is not None) == (name == '7scenes_redkitchen')


def test_both_eyes_of_kitti_look_alike(data_dir):
    left, right = (open_source(data_dir / 'kitti_seq2', SourceOptions(camera=camera))
                   for camera in ('left', 'right'))
    assert len(right) == len(left) == 51
    a, b = next(iter(left)), next(iter(right))
    assert a.stamp_ns == b.stamp_ns
    assert np.linalg.norm(a.T_map_cam[:3, 3] - b.T_map_cam[:3, 3]) == pytest.approx(0.537, abs=.01)
