"""From a recipe to the importance of its model's layers: which scores are read, computed and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ows_ds import config
from ows_ds.config import Recipe
from ows_ds.distributed.communicator import fail_together
from ows_ds.distributed.weights import Weights
from ows_ds.errors import one_line
from ows_ds.importance import probabilities
from ows_ds.importance.calibrate import Batches
from ows_ds.importance.metrics import measure
from ows_ds.importance.plot import plot, text_chart
from ows_ds.importance.probabilities import METRIC_OF, importance_of
from ows_ds.importance.scores import Scores
from ows_ds.model.blocks import ModelLayers

MakeBatches = Callable[[], Batches]
"""Gives this rank's calibration batches, from the beginning each time."""


def layer_importance(
    recipe: Recipe,
    weights: Weights,
    layers: ModelLayers,
    run_dir: Path,
    model: str,
    earlier: Path | None = None,
    batches: MakeBatches | None = None,
) -> list[float]:
    """What the recipe's method samples layers by: one number >= 0 each, input side first. Collective.

    Where the method needs scores, they are those of ``sampling.scores``; without it, of scores.json in ``earlier``, the
    folder of the run that is resumed (None: ``run_dir``); without that file, computed now over ``batches``. The run
    keeps them in ``run_dir`` as scores.json, with a picture. Without ``batches`` (an export) the run's own scores.json
    is read, and nothing is written. model: the fingerprint of ``weights``. Raises UserError for a file that is missing
    or made for something else.
    """
    sampling, kind = recipe.sampling, importance_of(recipe)
    n_layers = len(layers.layers)
    if kind not in METRIC_OF:
        return probabilities.importance(kind, n_layers)
    own = run_dir / "scores.json"
    given: Path | None = own
    if batches is not None:
        given = (earlier or run_dir) / "scores.json" if sampling.scores is None else Path(sampling.scores)
        if not weights.comm.broadcast_object(given.exists()):
            given = None
    if given is None:
        assert batches is not None
        [scores] = measure(weights, layers, [METRIC_OF[kind]], batches, sampling.tau, model).values()
    else:
        with fail_together(weights.comm):
            scores = Scores.read(given)
            scores.check(model, n_layers, kind, sampling.tau)
    found = probabilities.importance(kind, n_layers, scores.layers)
    # refuses what it must before anything is written
    probabilities.probabilities(found, config.gamma(recipe, found), sampling.tau)
    if batches is not None and given != own:
        with fail_together(weights.comm):
            if weights.comm.rank == 0:
                scores.write(own)
                plot([(Path(recipe.model.path).name, scores)], own.with_suffix(".png"))
    return found


def report(
    recipe: Recipe, weights: Weights, layers: ModelLayers, batches: MakeBatches, kinds: Sequence[str], path: Path
) -> None:
    """Measure what ``kinds`` of importance need, each metric once; print a chart of each kind, write files. Collective.

    kinds: values of ``sampling.importance``; none: the metric that the recipe's needs, outlier where it needs none.
    path: file of the scores of the metric that the recipe's importance needs, or of the first one where that was not
    asked for; it is not written where no kind needs one. Of several metrics, each also has a file of its own, named
    after it (scores-rm.json). One PNG, named after ``path``, shows all kinds. Errors as for `measure`.
    """
    needed, tau = METRIC_OF.get(recipe.sampling.importance), recipe.sampling.tau
    kinds = list(dict.fromkeys(kinds)) or [needed or "outlier"]
    metrics = list(dict.fromkeys(METRIC_OF[kind] for kind in kinds if kind in METRIC_OF))
    measured = measure(weights, layers, metrics, batches, tau)

    def row(kind: str) -> Scores:
        if kind in measured:
            return measured[kind]
        ratios = measured[METRIC_OF[kind]].layers if kind in METRIC_OF else None
        return Scores(kind, tau, "", tuple(probabilities.importance(kind, len(layers.layers), ratios)), 0)

    rows = [row(kind) for kind in kinds]
    files = {path: measured.get(str(needed), measured[metrics[0]])} if measured else {}
    if len(measured) > 1:
        files |= {path.with_stem(f"{path.stem}-{metric}"): scores for metric, scores in measured.items()}
    with fail_together(weights.comm):
        if weights.comm.rank == 0:
            for file, scores in files.items():
                scores.write(file)
            picture = path.with_suffix(".png")
            plot([(Path(recipe.model.path).name, one) for one in rows], picture)
            print("\n\n".join(map(text_chart, rows)))
            for file, scores in files.items():
                facts = f", {scores.tokens:,} tokens" if scores.tokens else ""
                facts += f", tau {scores.tau:g}" if scores.metric == "outlier" else ""
                print(one_line(f"{file}: {scores.metric}{facts}"))
            print(one_line(f"{picture}: {', '.join(kinds)}"))
