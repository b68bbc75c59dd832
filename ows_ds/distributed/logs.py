"""Where the package's log goes on the command line. Used as a library it goes where the program's logging sends it."""

from __future__ import annotations

import logging
import sys


class _Lines(logging.Handler):
    """Plain lines on standard output, whatever that is by then."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stdout, flush=True)


def show_log(rank: int = 0) -> None:
    """Print the package's log: from INFO on rank 0, from WARNING on the others. Changes the logger ``ows_ds``."""
    log = logging.getLogger("ows_ds")
    if not any(isinstance(handler, _Lines) for handler in log.handlers):
        log.addHandler(_Lines())
    log.propagate = False  # else a library that configures logging prints each line again
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
