"""Files: atomic writes, and reading of text, JSON and YAML that people may have written."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ows_ds.errors import UserError, first_line


@contextmanager
def atomic_write(path: Path, durable: bool = False) -> Iterator[Path]:
    """A temporary file that becomes ``path`` when all went well. durable: it survives a power failure (fsync)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Write ``text`` as UTF-8 by `atomic_write`."""
    with atomic_write(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


LARGEST = 1 << 20  # bytes of a file of settings


MOST_NODES = 100_000  # values in a YAML file, its aliases written out


def read_text(path: str | Path, largest: int = LARGEST) -> str:
    """The text of a file of settings, UTF-8. Raises OSError or ValueError, also where it has over ``largest`` bytes."""
    with open(path, "rb") as file:
        content = file.read(largest + 1)  # not its size first: a pipe and a device have none
    if len(content) > largest:
        raise ValueError(f"it has more than {largest} bytes")
    return content.decode("utf-8")


def parse_json(text: str) -> Any:
    """What JSON text says. Raises ValueError for all that is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_yaml(path: str | Path, key: str = "config") -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises UserError naming `key` and the file, with the line where the YAML is broken or says a key twice.
    """
    import yaml

    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(key, str(path), f"expected a readable YAML file ({error})") from error
    try:
        tree = yaml.load(text, _strict_loader())
    except Exception as error:  # the reader meets some values that are none with KeyErrors and the like
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(key, where, f"expected valid YAML ({problem})") from error
    if not isinstance({} if tree is None else tree, dict):
        raise UserError(key, str(path), "expected a YAML file of sections, such as `optim:` above `  rank: 64`")
    return tree or {}


@functools.cache
def _strict_loader() -> Any:
    """YAML's safe loader, which makes no objects; it also refuses a key that stands twice, and a file that would grow
    without bounds when its aliases are written out, as merging (``<<``) and printing do."""
    import yaml

    def refuse(problem: str, node: Any) -> yaml.MarkedYAMLError:
        return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    def count(node: Any, counts: dict[Any, int]) -> int:
        """Values in ``node``, itself included. counts: of the nodes that were met."""
        if node not in counts:
            counts[node] = MOST_NODES  # until it is known: what contains itself has no end
            parts = list(node.value) if isinstance(node, yaml.CollectionNode) else []
            if isinstance(node, yaml.MappingNode):
                said = set()
                for name in (name for name, _ in node.value if isinstance(name, yaml.ScalarNode)):
                    if (name.tag, name.value) in said:
                        raise refuse(f"the key {name.value} stands here for the second time", name)
                    said.add((name.tag, name.value))
                parts = [part for pair in node.value for part in pair]
            counts[node] = 1 + sum(count(part, counts) for part in parts)
            if counts[node] > MOST_NODES:
                raise refuse(f"it has more than {MOST_NODES} values, those behind aliases included", node)
        return counts[node]

    class Strict(yaml.SafeLoader):
        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None:
                count(node, {})
            return node

    return Strict


def can_be_made(folder: str | Path) -> bool:
    """Whether a folder is there and can be written to, or can be made. Nothing is."""
    path = os.path.abspath(folder)
    try:
        names = [os.fsencode(name) for name in path.split(os.sep)]
    except UnicodeEncodeError:
        return False
    if any(len(name) > 255 or b"\0" in name for name in names) or sum(map(len, names)) > 3500:  # Linux's limits
        return False
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)
