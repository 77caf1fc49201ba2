"""Settings of nodes: one declaration, and files that ROS and the command line both read."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from feedforward_recon.config.files import SECTION, mapper_settings, shipped_files, write
from feedforward_recon.config.network import (
    ATTENTIONS,
    MORE_NETWORKS,
    NETWORKS,
    ModelOptions,
)
from feedforward_recon.config.node import NodeConfig, each_setting
from feedforward_recon.config.schema import MapperConfig, from_dict, to_dict
from feedforward_recon.console.options import MODEL_FLAGS, settings
from feedforward_recon.errors import ConfigError
from feedforward_recon.model.attention.registry import ATTENTION
from feedforward_recon.model.configs import ALIASES, CONFIGS

ROOT = Path(__file__).resolve().parents[1]
YAML = [name for name in shipped_files() if name.endswith('.yaml')]


def parameters(name):
    """What ROS would give to every node from a shipped file."""
    return yaml.safe_load((ROOT / name).read_text(encoding='utf-8'))['/**'][SECTION]


@pytest.fixture
def file(tmp_path):
    """Write text to a settings file and return its path."""
    def written(text):
        path = tmp_path / 'settings.yaml'
        path.write_text(text, encoding='utf-8')
        return path
    return written


@pytest.mark.parametrize('name', shipped_files())
def test_shipped_files_are_generated_from_the_code(name):
    text = (ROOT / name).read_text(encoding='utf-8')
    assert text == shipped_files()[name], 'a default changed: run `make config`'


def test_generation_writes_the_files_where_they_are_shipped(tmp_path):
    for folder in ('config', 'docs'):
        (tmp_path / folder).mkdir()
    write(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in shipped_files()} == shipped_files()


@pytest.mark.parametrize('name', YAML)
def test_shipped_parameters_are_the_defaults(name):
    assert from_dict(NodeConfig, parameters(name)) == NodeConfig(mode=Path(name).stem)


def test_mapping_file_names_every_setting():
    assert parameters('config/mapping.yaml') == to_dict(NodeConfig())


@pytest.mark.parametrize('setting', list(each_setting(NodeConfig())), ids=lambda s: s.name)
def test_every_setting_is_documented_and_in_the_reference(setting):
    assert setting.spec.metadata['doc']
    assert f'| `{setting.name}` | ' in shipped_files()['docs/parameters.md']


def test_every_network_is_named_where_it_is_chosen():
    told = re.split(r'[ ,:]+', by_name()['model'].spec.metadata['doc'])
    sizes_of_tests = {'vggt-small', 'pi3-small', 'vggt-tiny'}
    assert {*CONFIGS, *ALIASES} - sizes_of_tests == {*NETWORKS, *MORE_NETWORKS} <= set(told)
    attention = re.split(r'[ ,:;]+', by_name()['attention'].spec.metadata['doc'])
    assert tuple(ATTENTION) == ATTENTIONS
    assert set(ATTENTION) <= set(attention)


def by_name():
    return {setting.name: setting for setting in each_setting(NodeConfig())}


def test_the_command_line_and_the_nodes_share_the_options_of_the_network():
    shared = {spec.name for spec in fields(ModelOptions)}
    assert shared == {'model', 'attention', 'device', 'weights', 'precision', 'window', 'anchors'}
    assert {flag.name for flag in MODEL_FLAGS.values()} == {
        *(f'--{name}' for name in shared), '--refine/--no-refine'}
    assert all(by_name()[name].when == 'configure' for name in shared)


@pytest.mark.parametrize(('changes', 'named'), [
    ({'attention': 'ttt'}, 'attention'), ({'device': 'cuda'}, 'device'),
    ({'window': 8, 'weights': 'x'}, 'weights, window')])
def test_what_compact_would_not_use_is_refused(changes, named):
    NodeConfig(model='tiny', **changes).check()
    with pytest.raises(ConfigError, match=f'expected {named} beside a feed-forward network'):
        NodeConfig(**changes).check()


def test_round_trip_keeps_booleans_and_texts():
    config = NodeConfig(autostart=False, map='~/maps/kitchen', tf_mode='none', tf_rate_hz=5.0)
    assert from_dict(NodeConfig, to_dict(config)) == config


def test_a_map_is_saved_with_the_settings_of_the_mapper_alone():
    config = from_dict(NodeConfig, {'memory': {'slots': 5}, 'map': 'x'})
    assert type(config.mapper) is MapperConfig
    assert config.mapper == from_dict(MapperConfig, {'memory': {'slots': 5}})


def test_what_shapes_the_map_never_changes_while_a_node_runs():
    live = {setting.name for setting in each_setting(NodeConfig()) if setting.when == 'live'}
    assert {'localizer.search_px', 'tf_rate_hz', 'path_length', 'depth_slop_ms'} <= live
    assert not {name for name in live if name.startswith(('memory', 'encoder', 'tracking'))}
    assert not live & {'mode', 'map_frame', 'image_qos', 'queue_size'}


@pytest.mark.parametrize(('values', 'message'), [
    ({'autostart': 1}, 'expected bool for autostart, found 1'),
    ({'queue_size': True}, 'expected int for queue_size, found True'),
    ({'map': 3}, 'expected str for map, found 3'),
    ({'tf_mode': 'map_to_bse'}, "tf_mode to be one of .*, found 'map_to_bse'"),
    ({'tf_rate': 10}, 'unknown setting tf_rate; did you mean tf_rate_hz'),
    ({'map_frame': ''}, "name of a TF frame for map_frame, found ''"),
    ({'camera_frame': '/camera'}, "without a leading slash, found '/camera'; use 'camera'"),
    ({'odom_frame': 'map'}, 'three different TF frames'),
])
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(NodeConfig, values)


# The command line reads the files of the nodes


@pytest.mark.parametrize('name', YAML)
def test_command_line_reads_the_shipped_files(name):
    assert settings(MapperConfig(), ROOT / name, None) == MapperConfig()


@pytest.mark.parametrize('text', [
    'memory: {slots: 7}',
    '/**:\n  ros__parameters:\n    memory: {slots: 7}',
    '/**:\n  ros__parameters:\n    memory.slots: 7',
    '/**:\n  ros__parameters: {use_sim_time: true, map_frame: m, memory: {slots: 7}}',
    '/**:\n  ros__parameters: {qos_overrides./tf.publisher.depth: 5, memory: {slots: 7}}',
    'robot1:\n  mapping_node:\n    ros__parameters: {memory: {slots: 7}}',
    'memory.slots: 7\nmemory: {tables: 4}',
])
def test_the_head_of_a_parameter_file_is_optional(file, text):
    assert mapper_settings(file(text))['memory']['slots'] == 7
    assert settings(MapperConfig(), file(text), None) == from_dict(MapperConfig,
                                                                   {'memory': {'slots': 7}})


def test_an_empty_file_changes_nothing(file):
    assert mapper_settings(file('# nothing\n')) == {}


@pytest.mark.parametrize(('text', 'message'), [
    ('/**:\n  ros__parameters: {memory: {slot: 7}}', 'did you mean memory.slots'),
    ('/**:\n  ros__parameters: {tf_rate_hz: fast}', 'expected float for tf_rate_hz'),
    ('tf_rate: 3', 'did you mean tf_rate_hz'),
    ('a: {ros__parameters: {}}\nb: {ros__parameters: {}}', 'one section ros__parameters with '
     r'settings, found 2 \(a, b\)'),
    ('/**: {ros__parameters: {}}\nmemory: {slots: 3}', 'nothing beside /\\*\\*'),
    ('/**: {ros__parameters: 3}', 'one section'),
    ('memory: 3\nmemory.slots: 3', 'expected a group of settings at memory'),
    ('- 1', 'found list; see config/mapping.yaml'),
    ('{', 'expected a YAML file of settings'),
])
def test_faults_in_files_are_named_with_the_file(file, text, message):
    with pytest.raises(ConfigError, match=f'settings.yaml: .*{message}'):
        mapper_settings(file(text))


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r'none.yaml: expected a YAML file of settings'):
        mapper_settings(tmp_path / 'none.yaml')


def test_values_are_plain_ones_that_ros_can_hold():
    kinds = {type(setting.value) for setting in each_setting(NodeConfig())}
    assert kinds <= {bool, int, float, str}
