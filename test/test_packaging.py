"""What gets installed, and that the files that describe it agree."""

import ast
import importlib.metadata
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from ros_support.harness import missing_ros
from ros_support.manifests import STARTED, exec_depends

import feedforward_recon

ROOT = Path(__file__).resolve().parents[1]
# Distribution names where they differ from the module that is imported.
MODULE_OF = {'opencv-python': 'cv2', 'pillow': 'PIL', 'pyyaml': 'yaml', 'rerun-sdk': 'rerun',
             'faiss-cpu': 'faiss'}
# Modules that rosdep knows in the versions that we need; the others come from pip.
ROSDEP = {'numpy': 'python3-numpy', 'cv2': 'python3-opencv', 'scipy': 'python3-scipy',
          'yaml': 'python3-yaml', 'PIL': 'python3-pil'}


@pytest.fixture(scope='module')
def setup_arguments():
    """Keyword arguments of setup(), without running it: literals as they stand."""
    tree = ast.parse((ROOT / 'setup.py').read_text(encoding='utf-8'))
    call = next(node for node in ast.walk(tree)
                if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'setup')
    arguments = {}
    for keyword in call.keywords:
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:  # built from NAME or a glob; not read here
            continue
    return arguments


@pytest.fixture(scope='module')
def package_xml():
    return ET.parse(ROOT / 'package.xml').getroot()


def pins():
    lines = (ROOT / 'constraints-dev.txt').read_text(encoding='utf-8').splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith('#')]
    return {r.name.lower(): Version(next(iter(r.specifier)).version) for r in requirements}


def test_one_version_everywhere(setup_arguments, package_xml):
    assert setup_arguments['version'] == feedforward_recon.__version__
    assert package_xml.findtext('version') == feedforward_recon.__version__


def test_ros_sees_a_python_package(package_xml):
    assert package_xml.get('format') == '3'
    assert package_xml.findtext('name') == 'feedforward_recon'
    assert package_xml.findtext('export/build_type') == 'ament_python'
    assert (ROOT / 'resource' / 'feedforward_recon').exists()


def test_licence_and_description_agree(setup_arguments, package_xml):
    assert package_xml.findtext('license') == setup_arguments['license'] == 'Apache-2.0'
    assert 'Apache License' in (ROOT / 'LICENSE').read_text(encoding='utf-8')


def test_every_folder_with_code_is_a_package():
    """find_packages silently leaves out a folder without __init__.py."""
    folders = {path.parent for path in (ROOT / 'feedforward_recon').rglob('*.py')}
    assert [str(f) for f in sorted(folders) if not (f / '__init__.py').exists()] == []


def test_development_pins_satisfy_the_lower_bounds(setup_arguments):
    requirements = [*setup_arguments['install_requires'],
                    *(r for extra in setup_arguments['extras_require'].values() for r in extra)]
    pinned = pins()
    pinned['opencv-python'] = pinned['opencv-python-headless']
    for requirement in map(Requirement, requirements):
        if requirement.name == 'rerun-sdk':  # a viewer for a desktop; no test needs it
            continue
        assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement


def imported(path):
    """Names of the packages that a file imports; `import_module('a.b')` too."""
    code = list(ast.walk(ast.parse(path.read_text(encoding='utf-8'))))
    names = {n.module for n in code if isinstance(n, ast.ImportFrom)}
    names |= {alias.name for n in code if isinstance(n, ast.Import) for alias in n.names}
    names |= {call.args[0].value for call in calls(code, 'import_module')
              if isinstance(call.args[0], ast.Constant)}
    return {name.split('.')[0] for name in names}


def calls(code, name):
    return [n for n in code if isinstance(n, ast.Call) and getattr(n.func, 'id', '') == name]


def modules_from_pip(setup_arguments):
    names = {Requirement(r).name for r in setup_arguments['install_requires']}
    return {MODULE_OF.get(name, name.replace('-', '_')) for name in names} - ROSDEP.keys()


def test_package_xml_declares_exactly_what_is_used(setup_arguments):
    """Imports of nodes and launch files, optional libraries, and what launch files start."""
    ros = ROOT / 'feedforward_recon' / 'ros'
    used = set().union(*(imported(path) for path in (*ros.glob('*.py'),
                                                     *(ROOT / 'launch').glob('*.py'))))
    used -= {*sys.stdlib_module_names, 'feedforward_recon', '_typeshed',
             *modules_from_pip(setup_arguments)}
    used |= {call.args[0].value for call in calls(ast.walk(ast.parse(
        (ros / 'optional.py').read_text(encoding='utf-8'))), '_tested')}
    everywhere = set().union(*(imported(path) for path in ros.parent.rglob('*.py')))
    used |= everywhere & ROSDEP.keys()
    assert sorted(exec_depends()) == sorted({ROSDEP.get(name, name) for name in used} | STARTED)


def test_colcon_test_finds_pytest(setup_arguments, package_xml):
    """Colcon chooses pytest where an extra named test asks for it; `setup.py test` is gone."""
    assert 'pytest' in {Requirement(r).name for r in setup_arguments['extras_require']['test']}
    assert 'tests_require' not in setup_arguments
    assert package_xml.findtext('test_depend') == 'python3-pytest'


def test_every_import_is_declared(setup_arguments):
    """Each third-party module the package imports comes with the package or with an extra."""
    declared = {Requirement(r).name for r in setup_arguments['install_requires']}
    for extra in setup_arguments['extras_require'].values():
        declared |= {Requirement(r).name for r in extra}
    known = {MODULE_OF.get(name, name.replace('-', '_')) for name in declared}
    known |= {*sys.stdlib_module_names, 'feedforward_recon'}
    for path in (ROOT / 'feedforward_recon').rglob('*.py'):
        if 'ros' in path.relative_to(ROOT).parts:
            continue
        names = imported(path)
        assert names <= known, f'{path}: {sorted(names - known)}'


def test_commands_point_at_functions():
    try:
        distribution = importlib.metadata.distribution('feedforward-recon')
    except importlib.metadata.PackageNotFoundError:
        pytest.skip('the package is not installed in this environment')
    commands = {e.name: e for e in distribution.entry_points if e.group == 'console_scripts'}
    nodes = {'mapping_node', 'localization_node', 'player_node', 'bag_mapper', 'doctor'}
    assert set(commands) == {'ffrecon', 'ffrecon-train'} | nodes
    for name, command in commands.items():
        if name not in nodes or not missing_ros():
            assert callable(command.load()), command
