"""The recipe: every setting of a run, its default, its range, and the checks that need no model."""

from ows_ds.config.recipe import *  # noqa: F403
