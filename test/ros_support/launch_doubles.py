"""Strict doubles of `launch` and `launch_ros`, for machines that have neither.

``launch_file(path, machine, given)`` executes a launch file with them and returns what it
started. They know only the names, keywords and types that our launch files use: a new one has
to be added here first. What the real packages refuse is an error here, and so is what these let
pass: launch arguments that nothing declares, parameter files that do not exist, programs that
are not installed, rules for a topic that already has one.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

OUTPUTS = ('screen', 'log', 'both', 'own_log', 'full')
NAME = re.compile(r'[A-Za-z_][A-Za-z0-9_]*')
NAMESPACE = re.compile(r'/?([A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*)?')


class LaunchError(Exception):
    """A launch file is wrong; the sentence says how."""


@dataclass(frozen=True)
class Machine:
    """What is installed.

    programs: package -> its executables; shares: package -> its folder share.
    commands: what is on the PATH.
    """

    programs: Mapping[str, set[str]]
    shares: Mapping[str, Path]
    commands: set[str]


@dataclass(frozen=True)
class Program:
    """One program as it would be started; files: content of its parameter files, in order."""

    package: str
    name: str
    words: list[str]
    environment: dict[str, str]
    files: list[str]


class Configurations(dict):
    """Values of the launch arguments that were declared so far; used: those that were read."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.used.add(name)
        return super().__getitem__(name)

    def __missing__(self, name: str) -> str:
        raise LaunchError(f'expected one of the launch arguments {sorted(self)}, found {name!r}; '
                          'declare it first')


class LaunchContext:
    """A run of a launch file: given arguments in, started programs out."""

    def __init__(self, machine: Machine, given: Mapping[str, str]) -> None:
        self.machine, self.given = machine, dict(given)
        self.launch_configurations = Configurations()
        self.environment = dict(os.environ)
        self.started: list[Program] = []


# -- texts --------------------------------------------------------------------------------------

class Substitution(ABC):
    """A text that is known when the launch file runs."""

    @abstractmethod
    def perform(self, context: LaunchContext) -> str:
        """The text."""


class LaunchConfiguration(Substitution):
    """The value of a launch argument."""

    def __init__(self, variable_name: str) -> None:
        self.name = plain(variable_name, str, 'the name of a launch argument')

    def perform(self, context: LaunchContext) -> str:
        return context.launch_configurations[self.name]


class FindPackageShare(Substitution):
    """The folder share of an installed package."""

    def __init__(self, package: Any) -> None:
        self.package = text(package, 'package')

    def perform(self, context: LaunchContext) -> str:
        package = joined(context, self.package)
        if package not in context.machine.shares:
            raise LaunchError(f'expected an installed package, found {package!r}')
        return str(context.machine.shares[package])


def text(value: Any, what: str) -> list[str | Substitution]:
    """The parts of a text: a str, a Substitution, or several of them."""
    parts = list(value) if isinstance(value, (list, tuple)) else [value]
    if not parts or not all(isinstance(part, (str, Substitution)) for part in parts):
        raise LaunchError(f'{what}: expected a text or substitutions, found {value!r}')
    return parts


def joined(context: LaunchContext, parts: list[str | Substitution]) -> str:
    """The text of its parts."""
    return ''.join(part if isinstance(part, str) else part.perform(context) for part in parts)


def plain(value: Any, type_: type, what: str) -> Any:
    """The value itself, if it has exactly this type."""
    if type(value) is not type_:
        raise LaunchError(f'{what}: expected {type_.__name__}, found {value!r}')
    return value


def flag(context: LaunchContext, parts: list[str | Substitution], what: str) -> bool:
    """A text as true or false."""
    found = joined(context, parts)
    if found.lower() not in ('true', 'false'):
        raise LaunchError(f'{what}: expected true or false, found {found!r}')
    return found.lower() == 'true'


# -- actions ------------------------------------------------------------------------------------

class IfCondition:
    """True where a text says so."""

    def __init__(self, predicate_expression: Any) -> None:
        self.expression = text(predicate_expression, 'condition')

    def holds(self, context: LaunchContext) -> bool:
        return flag(context, self.expression, 'condition')


class Action(ABC):
    """What a launch file does."""

    def __init__(self, condition: IfCondition | None = None) -> None:
        self.condition = None if condition is None else plain(condition, IfCondition, 'condition')

    @abstractmethod
    def execute(self, context: LaunchContext) -> Any:
        """Do it; returns further actions, or None."""


class LaunchDescription:
    """The actions of a launch file."""

    def __init__(self, initial_entities: Any) -> None:
        self.entities = actions(initial_entities, 'LaunchDescription')


class DeclareLaunchArgument(Action):
    """A launch argument."""

    def __init__(self, name: str, *, default_value: Any, description: str,
                 choices: list[str] | None = None) -> None:
        super().__init__()
        self.name = plain(name, str, 'the name of a launch argument')
        self.default = text(default_value, f'default_value of {name}')
        if not plain(description, str, f'description of {name}'):
            raise LaunchError(f'{name}: expected a description, found none')
        self.choices = choices
        for choice in plain(choices, list, f'choices of {name}') if choices is not None else ():
            plain(choice, str, f'choice of {name}')

    def execute(self, context: LaunchContext) -> None:
        if self.name in context.launch_configurations:
            raise LaunchError(f'expected each launch argument once, found {self.name} twice')
        default = joined(context, self.default)
        if self.choices is not None and default not in self.choices:
            raise LaunchError(f'{self.name}: expected a default of {self.choices}, found '
                              f'{default!r}')
        value = plain(context.given.get(self.name, default), str, f'argument {self.name}')
        if self.choices is not None and value not in self.choices:
            raise ValueError(f'{self.name}: expected one of {self.choices}, found {value!r}')
        context.launch_configurations[self.name] = value


class SetEnvironmentVariable(Action):
    """A variable for all programs that are started after it."""

    def __init__(self, name: Any, value: Any) -> None:
        super().__init__()
        self.name, self.value = text(name, 'name of a variable'), text(value, 'variable')

    def execute(self, context: LaunchContext) -> None:
        context.environment[joined(context, self.name)] = joined(context, self.value)


class OpaqueFunction(Action):
    """Actions that a function chooses when the launch file runs."""

    def __init__(self, *, function: Callable[..., Any], args: list[Any] | None = None) -> None:
        super().__init__()
        if not callable(function):
            raise LaunchError(f'function: expected a function, found {function!r}')
        self.function = function
        self.args = [] if args is None else plain(args, list, 'args')

    def execute(self, context: LaunchContext) -> Any:
        return self.function(context, *self.args)


class ExecuteProcess(Action):
    """A program that is found on the PATH."""

    def __init__(self, *, cmd: Any, output: str = 'log', emulate_tty: bool = False,
                 respawn: Any = False, respawn_delay: float | None = None,
                 condition: IfCondition | None = None) -> None:
        super().__init__(condition)
        self.cmd = [text(word, 'cmd') for word in plain(cmd, list, 'cmd')]
        if output not in OUTPUTS:
            raise LaunchError(f'output: expected one of {OUTPUTS}, found {output!r}')
        plain(emulate_tty, bool, 'emulate_tty')
        self.respawn = respawn if isinstance(respawn, bool) else text(respawn, 'respawn')
        if respawn_delay is not None:
            plain(respawn_delay, float, 'respawn_delay')

    def execute(self, context: LaunchContext) -> None:
        name, *words = (joined(context, word) for word in self.cmd)
        if name not in context.machine.commands:
            raise LaunchError(f'expected a command of {sorted(context.machine.commands)}, found '
                              f'{name!r}')
        self.start(context, '', name, words)

    def start(self, context: LaunchContext, package: str, name: str, words: list[str],
              files: list[str] | None = None) -> None:
        """Note it down instead of starting it."""
        if not isinstance(self.respawn, bool):
            flag(context, self.respawn, 'respawn')
        context.started.append(Program(package, name, words, dict(context.environment),
                                       files or []))


# -- nodes --------------------------------------------------------------------------------------

class ParameterValue:
    """A parameter whose type does not depend on what its text looks like."""

    def __init__(self, value: Any, *, value_type: type) -> None:
        self.value, self.type = text(value, 'parameter'), value_type
        if value_type not in (str, bool, int, float):
            raise LaunchError(f'value_type: expected a type of parameters, found {value_type!r}')

    def evaluate(self, context: LaunchContext) -> str | bool | int | float:
        found = joined(context, self.value)
        if self.type is bool:
            return flag(context, self.value, 'parameter')
        try:
            return self.type(found)
        except ValueError:
            raise LaunchError(f'parameter: expected {self.type.__name__}, found {found!r}'
                              ) from None


class ParameterFile:
    """A YAML file with parameters."""

    def __init__(self, param_file: Any, *, allow_substs: bool = False) -> None:
        self.path = text(param_file, 'parameter file')
        plain(allow_substs, bool, 'allow_substs')

    def read(self, context: LaunchContext) -> str:
        path = joined(context, self.path)
        try:
            with open(path, encoding='utf-8') as file:
                content = file.read()
        except OSError as error:
            raise LaunchError(f'parameter file: {error}') from None
        if '$(' in content:
            raise LaunchError(f'{path}: the doubles know no substitutions in parameter files')
        return content


class Node(ExecuteProcess):
    """A program of a ROS package."""

    def __init__(self, *, package: Any, executable: Any, name: Any = None, namespace: Any = '',
                 parameters: Any = (), remappings: Any = (), arguments: Any = (),
                 **options: Any) -> None:
        super().__init__(cmd=[], **options)
        self.package, self.executable = text(package, 'package'), text(executable, 'executable')
        self.name = None if name is None else text(name, 'name')
        self.namespace = text(namespace, 'namespace')
        self.parameters = [parameter(entry) for entry in parameters]
        self.remappings = [rule(entry) for entry in remappings]
        self.arguments = [text(word, 'arguments') for word in arguments]

    def execute(self, context: LaunchContext) -> None:
        package, executable = joined(context, self.package), joined(context, self.executable)
        installed = context.machine.programs.get(package, set())
        if executable not in installed:
            raise LaunchError(f'expected a program that {package} installs, of '
                              f'{sorted(installed)}, found {executable!r}')
        rules = self.rules(context)
        files = [entry.read(context) if isinstance(entry, ParameterFile)
                 else document(context, entry) for entry in self.parameters]
        words = [*(joined(context, word) for word in self.arguments), '--ros-args',
                 *(word for old, new in rules.items() for word in ('-r', f'{old}:={new}'))]
        self.start(context, package, executable, words, files)

    def rules(self, context: LaunchContext) -> dict[str, str]:
        """Name, namespace and topics: old -> new."""
        namespace = joined(context, self.namespace)
        if not NAMESPACE.fullmatch(namespace):
            raise LaunchError(f'expected a namespace, found {namespace!r}')
        rules = {'__ns': f'/{namespace.removeprefix("/")}'}
        if self.name is not None:
            rules['__node'] = joined(context, self.name)
            if not NAME.fullmatch(rules['__node']):
                raise LaunchError(f'expected a name of a node, found {rules["__node"]!r}')
        for old, new in ((joined(context, old), joined(context, new))
                         for old, new in self.remappings):
            if not old or not new or old in rules:
                raise LaunchError(f'expected one topic for {old!r}, found {new!r} and '
                                  f'{rules.get(old)!r}')
            rules[old] = new
        return rules


def parameter(entry: Any) -> ParameterFile | dict[str, Any]:
    """An entry of ``parameters``: a file, or names with values."""
    if isinstance(entry, ParameterFile):
        return entry
    for name, value in plain(entry, dict, 'parameters').items():
        plain(name, str, 'the name of a parameter')
        if not isinstance(value, (ParameterValue, str, bool, int, float)):
            raise LaunchError(f'parameter {name}: expected a value, found {value!r}')
    return entry


def document(context: LaunchContext, entry: dict[str, Any]) -> str:
    """The parameter file of names with values."""
    values = {name: value.evaluate(context) if isinstance(value, ParameterValue) else value
              for name, value in entry.items()}
    return yaml.safe_dump({'/**': {'ros__parameters': values}})


def rule(entry: Any) -> tuple[list[str | Substitution], list[str | Substitution]]:
    """An entry of ``remappings``: a pair of texts."""
    if not isinstance(entry, tuple) or len(entry) != 2:
        raise LaunchError(f'remappings: expected pairs (old, new), found {entry!r}')
    return text(entry[0], 'remappings'), text(entry[1], 'remappings')


# -- running ------------------------------------------------------------------------------------

MODULES: dict[str, tuple[type, ...]] = {
    'launch': (LaunchDescription,), 'launch.action': (Action,),
    'launch.actions': (DeclareLaunchArgument, ExecuteProcess, OpaqueFunction,
                       SetEnvironmentVariable),
    'launch.conditions': (IfCondition,), 'launch.launch_context': (LaunchContext,),
    'launch.substitution': (Substitution,), 'launch.substitutions': (LaunchConfiguration,),
    'launch_ros': (), 'launch_ros.actions': (Node,),
    'launch_ros.parameter_descriptions': (ParameterFile, ParameterValue),
    'launch_ros.substitutions': (FindPackageShare,)}
# Modules that hold on to one `launch` or the other.
REPLACED = re.compile(r'(launch|launch_ros)(\..*)?|feedforward_recon\.ros\.launching')


@contextmanager
def importable() -> Iterator[None]:
    """The doubles are what `import launch` finds; afterwards it finds what it found before."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules)
              if REPLACED.fullmatch(name)}
    for name, classes in MODULES.items():
        sys.modules[name] = module = ModuleType(name)
        vars(module).update({class_.__name__: class_ for class_ in classes})
    try:
        yield
    finally:
        for name in [name for name in sys.modules if REPLACED.fullmatch(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def launch_file(path: Path, machine: Machine, given: Mapping[str, str]) -> LaunchContext:
    """Execute a launch file. Raises ValueError for impossible values of launch arguments.

    LaunchError, TypeError and ImportError mean that the file is wrong.
    """
    with importable():
        description = runpy.run_path(str(path))['generate_launch_description']()
        return execute(plain(description, LaunchDescription, str(path)), machine, given)


def execute(description: LaunchDescription, machine: Machine, given: Mapping[str, str]
            ) -> LaunchContext:
    """Do what a launch file describes."""
    context = LaunchContext(machine, given)
    visit(context, description.entities)
    unknown = sorted(given.keys() - context.launch_configurations.keys())
    if unknown:
        raise LaunchError(f'expected launch arguments of {sorted(context.launch_configurations)}, '
                          f'found {unknown}')
    return context


def visit(context: LaunchContext, entities: list[Action]) -> None:
    """Do these actions and those that come out of them, in order."""
    for entity in entities:
        if entity.condition is None or entity.condition.holds(context):
            further = entity.execute(context)
            visit(context, [] if further is None else actions(further, type(entity).__name__))


def actions(entities: Any, where: str) -> list[Action]:
    """The list itself, if it holds nothing but actions."""
    for entity in plain(entities, list, where):
        if not isinstance(entity, Action):
            raise LaunchError(f'{where}: expected actions, found {entity!r}')
    return entities


CLASSES = {f'{module}.{class_.__name__}': class_
           for module, classes in MODULES.items() for class_ in classes}
