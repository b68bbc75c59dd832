"""The library that registers the devices, compiled once for each version of it and of torch."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")


def missing() -> str | None:
    """What is not there to compile it; None: everything is."""
    return None if shutil.which("g++") else "needs a C++ compiler (g++)"


def library() -> Path:
    """The library, compiled (half a minute) if it is not there. Does not import torch."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.submodule_search_locations
    torch = Path(found.submodule_search_locations[0])
    key = hashlib.sha256(SOURCE.read_bytes() + str(torch).encode() + (torch / "version.py").read_bytes())
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    cache = Path(extensions) / "fake_cuda"  # where torch and DeepSpeed keep what they compile
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{key.hexdigest()[:16]}.so"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(".partial")
            headers = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
            libraries = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
            options = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC"]
            subprocess.run(["g++", *options, *headers, str(SOURCE), "-o", str(partial), *libraries], check=True)
            partial.rename(path)
    return path
