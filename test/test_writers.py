"""Files written read back the same, and a folder is replaced whole or not at all."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, pose_error, se3_exp
from feedforward_recon.io import read_tum_trajectory
from feedforward_recon.io.writers import (
    PosedImage,
    atomic_folder,
    backups,
    localization_entries,
    read_ply,
    recover,
    write_colmap,
    write_kitti,
    write_ply,
    write_poses,
    write_tum,
)
from feedforward_recon.types import Estimate, PointCloud, Status, Trajectory

CAMERAS = [
    Camera(640, 480, 500, 510, 319.5, 239.5),
    Camera(640, 480, 500, 510, 320, 240, (.1, -.05, .001, -.002)),
    Camera(640, 480, 500, 510, 320, 240, (.1, -.05, .001, -.002, .01)),
    Camera(640, 480, 500, 510, 320, 240, (.1, -.05, .001, -.002, .01, .02, .03, .04), 'rational'),
    Camera(640, 480, 500, 510, 320, 240, (.05, -.01, .002, -.001), 'fisheye'),
]


@pytest.fixture
def trajectory():
    rng = np.random.default_rng(0)
    stamps_ns = 1_700_000_000_000_000_001 + np.cumsum(rng.integers(1, 10**8, 20))
    return Trajectory(stamps_ns, se3_exp(rng.normal(0, 1.5, (20, 6))))


@pytest.fixture
def cloud():
    rng = np.random.default_rng(1)
    return PointCloud(rng.normal(0, 9, (50, 3)).astype(np.float32),
                      rng.integers(0, 256, (50, 3), np.uint8))


# Trajectories, clouds, poses.json


def test_tum_keeps_every_nanosecond_and_the_poses(tmp_path, trajectory):
    write_tum(tmp_path / 't.tum', trajectory)
    found = read_tum_trajectory(tmp_path / 't.tum')
    np.testing.assert_array_equal(found.stamps_ns, trajectory.stamps_ns)
    distance, angle_deg = pose_error(found.T_map_cam, trajectory.T_map_cam)
    assert distance.max() < 1e-9
    assert angle_deg.max() < 1e-8


@pytest.mark.parametrize('stamp_ns', [0, 1, 999_999_999, 10**9, 2**62])
def test_stamps_of_any_size_survive(tmp_path, stamp_ns):
    write_tum(tmp_path / 't.tum', Trajectory(np.array([stamp_ns]), np.eye(4)[None]))
    assert read_tum_trajectory(tmp_path / 't.tum').stamps_ns[0] == stamp_ns


def test_evo_reads_the_trajectories(tmp_path, trajectory):
    file_interface = pytest.importorskip('evo.tools.file_interface')
    write_tum(tmp_path / 't.tum', trajectory)
    write_kitti(tmp_path / 't.kitti', trajectory)
    for found in (file_interface.read_tum_trajectory_file(tmp_path / 't.tum'),
                  file_interface.read_kitti_poses_file(tmp_path / 't.kitti')):
        np.testing.assert_allclose(found.poses_se3, trajectory.T_map_cam, atol=1e-9)


def test_an_empty_trajectory_is_a_file_without_poses(tmp_path):
    write_tum(tmp_path / 't.tum', Trajectory())
    write_kitti(tmp_path / 't.kitti', Trajectory())
    assert (tmp_path / 't.tum').read_text().startswith('#')
    assert (tmp_path / 't.kitti').read_text() == ''


def test_ply_comes_back_exactly(tmp_path, cloud):
    for expected in (cloud, PointCloud()):
        write_ply(tmp_path / 'cloud.ply', expected)
        found = read_ply(tmp_path / 'cloud.ply')
        np.testing.assert_array_equal(found.xyz, expected.xyz)
        np.testing.assert_array_equal(found.rgb, expected.rgb)


def test_a_truncated_ply_is_refused(tmp_path, cloud):
    write_ply(tmp_path / 'cloud.ply', cloud)
    content = (tmp_path / 'cloud.ply').read_bytes()
    for damaged in (content[:-1], content[:30], b''):
        (tmp_path / 'cloud.ply').write_bytes(damaged)
        with pytest.raises(InputError, match=r'cloud\.ply: expected'):
            read_ply(tmp_path / 'cloud.ply')


def test_poses_json_has_one_entry_per_image(tmp_path):
    T = se3_exp(np.arange(6) / 10)
    estimates = [Estimate(5, Status.TRACKING, T, inliers=40, score=0.5, latency_ms=12.0,
                          source='a.png'), Estimate(6, Status.LOST, source='b.png')]
    write_poses(tmp_path / 'poses.json', estimates)
    first, second = json.loads((tmp_path / 'poses.json').read_text())
    assert first == {'file': 'a.png', 'stamp_ns': 5, 'status': 'TRACKING',
                     'T_map_cam': T.tolist()}
    assert second == {'file': 'b.png', 'stamp_ns': 6, 'status': 'LOST', 'T_map_cam': None}
    entries = localization_entries(estimates)
    assert entries[0] == {**first, 'inliers': 40, 'score': 0.5, 'ms': 12.0}
    json.dumps(localization_entries([Estimate(7, Status.TRACKING, T, inliers=np.int64(3),
                                              score=np.float32(.5))]))
    write_poses(tmp_path / 'poses.json', [])
    assert json.loads((tmp_path / 'poses.json').read_text()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'poses.json'
    path.write_text('old')
    bad = Estimate(1, Status.TRACKING, np.full((4, 4), np.nan))
    with pytest.raises(ValueError, match='JSON'):
        write_poses(path, [bad])
    assert path.read_text() == 'old'
    with pytest.raises(InputError, match=r'file/t\.tum: expected a place to write'):
        (tmp_path / 'file').write_text('')
        write_tum(tmp_path / 'file/t.tum', Trajectory())
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'poses.json']


# COLMAP


def posed_images():
    rng = np.random.default_rng(2)
    return [PosedImage(f'images/{index}.jpg', CAMERAS[index % len(CAMERAS)], T)
            for index, T in enumerate(se3_exp(rng.normal(0, 1, (7, 6))))]


def test_colmap_projects_points_where_we_do(tmp_path, cloud):
    """The law: a map point lands on the same pixel, up to COLMAP's half-pixel shift."""
    pycolmap = pytest.importorskip('pycolmap')
    images = posed_images()
    write_colmap(tmp_path / 'model', images, cloud)
    model = pycolmap.Reconstruction(tmp_path / 'model')
    found = {image.name: image for image in model.images.values()}
    assert len(model.cameras) == len(CAMERAS)
    points_cam = np.random.default_rng(3).uniform((-1, -1, 2), (1, 1, 5), (30, 3))
    for image in images:
        points_map = points_cam @ image.T_map_cam[:3, :3].T + image.T_map_cam[:3, 3]
        colmap = np.array([found[image.name].project_point(p) for p in points_map])
        np.testing.assert_allclose(colmap - 0.5, image.camera.project(points_cam), atol=1e-6)


def test_colmap_reads_the_points(tmp_path, cloud):
    pycolmap = pytest.importorskip('pycolmap')
    write_colmap(tmp_path / 'model', posed_images(), cloud)
    points = pycolmap.Reconstruction(tmp_path / 'model').points3D
    np.testing.assert_allclose([points[i + 1].xyz for i in range(len(cloud))], cloud.xyz)
    np.testing.assert_array_equal([points[i + 1].color for i in range(len(cloud))], cloud.rgb)


def test_colmap_text_holds_world_to_camera(tmp_path):
    (image,) = images = posed_images()[:1]
    write_colmap(tmp_path / 'model', images)
    words = (tmp_path / 'model/images.txt').read_text().split()
    np.testing.assert_allclose([float(w) for w in words[5:8]],
                               inverse(image.T_map_cam)[:3, 3], atol=1e-9)
    assert words[8:] == ['1', 'images/0.jpg']


# Folders


def write_map(folder, content):
    (folder / 'map.yaml').write_text(content)
    (folder / 'sub').mkdir()
    (folder / 'sub/data.bin').write_text(content)


def test_a_new_folder_appears_whole(tmp_path):
    target = tmp_path / 'maps/kitchen'
    with atomic_folder(target) as folder:
        write_map(folder, 'one')
        assert not target.exists()
    assert (target / 'sub/data.bin').read_text() == 'one'
    assert [p.name for p in target.parent.iterdir()] == ['kitchen']


def test_our_maps_and_empty_folders_are_replaced_whole(tmp_path):
    target = tmp_path / 'map'
    target.mkdir()
    for content in ('one', 'two'):
        with atomic_folder(target) as folder:
            write_map(folder, content)
        assert (target / 'map.yaml').read_text() == content
        assert [p.name for p in tmp_path.iterdir()] == ['map']


def test_a_failure_leaves_the_old_map_untouched(tmp_path):
    with atomic_folder(tmp_path / 'map') as folder:
        write_map(folder, 'old')
    with pytest.raises(RuntimeError, match='stop'), atomic_folder(tmp_path / 'map') as folder:
        write_map(folder, 'new')
        raise RuntimeError('stop')
    assert (tmp_path / 'map/map.yaml').read_text() == 'old'
    assert [p.name for p in tmp_path.iterdir()] == ['map']


def test_a_rename_that_fails_brings_the_old_map_back(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / 'map') as folder:
        write_map(folder, 'old')
    rename = os.rename

    def full_disk(source, target):
        if str(source).endswith('.part'):
            raise OSError(28, 'No space left on device')
        rename(source, target)

    monkeypatch.setattr(os, 'rename', full_disk)
    with (pytest.raises(InputError, match=r'map: expected a place to write.*No space'),
          atomic_folder(tmp_path / 'map') as folder):
        write_map(folder, 'new')
    assert (tmp_path / 'map/map.yaml').read_text() == 'old'
    assert [p.name for p in tmp_path.iterdir()] == ['map']


def test_other_peoples_folders_are_never_replaced(tmp_path):
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos/cat.jpg').write_text('cat')
    with (pytest.raises(InputError, match=r'photos: expected .*found cat\.jpg'),
          atomic_folder(tmp_path / 'photos')):
        pytest.fail('the block must not run')
    assert (tmp_path / 'photos/cat.jpg').read_text() == 'cat'


def test_files_that_appear_meanwhile_are_not_overwritten(tmp_path):
    with (pytest.raises(InputError, match='expected a new folder'),
          atomic_folder(tmp_path / 'map') as folder):
        write_map(folder, 'new')
        (tmp_path / 'map').mkdir()
        (tmp_path / 'map/cat.jpg').write_text('cat')
    assert [p.name for p in (tmp_path / 'map').iterdir()] == ['cat.jpg']


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / 'file').write_text('x')
    for target in (tmp_path / 'file', tmp_path / 'file/map'):
        with (pytest.raises(InputError, match='expected a place to write'),
              atomic_folder(target)):
            pytest.fail('the block must not run')
    assert (tmp_path / 'file').read_text() == 'x'


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write all')
def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with (pytest.raises(InputError, match=r'expected a place to write.*Permission'),
              atomic_folder(tmp_path / 'map')):
            pytest.fail('the block must not run')
    finally:
        tmp_path.chmod(0o700)


def test_input_and_output_load_no_optional_package():
    code = ('import sys, feedforward_recon.io, feedforward_recon.io.writers, '
            'feedforward_recon.io.bag_writer; '
            "print([m for m in ('rosbags', 'pycolmap', 'evo', 'matplotlib', 'torch', 'yaml') "
            'if m in sys.modules])')
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                           check=True)
    assert found.stdout.strip() == '[]'


# Whoever dies while saving


def died(tmp_path, monkeypatch, *, at, keeps):
    """Replace map 'old' by 'new' in a process that dies at its n-th rename; what recover says."""
    target = tmp_path / 'map'
    with atomic_folder(target) as folder:
        write_map(folder, 'old')
    pid = os.fork()
    if pid == 0:
        count, rename = iter(range(9)), os.rename

        def deadly(a, b):
            if next(count) == at:
                os._exit(0)
            rename(a, b)

        monkeypatch.setattr('os.rename', deadly)
        with atomic_folder(target, keeps=lambda _: keeps) as folder:
            write_map(folder, 'new')
        os._exit(0)
    os.waitpid(pid, 0)
    return recover(target)


@pytest.mark.parametrize('keeps', [False, True])
@pytest.mark.parametrize('at', range(4))
def test_at_whatever_rename_a_process_dies_no_map_is_lost(tmp_path, monkeypatch, at, keeps):
    came_back = died(tmp_path, monkeypatch, at=at, keeps=keeps)
    content = (tmp_path / 'map/map.yaml').read_text()
    assert content == ('old' if at <= 1 else 'new') and came_back == (at == 1)
    assert (tmp_path / 'map/sub/data.bin').read_text() == content
    beside = [folder / 'map.yaml' for folder in backups(tmp_path / 'map')]
    assert [file.read_text() for file in beside] == ['old'] * (keeps and content == 'new')
    assert len(list(tmp_path.iterdir())) == 1 + len(beside)


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    with atomic_folder(tmp_path / 'map') as folder:
        write_map(folder, 'one')
        assert not recover(tmp_path / 'map')
        assert folder.exists()


SAVES_FOR_EVER = """
import sys
from pathlib import Path
from feedforward_recon.io.writers import atomic_folder
for number in range(10**6):
    with atomic_folder(sys.argv[1], keeps=lambda _: number % 2 == 1) as folder:
        for name in ('data', 'map.yaml'):
            (folder / name).write_text(str(number))
    print(number, flush=True)
"""


def test_a_process_that_is_killed_while_saving_leaves_a_whole_map(tmp_path):
    target = tmp_path / 'map'
    for turn in range(5):
        process = subprocess.Popen([sys.executable, '-c', SAVES_FOR_EVER, str(target)],
                                   stdout=subprocess.PIPE, text=True)
        for _ in range(3):
            last = int(process.stdout.readline())
        time.sleep(0.004 * turn)
        process.kill()
        process.communicate()
        recover(target)
        assert (target / 'data').read_text() == (target / 'map.yaml').read_text()
        assert int((target / 'data').read_text()) >= last
        assert {folder.name.split('.backup')[0] for folder in tmp_path.iterdir()} == {'map'}
