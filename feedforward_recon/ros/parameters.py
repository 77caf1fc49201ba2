"""ROS parameters from a configuration dataclass: declared, described, checked, changed.

``parameters = declare(node, NodeConfig, mode='localization')``, then ``parameters.config``
holds the settings (immutable, replaced as a whole), ``parameters.on_change(callback)`` gets
every accepted change, and after ``parameters.locked = True`` only live settings may change.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.node import Node
from rclpy.parameter import Parameter

from feedforward_recon.config.files import ROS_OWN, nested
from feedforward_recon.config.node import Setting, each_setting
from feedforward_recon.config.schema import from_dict
from feedforward_recon.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar('T', bound='DataclassInstance')
INT64 = 2 ** 63


class Parameters(Generic[T]):
    """The parameters of one node and the configuration that they make.

    config: what holds now; replaced as a whole, so any thread may read it.
    unknown: names in the parameter file that nothing declared.
    locked: while True, only live settings may change (set it while the node is configured).
    """

    def __init__(self, node: Node, defaults: T) -> None:
        self._node = node
        self._settings = {setting.name: setting for setting in each_setting(defaults)}
        self._listeners: list[Callable[[T], None]] = []
        self.locked = False
        overrides = _overrides(node)
        self.config: T = _changed(defaults, {name: value for name, value in overrides.items()
                                             if name in self._settings})
        for setting in each_setting(self.config):
            node.declare_parameter(setting.name, setting.value, descriptor(setting),
                                   ignore_override=setting.name in overrides)
        self.config = self._with(node.get_parameters(list(self._settings)))
        self.unknown = tuple(name for name in overrides if not self._known(name))
        for name in self.unknown:
            node.get_logger().warning(self._about_unknown(name))
        node.add_on_set_parameters_callback(self._check)
        if hasattr(node, 'add_post_set_parameters_callback'):  # from Iron on
            node.add_post_set_parameters_callback(self._apply)

    def on_change(self, callback: Callable[[T], None]) -> None:
        """Call back with the new configuration after every accepted change."""
        self._listeners.append(callback)

    def _known(self, name: str) -> bool:
        return self._node.has_parameter(name) or name.partition('.')[0] in ROS_OWN

    def _about_unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._settings, 1)
        hint = f'did you mean {near[0]}?' if near else 'see docs/parameters.md'
        return f'the parameter {name} is unknown and changes nothing; {hint}'

    def _check(self, changes: Sequence[Parameter]) -> SetParametersResult:
        """Accept or refuse what somebody wants to set; the reason goes back to them."""
        try:
            config = self._with(changes)
        except ConfigError as error:
            return SetParametersResult(successful=False, reason=str(error))
        refused = [] if not self.locked else [
            new.name for old, new in zip(each_setting(self.config), each_setting(config),
                                         strict=True)
            if new.value != old.value and new.when != 'live']
        if refused:
            return SetParametersResult(successful=False, reason=self._about_locked(refused))
        if not hasattr(self._node, 'add_post_set_parameters_callback'):
            self._apply(changes)
        return SetParametersResult(successful=True)

    def _about_locked(self, names: list[str]) -> str:
        node = self._node.get_fully_qualified_name()
        return (f'{", ".join(names)} cannot change while the node is configured; run `ros2 '
                f'lifecycle set {node} TRANSITION` with deactivate and cleanup, set it, then '
                'with configure and activate')

    def _apply(self, changes: Sequence[Parameter]) -> None:
        config = self._with(changes)
        if config != self.config:
            self.config = config
            for listener in self._listeners:
                listener(config)

    def _with(self, changes: Sequence[Parameter]) -> T:
        return _changed(self.config, {change.name: change.value for change in changes
                                      if change.name in self._settings})


def declare(node: Node, cls: type[T], **defaults: Any) -> Parameters[T]:
    """Declare every setting of ``cls`` as a parameter of the node.

    ``defaults`` replace those of single settings. Raises ConfigError for a value in the
    parameter file that is of the wrong type or out of range.
    """
    return Parameters(node, dataclasses.replace(cls(), **defaults))


def descriptor(setting: Setting) -> ParameterDescriptor:
    """What `ros2 param describe` shows of a setting.

    Real numbers are typed dynamically: ROS would refuse a YAML `1` where `1.0` is meant; they
    are checked here instead.
    """
    unit, choices = setting.spec.metadata['unit'], setting.spec.metadata['choices']
    notes = [f'one of: {", ".join(choices)}'] if choices else []
    if setting.when == 'configure':
        notes.append('changes while the node is unconfigured')
    made = ParameterDescriptor(
        name=setting.name,
        description=setting.spec.metadata['doc'] + (f' [{unit}]' if unit else ''),
        additional_constraints='; '.join(notes), read_only=setting.when == 'start',
        dynamic_typing=isinstance(setting.value, float))
    low, high = setting.spec.metadata['low'], setting.spec.metadata['high']
    if low is None and high is None:
        return made
    if isinstance(setting.value, float):
        largest = sys.float_info.max
        made.floating_point_range = [FloatingPointRange(
            from_value=-largest if low is None else float(low),
            to_value=largest if high is None else float(high))]
    else:
        made.integer_range = [IntegerRange(from_value=-INT64 if low is None else int(low),
                                           to_value=INT64 - 1 if high is None else int(high))]
    return made


def _changed(config: T, changes: dict[str, Any]) -> T:
    flat = {setting.name: setting.value for setting in each_setting(config)}
    return from_dict(type(config), nested({**flat, **changes}))


def _overrides(node: Node) -> dict[str, Any]:
    """Values from parameter files and the command line, also those nobody declares.

    rclpy has no public way to see the latter; should its attribute go, the warning goes with it.
    """
    found = getattr(node, '_parameter_overrides', {})
    return {name: parameter.value for name, parameter in found.items()}
