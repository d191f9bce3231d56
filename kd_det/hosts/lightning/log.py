"""``log.txt``: the messages of a run, from its first check on."""

from __future__ import annotations

import logging
import logging.handlers
from pathlib import Path

NAMES = ("kd_det", "lightning.pytorch")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_CAPACITY = 10_000  # records kept before there is a file


class RunLog:
    """Collects messages, and writes them to a file once the run may write.

    Use it as a context. The screen shows what it showed before: warnings. A file that another
    handler writes already, as the quickstart's does, is left to it.
    """

    def __init__(self) -> None:
        self._early = logging.handlers.MemoryHandler(
            _CAPACITY, flushLevel=logging.CRITICAL + 1, flushOnClose=False
        )
        self._added: list[tuple[logging.Logger, logging.Handler]] = []
        self._level = logging.NOTSET

    def __enter__(self) -> RunLog:
        package = logging.getLogger(NAMES[0])
        self._level = package.level
        if package.getEffectiveLevel() > logging.INFO:
            package.setLevel(logging.INFO)
        for name in NAMES:
            logger = logging.getLogger(name)
            # Python's handler for loggers without one, which the first handler would end.
            if not logger.hasHandlers() and logging.lastResort is not None:
                self._add(logger, logging.lastResort)
            self._add(logger, self._early)
        return self

    def __exit__(self, *error: object) -> None:
        for logger, handler in reversed(self._added):
            logger.removeHandler(handler)
            if isinstance(handler, logging.FileHandler):
                handler.close()
        logging.getLogger(NAMES[0]).setLevel(self._level)

    def write_to(self, path: Path | None) -> None:
        """Write all messages so far, and those that follow, to the end of a file.

        None, on processes other than the first, collects no more.
        """
        for name in NAMES:
            logging.getLogger(name).removeHandler(self._early)
        if path is None:
            return
        file = logging.FileHandler(path, encoding="utf-8", delay=True)
        file.setFormatter(logging.Formatter(_FORMAT))
        open_to = [n for n in NAMES if not _is_written(logging.getLogger(n), path)]
        for record in self._early.buffer:
            if record.name.startswith(tuple(open_to)):
                file.handle(record)
        for name in open_to:
            self._add(logging.getLogger(name), file)

    def _add(self, logger: logging.Logger, handler: logging.Handler) -> None:
        logger.addHandler(handler)
        self._added.append((logger, handler))


def _is_written(logger: logging.Logger, path: Path) -> bool:
    """Whether one of the logger's own handlers writes to the file."""
    streams = (getattr(handler, "stream", None) for handler in logger.handlers)
    names = (getattr(stream, "name", None) for stream in streams)
    return any(isinstance(n, str) and Path(n).resolve() == path.resolve() for n in names)
