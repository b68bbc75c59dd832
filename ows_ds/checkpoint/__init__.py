"""Checkpoints: complete or absent, sharded, readable at any world size, written while training goes on."""

from ows_ds.checkpoint.checkpoint import *  # noqa: F403
