"""Weights from their publishers onto this machine, and whether a file is what it should be.

A download happens only when the licence has been accepted, goes on where an interrupted one
stopped, and takes its final name only after its size, hash and contents have been checked.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from torch import nn

from feedforward_recon.errors import CheckpointError
from feedforward_recon.model.compact import CompactEncoder, load_compact
from feedforward_recon.model.configs import alignment_blocks, build
from feedforward_recon.model.weights.checkpoints import (
    KeyReport,
    file_sha256,
    match_keys,
    tensor_shapes,
)
from feedforward_recon.model.weights.registry import (
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

    It goes to $FEEDFORWARD_RECON_WEIGHTS, or into a folder of the user's cache without that.
    accept_licence: the user has agreed to the licence; nothing is downloaded otherwise.
    offline: never touch the network, as with HF_HUB_OFFLINE=1.
    Raises CheckpointError, in one sentence, and leaves nothing behind that could be mistaken
    for weights.
    """
    checkpoint = checkpoint_of(name)
    file = located(checkpoint)
    if file is not None:
        _check_bytes(file, checkpoint, f'remove {file} and fetch it again', _recorded(file))
        return file
    if not checkpoint.repo or offline or is_offline():
        raise missing(checkpoint, offline=True)
    if not accept_licence:
        licence = checkpoint.licence
        raise CheckpointError(f'expected agreement to the licence of {name} ({licence.name}), '
                              f'found none; read {licence.url} and add --accept-licence')
    return _download(checkpoint)


def check_weights(name_or_path: str | Path, model: str | None = None,
                  attention: str | None = None) -> WeightsReport:
    """Compare a file with its published hash and with the names and shapes of its network.

    model: the architecture of a file of your own; by default the checkpoint that the file is
        named after, with its hash. attention: another than that of the architecture.
    Raises CheckpointError for a file that is missing, damaged or has another hash. Names and
    shapes that do not fit are no error but in the report.
    """
    file = find_weights(name_or_path)
    checkpoint = None if model else _checkpoint_named(name_or_path)
    against = ''
    if checkpoint is None:
        sha256 = file_sha256(file)
    else:
        sha256 = _check_bytes(file, checkpoint, f'fetch {checkpoint.name} again', _recorded(file))
        against = 'published' if checkpoint.sha256 else 'first download' if _recorded(file) else ''
    shapes = tensor_shapes(file)
    architecture = model or (checkpoint.model if checkpoint else '')
    report = match_keys(_network(architecture, attention, file, shapes), shapes)
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


def _network(model: str, attention: str | None, file: Path, names: Iterable[str]) -> nn.Module:
    # Files of the compact encoder carry its widths; the others have fixed ones.
    if model == CompactEncoder.name:
        return load_compact(file)
    return build(model, attention, device='meta', alignment=alignment_blocks(names))


def _download(checkpoint: Checkpoint) -> Path:
    target = weights_folder() / checkpoint.local_file
    _make_folder(target.parent)
    part, published = _from_hub(checkpoint, target.parent)
    try:
        sha256 = _check_bytes(part, checkpoint, 'it was removed, fetch it again', published)
        tensor_shapes(part)
    except CheckpointError:
        part.unlink()
        raise
    os.replace(part, target)
    _record(target, sha256)
    for old in target.parent.glob(f'.{checkpoint.name}.*.part*'):
        old.unlink()
    return target


def _from_hub(checkpoint: Checkpoint, folder: Path) -> tuple[Path, str]:
    """Download into a hidden file; returns it and the hash that the hub tells, if it is one.

    The library's own `hf_hub_download` starts anew after an interruption (since its version 1).
    """
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers
    except ImportError as error:
        raise CheckpointError(f'expected huggingface_hub for downloads, found {error}; pip '
                              f'install huggingface_hub, or {by_hand(checkpoint)}') from error
    try:
        url = hf_hub_url(checkpoint.repo, checkpoint.file, revision=checkpoint.revision)
        about = get_hf_file_metadata(url)
        tag = re.sub(r'\W', '', about.etag or 'untagged')
        part = folder / f'.{checkpoint.name}.{tag[:16]}.part{Path(checkpoint.file).suffix}'
        # The token of the user is for the hub alone, not for where it stores files.
        same = urlsplit(about.location).netloc == urlsplit(url).netloc
        with part.open('ab') as stream:
            if about.size and stream.tell() > about.size:  # two wrote to it at once
                stream.seek(0)
                stream.truncate()
            if stream.tell() != about.size:
                http_get(about.location, stream, resume_size=stream.tell(),
                         expected_size=about.size, displayed_filename=checkpoint.local_file,
                         headers=build_hf_headers() if same else {})
        return part, tag.lower() if re.fullmatch('[0-9a-fA-F]{64}', tag) else ''
    except Exception as error:  # requests, httpx and the disk fail with classes of their own
        raise _interrupted(checkpoint, error) from error


def _interrupted(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip('.;')
    remedy = (f'ask for access at {checkpoint.url}, run `hf auth login` and try again'
              if checkpoint.gated else 'try again, it goes on where it stopped')
    return CheckpointError(f'expected {checkpoint.file} of {checkpoint.repo} from the network, '
                           f'found {reason}; {remedy}')


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f'expected a folder to write to at {folder}, found '
                              f'{error.strerror}; set {FOLDER_VARIABLE} to another') from error


def _check_bytes(file: Path, checkpoint: Checkpoint, remedy: str, recorded: str) -> str:
    """The hash of a file; raises CheckpointError when it is known to be another.

    remedy: what to do then. recorded: the hash that counts when none is registered.
    """
    size = file.stat().st_size
    if checkpoint.is_pinned and size != checkpoint.size:
        raise CheckpointError(f'expected {checkpoint.size} bytes in {checkpoint.file} of '
                              f'{checkpoint.name}, found {size}; {remedy}')
    sha256, known = file_sha256(file), checkpoint.sha256 or recorded
    if known and sha256 != known:
        raise CheckpointError(f'expected SHA-256 {known[:16]}… for {checkpoint.file} of '
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
