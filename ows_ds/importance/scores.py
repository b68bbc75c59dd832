"""Scores of a model's layers, and their file ``scores.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from ows_ds.distributed.weights import Weights
from ows_ds.errors import UserError
from ows_ds.files import parse_json, read_text, write_text
from ows_ds.importance.probabilities import METRIC_OF, importance
from ows_ds.model.fingerprint import fingerprint

_KEY = "sampling.scores"
_Ratio = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Scores:
    """The content of ``scores.json``.

    Attributes:
        metric: outlier (equation 2), rm, bi or alpha (`ows_ds.importance.metrics`).
        tau: The threshold of an outlier, 0 for the other metrics.
        model: Fingerprint of the base model.
        layers: The metric of every layer, input side first; for outlier D as a ratio (not percent).
        tokens: Calibration tokens that are not padding; 0 for alpha, which needs none.
        format: Version of the file.
    """

    metric: str
    tau: _Ratio
    model: str
    layers: Annotated[tuple[_Ratio, ...], Field(min_length=1)]
    tokens: Annotated[int, Field(strict=True, ge=0, lt=2**63)]
    format: Literal[1] = 1

    def write(self, path: Path) -> None:
        """Write as JSON; ``path`` is complete or as it was before."""
        write_text(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Read what `write` wrote. Raises UserError (``sampling.scores``) for anything else."""
        try:
            data = parse_json(read_text(path))
        except OSError as error:
            right = f"expected a file that can be read ({error.strerror}); `ows-ds score` writes one"
            raise UserError(_KEY, str(path), right) from error
        except ValueError as error:
            raise UserError(_KEY, str(path), f"expected a JSON file that `ows-ds score` wrote ({error})") from error
        if not isinstance(data, dict) or data.get("format") != 1:
            raise UserError(_KEY, str(path), "expected a file that `ows-ds score` wrote (scores of format 1)")
        try:
            scores = TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            right = f"compute {path} again with `ows-ds score` ({first['msg']})"
            raise UserError(f"{_KEY}: {first['loc'][0]}", first["input"], right) from None
        if scores.metric not in METRIC_OF.values():
            right = f"expected scores of one of {', '.join(dict.fromkeys(METRIC_OF.values()))}"
            raise UserError(f"{_KEY}: metric", scores.metric, right)
        return scores

    def check(
        self, model_fingerprint: str, n_layers: int, importance: str | None = None, tau: float | None = None
    ) -> None:
        """Refuse (UserError) scores of another model, of another number of layers, or made for something else.

        importance: the kind that they are for, one of `METRIC_OF`; None: any. tau: ``sampling.tau``, compared where
        the metric has one.
        """
        again = "compute the scores again with `ows-ds score`, or leave sampling.scores out"
        if len(self.layers) != n_layers:
            raise UserError(_KEY, f"scores of {len(self.layers)} layers", f"this model has {n_layers}; {again}")
        if self.model != model_fingerprint:
            short = f"scores of model {self.model[:12]}"
            raise UserError(_KEY, short, f"this model's weights are {model_fingerprint[:12]}; {again}")
        if importance is None:
            return
        metric = METRIC_OF[importance]
        if self.metric != metric:
            right = f"sampling.importance is {importance}, which needs scores of metric {metric}; {again}"
            raise UserError(_KEY, f"scores of metric {self.metric}", right)
        if metric == "outlier" and self.tau != tau:
            raise UserError(_KEY, f"scores with tau {self.tau:g}", f"sampling.tau is {tau:g}; {again}")


def ratios_of(scores: str | Path | Scores | Sequence[float], weights: Weights, n_layers: int) -> Sequence[float]:
    """One number >= 0 a layer, from a file of scores (refused for another model), `Scores`, or the numbers themselves.

    Raises UserError (``sampling.scores``). Collective for a file.
    """
    if isinstance(scores, str | Path):
        scores = Scores.read(Path(scores))
        scores.check(fingerprint(weights), n_layers)
    ratios = importance(scores.metric, n_layers, scores.layers) if isinstance(scores, Scores) else scores
    if len(ratios) != n_layers:
        raise UserError(_KEY, f"{len(ratios)} ratios", f"expected one for each of the {n_layers} layers")
    return ratios
