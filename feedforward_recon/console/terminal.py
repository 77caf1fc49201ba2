"""What the commands say: tables and JSON on stdout, progress, notes and errors on stderr."""

from __future__ import annotations

import inspect
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from feedforward_recon.errors import ReconError

T = TypeVar('T')
DONE, REFUSED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
# Typer carries its own copy of click in some releases: its errors are found through it.
USAGE_ERROR: Any = typer.BadParameter.__base__


def run(app: typer.Typer, arguments: Sequence[str] | None) -> int:
    """Run an app; errors made on purpose become one line, anything else is a bug and shows.

    Returns the exit code.
    """
    _log_to_stderr()
    try:
        code = app(None if arguments is None else list(arguments), prog_name=app.info.name,
                   standalone_mode=False)
    except USAGE_ERROR as error:
        return _fail(error.format_message(), BAD_INPUT)
    except ReconError as error:
        return _fail(str(error), BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        return _fail('interrupted; what was there before is unchanged', INTERRUPTED)
    return int(code or DONE)


def _fail(message: str, code: int) -> int:
    print('error:', ' '.join(message.split()), file=sys.stderr)
    return code


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f'{record.levelname.lower()}: {record.getMessage()}'


def _log_to_stderr() -> None:
    """Warnings of the package as lines on stderr, also when called twice in one process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain())
    logger = logging.getLogger('feedforward_recon')
    for old in [h for h in logger.handlers if isinstance(h.formatter, _Plain)]:
        logger.removeHandler(old)
    logger.addHandler(handler)


def note(text: str) -> None:
    """Tell the user something that is not a result."""
    print('note:', text, file=sys.stderr)


def print_json(value: Any) -> None:
    """The only thing on stdout with --json; infinite errors become null, as JSON has none."""
    print(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title: str, rows: Mapping[str, str] | Sequence[Sequence[str]],
                header: Sequence[str] = ()) -> None:
    """A table of rows on stdout; a mapping is a table of two columns."""
    table = Table(title=title, title_justify='left', show_header=bool(header))
    cells = list(rows.items()) if isinstance(rows, Mapping) else rows
    for index in range(len(cells[0]) if cells else len(header)):
        name = header[index] if header else ''
        table.add_column(name, justify='right' if header and index else 'left')
    for row in cells:
        table.add_row(*row)
    # Tables in files and pipes keep their width instead of breaking at 80 columns.
    console = Console(highlight=False)
    console.print(table, soft_wrap=not console.is_terminal)


@contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Bar]:
    """A progress bar on stderr, silent when stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn(), TextColumn('{task.fields[state]}'))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bar(progress, progress.add_task(title, total=total, state=''))


class Bar:
    """One line of progress."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, state: str = '') -> None:
        """One step done; ``state`` is shown behind the bar."""
        self._progress.update(self._task, advance=1, state=state)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items, one step each."""
        for item in items:
            yield item
            self.advance()


def bytes_text(count: int) -> str:
    """A number of bytes for people."""
    return f'{count / 1e6:.2f} MB' if count >= 10_000 else f'{count} bytes'


def taught(command: Callable[..., Any]) -> str:
    """The docstring for --help: paragraphs wrap with the terminal, indented lists stay."""
    paragraphs = inspect.cleandoc(command.__doc__ or '').split('\n\n')
    return '\n\n'.join(f'\b\n{text}' if '\n  ' in text else ' '.join(text.split())
                       for text in paragraphs)
