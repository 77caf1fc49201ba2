"""The layers of the package, read from its imports: who may know whom."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAME = 'feedforward_recon'
PACKAGE = ROOT / NAME
NETWORK = {'torch', f'{NAME}.model', f'{NAME}.memory', f'{NAME}.training'}
# Optional or heavy: loaded only by the function that needs them.
LAZY = {'rclpy', 'matplotlib', 'pycolmap', 'rosbags', 'evo', 'rerun', 'huggingface_hub',
        'ray', 'faiss'}
ENTRY_POINTS = {'main'}
# Names of libraries that begin with an underscore and are documented all the same.
LIBRARY_PRIVATE = {'_exit', '_asdict', '_buffers', '_parameters', '_scaled_mm'}
# From the top: a room may know those below it.
FLOORS = ['ros', 'cli', 'training', 'console', 'synthetic', 'session', 'localization',
          'reconstruction', 'mapping', 'memory', 'model', 'io', 'config', 'evaluation', 'types',
          'geometry', 'errors', 'version']
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


def test_nothing_imports_the_commands():
    """What commands share with nodes and training is in console."""
    assert offenders(lambda m: not within(m, {f'{NAME}.cli'}),
                     lambda name: within(name, {f'{NAME}.cli'})) == []


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


@pytest.mark.parametrize('layer', ['mapping', 'localization', 'memory', 'geometry'])
def test_the_online_layers_need_no_extra_at_all(layer):
    allowed = {'numpy', 'scipy', 'cv2', 'torch', 'safetensors', 'yaml', NAME,
               *sys.stdlib_module_names, '__future__'}
    inside = {f'{NAME}.{layer}'}
    assert offenders(lambda m: within(m, inside),
                     lambda name: name.split('.')[0] not in allowed) == []


def test_functions_stay_short():
    """Fewer than 50 lines each, docstring included."""
    long = [f'{module}.{node.name}' for module, tree in TREES.items() for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and node.end_lineno - node.lineno >= 50]
    assert long == []


def classes():
    """`module.Class` and its tree, for every class of the package."""
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield f'{module}.{node.name}', node


def methods_of(node):
    return [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def state_set_in(function):
    """Names of the attributes of self that a method assigns."""
    targets = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            targets.append(node.target)
    flat = [e for target in targets
            for e in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return {e.attr for e in flat
            if isinstance(e, ast.Attribute) and getattr(e.value, 'id', '') == 'self'}


def test_classes_have_at_most_20_methods_and_12_attributes():
    large = []
    for name, node in classes():
        methods = methods_of(node)
        attributes = {a for method in methods for a in state_set_in(method)}
        if len(methods) > 20 or len(attributes) > 12:
            large.append(f'{name}: {len(methods)} methods, {len(attributes)} attributes')
    assert not large, '\n'.join(large)


def test_state_is_set_in_init_only():
    """Whoever reads __init__ knows all that an object holds."""
    late = []
    for name, node in classes():
        methods = methods_of(node)
        declared = {a for m in methods if m.name == '__init__' for a in state_set_in(m)}
        declared |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
        late += [f'{name}.{a}' for m in methods for a in sorted(state_set_in(m) - declared)
                 if not any(isinstance(d, ast.Attribute) and d.attr == 'setter'
                            for d in m.decorator_list)]
    assert not late, '\n'.join(late)


def private(name):
    return name.startswith('_') and not name.endswith('__')


def test_private_names_stay_in_their_module():
    """No `_name` is imported, and none is used on anything but self, cls and one's own kind."""
    foreign = []
    for module, tree in TREES.items():
        own = {n.name for n in ast.walk(tree)
               if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}
        own |= {a for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)
                for a in state_set_in(n)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                foreign += [f'{module} -> {a.name}' for a in node.names if private(a.name)]
            elif isinstance(node, ast.Attribute) and private(node.attr) \
                    and node.attr not in own | LIBRARY_PRIVATE:
                foreign.append(f'{module}: {ast.unparse(node)}')
    assert not foreign, '\n'.join(foreign)


def test_a_name_means_one_thing():
    """No public class or function of a module has the name of another one."""
    places = {}
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not private(node.name):
                places.setdefault(node.name, []).append(module)
    twice = {name: modules for name, modules in places.items()
             if len(modules) > 1 and name not in ENTRY_POINTS}
    assert not twice, '\n'.join(map(str, twice.items()))


def package_of(module):
    """Room of a module: its package below the root, or its own name beside them."""
    return module.removeprefix(NAME).lstrip('.').split('.')[0]


def module_of(name):
    """The module that an imported name belongs to; None outside the package."""
    while name and name not in TREES:
        name = name.rpartition('.')[0]
    return name or None


def graph():
    """Module -> modules it imports anywhere, also in functions and for type checkers."""
    found = {}
    for module, tree in TREES.items():
        names = {module_of(name) for name in imports(tree, module=module)}
        found[module] = {n for n in names - {None, module} if not module.startswith(n + '.')
                         or names_of(TREES[n]) & imported_from(tree, n)}
    return found


def imported_from(tree, module):
    return {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)
            and n.module == module for a in n.names}


def names_of(tree):
    """Names that a module defines or imports at its top level."""
    return {n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))} | {
        a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom)
        for a in n.names} | {t.id for n in tree.body if isinstance(n, ast.Assign)
                             for t in n.targets if isinstance(t, ast.Name)}


def test_imports_go_down_the_floors_only():
    upwards = [f'{a} -> {b}' for a, known in graph().items() for b in sorted(known)
               if b != NAME and package_of(a) and package_of(a) != package_of(b)
               and FLOORS.index(package_of(b)) <= FLOORS.index(package_of(a))]
    assert not upwards, '\n'.join(upwards)


def test_no_module_reaches_itself():
    known, circles = graph(), []
    for start in known:
        reached, todo = set(), [start]
        while todo:
            for name in known[todo.pop()]:
                if name not in reached:
                    reached.add(name)
                    todo.append(name)
        circles += [start] * (start in reached)
    assert not circles, '\n'.join(circles)


def test_only_the_command_line_prints():
    talkers = [module for module, tree in TREES.items() if not within(
                   module, {f'{NAME}.cli', f'{NAME}.console'})
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


@pytest.mark.parametrize('module', ['mapping.mapper', 'localization.localizer'])
def test_online_modules_import_with_the_extras_blocked(module):
    blocked = sorted(LAZY)
    run_fresh(f'import sys\nfor name in {blocked}: sys.modules[name] = None\n'
              f'import {NAME}.{module}')


def has_comment(lines, row):
    """Whether a constant has a comment on its line, or one above its block of constants."""
    if '#' in lines[row]:
        return True
    while row and re.match(r'[A-Z][A-Z0-9_, ]* = ', lines[row]):
        row -= 1
    return lines[row].startswith('#')


@pytest.mark.parametrize('room', ['mapping', 'localization', 'memory', 'session'])
def test_tuning_constants_carry_their_reason(room):
    bare = []
    for path in sorted((PACKAGE / room).rglob('*.py')):
        source = path.read_text(encoding='utf-8')
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper() and any(
                    isinstance(part, ast.Constant) and isinstance(part.value, (int, float))
                    for part in ast.walk(node.value)) and not has_comment(lines, node.lineno - 1):
                bare.append(f'{path.name}: {lines[node.lineno - 1]}')
    assert not bare, '\n'.join(bare)
