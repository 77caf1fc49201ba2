"""A map is not lost: not by a kill, a respawn, a signal, nor by another map in its folder."""

import shutil

import numpy as np
import pytest
from ros_support.harness import missing_ros

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)

from geometry_msgs.msg import PoseWithCovarianceStamped
from rclpy.task import Future
from ros_support.camera import FakeCamera, walk
from std_srvs.srv import Trigger

from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.io.writers import backups
from feedforward_recon.session.map_folder import load_map

QUICK = {'memory.slots': 8000, 'memory.cells': 2000, 'memory.samples': 20_000,
         'refine.window': 3, 'tf_wait_s': 0.2}


@pytest.fixture(scope='module')
def frames():
    return walk(5, 50, every=2)


class Mapped:
    """A mapping node that has seen frames."""

    def __init__(self, start_node, probe, frames, folder, **parameters):
        self.node = start_node('mapping_node', parameters={**QUICK, 'map': folder, **parameters})
        self.probe, self.poses = probe, probe.collect(PoseWithCovarianceStamped, '/pose')
        self.camera = FakeCamera(probe)
        assert self.camera.heard(), self.node.output
        assert self.camera.play(frames, self.poses) >= len(frames) - 2, self.node.output

    def save(self):
        """What ~/save_map answers."""
        return self.probe.call(Trigger, '/mapping_node/save_map')

    def start_saving(self) -> Future:
        """Call ~/save_map and do not wait for the answer."""
        client = self.probe.node.create_client(Trigger, '/mapping_node/save_map')
        assert self.probe.spin_until(client.service_is_ready)
        return client.call_async(Trigger.Request())


def test_without_a_folder_the_node_says_that_nothing_is_saved(start_node, probe, frames):
    mapped = Mapped(start_node, probe, frames[:8], '')
    assert 'the parameter map is empty' in mapped.node.output
    mapped.node.interrupt()
    assert mapped.node.wait(15) == 0
    assert 'not saved: the map of' in mapped.node.output


def test_the_map_of_another_run_is_announced_and_kept(start_node, probe, frames, tmp_path):
    folder = tmp_path / 'map'
    mapped = Mapped(start_node, probe, frames, folder)
    assert 'no map there yet; this run starts a new map' in mapped.node.output
    assert mapped.save().success
    large = load_map(folder)
    mapped.node.kill()
    mapped = Mapped(start_node, probe, frames[:12], folder, fresh=True)
    assert f'holds a map of {large.info.keyframes} keyframes' in mapped.node.output
    assert 'this run starts a new map' in mapped.node.output
    reply = mapped.save()
    (backup,) = backups(folder)
    assert str(backup) in reply.message and str(backup) in mapped.node.output
    assert load_map(backup).sha256 == large.sha256
    assert load_map(folder).info.keyframes < large.info.keyframes
    assert mapped.save().success and backups(folder) == [backup]  # the own one is replaced


def test_a_node_that_is_started_again_goes_on_with_its_map(start_node, probe, frames, tmp_path):
    """Same folder, same frame, more keyframes, no backup."""
    folder = tmp_path / 'map'
    mapped = Mapped(start_node, probe, frames[:15], folder, autosave_s=1.0)
    mapped.node.wait_for_output('saved ')
    mapped.probe.spin_for(2.5)
    mapped.node.kill()
    before, first = load_map(folder).info, load_map(folder).trajectory()
    true = {f.stamp_ns: f.T_map_cam for f in frames}
    mapped = Mapped(start_node, probe, frames[10:], folder)
    assert 'this run goes on with it' in mapped.node.output
    assert mapped.save().success
    after = load_map(folder)
    assert after.info.sessions == 2 and after.info.keyframes > before.keyframes
    assert backups(folder) == []
    last = after.trajectory()
    T_map_world = first.T_map_cam[0] @ inverse(true[first.stamps_ns[0]])
    off = [np.linalg.norm((T_map_world @ true[stamp])[:3, 3] - T[:3, 3])
           for stamp, T in zip(last.stamps_ns, last.T_map_cam, strict=True)]
    assert len(off) >= 13, mapped.node.output
    assert np.median(off) < 0.03


def test_a_killed_node_has_lost_no_more_than_autosave_s(start_node, probe, frames, tmp_path):
    mapped = Mapped(start_node, probe, frames, tmp_path / 'map', autosave_s=1.0)
    mapped.node.wait_for_output('saved ')
    mapped.probe.spin_for(2.5)
    mapped.node.kill()
    saved = load_map(tmp_path / 'map')
    assert saved.info.tracked >= len(frames) - 2
    assert saved.localizer().localize(frames[10]).status.has_pose


@pytest.mark.parametrize('signal', ['interrupt', 'terminate'])
def test_a_node_that_is_told_to_end_saves_first(start_node, probe, frames, tmp_path, signal):
    mapped = Mapped(start_node, probe, frames[:15], tmp_path / 'map')
    getattr(mapped.node, signal)()
    assert mapped.node.wait(15) == 0
    assert 'saved ' in mapped.node.output
    assert load_map(tmp_path / 'map').info.tracked >= 13


def test_saves_under_way_are_done_and_answered(start_node, probe, frames, tmp_path):
    mapped = Mapped(start_node, probe, frames[:15], tmp_path / 'map')
    answers = [mapped.start_saving() for _ in range(3)]
    assert mapped.probe.spin_until(answers[0].done), mapped.node.output
    mapped.node.interrupt()  # the others are under way, unless the machine is quick
    assert mapped.probe.spin_until(lambda: all(answer.done() for answer in answers)), \
        mapped.node.output
    assert all(answer.result().success and 'keyframes' in answer.result().message
               for answer in answers)
    assert mapped.node.wait(15) == 0
    assert load_map(tmp_path / 'map').info.keyframes > 0


@pytest.mark.slow
def test_without_autosave_the_old_map_stays(start_node, probe, frames, tmp_path):
    mapped = Mapped(start_node, probe, frames[:15], tmp_path / 'map')
    assert mapped.save().success
    old = load_map(tmp_path / 'map').sha256
    mapped.node.kill()
    mapped = Mapped(start_node, probe, frames[:15], tmp_path / 'map', autosave_s=0.0)
    mapped.node.interrupt()
    assert mapped.node.wait(15) == 0
    assert 'autosave_s is 0' in mapped.node.output
    assert load_map(tmp_path / 'map').sha256 == old


def test_a_map_that_cannot_be_saved_is_told_and_tried_again(start_node, probe, frames, tmp_path):
    (tmp_path / 'map').mkdir()
    (tmp_path / 'map' / 'photo.jpg').write_bytes(b'dear')
    mapped = Mapped(start_node, probe, frames[:15], tmp_path / 'map', autosave_s=1.0)
    mapped.node.wait_for_output('the map was not saved')
    assert (tmp_path / 'map' / 'photo.jpg').read_bytes() == b'dear'
    shutil.rmtree(tmp_path / 'map')
    mapped.node.wait_for_output('saved /', timeout_s=25)
    assert load_map(tmp_path / 'map').info.keyframes > 0


def test_a_cleaned_up_node_saves_what_it_forgets(start_node, probe, frames, tmp_path):
    mapped = Mapped(start_node, probe, frames[:15], tmp_path / 'map')
    assert probe.change_state('/mapping_node', 'deactivate')
    assert probe.change_state('/mapping_node', 'cleanup')
    mapped.node.wait_for_output('saved /')
    assert load_map(tmp_path / 'map').info.keyframes > 0
