"""Settings as files: ROS parameter files that the command line reads too, and their reference.

`make config` writes all of them from the dataclasses.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from feedforward_recon.config.network import ModelOptions
from feedforward_recon.config.node import NodeConfig, Setting, each_setting
from feedforward_recon.config.photos import PhotoConfig
from feedforward_recon.config.schema import MapperConfig, as_yaml, from_dict, limits
from feedforward_recon.errors import ConfigError

SECTION = 'ros__parameters'
ROS_OWN = ('use_sim_time', 'qos_overrides', 'start_type_description_service')
MAPPING_ONLY = ('encoder', 'memory', 'tracking', 'keyframes', 'refine', 'loops', 'cloud',
                *(spec.name for spec in dataclasses.fields(ModelOptions)))
HEAD = """\
# Defaults of {node} and of `{command} --config`.
# Written by `make config`; keys that are left out keep them.
/**:
  {section}:
"""
REFERENCE = """\
# Parameters

Of `mapping_node` and `localization_node`; `ffrecon map --config` and `ffrecon localize --config`
read the same files and use the groups (names with a dot). Written by `make config`.

A **live** parameter may be set while a node is active (`ros2 param set`), a **start** one only
in a file or on the command line. A **configure** one is accepted while the node is unconfigured:
deactivate, clean up, set, configure, activate.
"""
PHOTOS = """\
# Photos
Of `ffrecon reconstruct` (`--config`, `--set`): these beside the groups above, and other defaults
of `encoder`.
"""


def mapper_settings(file: Path, cls: type[MapperConfig] = MapperConfig) -> dict[str, Any]:
    """Nested settings in a YAML file, with or without the head of ROS files.

    Settings of a node that ``cls`` does not have are checked and left out, those that only ``cls``
    has are read too. Raises ConfigError for an unreadable file, unknown names, wrong types and
    values out of range.
    """
    try:
        document = yaml.safe_load(file.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f'{file}: expected a YAML file of settings, found {error}') from error
    try:
        values = nested(_beneath_head({} if document is None else document))
        own = {name: value for name, value in values.items()
               if name in _names(cls) - _names(NodeConfig)}
        from_dict(cls, own)
        from_dict(NodeConfig, {name: value for name, value in values.items() if name not in own})
    except ConfigError as error:
        raise ConfigError(f'{file}: {error}') from error
    return {name: value for name, value in values.items() if name in _names(cls)}


def _names(cls: type[MapperConfig]) -> set[str]:
    return {spec.name for spec in dataclasses.fields(cls)}


def _beneath_head(document: Any) -> dict[str, Any]:
    """The settings below `/**: ros__parameters:`, or the document itself when it has no head."""
    if not isinstance(document, dict):
        raise ConfigError(f'expected groups of settings, found {type(document).__name__}; '
                          'see config/mapping.yaml')
    found = list(_sections(document))
    if not found:
        return document
    path, values = found[0]
    if len(found) > 1 or not isinstance(values, dict):
        names = ', '.join('/'.join(map(str, path)) for path, _ in found)
        raise ConfigError(f'expected one section {SECTION} with settings, found {len(found)} '
                          f'({names}); give each node a file of its own')
    for level in path:
        if len(document) > 1:
            raise ConfigError(f'expected nothing beside {level}, found {sorted(document)}; move '
                              f'the settings below {SECTION}')
        document = document[level]
    return {key: value for key, value in values.items()
            if str(key).partition('.')[0] not in ROS_OWN}


def _sections(node: dict, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    for key, value in node.items():
        if key == SECTION:
            yield path, value
        elif isinstance(value, dict):
            yield from _sections(value, (*path, key))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as groups: `memory.slots: 5` is `memory: {slots: 5}`.

    Raises ConfigError for a name that is a setting and a group at once.
    """
    whole: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = str(name).split('.')
        group = whole
        for key in path:
            group = group.setdefault(key, {})
            if not isinstance(group, dict):
                raise ConfigError(f'expected a group of settings at {key}, found {group!r}')
        if isinstance(value, dict) and isinstance(group.get(leaf), dict):
            value = {**group[leaf], **value}
        group[leaf] = value
    return whole


def shipped_files() -> dict[str, str]:
    """Path in the repository and text of every generated file: two YAML files, one reference."""
    mapping = HEAD.format(node='mapping_node', command='ffrecon map', section=SECTION)
    localization = HEAD.format(node='localization_node', command='ffrecon localize',
                               section=SECTION)
    return {'config/mapping.yaml': mapping + as_yaml(NodeConfig(), '    ') + '\n',
            'config/localization.yaml': localization + as_yaml(
                NodeConfig(mode='localization'), '    ', MAPPING_ONLY) + '\n',
            'docs/parameters.md': reference()}


def reference() -> str:
    """Every setting as Markdown tables, one for the node and one per group."""
    config = NodeConfig()
    groups: dict[str, list[Setting]] = {'': []}
    for setting in each_setting(config):
        groups.setdefault(setting.name.rpartition('.')[0], []).append(setting)
    photos = PhotoConfig()
    return '\n'.join([REFERENCE, *(_table(config, name, rows) for name, rows in groups.items()),
                      PHOTOS, *(_table(photos, name, list(each_setting(getattr(photos, name),
                                                                       f'{name}.')))
                                for name in ('reconstruction', 'encoder'))])


def _table(config: MapperConfig, group: str, settings: list[Setting]) -> str:
    about = getattr(config, group) if group else config
    summary = (type(about).__doc__ or '').strip().splitlines()[0]
    rows = [f'| `{s.name}` | `{json.dumps(s.value)}` | {s.spec.metadata["unit"]} | '
            f'{limits(s.spec).replace("|", "/")} | {s.when} | '
            f'{s.spec.metadata["doc"]} |' for s in settings]
    return '\n'.join([f'## {group or "Node"}', summary, '',
                      '| name | default | unit | allowed | when | meaning |',
                      '|---|---|---|---|---|---|', *rows, ''])


def write(root: Path) -> None:
    """Write the generated files below the folder of the repository."""
    for name, text in shipped_files().items():
        (root / name).write_text(text, encoding='utf-8')


if __name__ == '__main__':
    write(Path(sys.argv[1] if len(sys.argv) > 1 else '.'))
