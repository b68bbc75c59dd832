"""What lm-evaluation-harness has no public way for, as of 0.4.13."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_git() -> Iterator[None]:
    """Within it lm_eval does not ask git about the current folder: outside of a repository git's error is shown."""
    from lm_eval import evaluator

    before = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = before


def forget_answers(task: Any) -> None:
    """Let a task build its requests again: it keeps those of the last model, with the answers."""
    task._instances = None


def set_ranks(model: Any, rank: int, world_size: int) -> None:
    """Tell an ``HFLM`` of its ranks: by itself it knows those of Accelerate on GPUs of one host alone."""
    model._rank, model._world_size = rank, world_size
