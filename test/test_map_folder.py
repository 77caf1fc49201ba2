"""The map folder: saving is exact, few files are needed, damage is an error that says where."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from oracle import CAMERA, DIM, OracleScene, poses_around

from feedforward_recon.config.schema import LocalizerConfig, MapperConfig, MemoryConfig
from feedforward_recon.errors import InputError, MapError
from feedforward_recon.io.writers import backups
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.mapping.scene_map import SceneMap
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.session.map_folder import BACKUPS, check_map_output, load_map, save_map
from feedforward_recon.types import Estimate, PointCloud, Status, Trajectory

CONFIG = MapperConfig(memory=MemoryConfig(slots=2000, cells=500, samples=3000),
                      localizer=LocalizerConfig(network_candidates=50))
SCENE = OracleScene.generate(0)


class Encoder:
    """Only a name: nothing is encoded here."""

    name, sha256, dim = 'oracle', 'ab' * 32, DIM


def make(keyframes=6):
    """A map of the oracle scene, and the writer of its memory."""
    writer = MemoryWriter(CONFIG.memory, DIM)
    views = [SCENE.keyframe(index, pose)
             for index, pose in enumerate(poses_around(keyframes, seed=0))]
    for view in views:
        writer.write(view)
    estimates = [Estimate(v.stamp_ns, Status.TRACKING, v.T_map_cam, source=f'{v.id}.png')
                 for v in views]
    lost = Estimate(10**12, Status.LOST, source='lost.png')
    rng = np.random.default_rng(0)
    cloud = PointCloud(rng.normal(size=(50, 3)).astype(np.float32),
                       rng.integers(0, 256, (50, 3)).astype(np.uint8))
    trajectory = Trajectory(np.array([v.stamp_ns for v in views], np.int64),
                            np.stack([v.T_map_cam for v in views]))
    return SceneMap(tuple(views), trajectory, (*estimates, lost), cloud, 1.0, 'depth'), writer


@pytest.fixture(scope='module')
def pristine(tmp_path_factory):
    scene, writer = make()
    folder = tmp_path_factory.mktemp('maps') / 'oracle'
    save_map(folder, scene, writer, Encoder(), CONFIG)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy of a map that a test may damage."""
    return shutil.copytree(pristine, tmp_path / 'map')


def answers(memory):
    localizer = Localizer(memory, Encoder(), CONFIG.localizer)
    return [localizer.localize_features(SCENE.features(pose, seed=100 + seed)[0], CAMERA).estimate
            for seed, pose in enumerate(poses_around(5, seed=77))]


def same_bits(a, b):
    return all(np.array_equal(x.T_map_cam, y.T_map_cam) and x.score == y.score
               and np.array_equal(x.covariance, y.covariance)
               for x, y in zip(a, b, strict=True))


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_saved_comes_back_exactly(pristine):
    scene, writer = make()
    saved = load_map(pristine)
    assert same_tensors(saved.memory.tensors(), writer.snapshot().tensors())
    assert saved.info.config == CONFIG
    assert (saved.info.camera, saved.info.camera_source) == (CAMERA, 'given')
    assert (saved.info.metres_per_unit, saved.info.scale_source) == (1.0, 'depth')
    assert (saved.info.images, saved.info.tracked, saved.info.keyframes) == (7, 6, 6)
    np.testing.assert_array_equal(saved.trajectory().T_map_cam, scene.trajectory.T_map_cam)
    np.testing.assert_array_equal(saved.trajectory().stamps_ns, scene.trajectory.stamps_ns)
    np.testing.assert_array_equal(saved.cloud().xyz, scene.cloud.xyz)
    assert [entry['status'] for entry in saved.poses()] == ['TRACKING'] * 6 + ['LOST']
    assert saved.verify() == []


def test_localising_needs_only_the_description_and_the_memory(folder):
    _, writer = make()
    for file in folder.iterdir():
        if file.name not in ('map.yaml', 'memory.safetensors'):
            file.unlink()
    before = sorted((f.name, f.read_bytes()) for f in folder.iterdir())
    saved = load_map(folder)
    found = answers(saved.memory)
    assert all(answer.T_map_cam is not None for answer in found)
    assert same_bits(found, answers(writer.snapshot()))
    assert saved.verify() == ['cloud.ply', 'poses.json', 'trajectory.tum',
                              'writer.safetensors']
    assert sorted((f.name, f.read_bytes()) for f in folder.iterdir()) == before


def test_a_resumed_writer_writes_on_exactly(pristine):
    _, original = make()
    resumed = load_map(pristine).writer()
    for writer in (original, resumed):
        for index, pose in enumerate(poses_around(3, seed=9), start=6):
            writer.write(SCENE.keyframe(index, pose))
        writer.reanchor({0: poses_around(1, seed=4)[0]})
    assert same_tensors(original.snapshot().tensors(), resumed.snapshot().tensors())


def test_the_memory_file_has_one_size_for_every_map(pristine, tmp_path):
    scene, writer = make(keyframes=2)
    small = save_map(tmp_path / 'small', scene, writer, Encoder(), CONFIG)
    size = load_map(pristine).info.files['memory.safetensors']['bytes']
    assert small.info.files['memory.safetensors']['bytes'] == size
    assert small.info.files['writer.safetensors']['bytes'] \
        < load_map(pristine).info.files['writer.safetensors']['bytes']


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def edit(file, **changes):
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**values, **changes}))


DAMAGE = {
    'truncated memory': (lambda f: truncate(f / 'memory.safetensors'), r'expected \d+ bytes'),
    'one bit': (lambda f: flip(f / 'memory.safetensors'), 'SHA-256'),
    'missing memory': (lambda f: (f / 'memory.safetensors').unlink(), 'found none'),
    'missing description': (lambda f: (f / 'map.yaml').unlink(), 'expected a map folder'),
    'missing folder': (shutil.rmtree, 'no such folder'),
    'newer version': (lambda f: edit(f / 'map.yaml', schema_version=3),
                      'version 2, found 3; update feedforward_recon'),
    'older version': (lambda f: edit(f / 'map.yaml', schema_version=1),
                      'version 2, found 1; map again'),
    'empty description': (lambda f: (f / 'map.yaml').write_text(''), 'damaged'),
    'broken description': (lambda f: (f / 'map.yaml').write_text('{'), 'damaged'),
    'binary description': (lambda f: (f / 'map.yaml').write_bytes(b'\xff\xfe\x80'), 'damaged'),
    'truncated description': (lambda f: truncate(f / 'map.yaml'), 'damaged|range|expected'),
    'no camera': (lambda f: edit(f / 'map.yaml', camera=None), 'damaged'),
    'unknown setting': (lambda f: edit(f / 'map.yaml', config={'memori': {}}),
                        'update feedforward_recon'),
}


@pytest.mark.parametrize(('damage', 'words'), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_said(folder, damage, words):
    damage(folder)
    with pytest.raises(MapError, match=words):
        load_map(folder)


def test_damage_beside_the_memory_is_found_when_it_matters(folder):
    truncate(folder / 'cloud.ply')
    saved = load_map(folder)
    for use in (saved.verify, saved.cloud):
        with pytest.raises(MapError, match=r'cloud\.ply: expected .* bytes'):
            use()
    (folder / 'writer.safetensors').unlink()
    with pytest.raises(MapError, match='writer'):
        saved.writer()


def test_an_unknown_encoder_is_refused(pristine, tmp_path):
    saved = load_map(pristine)
    with pytest.raises(MapError, match='expected the encoder oracle with SHA-256 abababababab, '
                                       'found none; every released encoder ships'):
        saved.load_encoder()
    other = tmp_path / 'other.safetensors'
    other.write_bytes(b'other weights')
    with pytest.raises(MapError, match=r'abababababab, found [0-9a-f]{12}'):
        saved.load_encoder(other)


def test_a_map_replaces_a_map_and_nothing_else(folder, tmp_path):
    scene, writer = make(keyframes=2)
    assert save_map(folder, scene, writer, Encoder(), CONFIG).info.keyframes == 2
    photos = tmp_path / 'photos'
    photos.mkdir()
    (photos / 'a.jpg').write_bytes(b'dear')
    for check in (check_map_output,
                  lambda path: save_map(path, scene, writer, Encoder(), CONFIG)):
        with pytest.raises(InputError, match=r'a\.jpg'):
            check(photos)
    assert [f.name for f in photos.iterdir()] == ['a.jpg']


def test_a_failed_save_leaves_the_older_map(folder, monkeypatch):
    before = (folder / 'map.yaml').read_bytes()
    scene, writer = make(keyframes=2)
    for nothing in ((SceneMap(), writer), (scene, MemoryWriter(CONFIG.memory, DIM))):
        with pytest.raises(MapError, match='expected a map that views can be found in'):
            save_map(folder, *nothing, Encoder(), CONFIG)
    monkeypatch.setattr(MemoryWriter, 'state', lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_map(folder, scene, writer, Encoder(), CONFIG)
    assert (folder / 'map.yaml').read_bytes() == before
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


def test_a_map_of_another_run_is_kept_and_the_own_one_replaced(folder):
    scene, writer = make(keyframes=2)
    old = load_map(folder)
    first = save_map(folder, scene, writer, Encoder(), CONFIG, replaces='')
    assert load_map(first.backup).sha256 == old.sha256
    again = save_map(folder, scene, writer, Encoder(), CONFIG, replaces=first.sha256)
    assert again.backup is None and backups(folder) == [first.backup]


def test_many_small_maps_do_not_push_out_the_large_one(folder):
    large = load_map(folder).info.keyframes
    own = folder.with_name(f'{folder.name}.backup-photos')  # not one of ours, whatever its name
    own.mkdir()
    scene, writer = make(keyframes=2)
    for _ in range(BACKUPS + 2):
        save_map(folder, scene, writer, Encoder(), CONFIG, replaces='')
    kept = [load_map(path).info.keyframes for path in backups(folder)]
    assert len(kept) == BACKUPS and large > 2 and large in kept and own.exists()


def test_an_unwritable_place_is_refused_before_the_work(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(InputError, match='expected a place to write'):
        check_map_output(tmp_path / 'file' / 'map')
    check_map_output(tmp_path / 'new' / 'map')
    assert [f.name for f in tmp_path.iterdir()] == ['file']


def test_a_map_without_scale_says_so(tmp_path):
    scene, writer = make(keyframes=2)
    scene = replace(scene, metres_per_unit=None, scale_source='unknown', camera_source='refined')
    info = save_map(tmp_path / 'm', scene, writer, Encoder(), CONFIG).info
    assert (info.metres_per_unit, info.camera_source) == (None, 'refined')


def test_the_files_are_what_other_tools_read(pristine):
    entries = json.loads((pristine / 'poses.json').read_text())
    assert entries[-1] == {'file': 'lost.png', 'stamp_ns': 10**12, 'status': 'LOST',
                           'T_map_cam': None}
    rows = np.loadtxt(pristine / 'trajectory.tum')
    assert rows.shape == (6, 8)
    description = yaml.safe_load((pristine / 'map.yaml').read_text())
    assert set(description) == {'schema_version', 'package_version', 'encoder', 'camera',
                                'frame', 'sessions', 'scale', 'counts', 'files', 'config'}
