"""The documents say what the code does: names in tables, make targets, links."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from feedforward_recon.ros.camera_topics import CAMERA_TOPICS
from feedforward_recon.ros.diagnosis import PICTURES, TRACKING
from feedforward_recon.ros.input_health import StampFault

ROOT = Path(__file__).resolve().parent.parent
NODES = ROOT / 'feedforward_recon' / 'ros'
GUIDE = ROOT / 'docs' / 'ros.md'
DOCUMENTS = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
SUBSCRIBERS = ('create_subscription',)
TRANSPORTS = {'image': '/compressed', 'depth': '/compressedDepth', 'right/image': '/compressed'}
PUBLISHERS = ('create_publisher', 'create_lifecycle_publisher')
# Where the code computes a code, and the values it computes.
COMPUTED = {f'STAMPS_{fault.value}' for fault in StampFault} | set(TRACKING) | {
    code if code.startswith('DEPTH') else f'IMAGE_{code}' for code in PICTURES}


# -- what the code says -------------------------------------------------------------------------

def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, with the last name of what is called; `create = node.create_x` too."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    renamed = {target.id: node.value.attr for node in ast.walk(tree)
               if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute)
               for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
            yield renamed.get(name, name), node


def constant(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ''


def topics(paths: list[Path], makers: tuple[str, ...]) -> set[str]:
    """Topics with a written name."""
    return {constant(call.args[1]) for path in paths for name, call in calls(path)
            if name in makers and constant(call.args[1])}


def resolved(path: Path) -> set[str]:
    """Topics that go through resolve_topic_name, and the transports that are added to them."""
    source = path.read_text(encoding='utf-8')
    names = {constant(word) for loop in ast.walk(ast.parse(source))
             if isinstance(loop, ast.comprehension) and isinstance(loop.iter, ast.Tuple)
             for word in loop.iter.elts}
    assert all(f"{ending}'" in source for ending in TRANSPORTS.values())
    return names - {''} | {name + ending for name, ending in TRANSPORTS.items()}


def node_files() -> list[Path]:
    return [path for path in NODES.glob('*.py') if path.name not in ('demo.py', 'player_node.py',
                                                                     'doctor.py')]


def services() -> set[str]:
    """Names in the table of services.py that `create_service` is fed from."""
    tree = ast.parse((NODES / 'services.py').read_text(encoding='utf-8'))
    return {constant(row.elts[1]) for loop in ast.walk(tree)
            if isinstance(loop, ast.For) and 'create_service' in ast.unparse(loop)
            for row in loop.iter.elts}


def launch_arguments(path: Path) -> set[str]:
    return {constant(call.args[0]) for name, call in calls(path)
            if name == 'DeclareLaunchArgument'}


def codes() -> tuple[set[str], list[str]]:
    """Codes of causes and notices that are written out, and expressions of the others."""
    written, computed = {'NODE_SILENT'}, []
    for path in NODES.glob('*.py'):
        for name, call in calls(path):
            if name in ('Diagnosis', 'notice', '_notice', 'warn') and len(call.args) > 1:
                if constant(call.args[0]):
                    written.add(constant(call.args[0]))
                elif name == 'Diagnosis':
                    computed.append(ast.unparse(call.args[0]))
    return written, computed


# -- what the guide says ------------------------------------------------------------------------

def section(heading: str) -> str:
    """Text below a heading of the guide, up to the next one of the same or a higher level."""
    marks, text = heading.split()[0], GUIDE.read_text(encoding='utf-8')
    assert f'\n{heading}\n' in text, heading
    return re.split(rf'\n#{{1,{len(marks)}}} ', text.split(f'\n{heading}\n')[1])[0]


def rows(text: str) -> set[str]:
    """Names in the first column of the tables in a text."""
    return {name for line in text.splitlines() if line.startswith('| `')
            for name in re.findall(r'`([^`]+)`', line.split('|')[1])}


def test_table_of_inputs_is_complete():
    expected = topics(node_files(), SUBSCRIBERS) | resolved(NODES / 'subscriptions.py')
    assert rows(section('### Inputs')) == expected


def test_table_of_outputs_is_complete():
    assert rows(section('### Outputs')) == topics(node_files(), PUBLISHERS)


def test_table_of_the_player_is_complete():
    path = NODES / 'player_node.py'
    told = section('### player_node')
    assert rows(told) == topics([path], PUBLISHERS) | set(CAMERA_TOPICS.values())


def test_table_of_services_is_complete():
    assert rows(section('## Services').split('| reason ')[0]) == services()


@pytest.mark.parametrize('path', ['localization/localizer.py', 'session/live.py'])
def test_reasons_of_the_localizer_are_explained(path):
    tree = ast.parse((ROOT / 'feedforward_recon' / path).read_text(encoding='utf-8'))
    reasons = {constant(node) for node in ast.walk(tree) if isinstance(node, ast.expr)}
    reasons = {text for text in reasons if re.fullmatch(r'[A-Z]+(_[A-Z]+)*', text)}
    reasons -= set(TRACKING)
    assert reasons
    assert reasons <= rows(section('## Services'))


def test_tables_of_launch_arguments_are_complete():
    told = section('## Launch files').split('`replay.launch.py`')
    assert rows(told[0]) == launch_arguments(NODES / 'launching.py')
    assert rows(told[1]) == launch_arguments(ROOT / 'launch' / 'replay.launch.py')


def test_every_launch_file_is_described():
    told = section('## Launch files')
    for path in (ROOT / 'launch').glob('*.launch.py'):
        assert f'`{path.name}`' in told


def test_table_of_codes_is_complete():
    written, computed = codes()
    assert rows(section('## Diagnostic codes')) == written | COMPUTED
    # A new way of computing codes has to be added to COMPUTED.
    assert sorted(computed) == ["f'IMAGE_{code}' if kind == 'image' else code",
                                "f'STAMPS_{fault.value}'", 'status', 'warned.code']


def test_troubleshooting_names_codes_that_exist():
    text = GUIDE.read_text(encoding='utf-8')
    text = text.replace(section('## Diagnostic codes'), '')
    written, _ = codes()
    named = set(re.findall(r'`([A-Z]+(?:_[A-Z]+)+)`', text))
    reasons, variables = rows(section('## Services')), {'FFRECON_DATA', 'FFRECON_GOLDEN'}
    assert named <= written | COMPUTED | reasons | variables


def test_parameters_named_in_the_guide_exist():
    """Names in backquotes with a value behind a colon."""
    from feedforward_recon.config.node import NodeConfig, each_setting
    from feedforward_recon.ros.playback import PlayerConfig

    known = {setting.name for cls in (NodeConfig, PlayerConfig) for setting in each_setting(cls())}
    known |= {'use_sim_time'}
    others = {'bond_timeout', 'pose0_differential', 'smooth_lagged_data',  # of other packages
              'frame', 'ros', 'tf2_msgs'}
    named = set(re.findall(r'`([a-z0-9_.]+): [^`]*`', GUIDE.read_text(encoding='utf-8')))
    assert named - others <= known


def test_every_skip_is_explained():
    explained = rows(section('# What is tested'))
    for path in (ROOT / 'test').rglob('*.py'):
        for name, call in calls(path):
            for reason in skip_reasons(name, call):
                assert any(words in reason for words in explained), f'{path.name}: {reason}'


def skip_reasons(name: str, call: ast.Call) -> list[str]:
    """What a call of pytest says when it skips; {} stands for what is filled in."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == 'reason']
    if name == 'skip' and getattr(getattr(call.func, 'value', None), 'id', '') == 'pytest':
        given = call.args[:1]
    elif name == 'importorskip':
        given = given or [ast.Constant('could not import')]
    elif name != 'skipif':
        return []
    parts = [value.values if isinstance(value, ast.JoinedStr) else [value] for value in given
             if isinstance(value, (ast.JoinedStr, ast.Constant))]
    return [''.join(constant(part) or '{}' for part in found) for found in parts]


# -- all documents ------------------------------------------------------------------------------

def test_make_targets_in_documents_exist():
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    targets = set(re.findall(r'^([a-z][a-z-]*):', makefile, re.M))
    for path in DOCUMENTS:
        named = re.findall(r'(?:`|^)make ([a-z][a-z-]*)', path.read_text(encoding='utf-8'), re.M)
        assert set(named) <= targets, path.name


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings of a document."""
    headings = re.findall(r'^#+ (.+)$', path.read_text(encoding='utf-8'), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = re.sub(r'```.*?```', '', path.read_text(encoding='utf-8'), flags=re.S)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if '://' in target:
            continue
        name, _, anchor = target.partition('#')
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f'{path.name}: {target}'
        assert not anchor or anchor in anchors(file), f'{path.name}: {target}'


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_python_in_documents_imports_what_exists(path):
    for block in re.findall(r'```python\n(.*?)```', path.read_text(encoding='utf-8'), re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith('feedforward_recon'):
                module = importlib.import_module(node.module)
                missing = [a.name for a in node.names if not hasattr(module, a.name)]
                assert not missing, f'{path.name}: {node.module} has no {missing}'


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_documents_exist(path):
    """Python files and test files in backquotes, from the root or from the package."""
    for name in re.findall(r'`([\w/]+/\w+\.py)`', path.read_text(encoding='utf-8')):
        assert any((base / name).is_file() for base in (ROOT, ROOT / 'feedforward_recon')), (
            f'{path.name}: {name}')


@pytest.mark.parametrize('path', [ROOT / 'README.md', GUIDE], ids=lambda path: path.name)
def test_launch_files_and_programs_named_exist(path):
    text = path.read_text(encoding='utf-8')
    for name in re.findall(r'\b([\w]+\.launch\.py)', text):
        assert (ROOT / 'launch' / name).is_file(), name
    for name in re.findall(r'ros2 run feedforward_recon (\w+)', text):
        assert (NODES / f'{name}.py').is_file(), name
