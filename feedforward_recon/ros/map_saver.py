"""Saves the map of a node: on a timer, when asked to, and at the end.

    configure -> announce          what the folder holds, and what this run will do to it
    timer     -> tick              saves a map that grew, every autosave_s
    ~/save_map -> save             refined
    the end   -> save_at_the_end   what is not saved yet; a save under way goes on to its end

Jobs take the state of the session on its worker and write it on another one, so that images
never wait for a disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rclpy.impl.rcutils_logger import RcutilsLogger

from feedforward_recon.errors import MapError, ReconError
from feedforward_recon.io.writers import MAP_MARKER, backups
from feedforward_recon.ros.session_runner import SessionRunner
from feedforward_recon.ros.worker import Job, Worker
from feedforward_recon.session.map_folder import MEMORY, SavedMap, load_map

Done = Callable[[str | None, Exception | None], None]  # the sentence of a save, or its error
RETRY_S = 10.0  # after a save that failed


class MapSaver:
    """Saves of one node. Everything here is called on the executor's thread.

    writer: the worker that writes folders. notice: notes a failed save for log and diagnostics,
    (code, sentence).
    """

    def __init__(self, writer: Worker, log: RcutilsLogger, notice: Callable[[str, str], None]
                 ) -> None:
        self._writer, self._log, self._notice = writer, log, notice
        self._runner: SessionRunner | None = None
        self._waiting: list[Done] = []
        self._due_s = 0.0

    @property
    def is_busy(self) -> bool:
        """A save is under way."""
        return bool(self._waiting)

    def take(self, runner: SessionRunner, autosave_s: float) -> None:
        """Keep the map of this session from now on."""
        self._runner = runner
        self._due_s = time.monotonic() + autosave_s

    def drop(self) -> None:
        """The session is given up; what is being saved still is."""
        self._runner = None

    def announce(self, folder: str, autosave_s: float, *, fresh: bool) -> None:
        """Say what the folder holds and what mapping will do to it.

        fresh: a new map is started also where there is one.
        """
        if not folder:
            self._log.warning('the map is kept in memory only: the parameter map is empty; give '
                              'a folder (map:=FOLDER) to save it')
            return
        how = f'saved every {autosave_s:g} s, at the end and by ~/save_map' if autosave_s \
            else 'saved by ~/save_map alone (autosave_s is 0)'
        path = Path(folder).expanduser().absolute()
        self._log.info(f'{_about_folder(path, fresh=fresh)}, {how}')

    def save(self, runner: SessionRunner, folder: str, done: Done) -> None:
        """Save refined; ``done`` gets the sentence for the caller, or the error."""
        self._begin(runner, lambda: runner.session.save(folder), done)

    def tick(self, folder: str, autosave_s: float) -> None:
        """Once a second: save what grew, when it is time."""
        if autosave_s and not self.is_busy and time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + autosave_s
            self._autosave(folder)

    def save_at_the_end(self, folder: str, autosave_s: float) -> None:
        """Save what is not saved yet."""
        if self._runner is None:
            return
        session = self._runner.session
        if folder and autosave_s:
            self._autosave(folder, at_the_end=True)
        elif session.info.unsaved_keyframes and not self.is_busy:
            why = 'autosave_s is 0' if folder else 'the parameter map is empty'
            self._log.warning(f'not saved: the map of {session.info.unsaved_keyframes} keyframes '
                              f'ends here, because {why}')

    def _autosave(self, folder: str, *, at_the_end: bool = False) -> None:
        runner = self._runner
        if folder and runner is not None:
            self._begin(runner, lambda: runner.session.autosave(folder),
                        lambda text, error: self._log_failure(text, error, at_the_end))

    def _log_failure(self, text: str | None, error: Exception | None, at_the_end: bool) -> None:
        """At the end nothing logs notices any more."""
        if at_the_end and error is not None:
            self._log.error(text or str(error))

    def give_up(self, reason: str) -> None:
        """No time is left: callers that wait get this reason as the error."""
        for done in list(self._waiting):
            self._ended(None, ReconError(reason), done)

    def _begin(self, runner: SessionRunner, take: Callable[[], Callable[[], SavedMap] | None],
               done: Done) -> None:
        self._waiting.append(done)

        def taken(job: Any, error: Exception | None) -> None:
            if job is None:
                self._ended(None, error, done)
            else:
                self._writer.ask(Job(job, lambda saved, error: self._ended(saved, error, done)))

        runner.ask(take, taken)

    def _ended(self, saved: SavedMap | None, error: Exception | None, done: Done) -> None:
        if done not in self._waiting:
            return  # given up meanwhile
        self._waiting.remove(done)
        text = None if saved is None else _about_save(saved)
        if text is not None:
            self._log.info(text)
        elif error is not None:
            self._due_s = min(self._due_s, time.monotonic() + RETRY_S)
            why = str(error) if isinstance(error, ReconError) else f'internal error: {error!r}'
            text = f'the map was not saved, what was in the folder is unchanged: {why}'
            self._notice('NOT_SAVED', text)
        done(text, error)


def _about_save(saved: SavedMap) -> str:
    files = saved.info.files[MEMORY]
    kept = '' if saved.backup is None else f'; the map that was there is now {saved.backup}'
    return (f'saved {saved.path.resolve()}: {saved.info.keyframes} keyframes, memory of '
            f'{files["bytes"]} bytes, SHA-256 {files["sha256"]}{kept}')


def _about_folder(path: Path, *, fresh: bool) -> str:
    """What a folder holds, and what becomes of it, in a sentence."""
    older = len(backups(path))
    beside = f' ({older} backups beside it)' if older else ''
    new = 'this run starts a new map'
    if not path.exists() and not older:
        return f'{path}: no map there yet; {new}'
    try:
        info = load_map(path).info
    except MapError as error:
        return f'{path}{beside}: {error}; {new}'
    written = time.strftime('%Y-%m-%d %H:%M', time.localtime((path / MAP_MARKER).stat().st_mtime))
    holds = f'{path} holds a map of {info.keyframes} keyframes, saved {written}{beside}'
    if not fresh:
        return (f'{holds}; this run goes on with it once the camera is found there '
                '(fresh:=true starts a new map)')
    return (f'{holds}; it stays until the first save, which keeps it as {path.name}.backup-<UTC>; '
            f'{new}')
