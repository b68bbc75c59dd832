"""The model card of a trained model: its README.md, with metadata as the hub reads it.

It says what was done and measured. Paths of the machine are cut to their last part. The same run gives the same card,
wherever its folder is and however often it was interrupted.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from ows_ds import __version__, config
from ows_ds.config import Recipe
from ows_ds.errors import UserError, first_line, one_line
from ows_ds.files import write_text
from ows_ds.importance.probabilities import METRIC_OF
from ows_ds.runs import records, results
from ows_ds.runs.records import Run
from ows_ds.runs.results import Result
from ows_ds.tables import markdown

logger = logging.getLogger(__name__)

FILE = "README.md"
METHODS = {
    "ows": "outlier-weighed layerwise sampling (OWS)",
    "lisa": "layerwise importance sampling (LISA)",
    "lisa-d": "layerwise sampling, less towards the output (LISA-D)",
    "galore": "gradient low-rank projection (GaLore)",
    "badam": "block-cyclic training (BAdam)",
    "hift": "hierarchical training, one layer a step (HiFT)",
    "full": "full fine-tuning",
    "lora": "low-rank adapters (LoRA), merged",
    "dora": "weight-decomposed low-rank adapters (DoRA), merged",
    "mezo": "zeroth-order training (MeZO)",
}
PLACES = ("model.path", "data.train", "data.eval", "sampling.scores")
USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
```

Its bias, its limits and its licence are first of all those of the base model and of the data."""
BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"


def of_run(run_dir: Path, steps: int | None, fingerprint: str) -> str | None:
    """The card of a run's model after ``steps`` optimizer steps (None: all), whose weights have that fingerprint.

    None, with a warning, where files of the run cannot be read.
    """
    try:
        run = records.read(run_dir)
    except UserError as error:
        logger.warning("no model card is written: %s", one_line(str(error)))
        return None
    found = [one for one in run.evaluations[0] if one.model.get("fingerprint") == fingerprint]
    return str(_card(_text(run, steps, fingerprint), _metadata(run.recipe), found))


def add_results(folder: Path, found: Sequence[Result]) -> None:
    """Put into the card in ``folder`` what has been measured of its weights; the rest of it stays as it is."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return
    own = [one for one in found if one.model.get("fingerprint") and str(one.model["fingerprint"]) in text]
    if BEGIN not in text or END not in text or not own:
        return
    try:
        changed = str(_card(text, {}, own))
    except ValueError as error:  # metadata that somebody changed
        logger.warning("%s", one_line(f"{folder / FILE} stays as it is: {first_line(error)}"))
        return
    write_text(folder / FILE, changed)


def _card(text: str, metadata: dict[str, Any], found: Sequence[Result]) -> Any:
    """A `ModelCard`. text: with its metadata at the head, or without where ``metadata`` has them."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    if metadata:
        text = f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n{text}"
    card = ModelCard(text)
    # a function: in a replacement text backslashes would count
    card.text = re.sub(f"{BEGIN}.*?{END}", lambda _: _section(found), card.text, count=1, flags=re.DOTALL)
    rows = [
        EvalResult(
            task_type="text-generation", dataset_type=score.task, dataset_name=score.task, metric_type=score.metric,
            metric_value=score.value, metric_name=score.label,
        )
        for score, _ in results.newest(found).values()
        if score.value is not None and score.depth == 0
    ]  # fmt: skip
    if rows:
        data: Any = card.data
        data.eval_results, data.model_name = rows, data.model_name or "fine-tuned"
    return card


def _section(found: Sequence[Result]) -> str:
    """The evaluations, between their marks."""
    lines = [BEGIN, ""]
    for one in found:
        lines += markdown(results.table(one))
        said = [f"lm-evaluation-harness {one.versions['lm_eval']}"] if one.versions.get("lm_eval") else []
        if one.settings.get("mt_bench"):
            said = [f"judged by {one.settings.get('judge_model')}"]
        if one.settings.get("limit") is not None:
            said.append(f"only a part of the questions (limit {one.settings['limit']})")
        if one.before is not None:
            said.append(f"before: {one.before.model['name']}")
        lines += ["", one_line(f"{one.started[:10]}; {'; '.join(said)}."), ""]
    if not found:
        lines += ["Not evaluated on benchmarks yet.", ""]
    return "\n".join([*lines, END])


def _metadata(recipe: Recipe) -> dict[str, Any]:
    path = recipe.model.path
    sources = [one.path for one in config.sources(recipe.data, "data.train")]
    sets = [one for one in sources if not os.path.exists(one) and not config.is_file(one)]
    found: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ows_ds", recipe.method.name],
        "model_name": f"{_last(path)}-{recipe.method.name}",
    }
    if not os.path.isdir(path):
        found["base_model"] = path
    elif (licence := _licence(Path(path))) is not None:
        found["license"] = licence
    if sets:
        found["datasets"] = sets
    return found


def _licence(folder: Path) -> str | None:
    """By the base model's own card."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard((folder / FILE).read_text(encoding="utf-8"), ignore_metadata_errors=True)
        found = cast(Any, card.data).license
    except Exception:  # no card, or one that is none
        return None
    return found if isinstance(found, str) else None


def _text(run: Run, steps: int | None, fingerprint: str) -> str:
    import yaml

    recipe = run.recipe
    name = one_line(_last(recipe.model.path))
    records = [record for record in run.steps if steps is None or record["step"] <= steps]
    facts = [f"* Base model: `{name}`" + (f", revision `{recipe.model.revision}`" if recipe.model.revision else "")]
    done = records[-1]["step"] if records else 0
    # a run that resumed from another one's checkpoint has records of its own steps alone
    part = "" if len(records) == done else f" in the last {len(records):,} steps"
    facts += [
        f"* Method: {METHODS[recipe.method.name]}",
        f"* Optimizer steps: {done:,}, of {recipe.train.global_batch_size:,} rows each",
        f"* Tokens seen{part}: {sum(int(results.number(r.get('tokens')) or 0) for r in records):,}",
    ]
    losses = [(step, value) for step, value in run.series("eval_loss") if steps is None or step <= steps]
    if losses:
        (first, before), (_, after) = losses[0], losses[-1]
        began = f"{before:.4f} at first, " if first == 0 else ""
        facts.append(f"* Held-out loss: {began}{after:.4f} at the end (nats a token)")
    facts.append(f"* Written by ows_ds {__version__}; fingerprint of the weights: `{fingerprint}`")
    lines = [f"# {name}, fine-tuned", "", *facts, "", USE, "", "## Evaluation", "", BEGIN, END]
    if run.scores is not None and recipe.method.name == "ows" and recipe.sampling.importance in METRIC_OF:
        percent = run.scores.metric == "outlier"
        numbers = (f"{100 * value:.3f}" if percent else f"{value:.4g}" for value in run.scores.layers)
        what = f"outlier ratio in percent, tau {run.scores.tau:g}" if percent else run.scores.metric
        lines += ["", "## Layers", "", f"What layers were sampled by, from the input side ({what}):"]
        lines += ["", ", ".join(numbers), ""]
    settings = {section: dict(values) for section, values in config.to_dict(recipe).items()}
    for section in ("train", "log"):  # what decides nothing about the weights
        given = settings[section].items()
        settings[section] = {key: value for key, value in given if not config.may_change_on_resume(f"{section}.{key}")}
    for key in PLACES:
        section, _, field = key.partition(".")
        settings[section][field] = _without_folders(settings[section][field])
    written = yaml.safe_dump({section: values for section, values in settings.items() if values}, sort_keys=False)
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", written)), default=2))
    return "\n".join([*lines, "", "## Settings", "", f"{fence}yaml", written + fence, ""])


def _without_folders(given: Any) -> Any:
    """A path, or the sources of a data set, without the machine's folders."""
    if isinstance(given, list):
        return [one | {"path": _last(one["path"])} if isinstance(one, dict) else _last(one) for one in given]
    return None if given is None else _last(given)


def _last(path: str) -> str:
    """A name on the hub as it is; of a path on this machine the last part, or the last two of RUN/model."""
    if not os.path.exists(path) and re.fullmatch(config.HUB_NAME, path):
        return path
    parts = Path(path).absolute().parts
    return "/".join(parts[-2:]) if parts[-1] == "model" and len(parts) > 2 else parts[-1]
