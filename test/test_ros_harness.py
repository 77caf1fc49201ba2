"""The tests' own ROS machinery: large images arrive, domains do not meet, nothing stays."""

from pathlib import Path

import pytest
from ros_support import shared_memory
from ros_support.harness import own_domain

COUNT = 60


@pytest.mark.parametrize('reliability', ['best_effort', 'reliable'])
def test_raw_vga_images_arrive(start_node, probe, reliability):
    """Most are lost with the defaults of Fast DDS; config/fastdds.xml is what prevents it."""
    from sensor_msgs.msg import Image

    images = probe.collect(Image, 'image', 5, reliable=reliability == 'reliable')
    camera = start_node('ros_support.images', str(COUNT), '30', reliability)
    assert probe.spin_until(lambda: len(images) == COUNT or not camera.is_running(), 20)
    probe.spin_until(lambda: len(images) == COUNT, 0.5)
    assert len(images) >= 0.95 * COUNT
    assert all(len(image.data) == 640 * 480 * 3 for image in images)


def test_a_killed_process_leaves_no_shared_memory(start_node, probe):
    from sensor_msgs.msg import Image

    images = probe.collect(Image, 'image', 5)
    camera = start_node('ros_support.images', '1000', '30', 'reliable')
    assert probe.spin_until(lambda: images)
    mapped = shared_memory.mapped_by(camera.pid)
    camera.kill()
    ours = shared_memory.mapped_by(Path('/proc/self').resolve().name)
    assert mapped - ours
    assert not any(path.exists() for path in mapped - ours)


def test_domains_of_one_name_differ():
    with own_domain('a') as first, own_domain('a') as second:
        assert first.id != second.id
        assert first.environment['ROS_DOMAIN_ID'] == str(first.id)
