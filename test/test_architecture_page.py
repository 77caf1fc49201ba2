"""docs/architecture.md shows the packages as the imports have them.

Run as a script (``python test/test_architecture_page.py``) to write its picture and the last
column of its table again; it also prints how many packages, floors, arrows and circles there are.
"""

import re
from pathlib import Path

import pytest
from test_architecture import FLOORS, graph, package_of

PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'architecture.md'
MARKS = '<!-- imports -->', '<!-- /imports -->'


def arrows():
    """Pairs of packages (a, b): some module of a imports one of b, anywhere in its code."""
    return {(package_of(module), package_of(name)) for module, known in graph().items()
            for name in known if package_of(module) and package_of(name)
            and package_of(module) != package_of(name)}


def reachable(start, pairs):
    """Packages that one comes to from ``start`` along arrows."""
    found, todo = set(), [start]
    while todo:
        here = todo.pop()
        new = {b for a, b in pairs if a == here} - found
        found |= new
        todo += new
    return found


def shown(pairs):
    """The downward arrows that are not implied by a longer way through other packages."""
    down = {(a, b) for a, b in pairs if FLOORS.index(a) < FLOORS.index(b)}
    return {(a, b) for a, b in down if b not in reachable(a, down - {(a, b)})}


def floors(pairs):
    """Packages by floor, the top first; each stands just above the highest one that it knows."""
    height = {}
    for package in reversed(FLOORS):
        height[package] = 1 + max((height[b] for a, b in pairs if a == package), default=-1)
    return [[p for p in FLOORS if height[p] == level] for level in range(max(height.values()), -1,
                                                                         -1)]


def circles(pairs):
    """Sets of packages that reach each other."""
    ways = {package: reachable(package, pairs) for package in FLOORS}
    return {frozenset(b for b in FLOORS if b in ways[a] and a in ways[b]) for a in FLOORS
            if a in ways[a]}


def picture(pairs):
    """The packages as a Mermaid flow chart."""
    kept = shown(pairs)
    lines = ['```mermaid', 'flowchart TD']
    for number, names in enumerate(floors(kept)):
        lines += [f'    subgraph floor{number}[" "]', '        direction LR',
                  *(f'        {name}' for name in names), '    end']
    lines += [f'    {a} --> {b}' for a in FLOORS for b in FLOORS if (a, b) in kept]
    return '\n'.join([*lines, '```'])


def known_by(package, pairs):
    """Last cell of a package's row."""
    return ' '.join(b for b in FLOORS if (package, b) in pairs) or '-'


def written(text, pairs):
    """The page with its picture and table as ``pairs`` have them."""
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    lines = [re.sub(r'\|[^|]*\|$', f'| {known_by(name[1], pairs)} |', line)
             if (name := re.match(r'\| `(\w+)` \|', line)) and name[1] in FLOORS else line
             for line in after.split('\n')]
    return before + '\n'.join([MARKS[0], picture(pairs), MARKS[1]]) + '\n'.join(lines)


def test_picture_and_table_show_the_imports():
    text = PAGE.read_text(encoding='utf-8')
    assert text == written(text, arrows()), 'run `python test/test_architecture_page.py`'


def test_table_has_a_row_for_every_package():
    rows = re.findall(r'^\| `(\w+)` \|', PAGE.read_text(encoding='utf-8'), re.M)
    assert [name for name in rows if name in FLOORS] == FLOORS


@pytest.mark.parametrize('change', [('memory', 'ros'), ('geometry', 'io')])
def test_another_import_changes_the_page(change):
    text = PAGE.read_text(encoding='utf-8')
    pairs = arrows()
    assert written(text, pairs) != written(text, pairs | {change})
    assert written(text, pairs) != written(text, pairs - {('cli', 'session')})


def test_picture_leaves_out_what_follows():
    pairs = {('ros', 'cli'), ('cli', 'io'), ('ros', 'io'), ('errors', 'ros')}
    assert shown(pairs) == {('ros', 'cli'), ('cli', 'io')}


def test_circles_are_found():
    pairs = {('ros', 'cli'), ('cli', 'io'), ('io', 'cli'), ('io', 'errors')}
    assert circles(pairs) == {frozenset({'cli', 'io'})}


if __name__ == '__main__':
    found = arrows()
    PAGE.write_text(written(PAGE.read_text(encoding='utf-8'), found), encoding='utf-8')
    print(f'{len(FLOORS)} packages, {len(floors(shown(found)))} floors, {len(found)} arrows, '
          f'{len(circles(found))} circles')
