"""A reconstruction that was killed goes on where it stopped, and ends with the same map."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from feedforward_recon.cli import main
from feedforward_recon.config.photos import PhotoConfig
from feedforward_recon.config.schema import EncoderConfig, MemoryConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.reconstruction.pairs import CompactPairs, Comparison, compare
from feedforward_recon.reconstruction.shots import shot_of
from feedforward_recon.session.map_folder import load_map
from feedforward_recon.session.partial import PartialWork
from feedforward_recon.session.photos import reconstruct_frames
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Frame

CAMERA = Camera.from_fov(70.0, (240, 180))
CONFIG = PhotoConfig(encoder=EncoderConfig(max_keypoints=400, spacing_px=5),
                     memory=MemoryConfig(slots=2000))
COUNT = 7


@pytest.fixture(scope='module')
def photos():
    """Views of a room, without intrinsics, and one in which nothing is seen."""
    room = Room.generate(5)
    walk = render_walk(room, CAMERA, room.walk(COUNT, seed=0, fps=4.0), fps=4.0)
    black = Frame(10**12, np.zeros((180, 240, 3), np.uint8))
    return [*(Frame(f.stamp_ns, f.image) for f in walk), black]


class Counting:
    """Runs tasks here and counts images and pairs; dies after some of both.

    Images that are looked at rolled are not kept, and not counted.
    """

    def __init__(self, lives=10**6):
        self.images = self.pairs = 0
        self._lives = lives

    def __call__(self, function, items):
        for item in items:
            if self.images + self.pairs == self._lives:
                raise KeyboardInterrupt
            self.images += isinstance(item, tuple)
            self.pairs += isinstance(item, list)
            yield function(item)

    @property
    def counts(self):
        return self.images, self.pairs


@pytest.fixture(scope='module')
def whole(photos):
    """What comes of one run, and how many images and pairs it worked on."""
    counting = Counting()
    return reconstruct_frames(photos, CONFIG, engine=counting)[0], counting.counts


def again(photos, folder, said=None, config=CONFIG):
    """A run with the work of earlier ones: the run and the tasks that it still had."""
    counting = Counting()
    work = PartialWork(folder, (said if said is not None else []).append)
    return reconstruct_frames(photos, config, engine=counting, work=work)[0], counting.counts


def killed(photos, folder, lives):
    with pytest.raises(KeyboardInterrupt):
        reconstruct_frames(photos, CONFIG, engine=Counting(lives), work=PartialWork(folder))


def same(run, other):
    """Poses, points and the written memory are equal, bit for bit."""
    assert np.array_equal(run.scene.trajectory.T_map_cam, other.scene.trajectory.T_map_cam)
    assert np.array_equal(run.scene.cloud.xyz, other.scene.cloud.xyz)
    mine, others = run.memory.tensors(), other.memory.tensors()
    return all(mine[name].equal(others[name]) for name in mine)


@pytest.mark.parametrize('lives', [3, COUNT + 5])
def test_a_run_that_was_killed_is_gone_on_with(photos, whole, tmp_path, lives):
    run, (images, pairs) = whole
    assert (images, len(run.scene.trajectory)) == (COUNT + 1, COUNT)
    killed(photos, tmp_path / 'work', lives)
    said = []
    resumed, counts = again(photos, tmp_path / 'work', said)
    known = min(lives, images), max(lives - images, 0)
    assert said == ['going on from work: {} images, {} pairs'.format(*known)]
    assert counts == (images - known[0], pairs - known[1])
    assert same(resumed, run)
    resumed, counts = again(photos, tmp_path / 'work')
    assert counts == (0, 0) and same(resumed, run)


def test_other_settings_start_anew(photos, whole, tmp_path):
    killed(photos, tmp_path / 'work', 3)
    other = replace(CONFIG, encoder=replace(CONFIG.encoder, max_keypoints=380))
    said = []
    _, counts = again(photos, tmp_path / 'work', said, other)
    assert counts[0] == COUNT + 1
    assert len(said) == 1 and 'made with other settings' in said[0]


@pytest.mark.parametrize('damage', [lambda stored: stored[:len(stored) // 2], lambda stored: b'',
                                    lambda stored: stored[:-1] + bytes([stored[-1] ^ 1])])
def test_a_damaged_file_is_made_again(photos, whole, tmp_path, damage):
    run, (_, pairs) = whole
    again(photos, tmp_path / 'work')
    for kind in ('images', 'pairs'):
        file = min((tmp_path / 'work' / kind).iterdir())
        file.write_bytes(damage(file.read_bytes()))
    resumed, counts = again(photos, tmp_path / 'work')
    assert counts[0] == 1 and 0 < counts[1] <= pairs
    assert same(resumed, run)


def test_a_pair_seen_by_another_camera_is_compared_again(photos, tmp_path):
    encoder = CompactEncoder.load(config=CONFIG.encoder)
    shots = [replace(shot_of(frame, CAMERA, encoder, 10**6), content=str(k))
             for k, frame in enumerate(photos[:3])]
    work = PartialWork(tmp_path / 'work')
    work.begin(CONFIG, encoder)
    batches = [[Comparison(0, 1)], [Comparison(0, 2, roll_j=3)], [Comparison(1, 2)]]
    function = partial(compare, CompactPairs(shots, encoder))
    made = list(work.pairs(map, shots)(function, batches))
    work = PartialWork(tmp_path / 'work')
    work.begin(CONFIG, encoder)
    counting = Counting()
    recalled = list(work.pairs(counting, shots)(function, batches))
    assert counting.counts == (0, 0)
    for [one], [other] in zip(made, recalled, strict=True):
        alike(one, other)
    wider = [*shots[:2], shots[2].seen_by(CAMERA.with_lens(0.9, 0.0))]
    list(work.pairs(counting, wider)(function, batches))
    assert counting.counts == (0, 2)
    list(work.pairs(counting, shots)(function, [[Comparison(0, 1, roll_i=2)]]))
    assert counting.counts == (0, 3)  # nor is one that is rolled the same


def alike(one, other):
    """Two values are the same down to types and bits."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and other.flags.writeable
        np.testing.assert_array_equal(one, other)
        assert one.strides == other.strides  # or sums may be taken in another order
    elif isinstance(one, tuple):
        for a, b in zip(one, other, strict=True):
            alike(a, b)
    elif hasattr(one, '__dict__'):
        alike(tuple(vars(one).values()), tuple(vars(other).values()))
    else:
        assert one == other


def test_a_removal_that_was_killed_is_no_obstacle(photos, tmp_path, monkeypatch):
    killed(photos, tmp_path / 'work', 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, 'rmtree', dying_after(1, shutil.rmtree))
        PartialWork(tmp_path / 'work').remove()
    assert again(photos, tmp_path / 'work')[1][0] == COUNT + 1


def dying_after(calls, function):
    """The function, for so many calls."""
    left = iter(range(calls))

    def mortal(*arguments, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return mortal


def test_a_folder_of_something_else_is_left_alone(photos, tmp_path):
    (tmp_path / 'thesis.tex').write_text('all of it')
    with pytest.raises(InputError, match=r'found thesis.tex; choose another'):
        again(photos, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ['thesis.tex']


def of_process(folder, pid):
    """Processes that a process has started."""
    children = Path(f'/proc/{pid}/task').glob('*/children')
    return [int(child) for file in children for child in file.read_text().split()]


def lives(pid):
    """Whether a process is still there after a while."""
    for _ in range(500):
        if not Path(f'/proc/{pid}').exists():
            return False
        time.sleep(0.01)
    return True


@pytest.mark.skipif(sys.platform != 'linux', reason='processes of /proc: needs Linux')
def test_the_command_goes_on_after_a_kill_and_leaves_nothing(photos, tmp_path, capsys):
    for index, frame in enumerate(photos):
        cv2.imwrite(str(tmp_path / f'{index}.png'), frame.image)
    work, scratch = tmp_path / 'map.partial', tmp_path / 'scratch'
    scratch.mkdir()

    def command(out, workers):
        return ['reconstruct', str(tmp_path), '--set', 'encoder.max_keypoints=400', '--set',
                'encoder.spacing_px=5', '--out', str(tmp_path / out), '--workers', workers]

    process = subprocess.Popen([sys.executable, '-m', 'feedforward_recon.cli',
                                *command('map', '1')], stderr=subprocess.DEVNULL,
                               env={**os.environ, 'TMPDIR': str(scratch)})
    while len(list(work.glob('images/*.arrays'))) < 3 and process.poll() is None:
        time.sleep(0.002)
    workers = of_process(tmp_path, process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and workers
    assert not (tmp_path / 'map').exists()
    assert main(command('map', '0')) == 0
    assert 'going on from map.partial: ' in capsys.readouterr().err
    assert not work.exists()
    assert main(command('whole', '0')) == 0
    whole = load_map(tmp_path / 'whole')
    assert load_map(tmp_path / 'map').poses() == whole.poses()
    assert [worker for worker in workers if lives(worker)] == []
    assert not list(scratch.glob('ffrecon-*'))
