"""Weights from their publishers onto this machine, and whether a file is what it should be.

A download happens only when the licence has been accepted, goes on where an interrupted one
stopped, and takes its final name only after its size, hash and contents have been checked.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from feedforward_recon.errors import CheckpointError
from feedforward_recon.model.checkpoints import (
    KeyReport,
    file_sha256,
    match_keys,
    tensor_shapes,
)
from feedforward_recon.model.compact import CompactEncoder, load_network
from feedforward_recon.model.configs import build
from feedforward_recon.weights_registry import (
    CHECKPOINTS,
    FOLDER_VARIABLE,
    Checkpoint,
    by_hand,
    checkpoint_of,
    find_weights,
    is_offline,
    is_path,
    located,
    missing,
    weights_folder,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightsReport:
    """What `check_weights` found.

    checked_against: where the hash that the file has was known from; '' when from nowhere.
    """

    file: Path
    model: str
    size: int
    sha256: str
    checked_against: str
    keys: KeyReport


def fetch_weights(name: str, *, accept_licence: bool = False, offline: bool = False) -> Path:
    """The file of a checkpoint, downloaded if it is not here yet.

    It goes to $FEEDFORWARD_RECON_WEIGHTS, or into the Hugging Face cache without that.
    accept_licence: the user has agreed to the licence; nothing is downloaded otherwise.
    offline: never touch the network, as with HF_HUB_OFFLINE=1.
    Raises CheckpointError, in one sentence, and leaves nothing behind that could be mistaken
    for weights.
    """
    checkpoint = checkpoint_of(name)
    file = located(checkpoint)
    if file is not None:
        _check_bytes(file, checkpoint, f'remove {file} and fetch it again')
        return file
    if not checkpoint.repo or offline or is_offline():
        raise missing(checkpoint, offline=True)
    if not accept_licence:
        licence = checkpoint.licence
        raise CheckpointError(f'expected agreement to the licence of {name} ({licence.name}), '
                              f'found none; read {licence.url} and add --accept-licence')
    return _download(checkpoint)


def check_weights(name_or_path: str | Path, model: str | None = None) -> WeightsReport:
    """Compare a file with its published hash and with the names and shapes of its network.

    model: the architecture of a file of your own; by default the checkpoint that the file is
        named after, with its hash.
    Raises CheckpointError for a file that is missing, damaged or has another hash. Names and
    shapes that do not fit are no error but in the report.
    """
    file = find_weights(name_or_path)
    checkpoint = None if model else _checkpoint_named(name_or_path)
    against = ''
    if checkpoint is None:
        sha256 = file_sha256(file)
    else:
        sha256 = _check_bytes(file, checkpoint, f'fetch {checkpoint.name} again')
        against = 'published' if checkpoint.sha256 else 'first download' if _recorded(file) else ''
    shapes = tensor_shapes(file)
    architecture = model or (checkpoint.model if checkpoint else '')
    report = match_keys(_network(architecture, file), shapes)
    return WeightsReport(file, architecture, file.stat().st_size, sha256, against, report)


def _checkpoint_named(name_or_path: str | Path) -> Checkpoint:
    if not is_path(name_or_path):
        return checkpoint_of(str(name_or_path))
    name = Path(name_or_path).name
    for checkpoint in CHECKPOINTS.values():
        if checkpoint.local_file == name:
            return checkpoint
    raise CheckpointError(f'expected a file that is named after a checkpoint, found {name}; add '
                          '--model with the name of its architecture')


def _network(model: str, file: Path) -> nn.Module:
    # Files of the compact encoder carry its widths; the others have fixed ones.
    return load_network(file) if model == CompactEncoder.name else build(model, device='meta')


def _download(checkpoint: Checkpoint) -> Path:
    folder = weights_folder()
    if folder is None:
        file = _from_hub(checkpoint, None)
        try:
            sha256 = _check_download(file, checkpoint)
        except CheckpointError:
            _forget_cached(file)
            raise
        _record(file, sha256)
        return file
    # Kept when the connection breaks, so that the next try goes on from there.
    unfinished = folder / f'.{checkpoint.name}.part'
    file = _from_hub(checkpoint, unfinished)
    target = folder / checkpoint.local_file
    try:
        sha256 = _check_download(file, checkpoint)
        os.replace(file, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _record(target, sha256)
    return target


def _from_hub(checkpoint: Checkpoint, folder: Path | None) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise CheckpointError('expected huggingface_hub for downloads, found it missing; pip '
                              f'install huggingface_hub, or {by_hand(checkpoint)}') from error
    _check_writable(folder)
    try:
        return Path(hf_hub_download(checkpoint.repo, checkpoint.file, local_dir=folder,
                                    revision=checkpoint.revision))
    except Exception as error:  # requests, httpx and xet fail with classes of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        access = (f', after asking for access at {checkpoint.url} and `hf auth login`'
                  if checkpoint.gated else '; it goes on where it stopped')
        raise CheckpointError(f'expected {checkpoint.file} of {checkpoint.repo} from the network, '
                              f'found {reason}; try again{access}') from error


def _check_writable(folder: Path | None) -> None:
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f'expected a folder to write to at {folder}, found '
                              f'{error.strerror}; set {FOLDER_VARIABLE} to another') from error


def _check_download(file: Path, checkpoint: Checkpoint) -> str:
    """The hash of a file that has just come; raises CheckpointError unless it is whole."""
    remedy = 'it was removed, fetch it again'
    sha256 = _check_bytes(file, checkpoint, remedy, recorded=False)
    tensor_shapes(file)
    return sha256


def _check_bytes(file: Path, checkpoint: Checkpoint, remedy: str, recorded: bool = True) -> str:
    """The hash of a file; raises CheckpointError when it is known to be another.

    remedy: what to do then. recorded: whether the hash beside the file counts.
    """
    size = file.stat().st_size
    if checkpoint.sha256 and size != checkpoint.size:
        raise CheckpointError(f'expected {checkpoint.size} bytes in {file.name} of '
                              f'{checkpoint.name}, found {size}; {remedy}')
    sha256 = file_sha256(file)
    known = checkpoint.sha256 or (_recorded(file) if recorded else '')
    if known and sha256 != known:
        raise CheckpointError(f'expected SHA-256 {known[:16]}… for {file.name} of '
                              f'{checkpoint.name}, found {sha256[:16]}…; {remedy}')
    return sha256


def _record_of(file: Path) -> Path:
    return file.with_name(file.name + '.sha256')


def _recorded(file: Path) -> str:
    """The hash that the file had when it came; '' without a record."""
    record = _record_of(file)
    text = record.read_text(encoding='ascii', errors='replace') if record.is_file() else ''
    return text.partition(' ')[0]


def _record(file: Path, sha256: str) -> None:
    """Keep the hash of a file beside it, as `sha256sum --check` reads it."""
    record = _record_of(file)
    unfinished = record.with_name(f'.{record.name}.part')
    unfinished.write_text(f'{sha256}  {file.name}\n', encoding='ascii')
    os.replace(unfinished, record)
    log.info('%s has SHA-256 %s', file, sha256)


def _forget_cached(file: Path) -> None:
    """Remove a file from the Hugging Face cache, where its name is a link to its contents."""
    contents = file.resolve()
    file.unlink()
    contents.unlink(missing_ok=True)
