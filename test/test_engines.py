"""Threads, processes and a cluster do the same work, and outlive workers that die."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from feedforward_recon.config.photos import PhotoConfig
from feedforward_recon.config.schema import EncoderConfig, MemoryConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.session import engines
from feedforward_recon.session.engines import cluster, processes
from feedforward_recon.session.photos import reconstruct_frames
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Frame

CAMERA = Camera.from_fov(70.0, (240, 180))
CONFIG = PhotoConfig(encoder=EncoderConfig(max_keypoints=400, spacing_px=5),
                     memory=MemoryConfig(slots=2000))


class Mortal:
    """An encoder whose process is killed by the first image of all; always, without a marker."""

    def __init__(self, marker: Path | None) -> None:
        self._encoder, self._marker = CompactEncoder.load(config=CONFIG.encoder), marker
        self.sha256, self.dim, self.name = self._encoder.sha256, self._encoder.dim, 'compact'
        self.config = CONFIG.encoder

    def encode(self, image, max_keypoints=None):
        if self._marker is None or not self._marker.exists():
            if self._marker is not None:
                self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._encoder.encode(image, max_keypoints)

    def describe(self, image, pixels):
        return self._encoder.describe(image, pixels)


@pytest.fixture(scope='module')
def photos():
    """Views of a room, and one in which nothing is seen."""
    room = Room.generate(5)
    walk = render_walk(room, CAMERA, room.walk(7, seed=0, fps=4.0), fps=4.0)
    black = Frame(10**12, np.zeros((180, 240, 3), np.uint8), camera=CAMERA)
    return [Frame(f.stamp_ns, f.image, camera=CAMERA) for f in walk] + [black]


@pytest.fixture(scope='module')
def poses(photos):
    return reconstruct_frames(photos, CONFIG)[0].scene.trajectory.T_map_cam


def squared(x):
    return x * x


def refused(x):
    raise InputError(f'expected less than {x}')


def is_mapped(array):
    """Whether an array lies in a mapped file."""
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, 'obj', getattr(array, 'base', None))
    return array is not None


class Table:
    """A function with an array; counts how often it is sent."""

    def __init__(self):
        self.rows, self.nothing, self.sent = np.arange(1e5), np.zeros((0, 2), np.float32), 0

    def __call__(self, row):
        return self.rows[row], is_mapped(self.rows), self.nothing.shape

    def __getstate__(self):
        self.sent += 1
        return self.__dict__


@pytest.fixture(scope='module')
def one_process():
    with processes(1) as engine:
        yield engine


def test_a_function_is_sent_once_and_its_arrays_are_mapped(one_process):
    table = Table()
    for _ in range(2):
        assert list(one_process(table, [3, 7])) == [(3.0, True, (0, 2)), (7.0, True, (0, 2))]
    assert table.sent == 1


def test_results_come_in_order_and_errors_as_they_are(one_process):
    assert list(one_process(squared, iter(range(200)))) == [x * x for x in range(200)]
    with pytest.raises(InputError, match=r'^expected less than 3$'):
        list(one_process(refused, [3]))
    assert list(one_process(squared, [])) == []


def test_a_worker_that_is_killed_changes_nothing(photos, poses, tmp_path):
    with processes(2) as engine:
        run = reconstruct_frames(photos, CONFIG, Mortal(tmp_path / 'killed'), engine=engine)[0]
    assert (tmp_path / 'killed').exists()
    assert len(poses) == 7
    assert np.array_equal(run.scene.trajectory.T_map_cam, poses)


def test_a_task_that_kills_each_worker_is_one_sentence(photos, monkeypatch):
    monkeypatch.setattr(engines, 'RESTARTS', 1)
    with processes(1) as engine, pytest.raises(InputError, match='killed 2 times in a row'):
        reconstruct_frames(photos, CONFIG, Mortal(None), engine=engine)


@pytest.mark.parametrize('address', ['nowhere', '127.0.0.1:1', 'a:b'])
def test_a_cluster_that_is_not_there_is_one_sentence(address):
    pytest.importorskip('ray', reason='needs the extra [cluster]')
    with pytest.raises(InputError, match=f'{address}: expected a Ray cluster, found none'), \
            cluster(address):
        pass


@pytest.fixture(scope='module')
def ray():
    """A cluster of two workers on this machine."""
    ray = pytest.importorskip('ray', reason='needs the extra [cluster]')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join(sys.path))  # where workers find this file
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level='ERROR',
                 object_store_memory=100_000_000)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_a_worker_of_a_cluster_that_is_killed_changes_nothing(ray, photos, poses, tmp_path):
    with cluster('auto') as engine:
        run = reconstruct_frames(photos, CONFIG, Mortal(tmp_path / 'killed'), engine=engine)[0]
    assert (tmp_path / 'killed').exists()
    assert np.array_equal(run.scene.trajectory.T_map_cam, poses)
    assert ray.is_initialized()  # it was there before


def test_results_of_a_cluster_leave_its_object_store(ray):
    with cluster('auto') as engine:
        assert [array.flags.writeable for array in engine(np.zeros, [10**5])] == [True]


def test_errors_of_a_cluster_are_those_of_the_package(ray, monkeypatch):
    monkeypatch.setattr(engines, 'RESTARTS', 0)
    with cluster('auto') as engine:
        with pytest.raises(InputError, match=r'^expected less than 3$'):
            list(engine(refused, [3]))
        with pytest.raises(InputError, match='lost 1 times in a row'):
            list(engine(Mortal(None).encode, [None]))


def test_a_cluster_without_the_package_is_one_sentence(ray, monkeypatch):
    stranger = ModuleType('stranger')
    exec('def known_here_alone(x): return x', stranger.__dict__)
    monkeypatch.setitem(sys.modules, 'stranger', stranger)
    with cluster('auto') as engine, pytest.raises(InputError, match="No module named 'stranger'"):
        list(engine(stranger.known_here_alone, [1]))


def test_without_ray_the_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(InputError, match=r'pip install ray'), \
            cluster('auto'):
        pass
