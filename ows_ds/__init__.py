"""Outlier-weighed layerwise sampling for fine-tuning large language models, on any number of ranks and under ZeRO-3."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ows_ds.config import OWSConfig
    from ows_ds.importance.metrics import score
    from ows_ds.importance.scores import Scores
    from ows_ds.optim.ows import OWS

__version__ = "0.1.0"
__all__ = ["OWS", "OWSConfig", "Scores", "__version__", "score"]
_MODULES = {
    "OWS": "ows_ds.optim.ows",
    "OWSConfig": "ows_ds.config",
    "Scores": "ows_ds.importance.scores",
    "score": "ows_ds.importance.metrics",
}


def __getattr__(name: str) -> Any:
    # imported when asked for, so that the command line's help does not wait for torch
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
