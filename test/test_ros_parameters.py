"""ROS parameters on a real node: declared once, described, checked, and changed with a reason."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

rclpy = pytest.importorskip('rclpy', reason='ros: rclpy is not installed')

from rcl_interfaces.msg import ParameterType  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402

from feedforward_recon.config.files import nested  # noqa: E402
from feedforward_recon.config.node import NodeConfig, each_setting  # noqa: E402
from feedforward_recon.config.schema import from_dict  # noqa: E402
from feedforward_recon.errors import ConfigError  # noqa: E402
from feedforward_recon.ros.parameters import declare  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def context(ros_domain):
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=ros_domain.id)
    yield context
    rclpy.shutdown(context=context)


@pytest.fixture
def make_node(context):
    """Create nodes with the given overrides, as a parameter file or command line would."""
    nodes = []

    def make(*arguments, **overrides):
        node = rclpy.create_node('mapping_node', context=context, cli_args=list(arguments),
                                 use_global_arguments=False, parameter_overrides=[
                                     Parameter(name.replace('__', '.'), value=value)
                                     for name, value in overrides.items()])
        nodes.append(node)
        return node
    yield make
    for node in nodes:
        node.destroy_node()


def put(node, name, value):
    (result,) = node.set_parameters([Parameter(name, value=value)])
    return result


def test_every_setting_is_a_parameter_with_its_default(make_node):
    node = make_node()
    parameters = declare(node, NodeConfig)
    assert parameters.config == NodeConfig()
    values = {s.name: node.get_parameter(s.name).value for s in each_setting(NodeConfig())}
    assert from_dict(NodeConfig, nested(values)) == NodeConfig()
    assert parameters.unknown == ()


def test_a_node_may_have_defaults_of_its_own(make_node):
    node = make_node()
    assert declare(node, NodeConfig, mode='localization').config == NodeConfig(mode='localization')
    assert node.get_parameter('mode').value == 'localization'


@pytest.mark.parametrize('name', ['mapping', 'localization'])
def test_ros_reads_the_shipped_files_without_a_warning(make_node, name):
    node = make_node('--ros-args', '--params-file', str(ROOT / f'config/{name}.yaml'))
    parameters = declare(node, NodeConfig)
    assert parameters.config == NodeConfig(mode=name)
    assert parameters.unknown == ()


def test_a_whole_number_stands_for_a_real_one(make_node, tmp_path):
    file = tmp_path / 'p.yaml'
    file.write_text('/**: {ros__parameters: {tf_rate_hz: 30, localizer: {search_px: 9}}}')
    node = make_node('--ros-args', '--params-file', str(file), '-p', 'path_length:=7')
    parameters = declare(node, NodeConfig)
    assert node.get_parameter('tf_rate_hz').type_ == Parameter.Type.DOUBLE
    assert put(node, 'tf_rate_hz', 40).successful
    config = parameters.config
    assert (config.tf_rate_hz, config.localizer.search_px, config.path_length) == (40, 9, 7)
    assert isinstance(config.tf_rate_hz, float)


def test_descriptors_tell_meaning_range_and_choices(make_node):
    node = make_node()
    declare(node, NodeConfig)
    for setting in each_setting(NodeConfig()):
        told, meta = node.describe_parameter(setting.name), setting.spec.metadata
        assert told.description.startswith(meta['doc'])
        assert meta['unit'] in told.description
        assert told.read_only == (setting.when == 'start')
        assert all(choice in told.additional_constraints for choice in meta['choices'])
        for limit, end in (('low', 'from_value'), ('high', 'to_value')):
            if meta[limit] is not None:
                (range_,) = told.floating_point_range or told.integer_range
                assert getattr(range_, end) == meta[limit]
    assert node.describe_parameter('tf_rate_hz').type == ParameterType.PARAMETER_DOUBLE
    assert node.describe_parameter('autostart').type == ParameterType.PARAMETER_BOOL


@pytest.mark.parametrize(('overrides', 'message'), [
    ({'queue_size': 0}, r'queue_size within \[1, 1000\], found 0'),
    ({'queue_size': 2.0}, 'expected int for queue_size, found 2.0'),
    ({'memory__slots': 'many'}, "expected int for memory.slots, found 'many'"),
    ({'tf_mode': 'odom'}, 'tf_mode to be one of'),
    ({'tf_rate_hz': float('nan')}, 'a finite number for tf_rate_hz'),
    ({'map_frame': 'odom'}, 'three different TF frames'),
])
def test_wrong_values_at_start_are_one_sentence(make_node, overrides, message):
    with pytest.raises(ConfigError, match=message):
        declare(make_node(**overrides), NodeConfig)


def test_unknown_names_are_warned_about_with_the_nearest_known(make_node, capfd):
    node = make_node(memory__slot=3, zzz=1, use_sim_time=True)
    parameters = declare(node, NodeConfig)
    assert parameters.unknown == ('memory.slot', 'zzz')
    said = capfd.readouterr().err
    assert 'memory.slot is unknown and changes nothing; did you mean memory.slots?' in said
    assert 'zzz is unknown and changes nothing; see docs/parameters.md' in said
    assert 'use_sim_time' not in said


@pytest.mark.parametrize(('name', 'value', 'reason'), [
    ('localizer.search_px', 0.1, 'localizer.search_px'),
    ('localizer.min_inliers', 3, 'localizer.min_inliers'),
    ('tf_rate_hz', 'fast', "expected float for tf_rate_hz, found 'fast'"),
    ('tf_rate_hz', True, 'expected float for tf_rate_hz, found True'),
    ('tf_rate_hz', 0, r'expected tf_rate_hz within [0.1, 200.0]'),
    ('image_qos', 'sensor_data', 'expected image_qos to be one of'),
    ('base_frame', '/base_link', 'without a leading slash'),
    ('autostart', False, 'read-only'),
])
def test_a_refused_change_has_a_reason_and_changes_nothing(make_node, name, value, reason):
    node = make_node()
    parameters = declare(node, NodeConfig)
    before, told = node.get_parameter(name).value, []
    parameters.on_change(told.append)
    result = put(node, name, value)
    assert not result.successful
    assert reason in result.reason
    assert (parameters.config, node.get_parameter(name).value, told) == (NodeConfig(), before, [])


@pytest.mark.parametrize('iron_or_later', [True, False])
def test_listeners_hear_an_accepted_change_once(make_node, monkeypatch, iron_or_later):
    node = make_node()
    if not iron_or_later:
        monkeypatch.delattr(type(node), 'add_post_set_parameters_callback')
    parameters, told = declare(node, NodeConfig), []
    parameters.on_change(told.append)
    assert put(node, 'localizer.search_px', 5.0).successful
    assert put(node, 'localizer.search_px', 5.0).successful  # nothing new
    assert put(node, 'use_sim_time', True).successful  # not ours
    assert [config.localizer.search_px for config in told] == [5.0]
    assert parameters.config is told[0]


def test_several_changes_are_all_or_nothing(make_node):
    node = make_node()
    parameters, told = declare(node, NodeConfig), []
    parameters.on_change(told.append)
    pair = [Parameter('map_frame', value='odom'), Parameter('odom_frame', value='map')]
    assert node.set_parameters_atomically(pair).successful
    assert [(c.map_frame, c.odom_frame) for c in told] == [('odom', 'map')]
    pair = [Parameter('path_length', value=9), Parameter('queue_size', value=0)]
    assert not node.set_parameters_atomically(pair).successful
    assert parameters.config.path_length == NodeConfig().path_length


def test_a_configured_node_changes_only_live_settings(make_node):
    node = make_node()
    parameters = declare(node, NodeConfig)
    assert put(node, 'memory.slots', 5).successful
    parameters.locked = True
    result = put(node, 'memory.slots', 6)
    assert not result.successful
    assert 'memory.slots cannot change while the node is configured' in result.reason
    assert 'ros2 lifecycle set /mapping_node' in result.reason
    assert put(node, 'memory.slots', 5).successful, 'the same value is no change'
    assert put(node, 'map', '/tmp/kitchen').successful
    parameters.locked = False
    assert put(node, 'memory.slots', 6).successful
    assert (parameters.config.memory.slots, parameters.config.map) == (6, '/tmp/kitchen')


def test_any_dataclass_of_settings_will_do(make_node):
    from feedforward_recon.config.schema import option

    @dataclass(frozen=True)
    class Player:
        rate_hz: float = option(15.0, 'images per second', low=0.1, unit='Hz')

    node = make_node(rate_hz=5)
    assert declare(node, Player).config == Player(rate_hz=5.0)
    assert not put(node, 'rate_hz', 0.0).successful
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert put(node, 'rate_hz', 1e9).successful
