"""The command line end to end on a small walk, and every bad input as one sentence."""

import json
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest

from feedforward_recon.cli import main
from feedforward_recon.cli.mapping import summary_rows
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.console.options import settings
from feedforward_recon.console.terminal import print_json
from feedforward_recon.errors import ConfigError
from feedforward_recon.geometry.transforms import pose_error
from feedforward_recon.io import SourceOptions, open_source
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.mapping.sources import GivenPoses
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.session.map_folder import load_map
from feedforward_recon.session.offline import map_frames

SMALL = ['memory.slots=6000', 'memory.cells=2000', 'memory.samples=5000',
         'encoder.max_keypoints=500']
SET = [word for setting in SMALL for word in ('--set', setting)]


@pytest.fixture(scope='module')
def mapped(walk_folder, tmp_path_factory):
    """A map of the walk, made in this process: its folder, and the answers of its memory."""
    config = settings(MapperConfig(), None, SMALL)
    encoder = CompactEncoder.load(config=config.encoder)
    source = open_source(walk_folder, SourceOptions(max_frames=16))
    run = map_frames(source, config, encoder, source=lambda _: GivenPoses(config, encoder))
    folder = tmp_path_factory.mktemp('maps') / 'walk'
    run.save(folder)
    localizer = Localizer(run.writer.snapshot(), encoder, config.localizer,
                          run.scene.keyframes[-1].camera)
    queries = open_source(walk_folder, SourceOptions(step=4, use_depth=False))
    return folder, [localizer.localize(frame) for frame in queries]


@pytest.fixture
def walk(walk_folder, tmp_path):
    """A copy of the walk that a test may damage."""
    return shutil.copytree(walk_folder, tmp_path / 'walk')


def ffrecon(*arguments):
    """Run the command in a process of its own."""
    return subprocess.run([sys.executable, '-m', 'feedforward_recon.cli', *map(str, arguments)],
                          capture_output=True, text=True, timeout=300, check=False)


def refused(capsys, *arguments):
    """Run the command in this process; the sentence of its refusal."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ''
    lines = [line for line in err.splitlines() if not line.startswith(('warning:', 'note:'))]
    assert len(lines) == 1, err
    assert lines[0].startswith('error: ')
    assert 'Traceback' not in err
    return lines[0]


# What works


def test_another_process_gives_the_same_poses_bit_for_bit(mapped, walk_folder, tmp_path):
    folder, answers = mapped
    bare = tmp_path / 'bare'
    bare.mkdir()
    for name in ('map.yaml', 'memory.safetensors'):
        shutil.copy(folder / name, bare)
    done = ffrecon('localize', bare, walk_folder, '--step', 4, '--json')
    assert done.returncode == 0, done.stderr
    entries = json.loads(done.stdout)  # nothing but JSON on stdout
    assert len(entries) == len(answers) == 8
    assert sum(entry['T_map_cam'] is not None for entry in entries) >= 5
    for entry, answer in zip(entries, answers, strict=True):
        assert entry.keys() == {'file', 'stamp_ns', 'status', 'T_map_cam', 'inliers', 'score',
                                'ms'}
        ours = None if answer.T_map_cam is None else answer.T_map_cam.tolist()
        assert (entry['T_map_cam'], entry['status']) == (ours, answer.status.value)


def test_mapped_views_are_found_where_they_were_taken(mapped, walk_folder):
    _, answers = mapped
    truth = [f.T_map_cam for f in open_source(walk_folder, SourceOptions(step=4))]
    for answer, T_map_cam in list(zip(answers, truth, strict=True))[:4]:
        assert answer.T_map_cam is not None
        assert pose_error(answer.T_map_cam, T_map_cam)[0] < 0.05


def test_map_tells_how_many_poses_are_not_sure(walk_folder, tmp_path, capsys):
    folder = tmp_path / 'map'
    assert main(['map', str(walk_folder), '--out', str(folder), '--max-frames', '24', '--mono',
                 '--json', *SET]) == 0
    summary = json.loads(capsys.readouterr().out)
    statuses = [entry['status'] for entry in json.loads((folder / 'poses.json').read_text())]
    assert summary['unsure'] == statuses.count('UNCERTAIN') > 0
    assert summary_rows(summary)['frames'].endswith(f'tracked, {summary["unsure"]} not sure')


def test_map_json_and_the_commands_that_read_a_map(walk_folder, tmp_path, capsys):
    folder = tmp_path / 'map'
    assert main(['map', str(walk_folder), '--out', str(folder), '--max-frames', '16', '--json',
                 *SET]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary['frames'] == summary['tracked'] == 16
    assert summary['unsure'] == 0
    assert summary['error']['ate_rmse'] < 0.03
    assert summary['error']['straight_line_rmse'] > 0
    assert (summary['scale_source'], summary['camera_source']) == ('depth', 'given')
    assert summary['memory_bytes'] == (folder / 'memory.safetensors').stat().st_size

    assert main(['info', str(folder), '--json']) == 0
    assert json.loads(capsys.readouterr().out)['keyframes'] == summary['keyframes']
    assert main(['eval', str(folder), str(walk_folder), '--json']) == 0
    assert json.loads(capsys.readouterr().out)['rmse'] == summary['error']['ate_rmse']
    assert main(['export', str(folder), '--format', 'tum', '--out', str(tmp_path / 'a.tum')]) == 0
    assert main(['eval', str(tmp_path / 'a.tum'), str(folder), '--align', 'none']) == 0
    assert main(['export', str(folder), '--format', 'colmap', '--out',
                 str(tmp_path / 'model')]) == 0
    images = (tmp_path / 'model' / 'images.txt').read_text()
    assert images.count('images/') == 16
    for kind, name in (('kitti', 'a.txt'), ('ply', 'a.ply')):
        assert main(['export', str(folder), '--format', kind, '--out', str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size > 0


def test_one_photo_without_intrinsics_takes_the_camera_of_the_map(mapped, walk_folder, capsys):
    folder, _ = mapped
    assert main(['localize', str(folder), str(walk_folder / 'images' / '004.png')]) == 0
    out, err = capsys.readouterr()
    assert '1 of 1 images found' in out
    assert 'no intrinsics' in err


def test_a_foreign_place_is_refused_with_exit_code_1(mapped, tmp_path, capsys):
    folder, _ = mapped
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / 'noise.png'), noise)
    assert main(['localize', str(folder), str(tmp_path / 'noise.png'), '--json']) == 1
    entry, = json.loads(capsys.readouterr().out)
    assert (entry['status'], entry['T_map_cam']) == ('NOT_LOCALISED', None)


def test_recall_is_printed_where_the_source_knows_the_truth(mapped, walk_folder, tmp_path,
                                                            capsys):
    folder, answers = mapped
    answers_file = tmp_path / 'answers.json'
    assert main(['localize', str(folder), str(walk_folder), '--step', '4', '--align', '--out',
                 str(answers_file)]) == 0
    assert 'within 5 cm and 5 deg' in capsys.readouterr().out
    assert len(json.loads(answers_file.read_text())) == len(answers)


def test_json_has_no_infinity(capsys):
    print_json({'median_m': float('inf'), 'recall': (0.5, float('nan'))})
    assert json.loads(capsys.readouterr().out) == {'median_m': None, 'recall': [0.5, None]}


def test_settings_come_from_a_file_and_then_from_set(tmp_path):
    file = tmp_path / 's.yaml'
    file.write_text('memory: {slots: 100, cells: 128}\n')
    config = settings(MapperConfig(), file, ['memory.slots=7', 'localizer.search_px=9'])
    assert (config.memory.slots, config.memory.cells) == (7, 128)
    assert config.localizer.search_px == 9.0
    for bad in ('memory.slot=7', 'memory', 'memory.slots=many', 'memory.slots=-1', 'memory=3'):
        with pytest.raises(ConfigError):
            settings(MapperConfig(), None, [bad])


# What is refused: one sentence, exit code 2, nothing written


def json_edit(folder, change):
    path = folder / 'cameras.json'
    document = json.loads(path.read_text())
    change(document['frames'])
    path.write_text(json.dumps(document))


def image_of(size_wh, path, kind=np.uint8):
    assert cv2.imwrite(str(path), np.full((size_wh[1], size_wh[0]), 99, kind))


def truncate_image(walk):
    file = walk / 'images' / '004.png'
    file.write_bytes(file.read_bytes()[:2000])


def empty(walk):
    shutil.rmtree(walk)
    walk.mkdir()


BAD_WALKS = {
    'missing folder': (shutil.rmtree, 'found nothing'),
    'empty folder': (empty, 'expected images'),
    'unreadable image': (lambda w: (w / 'images' / '004.png').write_text('no'), r'004\.png'),
    'truncated image': (truncate_image, r'004\.png'),
    'missing image': (lambda w: (w / 'images' / '004.png').unlink(), r'004\.png'),
    'changing resolution': (lambda w: image_of((200, 100), w / 'images' / '004.png'),
                            'expected 320x240'),
    'missing intrinsics': (lambda w: json_edit(w, lambda f: [e.update(K=None) for e in f]),
                           'intrinsics'),
    'depth of another shape': (lambda w: image_of((64, 40), w / 'depth' / '004.png', np.uint16),
                              'expected depth of 320x240'),
    'zero depth': (lambda w: cv2.imwrite(str(w / 'depth' / '004.png'),
                                         np.zeros((240, 320), np.uint16)), 'no valid value'),
    'stamps going back': (lambda w: json_edit(w, lambda f: f[4].update(timestamp=0.01)),
                          'later time stamp'),
    'broken cameras.json': (lambda w: (w / 'cameras.json').write_text('{'), 'expected JSON'),
}


@pytest.mark.parametrize(('damage', 'words'), BAD_WALKS.values(), ids=BAD_WALKS)
def test_a_bad_walk_is_one_sentence(walk, tmp_path, capsys, damage, words):
    damage(walk)
    out = tmp_path / 'maps' / 'out'
    assert_matches(words, refused(capsys, 'map', walk, '--out', out, '--max-frames', 6, *SET))
    assert not out.parent.exists()


def assert_matches(words, text):
    assert re.search(words, text), text


def test_nan_depth_is_one_sentence(walk, tmp_path, capsys):
    file = walk / 'depth' / '003.tiff'
    assert cv2.imwrite(str(file), np.full((240, 320), np.nan, np.float32))
    json_edit(walk, lambda frames: frames[3].update(depth='depth/003.tiff'))
    assert 'no valid value' in refused(capsys, 'map', walk, '--out', tmp_path / 'm', *SET)


def test_an_unknown_topic_is_one_sentence(walk_folder, tmp_path, capsys):
    pytest.importorskip('rosbags', reason='bags need the extra [bag]')
    from feedforward_recon.io.bag_writer import write_bag

    write_bag(tmp_path / 'bag', open_source(walk_folder, SourceOptions(max_frames=3)))
    sentence = refused(capsys, 'map', tmp_path / 'bag', '--image-topic', '/nose', '--out',
                       tmp_path / 'm')
    assert '/nose' in sentence
    assert '/camera/image_raw' in sentence


@pytest.mark.parametrize('command', ['localize', 'info', 'export'])
def test_a_bad_map_is_one_sentence(mapped, walk_folder, tmp_path, capsys, command):
    folder = shutil.copytree(mapped[0], tmp_path / 'map')
    rest = {'localize': [walk_folder], 'info': [],
            'export': ['--format', 'ply', '--out', tmp_path / 'x.ply']}[command]
    memory = folder / 'memory.safetensors'
    memory.write_bytes(memory.read_bytes()[:-1])
    assert 'truncated' in refused(capsys, command, folder, *rest)
    description = folder / 'map.yaml'
    description.write_text(description.read_text().replace('schema_version: 2',
                                                           'schema_version: 99'))
    assert 'update feedforward_recon' in refused(capsys, command, folder, *rest)
    assert 'expected a map folder' in refused(capsys, command, tmp_path, *rest)
    assert not (tmp_path / 'x.ply').exists()


def test_outputs_in_the_way_are_one_sentence_and_stay(mapped, walk_folder, tmp_path, capsys):
    folder = shutil.copytree(mapped[0], tmp_path / 'map')
    before = (folder / 'map.yaml').read_bytes()
    photos = tmp_path / 'photos'
    photos.mkdir()
    (photos / 'a.jpg').write_bytes(b'dear')
    assert '--overwrite' in refused(capsys, 'map', walk_folder, '--out', folder)
    for out, words in ((photos, 'a.jpg'), (photos / 'a.jpg' / 'map', 'place to write')):
        assert words in refused(capsys, 'map', walk_folder, '--out', out)
        assert words in refused(capsys, 'demo', '--out', out)
    assert 'a.jpg' in refused(capsys, 'export', folder, '--format', 'ply', '--out',
                              photos / 'a.jpg')
    assert 'a.jpg' in refused(capsys, 'export', folder, '--format', 'colmap', '--out', photos)
    assert 'place to write' in refused(capsys, 'localize', folder, walk_folder, '--out',
                                       photos / 'a.jpg' / 'b.json')
    assert (folder / 'map.yaml').read_bytes() == before
    assert (photos / 'a.jpg').read_bytes() == b'dear'


def test_queries_of_another_camera_need_intrinsics(mapped, tmp_path, capsys):
    image_of((200, 100), tmp_path / 'q.png')
    assert '--fov' in refused(capsys, 'localize', mapped[0], tmp_path / 'q.png')


@pytest.mark.parametrize('arguments', [
    ['map'], ['maps', 'x'], ['map', 'x'], ['map', '.', '--out', 'o', '--frames', '3'],
    ['map', '.', '--out', 'o', '--step', '0'], ['map', '.', '--out', 'o', '--step', 'two'],
    ['map', '.', '--out', 'o', '--fx', '500', '--fov', '60'],
    ['map', '.', '--out', 'o', '--distortion', 'a,b', '--fx', '500'],
    ['map', '.', '--out', 'o', '--set', 'memory.slotz=3'],
    ['map', '.', '--out', 'o', '--config', 'nowhere.yaml'],
    ['map', '.', '--out', 'o', '--encoder', 'nowhere.safetensors'],
    ['export', '.', '--format', 'dwg', '--out', 'o'], ['eval', 'nowhere', 'nothing']])
def test_bad_usage_is_one_sentence(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_given_poses_must_be_given(walk, tmp_path, capsys):
    json_edit(walk, lambda frames: [frame.update(T_world_camera=None) for frame in frames])
    sentence = refused(capsys, 'map', walk, '--poses', 'given', '--out', tmp_path / 'm')
    assert 'pose for every image' in sentence


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize('step', ['cli.mapping.map_frames', 'session.map_folder.write_ply'])
def test_an_interrupt_leaves_nothing(walk_folder, tmp_path, capsys, monkeypatch, step):
    monkeypatch.setattr(f'feedforward_recon.{step}', interrupted)
    out = tmp_path / 'maps' / 'm'
    assert main(['map', str(walk_folder), '--out', str(out), '--max-frames', '4', *SET]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith('error: interrupted')
    assert list(tmp_path.rglob('*.*')) == []


@pytest.mark.parametrize('command', ['', 'demo', 'map', 'localize', 'info', 'eval', 'export',
                                     'bench'])
def test_help_teaches(command, capsys):
    assert main([*command.split(), '--help']) == 0
    text = capsys.readouterr().out
    assert 'ffrecon ' in text
    assert main(['--version']) == 0


def test_maps_open_again_with_their_settings(mapped):
    info = load_map(mapped[0]).info
    assert info.config.memory.slots == 6000
    assert info.scale_source == 'given poses'


# Training


def test_training_commands(tmp_path, capsys):
    from feedforward_recon.training.cli import main as train

    assert train(['rooms', '--out', str(tmp_path / 'rooms'), '--count', '1']) == 0
    with np.load(tmp_path / 'rooms' / 'r0000.npz') as views:
        assert views['image'].shape == (10, 360, 480, 3)
        assert views['depth'].min() > 0
    assert train(['encoder', '--help']) == 0
    assert '--photos' in capsys.readouterr().out
    assert train(['encoder', '--photos', str(tmp_path), '--out', str(tmp_path / 'run')]) == 2
    assert train(['encoder', '--steps', 'many']) == 2
    error, usage = capsys.readouterr().err.splitlines()
    assert error.startswith('error: expected *.jpg photos')
    assert usage.startswith('error: Invalid value')


def test_a_map_is_gone_on_with(walk_folder, tmp_path, capsys):
    folder = tmp_path / 'map'
    assert main(['map', str(walk_folder), '--out', str(folder), '--max-frames', '9', *SET]) == 0
    before = load_map(folder).info
    capsys.readouterr()
    assert main(['map', str(walk_folder), '--into', str(folder), '--json', *SET]) == 0
    summary = json.loads(capsys.readouterr().out)
    after, memory = load_map(folder).info, 'memory.safetensors'
    assert (summary['sessions'], after.sessions) == (2, 2)
    assert after.keyframes > before.keyframes and summary['tracked_share'] > 0.9
    assert after.files[memory]['bytes'] == before.files[memory]['bytes']


@pytest.mark.parametrize(('options', 'said'), [
    ([], 'one of --out and --into, found none'),
    (['--out', 'a', '--into', 'b'], 'one of --out and --into, found both'),
    (['--into', 'nothing'], 'expected a map folder'),
    (['--into', 'nothing', '--poses', 'given'], 'found --poses given'),
    (['--into', 'nothing', '--model', 'tiny'], 'found --model')])
def test_where_the_map_goes_is_asked_before_any_work(walk_folder, options, said, capsys,
                                                     monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(['map', str(walk_folder), *options]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
