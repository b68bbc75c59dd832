"""Each private name of another library that `ows_ds.compat` uses: there, and doing what is expected of it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def unchanged(library: str, what: str) -> Iterator[None]:
    """Where its body fails: "DeepSpeed 0.19.8 changed WHAT"."""
    try:
        yield
    except Exception as error:
        version = importlib.import_module(library.lower()).__version__
        pytest.fail(f"{library} {version} changed {what} ({type(error).__name__}: {error})")
