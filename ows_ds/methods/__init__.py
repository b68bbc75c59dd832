"""The method that ``method.name`` names, in one trainer, with one data order and one report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

from ows_ds.config import Recipe
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import ReadShard, Shard, Weights
from ows_ds.methods import badam, full, galore, hift, lisa, lora, mezo, ows
from ows_ds.model.fingerprint import fingerprint
from ows_ds.model.layers import ModelLayers
from ows_ds.optim.ows import check_fits
from ows_ds.optim.sampling import LayerSet
from ows_ds.optim.update import Accept, always


class Method(Protocol):
    """What the trainer needs of a method; each is a `torch.optim.Optimizer` too, for schedulers."""

    weights: Weights
    comm: Communicator
    grad_norm: Tensor | None  # of the last step, before clipping
    param_groups: list[dict[str, Any]]
    steps: int  # taken
    skipped: int  # of them, in which nothing trained

    @property
    def layer_set(self) -> LayerSet:
        """The layers that train in the coming step."""

    @property
    def nothing_to_train(self) -> bool:
        """Nothing trains in the coming step."""

    @property
    def lr(self) -> float:
        """The learning rate of the coming step."""

    def train_step(self, losses: Iterable[Callable[[], Tensor]], accept: Accept = always) -> Tensor:
        """A whole optimizer step with this process's losses, one a micro-batch, the sum of which is its mean.

        accept: is asked once, before anything changes, whether the step is taken: not where the norm is not finite.
        Returns the sum: float64, (). Collective.
        """

    def projector_energy(self) -> dict[int, Tensor]:
        """Of each layer that gets new projectors in this step: see `ows_ds.optim.ows.OWS.energies`."""

    def update_norm(self, all_layers: bool = False) -> dict[int, Tensor]:
        """Of each layer that was merged after the last step: see `ows_ds.optim.ows.OWS.moved`."""

    def pieces(self) -> list[Shard]:
        """This process's part of the tensors of a checkpoint."""

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, JSON-able."""

    def restore(self, numbers: dict[str, Any], read: ReadShard) -> None:
        """Continue from where `pieces` and `numbers` were taken. Collective."""

    def close(self) -> None:
        """Leave a plain model in ``weights.module`` that is what was trained. Collective."""


SAMPLING: dict[str, Callable[..., Any]] = {
    "ows": ows.build,
    "lisa": lisa.build,
    "lisa-d": lisa.build,
    "galore": galore.build,
    "badam": badam.build,
}  # layer sets drawn by importance, trained by `ows_ds.optim.ows.OWS`
WHOLE: dict[str, Callable[..., Any]] = {
    "full": full.build,
    "lora": lora.build,
    "dora": lora.build,
    "hift": hift.build,
}  # AdamW on whole weights or adapters, by `ows_ds.optim.adamw.AdamW`
ADAPTERS = ("lora", "dora")


def adapt(recipe: Recipe, model: Any) -> Any:
    """The model that is trained: ``model`` itself, or with adapters."""
    return lora.adapt(recipe, model) if recipe.method.name in ADAPTERS else model


def base_model(recipe: Recipe, weights: Weights) -> str:
    """Fingerprint of the model as it was before `adapt`. Before anything has trained. Collective."""
    return fingerprint(weights, lora.base(weights) if recipe.method.name in ADAPTERS else None)


def deepspeed_trains(recipe: Recipe) -> bool:
    """Whether DeepSpeed's own optimizer trains under ZeRO-3; it has no float64, for which ours works on the shards."""
    return recipe.method.name in ("full", *ADAPTERS) and recipe.model.dtype != "float64"


def check(recipe: Recipe, layers: ModelLayers) -> None:
    """Refuse (UserError) what this model is too small for, before it is scored."""
    name, optim = recipe.method.name, recipe.optim
    if name in SAMPLING:
        gamma = recipe.sampling.gamma if name in ("ows", "lisa", "lisa-d") else 1
        check_fits(layers, gamma, optim.rank if name in ("ows", "galore") else None, optim.always_on)


def build(recipe: Recipe, weights: Weights, layers: ModelLayers, importance: list[float], accumulation: int) -> Method:
    """The recipe's method over ``weights``. Collective.

    layers: of the model before `adapt`. importance: one number >= 0 a layer, in proportion to which layers are sampled.
    accumulation: micro-batches a step.
    """
    name, optim = recipe.method.name, recipe.optim
    method: Method
    if name == "mezo":
        method = mezo.build(recipe, weights, layers)
    elif name in WHOLE:
        method = WHOLE[name](
            recipe,
            weights,
            layers,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.max_grad_norm,
        )
    else:
        method = SAMPLING[name](recipe, weights, importance, **_sampling(recipe, accumulation))
    return method


def _sampling(recipe: Recipe, accumulation: int) -> dict[str, Any]:
    """The settings of `OWS` that all methods of `SAMPLING` take from the recipe as they are."""
    sampling, optim = recipe.sampling, recipe.optim
    return {
        "period": sampling.period,
        "scheme": sampling.scheme,
        "update_proj_gap": optim.update_proj_gap,
        "scale": optim.scale,
        "lr": optim.lr,
        "betas": optim.betas,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "projector": optim.projector,
        "refresh": optim.refresh,
        "refresh_batch": optim.refresh_batch,
        "moments_on_refresh": optim.moments_on_refresh,
        "merge_rounding": optim.merge_rounding,
        "always_on": optim.always_on,
        "side": optim.side,
        "accumulation": accumulation,
        "seed": recipe.train.seed if sampling.seed is None else sampling.seed,
    }
