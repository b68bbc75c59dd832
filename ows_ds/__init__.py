"""Outlier-weighed layerwise sampling for fine-tuning large language models, across processes and under ZeRO-3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ows_ds.config import OWSConfig
    from ows_ds.optim.ows import OWS

__version__ = "0.1.0"
__all__ = ["OWS", "OWSConfig", "__version__"]


def __getattr__(name: str) -> Any:
    # imported when asked for, so that the command line's help does not wait for torch
    if name == "OWS":
        from ows_ds.optim.ows import OWS

        return OWS
    if name == "OWSConfig":
        from ows_ds.config import OWSConfig

        return OWSConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
