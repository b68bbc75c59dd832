"""The verb `plan`: what a recipe needs on a cluster, what fits, and files to start with; before anything runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ows_ds import config
from ows_ds.config import Recipe
from ows_ds.errors import UserError
from ows_ds.files import atomic_write, can_be_made
from ows_ds.model.shapes import named
from ows_ds.optim.sizes import ADAPTERS
from ows_ds.planner.choices import HOMES
from ows_ds.planner.cluster import Cluster
from ows_ds.planner.forecast import Forecast
from ows_ds.planner.page import Page
from ows_ds.planner.report import Report
from ows_ds.tables import lines, thinking

FILES = ("plan.json", "recipe.yaml", "scaling.png")


def plan(
    recipe: Recipe,
    cluster: Cluster,
    others: Sequence[str],
    lengths: Sequence[int],
    output: Path | None,
    choose: str,
    as_json: bool,
) -> None:
    """Print tables (or JSON) of ``recipe`` on ``cluster``. others: methods to compare it with. lengths: of rows.

    output: folder for a recipe with the cheapest or the fastest choice that fits (choose), its DeepSpeed file, the
    numbers and a plot; nothing in it is written over. Raises UserError for whatever the user can put right.
    """
    if named(recipe.model.path) is None or {recipe.method.name, *others} & {*ADAPTERS}:
        from ows_ds.distributed.launch import suppress_warnings  # of transformers, which is needed

        suppress_warnings()
    with thinking(f"planning {recipe.model.path}"):
        report = Report(recipe, cluster, others, lengths)
        if output is not None:
            _check_output(output)
        summary = report.summary() if as_json or output is not None else {}
        if output is not None:
            fitted = report.proposal
            chosen = report.cheapest if choose == "cheapest" else report.fastest
            _write(output, report, {} if fitted is None else fitted.changes, chosen, summary)
        shown = json.dumps(summary, indent=2, allow_nan=False) if as_json else Page(report).text()
    print(shown)


# ------------------------------------------------------------------ files


def _check_output(output: Path) -> None:
    right = "a folder that can be written to, or a name at which one can be made" if not can_be_made(output) else None
    for name in (*FILES, "ds_config.json"):
        if right is None and (output / name).exists():
            right = f"a folder without {name}: nothing is written over"
    if right is not None:
        raise UserError("--output", str(output), f"expected {right}")


def _write(
    output: Path, report: Report, taken: Mapping[str, Any], chosen: Forecast | None, summary: dict[str, Any]
) -> None:
    """The numbers, the plot, and what starts the choice. taken: keys of the recipe that it changes, too."""
    texts = {"plan.json": json.dumps(summary, indent=2, allow_nan=False) + "\n"}
    if chosen is not None:
        sharded = chosen.choice.sharding == "zero3"
        ds_config = {"ds_config": str(output / "ds_config.json") if sharded else None}
        recipe = report.planner.changed(train=chosen.choice.settings() | ds_config).recipe
        recipe = config.changed(recipe, taken)
        start = report.command(chosen.choice, str(output / "recipe.yaml"))
        texts["recipe.yaml"] = f"# {start}\n{config.to_yaml(recipe)}"
        if sharded:
            texts["ds_config.json"] = json.dumps(report.ds_config(chosen.choice), indent=2) + "\n"
    for name, text in texts.items():
        with atomic_write(output / name) as partial:
            partial.write_text(text, encoding="utf-8")
    series = {
        HOMES[home]: {n: one.tokens_per_day / 1e6 for n, one in some.items()} for home, some in report.scaling.items()
    }
    lines(series, "GPUs", "million tokens a day, roofline", output / "scaling.png", log=True)
