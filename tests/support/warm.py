"""What short-lived processes of tests are forked from: it has imported, and loaded, all that takes long."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

import accelerate
import datasets
import matplotlib.figure
import transformers.models.llama.modeling_llama
import transformers.optimization  # where peft is installed, it imports peft
from deepspeed.comm.torch import build_shm_op

from ows_ds.train import trainer

__all__ = ["accelerate", "datasets", "matplotlib", "trainer", "transformers"]

with contextlib.redirect_stdout(io.StringIO()):
    build_shm_op()  # before anything is killed: a build that dies leaves its lock behind
gc.freeze()  # children's collections leave alone what is shared
