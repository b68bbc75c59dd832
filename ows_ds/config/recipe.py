"""The recipe: every setting of a run, a section each."""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, model_validator
from pydantic.fields import FieldInfo
from typing_extensions import Self

from ows_ds.config.elsewhere import MEANINGS
from ows_ds.config.inputs import Data, Model
from ows_ds.config.loss import REFERENCE, ROWS, Loss
from ows_ds.config.method import LEARNING_RATES, LEAST_DRAWS, LONGEST_PERIOD, Method, Optim, Sampling, usual_gamma
from ows_ds.config.settings import (
    MOST,
    Count,
    Expected,
    MayChange,
    Planned,
    Positive,
    Seed,
    Settings,
    Wrong,
    is_planned,
    model_in,
    unknown,
)


class Train(Settings):
    """The run."""

    renamed: ClassVar[Mapping[str, str]] = {
        "eval_every": "it is called {prefix}eval_steps",
        "save_every": "it is called {prefix}save_steps",
        "keep_last": "it is called {prefix}save_total_limit",
        "batch_size": "it is called {prefix}global_batch_size",
    }

    output_dir: MayChange[str]
    """Folder of the run. Required."""
    epochs: Positive = Field(1.0, le=MOST)
    """Passes over the training rows."""
    steps: Count | None = None
    """Optimizer steps; null: as many as train.epochs asks for."""
    global_batch_size: Count = 16
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: MayChange[Annotated[Count, Planned()]] = 1
    """Sequences per rank and forward pass; accumulation makes up the rest of the batch. auto: as many as fit and make
    a step faster."""
    gradient_checkpointing: MayChange[Annotated[bool, Planned()]] = False
    """Compute activations again in the backward pass: less memory, more time. auto: where nothing else fits."""
    activation_offload: MayChange[bool] = False
    """Keep the inputs of checkpointed layers in the host's memory until the backward pass: of long rows a layer's alone
    is on the device. Turns train.gradient_checkpointing on."""
    tiled_mlp: MayChange[Annotated[bool | Literal["auto"], Expected("true or false, or auto")]] = "auto"
    """Compute MLPs a run of tokens at a time, as many as a hidden state is wide, and again in the backward pass; auto:
    where a pass has at least four such runs."""
    kernels: MayChange[Literal["auto", "torch", "liger", "compile"]] = "auto"
    """What computes norms, rotary positions and activation functions: torch; liger (Liger's, on a GPU); compile
    (torch.compile, which takes minutes at the start). auto: liger where it is installed, otherwise torch."""
    sequence_parallel: MayChange[Count] = 1
    """Ranks that share the tokens of each row (Ulysses), for rows that are too long for one; 1: none do."""
    seed: Seed = 0
    """Seed of the order of rows, of dropout and of the draws."""
    eval_steps: MayChange[Count | None] = None
    """Optimizer steps between evaluations; null: only before and after training."""
    early_stopping: MayChange[Count | None] = None
    """So many evaluations in a row whose loss is not below the lowest stop the run; null: none do."""
    load_best: MayChange[bool] = False
    """Save a checkpoint at every evaluation whose loss is the lowest, keep it, and export the model of the best one."""
    eval_batch_size: MayChange[Count] = 8
    """Sequences per rank and forward pass in evaluation."""
    save_steps: MayChange[Count | None] = None
    """Optimizer steps between checkpoints; null: only at the end."""
    save_total_limit: MayChange[Count] = 2
    """Newest checkpoints that are kept."""
    checkpoint: MayChange[Literal["incremental", "full"]] = "incremental"
    """What a checkpoint holds of the weights: incremental those that have ever trained, the rest is the base model's;
    full all of them."""
    on_save_error: MayChange[Literal["continue", "stop"]] = "continue"
    """What a checkpoint that cannot be written does to the run, the last one aside: continue with a line that says so,
    or stop."""
    resume: MayChange[str] = "never"
    """never, auto (the newest complete checkpoint, if there is one), or the folder of a checkpoint."""
    gpus: MayChange[Annotated[Count | Literal["auto"], Expected("an integer of at least 1, or auto")]] = "auto"
    """GPUs of this host on which `ows-ds train` starts ranks of its own, where no launcher has; auto: as many as there
    are and divide the batch."""
    sharding: MayChange[Literal["auto", "replicated", "zero3"]] = "auto"
    """Frozen weights on every rank (replicated) or in shards (zero3); auto: zero3 when the launcher set it up,
    otherwise replicated."""
    ds_config: MayChange[str | None] = None
    """DeepSpeed file (JSON); null: the launcher's, or ours."""
    max_nonfinite_steps: MayChange[Count | None] = 10
    """So many steps in a row whose loss or gradient is NaN or infinite stop the run; each of them is skipped. null: no
    number of them does."""
    timeout_seconds: MayChange[Count] = 600
    """Seconds after which a rank that is not heard of, or a collective that does not complete, stops all ranks."""

    check_memory: MayChange[bool] = True
    """Refuse a run whose planned memory exceeds what is free, before its weights load; false: try it."""

    def contradictions(self) -> Iterator[Wrong]:
        if self.global_batch_size % self.micro_batch_size:
            right = f"expected a multiple of train.micro_batch_size, {self.micro_batch_size}"
            yield Wrong("global_batch_size", right, ("micro_batch_size",))
        if self.activation_offload and not self.gradient_checkpointing:
            right = "expected false, or train.gradient_checkpointing true: what is kept on the host is layers' inputs"
            yield Wrong("activation_offload", right, ("gradient_checkpointing",))
        if self.sharding == "replicated" and self.ds_config is not None:
            right = "leave it out under train.sharding replicated, or give zero3"
            yield Wrong("ds_config", right, ("sharding",))


class Log(Settings):
    """What is shown and recorded; metrics.jsonl is always written."""

    trackers: MayChange[
        list[Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]]
    ] = Field(["tensorboard"])
    """Trackers of accelerate: tensorboard, wandb, mlflow, trackio, ...; [] for none."""
    progress: MayChange[Literal["auto", "rich", "plain", "none"]] = "auto"
    """On the terminal: a live bar (rich), a line every few steps (plain), nothing but warnings (none), or auto."""
    samples: MayChange[list[str]] = Field([])
    """Messages that the model answers at every evaluation: on the terminal, in metrics.jsonl, trackers and report."""
    sample_tokens: MayChange[Count] = 64
    """Tokens of such an answer, at most."""


class Recipe(Settings):
    """All settings of a run, one section each, in the order in which people read and write them."""

    model: Model
    data: Data = Data()
    loss: Loss = Loss()
    method: Method = Method()
    sampling: Sampling = Sampling()
    optim: Optim = Optim()
    train: Train
    log: Log = Log()

    _auto: frozenset[str] = PrivateAttr(frozenset())

    @property
    def auto(self) -> frozenset[str]:
        """Keys that are ``auto`` until `ows_ds.planner.fit` chooses; the recipe has their plain values."""
        return self._auto

    @model_validator(mode="wrap")
    @classmethod
    def _sections(cls, tree: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """A section whose lines are all commented out is an empty one, and so is an absent one. The learning rate is
        the method's where none is given."""
        if not isinstance(tree, Mapping):
            return handler(tree)
        made = {**{k: {} for k in cls.model_fields}, **{k: {} if v is None else v for k, v in tree.items()}}
        auto = set()
        for key in planned_keys():
            section, _, name = key.partition(".")
            if isinstance(made[section], Mapping) and made[section].get(name, "auto") == "auto":
                if name == "gradient_checkpointing" and made[section].get("activation_offload") is True:
                    made[section] = {**made[section], name: True}
                    continue
                made[section] = {k: v for k, v in made[section].items() if k != name}
                auto.add(key)
        method, optim = made["method"], made["optim"]
        if isinstance(method, Mapping) and isinstance(optim, Mapping) and optim.get("lr", "auto") == "auto":
            name = method.get("name", "ows")
            own = LEARNING_RATES.get(name) if isinstance(name, str) else None
            made["optim"] = {**optim, "lr": own} if own is not None else optim
        loss, data = made["loss"], made["data"]
        rows = ROWS.get(loss["name"]) if isinstance(loss, Mapping) and isinstance(loss.get("name"), str) else None
        if rows and isinstance(data, Mapping) and data.get("format", "auto") == "auto":
            made["data"] = {**data, "format": rows}
        found = handler(made)
        found._auto = frozenset(auto)
        return found

    def contradictions(self) -> Iterator[Wrong]:
        data, optim, train = self.data, self.optim, self.train
        if self.method.name in ("lisa", "lisa-d", "badam") and optim.always_on == "low_rank":
            right = f"expected full or none under {self.method.name}, which trains at full rank"
            yield Wrong("optim.always_on", right, ("method.name",))
        if self.method.name not in ("ows", "galore") and optim.rule == "muon":
            right = f"expected adamw under {self.method.name}, which trains no matrix in a subspace of its gradients"
            yield Wrong("optim.rule", right, ("method.name",))
        if self.model.frozen != "same" and self.method.name in ("full", "mezo", "dora"):
            why = {
                "full": "full trains all weights all the time: none is frozen",
                "mezo": "mezo trains all weights all the time: none is frozen",
                "dora": "dora needs the norms of real weights in every pass; lora does not",
            }[self.method.name]
            yield Wrong("model.frozen", f"expected same: {why}", ("method.name",))
        if train.steps is not None and optim.warmup_steps > train.steps:
            yield Wrong("optim.warmup_steps", f"expected at most train.steps, {train.steps}", ("train.steps",))
        if data.streaming and train.steps is None:
            right = "expected their number: under data.streaming nobody knows how long an epoch is"
            yield Wrong("train.steps", right, ("data.streaming",))
        if data.streaming and data.buffer_size < train.global_batch_size:
            right = f"expected at least train.global_batch_size, {train.global_batch_size}"
            yield Wrong("data.buffer_size", right, ("data.streaming", "train.global_batch_size"))
        if data.format != self.loss.rows and (self.loss.rows or data.format in ROWS.values()):
            right = f"expected {self.loss.rows or 'a format of examples'}, or auto, under loss.name {self.loss.name}"
            yield Wrong("data.format", right, ("loss.name",))
        if self.loss.name == "reward" and self.method.name in ("lora", "dora", "mezo", "hift"):
            right = f"expected dpo, orpo, simpo or kto under method.name {self.method.name}, which trains no new head"
            yield Wrong("loss.name", right, ("method.name",))
        if train.sequence_parallel > 1 and self.loss.rows:
            right = f"expected 1 under loss.name {self.loss.name}, which compares whole rows"
            yield Wrong("train.sequence_parallel", right, ("loss.name",))
        if self.loss.rows:
            name = self.loss.name
            if data.packing:
                yield Wrong("data.packing", f"expected false under loss.name {name}", ("loss.name",))
            if data.loss_on == "all":
                right = f"expected assistant under loss.name {name}, which compares answers"
                yield Wrong("data.loss_on", right, ("loss.name",))
            if data.streaming and name in REFERENCE:
                right = f"expected false under loss.name {name}, which asks the model about all rows before training"
                yield Wrong("data.streaming", right, ("loss.name",))
        for key in ("early_stopping", "load_best"):
            if getattr(train, key) and train.eval_steps is None:
                right = "leave it out, or give train.eval_steps: evaluations decide"
                yield Wrong(f"train.{key}", right, ("train.eval_steps",))
        if self.log.samples and self.loss.name == "reward":
            yield Wrong(
                "log.samples", "leave it out under loss.name reward: such a model gives numbers", ("loss.name",)
            )
        if train.eval_steps is not None and data.eval is None:
            right = "leave it out, or give data.eval: there is nothing to evaluate with"
            yield Wrong("train.eval_steps", right, ("data.eval",))


@functools.cache
def sections() -> dict[str, type[Settings]]:
    """The models of the recipe's sections by name."""
    return {name: kind for name, field in Recipe.model_fields.items() if (kind := model_in(field.annotation))}


@functools.cache
def recipe_keys() -> dict[str, FieldInfo]:
    """Every key of the recipe by its full name, such as optim.rank."""
    return {f"{name}.{key}": field for name, kind in sections().items() for key, field in kind.model_fields.items()}


@functools.cache
def planned_keys() -> tuple[str, ...]:
    """Keys that may be ``auto``, see `Recipe.auto`."""
    return tuple(key for key, field in recipe_keys().items() if is_planned(field))


def _meanings() -> dict[str, str]:
    """Other tools' names of keys, and our own without their section."""
    last = Counter(key.partition(".")[2] for key in recipe_keys())
    own = {name: key for key in recipe_keys() if last[name := key.partition(".")[2]] == 1}
    return {**own, **MEANINGS}


_kinds: list[type[Settings]] = [Recipe, *sections().values()]
for _kind in _kinds:
    _kind.meanings = _meanings()


def period(recipe: Recipe, steps: int | None) -> int:
    """Optimizer steps between two draws, in a run of so many; None: as in a long one."""
    if "sampling.period" not in recipe.auto:
        return recipe.sampling.period
    return LONGEST_PERIOD if steps is None else max(1, min(LONGEST_PERIOD, steps // LEAST_DRAWS))


def gamma(recipe: Recipe, importance: Sequence[float]) -> float:
    """Expected number of sampled layers, of layers with these importances."""
    if "sampling.gamma" not in recipe.auto:
        return recipe.sampling.gamma
    return usual_gamma(importance, recipe.method.name != "ows", recipe.sampling.scheme)


def may_change_on_resume(key: str) -> bool:
    """Whether a run may be resumed with another value of a key, such as train.save_steps."""
    extra = recipe_keys()[key].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("may_change_on_resume"))


def unknown_key(key: str, prefix: str = "") -> str:
    """What to say of a full name that is no key of the recipe."""
    section, _, name = key.partition(".")
    kind = sections().get(section)
    if kind is not None and name in kind.renamed:
        return kind.renamed[name].format(prefix=f"{prefix}{section}.")
    return unknown(key, recipe_keys(), {}, prefix)
