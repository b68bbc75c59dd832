"""Settings: the recipe and all others, their defaults, ranges and meaning, stated once; no torch."""

from ows_ds.config.inputs import Data, Format, Model, Source
from ows_ds.config.method import Method, Optim, OWSConfig, Sampling
from ows_ds.config.reading import (
    COMPRESSED,
    DATA_FILES,
    HUB_NAME,
    accumulation,
    changed,
    check,
    data_suffix,
    from_dict,
    is_file,
    sources,
    to_dict,
    to_yaml,
    used,
)
from ows_ds.config.recipe import Log, Recipe, Train, may_change_on_resume, period, recipe_keys, sections, unknown_key
from ows_ds.config.settings import MOST, Settings, Wrong, fields_of, parse, words

__all__ = [
    "COMPRESSED",
    "DATA_FILES",
    "HUB_NAME",
    "MOST",
    "Data",
    "Format",
    "Log",
    "Method",
    "Model",
    "OWSConfig",
    "Optim",
    "Recipe",
    "Sampling",
    "Settings",
    "Source",
    "Train",
    "Wrong",
    "accumulation",
    "changed",
    "check",
    "data_suffix",
    "fields_of",
    "from_dict",
    "is_file",
    "may_change_on_resume",
    "parse",
    "period",
    "recipe_keys",
    "sections",
    "sources",
    "to_dict",
    "to_yaml",
    "unknown_key",
    "used",
    "words",
]
