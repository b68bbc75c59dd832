"""Encoded rows on disk: made once by the process that comes first, read by the others and by later runs.

The name of an entry is a hash of all that it is made of, so an entry is valid or absent, and any may be removed.
Mistakes in rows are kept as well: they are a function of the same things.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ows_ds.config import Data, Source
from ows_ds.data.encoded import Counts, EncodedRows
from ows_ds.data.template import CLOCK
from ows_ds.errors import UserError
from ows_ds.files import atomic_write

FORMAT = 5  # of an entry, and of what encoding makes: a change of either needs another number
SETTINGS = ("max_length", "loss_on", "template", "on_bad_row")
NAMES = ("tokens", "trained", "ends", "targets", "right")


def place(data: Data) -> Path:
    """The folder of entries."""
    from huggingface_hub import constants

    return Path(data.cache if data.cache is not None else os.path.join(constants.HF_HOME, "ows_ds"))


def name(
    source: Source, content: str, tokenizer: Any, data: Data, key: str, today: datetime.datetime | None = None
) -> str:
    """Of the entry of ``source``, whose content has the hash ``content``.

    key: is named in messages about mistakes. today: of templates that write the date; None: today.
    """
    template = json.dumps(tokenizer.chat_template)
    facts = {
        "format": [FORMAT, *(importlib.metadata.version(package) for package in ("transformers", "tokenizers"))],
        "source": [key, content, {**source.model_dump(), "weight": None}],
        "tokenizer": [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id],
        "marks": {name: str(mark) for name, mark in tokenizer.special_tokens_map.items()},  # templates write them
        "template": [template, str(today.date() if today else datetime.date.today()) if CLOCK in template else ""],
        "settings": [getattr(data, setting) for setting in SETTINGS],
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=20).hexdigest()


def entry(folder: Path, name: str, make: Callable[[], tuple[EncodedRows, Counts]]) -> tuple[EncodedRows, Counts]:
    """What ``make`` gives, or gave before under this name. Where several processes ask, one makes it.

    Raises UserError as ``make`` does. Where the folder cannot be written to, nothing is kept.
    """
    from filelock import FileLock

    path = folder / f"{name}.safetensors"
    if (found := _read(path)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()
    except (OSError, NotImplementedError):  # filelock's, for a file system without locks
        return make()
    try:
        if (found := _read(path)) is not None:
            return found
        try:
            rows, counts = make()
        except UserError as error:
            value = error.value if isinstance(error.value, str | int | float | None) else repr(error.value)
            text = json.dumps([error.key, value, error.right])
            keep(path.with_suffix(".json"), lambda to: to.write_text(text))
            raise
        tensors = {name: torch.from_numpy(getattr(rows, name)) for name in NAMES}
        metadata = {"counts": json.dumps(dataclasses.asdict(counts)), "digest": rows.digest}
        keep(path, lambda to: save_file(tensors, to, metadata))
        return rows, counts
    finally:
        lock.release()


def _read(path: Path) -> tuple[EncodedRows, Counts] | None:
    """The entry at ``path``, mapped into memory; None where there is none, or none that is whole. Raises the UserError
    that was kept in its place."""
    try:
        with safe_open(path, "pt") as file:
            rows = EncodedRows(*(file.get_tensor(name).numpy() for name in NAMES))
            counts = Counts(**json.loads(file.metadata()["counts"]))
            whole = rows.digest == file.metadata()["digest"]
        if whole:
            return rows, counts
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        pass
    try:
        key, value, right = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError, TypeError):
        return None
    raise UserError(key, value, right)


def keep(path: Path, write: Callable[[Path], Any]) -> None:
    """Write the file at ``path`` at once, in a folder that is made; there is none where the disk does not take it."""
    with contextlib.suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            write(partial)
