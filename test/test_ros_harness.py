"""The tests' own ROS machinery: large images arrive, domains do not meet, nothing stays."""

import pytest
from ros_support.harness import NodeProcess, missing_ros, own_domain

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


def test_a_killed_process_leaves_no_shared_memory(tmp_path):
    """Not even what this process still had open when the other died."""
    if missing_ros():
        pytest.skip(missing_ros())
    from ros_support.probe import Probe
    from sensor_msgs.msg import Image

    with own_domain('leftovers') as domain, pytest.MonkeyPatch.context() as patch:
        for name, value in domain.environment.items():
            patch.setenv(name, value)
        probe = Probe(domain)
        images = probe.collect(Image, 'image', 5)
        camera = NodeProcess(domain, tmp_path / 'log', 'ros_support.images', '1000', '30',
                             'reliable')
        assert probe.spin_until(lambda: images)
        camera.kill()
        left = {path for path in domain.leftovers if path.exists()}
        probe.close()
    assert left
    assert not any(path.exists() for path in left)


def test_domains_of_one_name_differ():
    with own_domain('a') as first, own_domain('a') as second:
        assert first.id != second.id
        assert first.environment['ROS_DOMAIN_ID'] == str(first.id)
