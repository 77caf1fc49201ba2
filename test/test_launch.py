"""The launch files: what they declare, and what they start where `launch` is installed."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / 'launch').glob('*.launch.py'))
SHARED = ROOT / 'feedforward_recon' / 'ros' / 'launching.py'
NAV2 = {'namespace', 'use_sim_time', 'params_file', 'autostart', 'use_respawn', 'log_level',
        'use_rviz', 'rviz_config'}
OWN = {'image_topic', 'camera_info_topic', 'depth_topic', 'odom_topic', 'imu_topic', 'map',
       'model', 'attention', 'device', 'weights'}
REPLAY = {'source', 'bag', 'rate', 'loop', 'mode'}


# -- read, not run ------------------------------------------------------------------------------

def calls(path: Path, name: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
            and getattr(node.func, 'id', '') == name]


def first_words(path: Path, name: str) -> set[str]:
    return {call.args[0].value for call in calls(path, name)
            if isinstance(call.args[0], ast.Constant)}


def test_arguments_have_the_names_of_nav2():
    assert first_words(SHARED, 'DeclareLaunchArgument') == NAV2 | OWN


def test_every_argument_is_described_and_has_a_default():
    for path in (SHARED, *FILES):
        for call in calls(path, 'DeclareLaunchArgument'):
            given = {keyword.arg for keyword in call.keywords}
            assert {'description', 'default_value'} <= given, ast.unparse(call)


def test_every_argument_used_is_declared():
    for path in (SHARED, *FILES):
        used = first_words(path, 'LaunchConfiguration')
        assert used <= NAV2 | OWN | first_words(path, 'DeclareLaunchArgument'), path


def test_replay_declares_what_it_adds():
    assert first_words(ROOT / 'launch' / 'replay.launch.py', 'DeclareLaunchArgument') == REPLAY


@pytest.mark.parametrize('name', ['mapping', 'localization'])
def test_rviz_shows_what_the_nodes_publish(name):
    """Topics are relative (RViz adds its namespace) and of the display's type."""
    config = yaml.safe_load((ROOT / 'config' / f'{name}.rviz').read_text())
    manager = config['Visualization Manager']
    topics = {display['Topic']['Value']: display['Class'].rsplit('/')[-1]
              for display in manager['Displays'] if 'Topic' in display}
    assert topics == {'cloud_map': 'PointCloud2', 'path': 'Path', 'markers': 'MarkerArray',
                      'pose': 'PoseWithCovariance', 'camera/image_raw': 'Image'}
    assert manager['Global Options']['Fixed Frame'] == 'map'
    for display in manager['Displays']:
        if display['Class'].endswith(('PointCloud2', 'Path', 'MarkerArray')):
            assert display['Topic']['Durability Policy'] == 'Transient Local'


# -- run, where ROS brings launch ---------------------------------------------------------------

# Stands in for a node: writes down how it was started, then ends.
RECORDER = """#!{python}
import json, os, sys
from pathlib import Path
files = [word for before, word in zip(sys.argv, sys.argv[1:]) if before == '--params-file']
Path({folder!r}, Path(sys.argv[0]).name + '.json').write_text(json.dumps({{
    'words': sys.argv[1:], 'environment': dict(os.environ),
    'files': [Path(name).read_text() for name in files]}}))
"""


class Started:
    """How a launch file started one program."""

    def __init__(self, record):
        self.words, self.environment = record['words'], record['environment']
        self.parameters = {}
        for text in record['files']:
            for settings in yaml.safe_load(text).values():
                self.parameters.update(settings['ros__parameters'])
        rules = [word.partition(':=') for before, word in pairwise(self.words)
                 if before == '-r']
        self.rules = {old: new for old, _, new in rules}


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Run a launch file with programs that only write down how they were started."""
    if importlib.util.find_spec('launch_ros') is None:
        pytest.skip('launch: launch_ros is not installed and PyPI has none; run the tests where '
                    'a ROS 2 is sourced')
    records = tmp_path / 'records'
    records.mkdir()
    for package, programs in (
            ('feedforward_recon', ('mapping_node', 'localization_node', 'player_node')),
            ('rviz2', ('rviz2',))):
        install(tmp_path, package, programs, RECORDER.format(python=sys.executable,
                                                             folder=str(records)))
    (tmp_path / 'share/feedforward_recon').symlink_to(ROOT)
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path), prepend=os.pathsep)
    for name in ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE'):
        monkeypatch.delenv(name, raising=False)

    def run(name, **given):
        from launch.actions import IncludeLaunchDescription
        from launch.launch_description_sources import PythonLaunchDescriptionSource

        from launch import LaunchDescription, LaunchService

        service = LaunchService()
        service.include_launch_description(LaunchDescription([IncludeLaunchDescription(
            PythonLaunchDescriptionSource(str(ROOT / 'launch' / f'{name}.launch.py')),
            launch_arguments=given.items())]))
        code = service.run()
        return code, {path.stem: Started(json.loads(path.read_text()))
                      for path in records.iterdir()}
    return run


def install(prefix, package, programs, script):
    """Put programs where `ros2 launch` looks for those of a package."""
    marker = prefix / 'share/ament_index/resource_index/packages' / package
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    folder = prefix / 'lib' / package
    folder.mkdir(parents=True)
    for name in programs:
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)


@pytest.mark.parametrize('mode', ['mapping', 'localization'])
def test_defaults_start_the_node_with_its_file(launched, mode):
    code, started = launched(mode)
    assert code == 0
    assert set(started) == {f'{mode}_node'}
    node = started[f'{mode}_node']
    defaults = yaml.safe_load((ROOT / 'config' / f'{mode}.yaml').read_text())['/**']
    assert node.parameters == {**defaults['ros__parameters'], 'use_sim_time': False}
    assert node.rules['image'] == 'camera/image_raw'
    assert node.rules['/tf'] == 'tf'
    assert node.rules['__node'] == f'{mode}_node'
    assert node.rules.get('__ns', '/') == '/'


def test_arguments_reach_the_node(launched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, started = launched(
        'localization', namespace='robot1', use_sim_time='true', autostart='false',
        image_topic='/front/image', camera_info_topic='/front/info', depth_topic='/front/depth',
        odom_topic='/odometry/filtered', imu_topic='/imu/data', map='maps/home',
        model='tiny', attention='ttt', device='cpu', weights='mine.safetensors',
        log_level='debug')
    node = started['localization_node']
    assert node.rules == {
        '__node': 'localization_node', '__ns': '/robot1', '/tf': 'tf', '/tf_static': 'tf_static',
        'image': '/front/image', 'camera_info': '/front/info', 'depth': '/front/depth',
        'odom': '/odometry/filtered', 'imu': '/imu/data'}
    expected = {'use_sim_time': True, 'autostart': False, 'map': str(tmp_path / 'maps' / 'home'),
                'model': 'tiny', 'attention': 'ttt', 'device': 'cpu',
                'weights': str(tmp_path / 'mine.safetensors')}
    assert {name: node.parameters[name] for name in expected} == expected
    assert node.words[node.words.index('--log-level') + 1] == 'debug'


def test_a_file_of_the_user_counts_and_empty_arguments_keep_it(launched, tmp_path):
    own = tmp_path / 'own.yaml'
    own.write_text('/**:\n  ros__parameters:\n    map: /from/file\n    queue_size: 7\n')
    node = launched('mapping', params_file=str(own))[1]['mapping_node']
    assert (node.parameters['map'], node.parameters['queue_size']) == ('/from/file', 7)


def test_large_images_get_shared_memory_unless_the_user_has_a_profile(launched, monkeypatch):
    node = launched('mapping')[1]['mapping_node']
    old = os.environ.get('ROS_DISTRO') in ('humble', 'jazzy')
    name = 'FASTRTPS_DEFAULT_PROFILES_FILE' if old else 'FASTDDS_DEFAULT_PROFILES_FILE'
    assert Path(node.environment[name]).samefile(ROOT / 'config' / 'fastdds.xml')
    monkeypatch.setenv(name, '/own.xml')
    assert launched('mapping')[1]['mapping_node'].environment[name] == '/own.xml'


def test_rviz_comes_on_demand_in_the_same_namespace(launched):
    rviz = launched('mapping', use_rviz='true', namespace='robot1')[1]['rviz2']
    assert Path(rviz.words[rviz.words.index('-d') + 1]).samefile(ROOT / 'config/mapping.rviz')
    assert rviz.rules['__ns'] == '/robot1' and rviz.rules['/tf'] == 'tf'


def test_replay_plays_a_source_on_simulated_time(launched):
    _, started = launched('replay', source='synthetic:7', rate='2', mode='localization',
                          namespace='robot1', image_topic='eye')
    player, node = started['player_node'], started['localization_node']
    assert player.parameters == {'source': 'synthetic:7', 'rate': 2.0, 'loop': False,
                                 'publish_clock': True}
    assert player.rules['image'] == node.rules['image'] == 'eye'
    assert player.rules['__ns'] == node.rules['__ns'] == '/robot1'
    assert node.parameters['use_sim_time'] is True
    assert node.parameters['mode'] == 'localization'


@pytest.mark.parametrize('given', [{}, {'source': 'a', 'bag': 'b'}])
def test_replay_does_not_guess_between_sources(launched, given, caplog):
    code, started = launched('replay', **given)
    assert code == 1
    assert 'player_node' not in started
    assert 'expected one of source and bag' in caplog.text


def test_replay_of_a_bag_plays_all_its_topics(launched, tmp_path, monkeypatch):
    records = tmp_path / 'records'
    program = tmp_path / 'bin' / 'ros2'
    program.parent.mkdir()
    program.write_text(RECORDER.format(python=sys.executable, folder=str(records)))
    program.chmod(0o755)
    monkeypatch.setenv('PATH', f'{program.parent}:{os.environ["PATH"]}')
    _, started = launched('replay', bag='drive', loop='true')
    assert started['ros2'].words == ['bag', 'play', 'drive', '--clock', '--rate', '1.0', '--loop']
    assert 'player_node' not in started
