"""The command line: `ows-ds VERB`."""

from ows_ds.cli.main import main

__all__ = ["main"]
