"""Where the command line writes the package's log. Used as a library it goes where the program's logging sends it."""

from __future__ import annotations

import logging
import sys


class _Lines(logging.Handler):
    """Plain lines on standard output or standard error, whatever these are by then."""

    to_stderr = False

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr if self.to_stderr else sys.stdout, flush=True)


def show_log(rank: int = 0, to_stderr: bool | None = None) -> None:
    """Print the package's log: from INFO on rank 0, from WARNING on the others. Changes the logger ``ows_ds``.

    to_stderr: for commands whose result is what standard output gets; None: as it was said before.
    """
    log = logging.getLogger("ows_ds")
    lines = next((handler for handler in log.handlers if isinstance(handler, _Lines)), None)
    if lines is None:
        lines = _Lines()
        log.addHandler(lines)
    if to_stderr is not None:
        lines.to_stderr = to_stderr
    log.propagate = False  # else a library that configures logging prints each line again
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
