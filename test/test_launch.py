"""The launch files, executed: with doubles of `launch` always, with the real one where it is."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from ros_support import launch_doubles as doubles
from ros_support.manifests import STARTED, console_scripts

ROOT = Path(__file__).resolve().parent.parent
NAV2 = {'namespace', 'use_sim_time', 'params_file', 'autostart', 'use_respawn', 'log_level',
        'use_rviz', 'rviz_config'}
OWN = {'image_topic', 'camera_info_topic', 'depth_topic', 'odom_topic', 'imu_topic',
       'right_image_topic', 'right_camera_info_topic',
       'image_transport', 'depth_transport', 'map', 'fresh', 'model', 'attention', 'device',
       'weights', 'precision'}
REPLAY = {'source', 'bag', 'rate', 'loop', 'mode'}
REAL = importlib.util.find_spec('launch_ros') is not None
needs_real = pytest.mark.skipif(not REAL, reason='launch: launch_ros is not installed and PyPI '
                                'has none; run the tests where a ROS 2 is sourced')
MACHINE = doubles.Machine(
    programs={'feedforward_recon': console_scripts(), 'rviz2': {'rviz2'}},
    shares={'feedforward_recon': ROOT}, commands={'ros2'})


def launch_file(name):
    return ROOT / 'launch' / f'{name}.launch.py'


# -- both kinds of launch -----------------------------------------------------------------------

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

    def __init__(self, words, environment, files):
        self.words, self.environment = words, environment
        self.parameters = {}
        for text in files:
            for settings in yaml.safe_load(text).values():
                self.parameters.update(settings['ros__parameters'])
        rules = [word.partition(':=') for before, word in pairwise(self.words)
                 if before == '-r']
        self.rules = {old: new for old, _, new in rules}


class RefusedError(Exception):
    """What a launch file will not be started with."""


@pytest.fixture(params=['doubles', pytest.param('real', marks=needs_real)])
def launched(request, monkeypatch):
    """Run a launch file; {program: Started}, or RefusedError for impossible arguments."""
    for name in ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE'):
        monkeypatch.delenv(name, raising=False)
    return request.getfixturevalue(f'launched_with_{request.param}')


@pytest.fixture
def launched_with_doubles():
    def run(name, **given):
        try:
            context = doubles.launch_file(launch_file(name), MACHINE, given)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        return {program.name: Started(program.words, program.environment, program.files)
                for program in context.started}
    return run


@pytest.fixture
def launched_with_real(tmp_path, monkeypatch, caplog):
    """The real thing, with programs that only write down how they were started."""
    records = tmp_path / 'records'
    records.mkdir()
    script = RECORDER.format(python=sys.executable, folder=str(records))
    for package, programs in MACHINE.programs.items():
        marker = tmp_path / 'share/ament_index/resource_index/packages' / package
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        write_programs(tmp_path / 'lib' / package, programs, script)
    write_programs(tmp_path / 'bin', MACHINE.commands, script)
    (tmp_path / 'share/feedforward_recon').symlink_to(ROOT)
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'), prepend=os.pathsep)

    def run(name, **given):
        from launch.actions import IncludeLaunchDescription
        from launch.launch_description_sources import PythonLaunchDescriptionSource

        from launch import LaunchDescription, LaunchService

        service = LaunchService()
        service.include_launch_description(LaunchDescription([IncludeLaunchDescription(
            PythonLaunchDescriptionSource(str(launch_file(name))),
            launch_arguments=given.items())]))
        before = dict(os.environ)  # launch sets variables in its own process
        try:
            code = service.run()
        finally:
            os.environ.clear()
            os.environ.update(before)
        if code:
            raise RefusedError(caplog.text)
        return {path.stem: Started(**json.loads(path.read_text())) for path in records.iterdir()}
    return run


def write_programs(folder, names, script):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)


@pytest.mark.parametrize('mode', ['mapping', 'localization'])
def test_defaults_start_the_node_with_its_file(launched, mode):
    started = launched(mode)
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
    started = launched(
        'localization', namespace='robot1', use_sim_time='true', autostart='false',
        image_topic='/front/image', camera_info_topic='/front/info', depth_topic='/front/depth',
        right_image_topic='/right/image_rect', right_camera_info_topic='/right/camera_info',
        odom_topic='/odometry/filtered', imu_topic='/imu/data', image_transport='compressed',
        depth_transport='auto', map='maps/home',
        model='tiny', attention='ttt', device='cpu', weights='mine.safetensors',
        precision='fp8',
        log_level='debug')
    node = started['localization_node']
    assert node.rules == {
        '__node': 'localization_node', '__ns': '/robot1', '/tf': 'tf', '/tf_static': 'tf_static',
        'image': '/front/image', 'camera_info': '/front/info', 'depth': '/front/depth',
        'right/image': '/right/image_rect', 'right/camera_info': '/right/camera_info',
        'odom': '/odometry/filtered', 'imu': '/imu/data'}
    expected = {'use_sim_time': True, 'autostart': False, 'image_transport': 'compressed',
                'depth_transport': 'auto', 'map': str(tmp_path / 'maps' / 'home'),
                'model': 'tiny', 'attention': 'ttt', 'device': 'cpu', 'precision': 'fp8',
                'weights': str(tmp_path / 'mine.safetensors')}
    assert {name: node.parameters[name] for name in expected} == expected
    assert node.words[node.words.index('--log-level') + 1] == 'debug'


def test_a_file_of_the_user_counts_and_empty_arguments_keep_it(launched, tmp_path):
    own = tmp_path / 'own.yaml'
    own.write_text('/**:\n  ros__parameters:\n    map: /from/file\n    queue_size: 7\n')
    node = launched('mapping', params_file=str(own))['mapping_node']
    assert (node.parameters['map'], node.parameters['queue_size']) == ('/from/file', 7)


def test_large_images_get_shared_memory_unless_the_user_has_a_profile(launched, monkeypatch):
    node = launched('mapping')['mapping_node']
    old = os.environ.get('ROS_DISTRO') in ('humble', 'jazzy')
    name = 'FASTRTPS_DEFAULT_PROFILES_FILE' if old else 'FASTDDS_DEFAULT_PROFILES_FILE'
    assert Path(node.environment[name]).samefile(ROOT / 'config' / 'fastdds.xml')
    monkeypatch.setenv(name, '/own.xml')
    assert launched('mapping')['mapping_node'].environment[name] == '/own.xml'


def test_rviz_comes_on_demand_in_the_same_namespace(launched):
    rviz = launched('mapping', use_rviz='true', namespace='robot1')['rviz2']
    assert Path(rviz.words[rviz.words.index('-d') + 1]).samefile(ROOT / 'config/mapping.rviz')
    assert rviz.rules['__ns'] == '/robot1' and rviz.rules['/tf'] == 'tf'


def test_replay_plays_a_source_on_simulated_time(launched):
    started = launched('replay', source='synthetic:7', rate='2', mode='localization',
                       namespace='robot1', image_topic='eye')
    player, node = started['player_node'], started['localization_node']
    assert player.parameters == {'source': 'synthetic:7', 'rate': 2.0, 'loop': False,
                                 'publish_clock': True, 'image_transport': 'raw'}
    assert player.rules['camera/image_raw'] == node.rules['image'] == 'eye'
    assert player.rules['camera/camera_info'] == node.rules['camera_info']
    assert player.rules['camera/depth/image_raw'] == node.rules['depth']
    assert player.rules['__ns'] == node.rules['__ns'] == '/robot1'
    assert node.parameters['use_sim_time'] is True
    assert node.parameters['mode'] == 'localization'


def test_player_and_node_agree_on_the_transport(launched):
    started = launched('replay', source='walk', image_transport='compressed')
    assert {started[name].parameters['image_transport'] for name in started} == {'compressed'}


@pytest.mark.parametrize('given', [{}, {'source': 'a', 'bag': 'b'}])
def test_replay_does_not_guess_between_sources(launched, given):
    with pytest.raises(RefusedError, match='expected one of source and bag'):
        launched('replay', **given)


@pytest.mark.parametrize(('loop', 'words'), [('false', []), ('true', ['--loop']),
                                             ('True', ['--loop']), ('False', [])])
def test_replay_of_a_bag_plays_all_its_topics(launched, loop, words):
    started = launched('replay', bag='drive', loop=loop)
    assert started['ros2'].words == ['bag', 'play', 'drive', '--clock', '--rate', '1.0', *words]
    assert 'player_node' not in started


@pytest.mark.parametrize('loop', ['true', 'True'])
def test_replay_of_a_source_loops(launched, loop):
    assert launched('replay', source='walk', loop=loop)['player_node'].parameters['loop'] is True


@pytest.mark.parametrize(('name', 'given'), [
    ('mapping', {'log_level': 'loud'}), ('localization', {'use_rviz': 'yes'}),
    ('mapping', {'image_transport': 'theora'}), ('replay', {'source': 'a', 'mode': 'flying'})])
def test_impossible_values_are_refused(launched, name, given):
    with pytest.raises(RefusedError, match=list(given.values())[-1]):
        launched(name, **given)


# -- doubles alone ------------------------------------------------------------------------------

RUNS = {'mapping': [{'use_rviz': 'true'}], 'localization': [{'use_rviz': 'true'}],
        'replay': [{'use_rviz': 'true', 'source': 'walk'}, {'bag': 'drive'}]}


def runs_of(name):
    return [doubles.launch_file(launch_file(name), MACHINE, given) for given in RUNS[name]]


def test_every_launch_file_is_executed():
    assert {path.name for path in (ROOT / 'launch').iterdir() if path.is_file()} == {
        f'{name}.launch.py' for name in RUNS}


@pytest.mark.parametrize('name', RUNS)
def test_arguments_have_the_names_of_nav2_and_each_is_used(name):
    runs = runs_of(name)
    expected = NAV2 | OWN | (REPLAY if name == 'replay' else set())
    assert set(runs[0].launch_configurations) == expected
    assert set.union(*(run.launch_configurations.used for run in runs)) == expected


def test_packages_that_are_started_are_known():
    """package.xml has to name them (test_packaging.py)."""
    started = [program for name in RUNS for run in runs_of(name) for program in run.started]
    packages = {program.package or f'{program.name}{program.words[0]}' for program in started}
    assert packages == STARTED | {'feedforward_recon'}


def test_replay_starts_the_node_only_with_a_player():
    """A launch that ends at once does not always end what it has just started."""
    for run in runs_of('replay'):
        assert run.started[0].name in ('player_node', 'ros2')


def test_an_argument_that_nobody_declares_is_refused():
    with pytest.raises(doubles.LaunchError, match=r"found \['image_topics'\]"):
        doubles.launch_file(launch_file('mapping'), MACHINE, {'image_topics': '/a'})


def node(**changes):
    words = {'package': 'feedforward_recon', 'executable': 'mapping_node', **changes}
    return [doubles.Node(**words)]


def argument(**changes):
    words = {'name': 'map', 'default_value': '', 'description': 'folder', **changes}
    return [doubles.DeclareLaunchArgument(words.pop('name'), **words)]


def value(text, type_):
    return node(parameters=[{'rate': doubles.ParameterValue(text, value_type=type_)}])


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: node(executable='weights'), "found 'weights'"),
    (lambda: node(executable=['mapping', '_nodes']), "found 'mapping_nodes'"),
    (lambda: node(package='rviz'), 'a program that rviz installs'),
    (lambda: node(executable=None), 'executable: expected a text'),
    (lambda: node(executable=[3]), 'executable: expected a text'),
    (lambda: node(exec='mapping_node'), 'unexpected keyword'),
    (lambda: node(name='mapping node'), 'a name of a node'),
    (lambda: node(namespace='my robot'), 'a namespace'),
    (lambda: node(arguments=[5]), 'arguments: expected a text'),
    (lambda: node(remappings=[('image', 'a', 'b')]), 'pairs'),
    (lambda: node(remappings=['image:=a']), 'pairs'),
    (lambda: node(remappings=[('image', None)]), 'remappings: expected a text'),
    (lambda: node(remappings=[('image', 'a'), ('image', 'b')]), 'one topic'),
    (lambda: node(parameters=['file.yaml']), 'parameters: expected dict'),
    (lambda: node(parameters=[{'map': None}]), 'parameter map: expected a value'),
    (lambda: node(parameters=[doubles.ParameterFile('/no/such.yaml')]), 'No such file'),
    (lambda: node(respawn='maybe'), 'respawn: expected true or false'),
    (lambda: node(output='window'), 'output'),
    (lambda: node(condition='true'), 'condition: expected IfCondition'),
    (lambda: node(condition=doubles.IfCondition('maybe')), 'condition: expected true or false'),
    (lambda: node(namespace=doubles.LaunchConfiguration('namespace')), "found 'namespace'"),
    (lambda: value('fast', float), "expected float, found 'fast'"),
    (lambda: value('yes', bool), "expected true or false, found 'yes'"),
    (lambda: argument(default_value=True), 'default_value of map: expected a text'),
    (lambda: argument(default=''), 'unexpected keyword'),
    (lambda: argument(default_value='a', choices=['b']), "found 'a'"),
    (lambda: argument(description=''), 'a description'),
    (lambda: argument() + argument(), 'twice'),
    (lambda: [doubles.OpaqueFunction(function=lambda context: 'mapping_node')],
     'OpaqueFunction: expected list'),
    (lambda: [doubles.OpaqueFunction(function=lambda context: [node])], 'expected actions'),
    (lambda: [doubles.OpaqueFunction(function=lambda c: node(name=c.launch_configurations['a']))],
     "found 'a'"),
    (lambda: [doubles.SetEnvironmentVariable('NAME', 1)], 'variable: expected a text'),
    (lambda: [doubles.SetEnvironmentVariable('A', doubles.FindPackageShare('rviz'))],
     "an installed package, found 'rviz'"),
    (lambda: [doubles.ExecuteProcess(cmd=['ros', 'bag'])], "found 'ros'"),
    (lambda: [doubles.ExecuteProcess(cmd='ros2 bag')], 'cmd: expected list'),
    (lambda: ['mapping_node'], 'expected actions')])
def test_doubles_refuse(make, words):
    with pytest.raises((doubles.LaunchError, TypeError), match=words):
        doubles.execute(doubles.LaunchDescription(make()), MACHINE, {})


def test_doubles_leave_nothing_behind():
    before = sys.modules.get('launch')
    with doubles.importable():
        assert sys.modules['launch'].LaunchDescription is doubles.LaunchDescription
    assert sys.modules.get('launch') is before


@needs_real
@pytest.mark.parametrize('name', doubles.CLASSES)
def test_the_real_classes_take_what_the_doubles_take(name):
    module, _, class_ = name.rpartition('.')
    real = getattr(importlib.import_module(module), class_)
    known = {parameter for base in real.__mro__
             for parameter in inspect.signature(base.__init__).parameters}
    taken = {parameter for base in doubles.CLASSES[name].__mro__ if base is not object
             for parameter in inspect.signature(base.__init__).parameters}
    if name != 'launch.launch_context.LaunchContext':  # made by launch itself
        assert taken <= known | {'options'}


# -- RViz ---------------------------------------------------------------------------------------

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
