"""Photos as they are read: copies found, the others encoded."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np

from feedforward_recon.model import Encoder
from feedforward_recon.model.compact import scaled_down
from feedforward_recon.model.preprocess import PreparedImage
from feedforward_recon.reconstruction.comparisons import Mapped
from feedforward_recon.reconstruction.shots import (
    EncodedImage,
    Photo,
    Shot,
    encoded_image,
    taken_by,
)
from feedforward_recon.session.offline import ProgressBar
from feedforward_recon.session.photo_cameras import guessed_camera, like_others
from feedforward_recon.types import Frame

AT_ONCE = 64  # images that are in memory with their colours
Prepare = Callable[[np.ndarray], PreparedImage]


@dataclass
class PhotosRead:
    """What was read: different images, all photos, and stamped poses that came with them."""

    shots: list[Shot] = field(default_factory=list)
    photos: list[Photo] = field(default_factory=list)
    truth: list[tuple[int, np.ndarray]] = field(default_factory=list)
    reading_s: float = 0.0


def read_photos(frames: Iterable[Frame], encoder: Encoder, max_pixels: int, engine: Mapped,
                bar: ProgressBar, prepare: Prepare | None = None) -> PhotosRead:
    """Read and encode frames; engine: what encodes, prepare: gives images as a network sees them.

    Raises InputError for an image that cannot be used.
    """
    read, known = PhotosRead(), _Contents()
    encode = partial(_encode, encoder)
    for batch in _batches(_timed(frames, read), AT_ONCE):
        read.truth += [(f.stamp_ns, f.T_map_cam) for f in batch if f.T_map_cam is not None]
        new: dict[str, Frame] = {}
        for frame in batch:
            content, number, is_new = known.number(frame.image)
            if is_new:
                new[content] = frame
            read.photos.append(Photo(frame.stamp_ns, frame.source, number))
        images = [(name, scaled_down(frame.image, max_pixels)) for name, frame in new.items()]
        for frame, (name, image), encoded in zip(new.values(), images, engine(encode, images),
                                                 strict=True):
            shot = _shot(frame, name, encoded)
            read.shots.append(shot if prepare is None else replace(shot, prepared=prepare(image)))
        for _ in batch:
            bar.advance()
    read.shots = like_others(read.shots)
    return read


class _Contents:
    """Numbers of images by what they show; links to one file share the image, and its name."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._last: tuple[np.ndarray | None, str] = None, ''

    def number(self, image: np.ndarray) -> tuple[str, int, bool]:
        """Name and number of an image, and whether it is new."""
        if self._last[0] is not image:
            self._last = image, _content(image)
        name, before = self._last[1], len(self._numbers)
        number = self._numbers.setdefault(name, before)
        return name, number, number == before


def _content(image: np.ndarray) -> str:
    """A name for the pixels of an image."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def _encode(encoder: Encoder, named: tuple[str, np.ndarray]) -> EncodedImage:
    return encoded_image(named[1], encoder)


def _shot(frame: Frame, content: str, image: EncodedImage) -> Shot:
    height, width = frame.image.shape[:2]
    return taken_by(frame.camera or guessed_camera((width, height)), image, frame, content,
                    camera_source=frame.camera_source if frame.camera else 'guessed')


def _timed(frames: Iterable[Frame], read: PhotosRead) -> Iterator[Frame]:
    """Frames; how long they were waited for is noted."""
    remaining = iter(frames)
    while True:
        before = time.perf_counter()
        frame = next(remaining, None)
        read.reading_s += time.perf_counter() - before
        if frame is None:
            return
        yield frame


def _batches(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    remaining = iter(frames)
    while batch := list(islice(remaining, size)):
        yield batch
