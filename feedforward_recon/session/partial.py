"""``PartialWork``: what a reconstruction has worked out, in a folder, until its map is saved.

A run that was killed goes on with it when it is started again, and ends with the same map. One
file holds an encoded image, another some pairs; a file that is damaged counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.numpy import load, save

from feedforward_recon.config.photos import PhotoConfig
from feedforward_recon.config.schema import to_dict
from feedforward_recon.io.writers import check_output, not_writable, write_bytes
from feedforward_recon.model import Encoder
from feedforward_recon.reconstruction.comparisons import Mapped
from feedforward_recon.reconstruction.pairs import (
    Compared,
    Comparison,
    FeatureMatches,
    PairGeometry,
)
from feedforward_recon.reconstruction.shots import EncodedImage, Shot
from feedforward_recon.types import Features
from feedforward_recon.version import __version__

log = logging.getLogger(__name__)
ABOUT = 'partial.json'
KINDS = IMAGES, PAIRS = 'images', 'pairs'
ARRAYS_PER_FILE = 500  # of 50 to 170 pairs, which are lost when the process dies; by hand
DIGEST_BYTES = 32  # SHA-256 of the rest of a file, and its beginning


class PartialWork:
    """A folder of encoded images and compared pairs.

    Results are found by what they depend on: those of an image by its pixels, those of a pair by
    its images and their cameras. All else they depend on is the same for a folder (``begin``).
    say: told in one sentence what an earlier run left.
    """

    def __init__(self, folder: str | Path, say: Callable[[str], None] = log.warning) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self._say = say
        self._pairs: dict[str, dict[str, np.ndarray]] = {}

    @staticmethod
    def beside(out: Path, say: Callable[[str], None]) -> PartialWork:
        """The folder OUT.partial beside a map."""
        out = out.expanduser().resolve()
        return PartialWork(out.with_name(f'{out.name}.partial'), say)

    def begin(self, config: PhotoConfig, encoder: Encoder) -> None:
        """Go on with the folder, or start anew if other settings or another version made it.

        Raises InputError for a folder of something else, or that cannot be written.
        """
        check_output(self.folder, ABOUT)
        about = json.dumps({
            'version': __version__, 'encoder': encoder.sha256, 'config': to_dict(config),
            'libraries': [torch.__version__, np.__version__, cv2.__version__]}).encode()
        marker = self.folder / ABOUT
        try:
            if marker.exists() and marker.read_bytes() != about:
                self._say(f'{self.folder}: made with other settings, another encoder or another '
                          'version; starting anew')
                self.remove()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(marker, about)
            for kind in KINDS:
                (self.folder / kind).mkdir(exist_ok=True)
        except OSError as error:
            raise not_writable(self.folder, error) from None
        self._load()

    def images(self, engine: Mapped) -> Mapped:
        """``engine`` for encoding items (name of the content, image), spared the known ones."""
        def file(item: tuple[str, np.ndarray]) -> Path:
            return self.folder / IMAGES / f'{item[0]}.arrays'

        def recall(item: tuple[str, np.ndarray]) -> EncodedImage | None:
            arrays = _read(file(item))
            return None if arrays is None else _image_of(arrays)

        def keep(item: tuple[str, np.ndarray], image: EncodedImage) -> None:
            _write(file(item), {**vars(image.features), 'rgb': image.rgb, 'gray': image.gray})

        return _recalling(engine, recall, keep)

    def pairs(self, engine: Mapped, shots: Sequence[Shot]) -> Mapped:
        """``engine`` for batches of comparisons of these shots, spared the known ones."""
        def key(one: Comparison) -> str:
            parts = [(shots[image].content, shots[image].camera, roll)
                     for image, roll in ((one.i, one.roll_i), (one.j, one.roll_j))]
            return hashlib.sha256(repr(parts).encode()).hexdigest()

        new: dict[str, np.ndarray] = {}

        def recall(batch: Sequence[Comparison]) -> list[Compared] | None:
            known = [(self._pairs.get(key(one)), one) for one in batch]
            done = [_compared_of(arrays, one) for arrays, one in known if arrays is not None]
            return done if len(done) == len(batch) else None

        def keep(batch: Sequence[Comparison], compared: list[Compared]) -> None:
            for one, result in zip(batch, compared, strict=True):
                new.update(_pair_arrays(key(one), result))
            if len(new) > ARRAYS_PER_FILE:
                end()

        def end() -> None:
            if new:
                _write(self.folder / PAIRS / f'{secrets.token_hex(8)}.arrays', new)
                new.clear()

        return _recalling(engine, recall, keep, end)

    def remove(self) -> None:
        """Delete the folder, last what says whose it is."""
        for kind in KINDS:
            shutil.rmtree(self.folder / kind, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _load(self) -> None:
        for file in self._files(PAIRS):
            for name, array in (_read(file) or {}).items():
                key, field = name.split()
                self._pairs.setdefault(key, {})[field] = array
        images = len(self._files(IMAGES))
        if images:
            self._say(f'going on from {self.folder.name}: {images} images, {len(self._pairs)} '
                      'pairs')

    def _files(self, kind: str) -> list[Path]:
        return sorted((self.folder / kind).glob('*.arrays'))


def _recalling(engine: Mapped, recall: Callable[[Any], Any], keep: Callable[[Any, Any], None],
               end: Callable[[], None] = lambda: None) -> Mapped:
    """``engine`` for items that ``recall`` does not know; what comes of them is kept."""
    def mapped(function: Callable, items: Iterable) -> Iterator:
        found = [(item, recall(item)) for item in items]
        results = iter(engine(function, [item for item, known in found if known is None]))
        try:
            for item, known in found:
                if known is not None:
                    yield known
                    continue
                result = next(results)
                keep(item, result)
                yield result
        finally:
            end()

    return mapped


def _image_of(arrays: dict[str, np.ndarray]) -> EncodedImage:
    rgb, gray = arrays.pop('rgb'), arrays.pop('gray')
    return EncodedImage(Features(**arrays), rgb, gray)


def _pair_arrays(key: str, compared: Compared) -> dict[str, np.ndarray]:
    matches, pair = compared
    named = dict(vars(matches))
    if pair is not None:
        named |= {f'pair.{name}': value for name, value in vars(pair).items()
                  if isinstance(value, np.ndarray)}
    return {f'{key} {name}': array for name, array in named.items()}


def _compared_of(arrays: dict[str, np.ndarray], one: Comparison) -> Compared:
    pair: dict[str, Any] = {name.removeprefix('pair.'): array for name, array in arrays.items()
                            if '.' in name}
    matches = FeatureMatches(**{name: arrays[name] for name in arrays if '.' not in name})
    return matches, PairGeometry(one.i, one.j, **pair) if pair else None


def _write(file: Path, arrays: dict[str, np.ndarray]) -> None:
    content = save(arrays)
    write_bytes(file, hashlib.sha256(content).digest() + content)


def _read(file: Path) -> dict[str, np.ndarray] | None:
    """What ``_write`` wrote; None without the file, or for a damaged one."""
    try:
        stored = file.read_bytes()
    except OSError:
        return None
    digest, content = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        return None
    return load(content)
