"""Safetensors files, read and written by runs of entries: neither a file nor a full tensor is in memory.

A file is 8 bytes with the length of its header (little-endian), the header (JSON: each tensor's dtype, shape and place
among the bytes that follow) and the tensors' entries in row-major order
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ows_ds.distributed.merging import CHUNK

# widest first, in the order in which safetensors sorts them
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Files:
    """Files that are open for reading. shapes, dtypes (safetensors' names): of all tensors in them, by name."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Raises OSError or safetensors' own error for what is missing or no such file."""
        from safetensors import safe_open

        self._views: dict[str, Any] = {}
        for path in paths:
            file = safe_open(path, framework="pt")
            names: list[str] = file.keys()
            self._views |= {name: file.get_slice(name) for name in names}
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(v.get_shape()) for name, v in self._views.items()}
        self.dtypes: dict[str, str] = {name: v.get_dtype() for name, v in self._views.items()}

    def read(self, name: str, start: int, out: Tensor) -> None:
        """out <- entries [start, start + out.numel()) of the flattened tensor ``name``, in out's dtype.

        out: 1-D, on any device. Only these entries are read, at most about `CHUNK` of them at once.
        """
        view, shape = self._views[name], self.shapes[name]
        width, stop = math.prod(shape[1:]), start + out.numel()  # entries of a row
        if not shape:
            out.copy_(view[...].view(-1))
        elif out.numel():
            rows = max(1, CHUNK // width)
            for row in range(start // width, math.ceil(stop / width), rows):
                block = view[row : row + rows].reshape(-1)
                first = row * width
                a, b = max(start, first), min(stop, first + block.numel())
                out[a - start : b - start].copy_(block[a - first : b - first])


class Writer:
    """A file that is written by runs of entries, in any order. Its bytes are those of ``safetensors.torch.save_file``.

    names: its tensors, in the order in which they lie in it.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], digest: Any = None) -> None:
        """tensors: what will be written, of which only shapes and dtypes count (on the meta device, for example).

        digest: of hashlib, updated with all bytes that are written: the file's, if written in the order of ``names``.
        """
        self.names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places: dict[str, int] = {}
        end = 0
        for name in self.names:
            tensor = tensors[name]
            places[name], end = end, end + tensor.nbytes
            offsets = [places[name], end]
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._places = {name: 8 + len(text) + place for name, place in places.items()}
        self._digest = digest
        self._file = path.open("wb")
        self._write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, start: int, run: Tensor) -> None:
        """Entries of the tensor ``name`` from ``start`` on. run: 1-D, on any device."""
        self._file.seek(self._places[name] + start * run.element_size())
        self._write(run.detach().cpu().view(torch.uint8).numpy().data)

    def _write(self, content: bytes | memoryview) -> None:
        if self._digest is not None:
            self._digest.update(content)
        self._file.write(content)

    def close(self) -> None:
        """All is on the disk when this returns."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


_ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}
