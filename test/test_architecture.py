"""The layers of the package, read from its imports: who may know whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAME = 'feedforward_recon'
PACKAGE = ROOT / NAME
NETWORK = {'torch', f'{NAME}.model', f'{NAME}.memory', f'{NAME}.training'}
# Optional or heavy: loaded only by the function that needs them.
LAZY = {'rclpy', 'matplotlib', 'pycolmap', 'rosbags', 'evo', 'rerun', 'huggingface_hub'}
ROS = {'rclpy', 'rcl_interfaces', 'tf2_ros', 'tf2_py', 'cv_bridge', 'sensor_msgs_py',
       'tf_transformations', 'message_filters', 'launch', 'launch_ros'}


def modules():
    """Dotted name and syntax tree of every module of the package."""
    for path in sorted(PACKAGE.rglob('*.py')):
        parts = path.relative_to(ROOT).with_suffix('').parts
        dotted = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
        yield dotted, ast.parse(path.read_text(encoding='utf-8'), str(path))


TREES = dict(modules())


def imports(tree, *, module, top_level_only=False):
    """Dotted names that a tree imports; `from a import b` counts as a and a.b."""
    found = set()
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{module}: imports are absolute here'
            found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    return found


def within(name, roots):
    return any(name == root or name.startswith(root + '.') for root in roots)


def offenders(inside, forbidden, **options):
    """`module -> import` for modules that satisfy `inside` and import what they must not."""
    return [f'{module} -> {name}' for module, tree in TREES.items() if inside(module)
            for name in sorted(imports(tree, module=module, **options)) if forbidden(name)]


def test_only_ros_imports_ros():
    def is_ros(name):
        root = name.split('.')[0]
        return root in ROS or root.endswith(('_msgs', '_srvs'))
    assert offenders(lambda m: not within(m, {f'{NAME}.ros'}), is_ros) == []


def test_nothing_imports_the_ros_package():
    assert offenders(lambda m: not within(m, {f'{NAME}.ros'}),
                     lambda name: within(name, {f'{NAME}.ros'})) == []


def test_nothing_outside_training_imports_it():
    assert offenders(lambda m: not within(m, {f'{NAME}.training'}),
                     lambda name: within(name, {f'{NAME}.training'})) == []


def test_geometry_knows_no_network():
    """Nor anything above it: cameras, points, errors, nothing else of ours."""
    assert offenders(lambda m: within(m, {f'{NAME}.geometry'}),
                     lambda name: within(name, NETWORK)) == []
    below = {f'{NAME}.geometry', f'{NAME}.errors', f'{NAME}.types'}
    assert offenders(lambda m: within(m, {f'{NAME}.geometry'}),
                     lambda name: name.startswith(NAME + '.') and not within(name, below)) == []


def test_mapping_knows_only_the_protocol_of_a_network():
    allowed = {f'{NAME}.model', f'{NAME}.model.Encoder', f'{NAME}.model.Predictor'}
    assert offenders(lambda m: within(m, {f'{NAME}.mapping', f'{NAME}.memory'}),
                     lambda name: within(name, {f'{NAME}.model'}) and name not in allowed) == []


def test_optional_libraries_are_imported_where_they_are_used():
    """Extras never decide whether the package can be imported."""
    assert offenders(lambda m: not within(m, {f'{NAME}.ros'}),
                     lambda name: within(name, LAZY), top_level_only=True) == []


@pytest.mark.parametrize('layer', ['mapping', 'memory', 'geometry'])
def test_the_online_layers_need_no_extra_at_all(layer):
    allowed = {'numpy', 'scipy', 'cv2', 'torch', 'safetensors', 'yaml', NAME,
               *sys.stdlib_module_names, '__future__'}
    inside = {f'{NAME}.{layer}'}
    offline = {f'{NAME}.mapping.offline'}
    assert offenders(lambda m: within(m, inside) and not within(m, offline),
                     lambda name: name.split('.')[0] not in allowed) == []


def test_functions_stay_short():
    """Fewer than 50 lines each, docstring included."""
    long = [f'{module}.{node.name}' for module, tree in TREES.items() for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and node.end_lineno - node.lineno >= 50]
    assert long == []


def test_only_the_command_line_prints():
    talkers = [module for module, tree in TREES.items() if not within(module, {f'{NAME}.cli'})
               and not within(module, {f'{NAME}.training.cli'}) for node in ast.walk(tree)
               if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'print']
    assert talkers == []


def run_fresh(code):
    """Run code in a new interpreter; returns what it printed."""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                            cwd=ROOT, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_the_package_loads_nothing_heavy():
    heavy = {*LAZY, 'torch', 'cv2', 'scipy', 'typer'}
    loaded = run_fresh(f'import {NAME}, sys; print(*[m for m in sys.modules if "." not in m])')
    assert heavy & set(loaded) == set()


@pytest.mark.parametrize('module', ['mapping.online', 'mapping.localizer'])
def test_online_modules_import_with_the_extras_blocked(module):
    blocked = sorted(LAZY)
    run_fresh(f'import sys\nfor name in {blocked}: sys.modules[name] = None\n'
              f'import {NAME}.{module}')
