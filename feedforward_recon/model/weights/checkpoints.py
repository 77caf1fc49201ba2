"""Weights from files into networks: strictly, memory-mapped, never by running a pickle.

A network says which names its published files use (`KeyRules`); everything in the file must
fit a parameter and every parameter must be in the file, except for what those rules name.
Tensors are put in place one by one: a network built on the device `meta` never exists twice.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from feedforward_recon.errors import CheckpointError
from feedforward_recon.model.fp8 import Stored, stored_in_fp8

log = logging.getLogger(__name__)
TORCH_SUFFIXES = ('.pt', '.pth', '.bin')
NAMES_SHOWN = 2
Shape = tuple[int, ...]


@dataclass(frozen=True)
class KeyRules:
    """How the names in a published file differ from the names of the network's parameters.

    prefix: before every name in the file; files without it are accepted too.
    ignored: patterns of names in the file that are parts we do not have.
    renamed: (pattern, replacement) pairs for other spellings of the same name.
    optional: patterns of parameters that a file may lack because they have fixed values.
    """

    prefix: str = ''
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = ()
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeyReport:
    """How a file fits a network.

    sources: name of the tensor in the file for each parameter found.
    missing, unexpected, ignored: names; misshapen: (name, expected shape, found shape).
    """

    sources: Mapping[str, str]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[tuple[str, Shape, Shape]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """True when nothing is missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        shapes = [f'{name} {list(found)} instead of {list(expected)}'
                  for name, expected, found in self.misshapen]
        parts = {'missing': self.missing, 'unexpected': self.unexpected, 'misshapen': shapes}
        return ', '.join(f'{len(names)} {kind} ({_some(names)})'
                         for kind, names in parts.items() if names) or 'a perfect fit'


def key_rules(model: nn.Module) -> KeyRules:
    """The naming rules of a network; networks of our own need none."""
    return getattr(model, 'key_rules', KeyRules())


def expected_tensors(model: nn.Module) -> dict[str, Shape]:
    """Published name and shape of every parameter and saved buffer of a network."""
    prefix = key_rules(model).prefix
    return {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def put_tensor(model: nn.Module, key: str, tensor: torch.Tensor) -> None:
    """Make ``tensor`` the parameter or buffer of that published name, without a copy.

    Layers that keep their weights in fp8 take them as they are in a file.
    """
    path, _, name = key.removeprefix(key_rules(model).prefix).rpartition('.')
    module = model.get_submodule(path)
    layer = module if name == 'weight' else getattr(module, name, None)
    if isinstance(layer, Stored):
        layer.keep(tensor)
    elif name in module._buffers:
        module._buffers[name] = tensor
    else:
        old = module._parameters[name]
        module._parameters[name] = nn.Parameter(tensor, old is not None and old.requires_grad)


def match_keys(model: nn.Module, shapes: Mapping[str, Shape]) -> KeyReport:
    """Compare the names and shapes in a file with a network, which may be on `meta`.

    Parameters that are one tensor under several names (DA3 shares a norm) need one of them.
    """
    rules, wanted = key_rules(model), model.state_dict(keep_vars=True)
    sources: dict[str, str] = {}
    unexpected: list[str] = []
    ignored: list[str] = []
    for key in shapes:
        name = _own_name(key, rules)
        if name in wanted:
            sources[name] = key
        else:
            (ignored if _matches(key, rules.ignored) else unexpected).append(key)
    misshapen = [(key, tuple(wanted[name].shape), shapes[key]) for name, key in sources.items()
                 if shapes[key] != tuple(wanted[name].shape)]
    found = {id(wanted[name]) for name in sources}
    missing = [rules.prefix + name for name, tensor in wanted.items()
               if id(tensor) not in found and not _matches(name, rules.optional)]
    return KeyReport(sources, missing, unexpected, misshapen, ignored)


def tensor_shapes(file: Path) -> dict[str, Shape]:
    """Name and shape of every tensor in a file; values are not read.

    Raises CheckpointError for a damaged file or one that holds other things than tensors.
    """
    return _open(file)[0]


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open('rb') as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def load_weights(model: nn.Module, path: str | Path, *, sha256: str = '',
                 device: str | torch.device = 'cpu', fp8: bool = False) -> KeyReport:
    """Put the weights of a file into a network as float32 on ``device``.

    path: `.safetensors`, or `.pt`, `.pth`, `.bin` that hold nothing but tensors, also in the
        checkpoint of a training, under `model`.
    sha256: what the file must hash to; '' skips the check.
    fp8: keep the weights of its layers in E4M3 (`model.fp8`); each is converted as it is read.
    Raises CheckpointError, in one sentence, for a missing or damaged file, another hash, and
    names or shapes that do not fit.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f'expected weights at {file}, found no file; fetch them first')
    if sha256:
        _check_hash(file, sha256)
    shapes, read = _open(file)
    report = match_keys(model, shapes)
    if not report.fits:
        raise mismatch_error(_described(model), file, report)
    if fp8:
        stored_in_fp8(model)
    for name, key in report.sources.items():
        tensor = _read(read, key, file)
        put_tensor(model, name, tensor.to(device, torch.float32))
    for name, tensor in model.state_dict().items():
        if name not in report.sources and _matches(name, key_rules(model).optional):
            put_tensor(model, name, tensor.to(device))
    log.info('loaded %d tensors from %s; left out %d that this network does not use',
             len(report.sources), file, len(report.ignored))
    return report


def mismatch_error(model: str, file: Path, report: KeyReport) -> CheckpointError:
    """The error for a file whose names and shapes are not those of a model."""
    return CheckpointError(f'expected weights of {model} in {file}, found {report}; is it the '
                           'checkpoint of another model, or of another attention?')


def _described(model: nn.Module) -> str:
    attention = getattr(getattr(model, 'config', None), 'attention', '')
    return type(model).__name__ + (f' with {attention} attention' if attention else '')


def _open(file: Path) -> tuple[dict[str, Shape], Callable[[str], torch.Tensor]]:
    """Shapes by name, and a function that reads one tensor from the mapped file."""
    if file.suffix == '.safetensors':
        return _open_safetensors(file)
    if file.suffix in TORCH_SUFFIXES:
        return _open_torch(file)
    raise CheckpointError(f'expected weights as .safetensors or {", ".join(TORCH_SUFFIXES)}, '
                          f'found {file.name}; convert them to safetensors')


def _open_safetensors(file: Path) -> tuple[dict[str, Shape], Callable[[str], torch.Tensor]]:
    try:
        archive = safe_open(str(file), 'pt')
        shapes = {key: tuple(archive.get_slice(key).get_shape()) for key in archive.keys()}
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    return shapes, archive.get_tensor


def _open_torch(file: Path) -> tuple[dict[str, Shape], Callable[[str], torch.Tensor]]:
    with file.open('rb') as stream:
        if stream.read(1) not in (b'P', b'\x80'):  # of a zip file, and of what came before it
            raise _damaged(file, ValueError('it does not begin like weights'))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about old ways of pickling
            content = torch.load(file, map_location='cpu', weights_only=True,
                                 mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f'expected nothing but tensors in {file}, found other Python '
                              'objects, which are never loaded; convert it to safetensors '
                              'where you trust it') from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise _damaged(file, error) from error
    tensors = content.get('model', content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise CheckpointError(f'expected a dictionary of tensors in {file}, found '
                              f'{type(tensors).__name__} of other things; save the state dict '
                              'alone')
    return {key: tuple(t.shape) for key, t in tensors.items()}, tensors.__getitem__


def _read(read: Callable[[str], torch.Tensor], key: str, file: Path) -> torch.Tensor:
    try:
        return read(key)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> CheckpointError:
    # PyTorch explains itself in several sentences; the first says what is wrong.
    reason = (str(error).splitlines() or [type(error).__name__])[0].partition('. ')[0]
    return CheckpointError(f'expected readable weights in {file}, found a damaged file '
                           f'({reason}); fetch it again')


def _check_hash(file: Path, sha256: str) -> None:
    found = file_sha256(file)
    if found != sha256.lower():
        raise CheckpointError(f'expected {file} to have SHA-256 {sha256[:16]}…, found '
                              f'{found[:16]}…; fetch it again')


def _own_name(key: str, rules: KeyRules) -> str:
    name = key.removeprefix(rules.prefix)
    for pattern, replacement in rules.renamed:
        name = re.sub(pattern, replacement, name)
    return name


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _some(names: list[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ', '.join(names[:NAMES_SHOWN]) + (f' and {rest} more' if rest > 0 else '')
