from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ows_ds.compat import lm_eval as ours
from tests.compat import unchanged

pytest.importorskip("lm_eval")


def test_git_is_not_asked() -> None:
    from lm_eval import evaluator

    with unchanged("lm_eval", "evaluator.get_git_commit_hash"):
        before = evaluator.get_git_commit_hash
        with ours.without_git():
            assert evaluator.get_git_commit_hash() is None
        assert evaluator.get_git_commit_hash is before


def test_ranks_of_a_model() -> None:
    from lm_eval.models.huggingface import HFLM

    with unchanged("lm_eval", "HFLM._rank or _world_size"):
        model: Any = HFLM.__new__(HFLM)
        ours.set_ranks(model, 1, 3)
        assert (model.rank, model.world_size) == (1, 3)


def test_answers_are_forgotten() -> None:
    from lm_eval.api.task import Task

    with unchanged("lm_eval", "Task._instances"):
        task = SimpleNamespace(_instances=["an answer"])
        ours.forget_answers(task)
        assert Task.instances.fget(task) is None
