"""Checkpoints: complete or absent, sharded, readable at any world size, written while training continues.

    checkpoints/step-20/
        manifest.json                    state, versions, recipe; size and SHA-256 of every file
        state-00000-of-00002.safetensors the shards of rank 0: runs of flattened tensors
        state-00001-of-00002.safetensors ...

A checkpoint is written to step-20.partial, synced, read back and renamed. A shard knows its tensor's shape and its own
start, so that any number of ranks can read what each of them needs. Safetensors and JSON only: no file can run code.
"""

from ows_ds.checkpoint.manifest import MANIFEST, NAME, Manifest, checkpoints, folder_of, read_manifest, version
from ows_ds.checkpoint.reader import Checkpoint, find, open_checkpoint
from ows_ds.checkpoint.saver import Saver
from ows_ds.checkpoint.writer import SaveError, save

__all__ = [
    "MANIFEST", "NAME", "Checkpoint", "Manifest", "SaveError", "Saver", "checkpoints", "find", "folder_of",
    "open_checkpoint", "read_manifest", "save", "version",
]  # fmt: skip
