"""The recipe: every setting of a run, its default, its unit, and the checks that need no model.

`from_dict` reads strictly (unknown keys and wrong types are refused), `check` looks at ranges and
contradictions, `to_yaml` writes every default out. Importing this module is cheap: no torch, no YAML reader.
"""

import dataclasses
import difflib
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ows_ds.errors import UserError
from ows_ds.files import can_be_made

MOST = 2**31 - 1  # of any number of things


@dataclass(frozen=True)
class Model:
    """The pre-trained model.

    Attributes:
        path: Folder of a Hugging Face checkpoint, or a name on the hub. Required.
        revision: Branch, tag or commit on the hub; null: the newest.
        dtype: Number format of the weights; coordinates and moments are float32, or float64 under float64.
        attn_implementation: Attention kernel of transformers, such as sdpa or flash_attention_2; null: its own choice.
        trust_remote_code: Run the Python code that comes with the model.
    """

    path: str
    revision: str | None = None
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    attn_implementation: str | None = None
    trust_remote_code: bool = False


Format = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "multiple_choice", "question_answer", "text"
]


@dataclass(frozen=True)
class Source:
    """One of several files or data sets.

    Attributes:
        path: File, folder or name on the hub, as data.train alone.
        weight: Its share of the rows of an epoch, in proportion to those of the others (1 where one has none); null
            for all: every row once an epoch.
        subset: As data.train_subset; null: that one.
        split: As data.train_split; null: that one.
        format: As data.format; auto: that one.
    """

    path: str
    weight: float | None = None
    subset: str | None = None
    split: str | None = None
    format: Format = "auto"


SOURCES = str | list[Source] | None


@dataclass(frozen=True)
class Data:
    """The rows to train on and to evaluate with.

    Attributes:
        train: File (.jsonl, .json, .parquet, .csv), folder of a data set, or its name on the hub; or a list of them,
            each a text or a mapping of path, weight, subset, split and format. Required by train, and by score for
            calibration.
        eval: The same for held-out rows, without weights; null: no evaluation.
        train_subset: Subset (configuration) of the data set that data.train names, such as main; null: its only
            one. Files have none.
        eval_subset: The same for data.eval.
        train_split: Split of the data set that data.train names, or a part of it such as train[:1%] or
            train[100:]. Of a file the name is ignored, the part is taken.
        eval_split: The same for data.eval.
        max_length: Tokens of a row; longer rows are cut at the end. Under data.packing, of a sequence.
        loss_on: Tokens that are trained: the assistant's turns with their end mark, or all of them.
        format: Columns of a row; auto recognises messages, sharegpt (conversations), alpaca (instruction, input,
            output), prompt_completion (prompt, completion), multiple_choice (question, choices, answer),
            question_answer (question, answer) and text by their names.
        template: How a row with a task and an answer is written: the tokenizer's chat template, plain text, or
            Stanford Alpaca's prompt; auto: chat where the tokenizer has a template, otherwise plain.
        chat_template: Jinja file of a chat template in place of the tokenizer's; it is saved with the model.
        packing: Join several rows to one sequence of up to data.max_length tokens, without attention from one to
            another.
        streaming: Read the training rows while training, in blocks, instead of all before it; train.steps says when to
            stop.
        buffer_size: Rows of a block under data.streaming; they are shuffled within it.
        on_bad_row: What a row that cannot be used does: stop the run with its place and reason, or skip it; those
            skipped are counted, and the first one is named.
        cache: Folder of tokenized rows, which later runs read; null: ows_ds in the cache of Hugging Face (HF_HOME).
    """

    train: SOURCES = None
    eval: SOURCES = None
    train_subset: str | None = None
    eval_subset: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    max_length: int = 512
    loss_on: Literal["assistant", "all"] = "assistant"
    format: Format = "auto"
    template: Literal["auto", "chat", "plain", "alpaca"] = "auto"
    chat_template: str | None = None
    packing: bool = False
    streaming: bool = False
    buffer_size: int = 16384
    on_bad_row: Literal["stop", "skip"] = "stop"
    cache: str | None = None


@dataclass(frozen=True)
class Method:
    """How the model is trained.

    Attributes:
        name: ows samples layers by importance and trains them at low rank; lisa samples evenly, lisa-d less
            towards the output, both at full rank; galore trains all layers at low rank; badam one layer
            after the other at full rank; hift one layer a step at full rank and keeps its moments; full all
            weights; lora and dora adapters of all linear layers; mezo all weights by forward passes alone.
        lora_rank: Rank of the adapters of lora and dora.
        lora_alpha: Numerator of the adapters' scale; the denominator is method.lora_rank.
        lora_dropout: Share of an adapter's inputs that is zeroed in training; from 0 to below 1.
        epsilon: Length of mezo's step to both sides of the weights, in units of its noise.
    """

    name: Literal["ows", "lisa", "lisa-d", "galore", "badam", "hift", "full", "lora", "dora", "mezo"] = "ows"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    epsilon: float = 1e-3


@dataclass(frozen=True)
class Sampling:
    """Which layers train, and for how long.

    Attributes:
        importance: What layers are sampled by under ows: outlier, the share of weights that stand out
            (equation 2); reverse, the opposite; uniform; decreasing towards the output; rm, a layer's relative
            magnitude; bi, its block influence; alpha, how heavy the tails of its spectra are.
        gamma: Expected number of sampled layers, in layers; above 0.
        period: Optimizer steps between two draws.
        scheme: bernoulli draws each layer on its own; fixed draws exactly gamma layers.
        order: Course of badam and hift through the layers: from the input, from the output, or at random (badam
            anew in each round, hift once before training).
        tau: An entry is an outlier when it exceeds tau times its layer's mean.
        scores: File of scores to use; null: scores.json in train.output_dir, computed when it is absent.
        calibration_samples: Training rows that the scores are computed on.
        calibration_batch_size: Rows per rank and forward pass while scoring.
        seed: Seed of the draws; null: train.seed.
    """

    importance: Literal["outlier", "reverse", "uniform", "decreasing", "rm", "bi", "alpha"] = "outlier"
    gamma: float = 5.0
    period: int = 50
    scheme: Literal["bernoulli", "fixed"] = "bernoulli"
    order: Literal["ascending", "descending", "random"] = "random"
    tau: float = 13.0
    scores: str | None = None
    calibration_samples: int = 128
    calibration_batch_size: int = 8
    seed: int | None = None


@dataclass(frozen=True)
class Optim:
    """AdamW on the low-rank coordinates of the sampled layers.

    Attributes:
        lr: Peak learning rate.
        betas: Decay per step of Adam's first and second moment; each from 0 to below 1.
        eps: Added to the root of Adam's second moment.
        weight_decay: Decoupled decay of the effective weights, per step and learning rate.
        max_grad_norm: Largest global norm of the gradient; null: no clipping.
        schedule: Course of the learning rate after the warm-up: linear or cosine to 0, or constant.
        warmup_steps: Optimizer steps over which the learning rate rises from 0.
        rank: Dimension of the subspace of each matrix; at most its smaller side.
        update_proj_gap: Active steps of a layer between two projectors (T_p).
        scale: Factor on the projected update.
        projector: How the top singular vectors are found: randomized range finder, or exact svd.
        refresh: What new projectors are found from: full gradients, one matrix at a time, or a sketch of them over
            two steps, without a full gradient of any matrix of the sampled layers.
        refresh_batch: Gradient that a projector is computed from: the full batch, or the first micro-batch.
        moments_on_refresh: Adam's moments at a refresh: kept, reset to 0, or rotated into the new basis.
        merge_rounding: How merging coordinates into bfloat16 weights rounds: to the nearest value, or stochastic, up
            or down at random so that it is exact on average. Wider weights are not rounded.
        always_on: Training of embedding and head beside the sampled layers: full rank, low_rank, or none.
        side: Side of a matrix that is projected: std the shorter one, as GaLore; right the inputs, which keeps rank
            numbers a token for the backward pass in place of them; left the outputs.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 1.0
    projector: Literal["randomized", "svd"] = "randomized"
    refresh: Literal["full", "sketch"] = "full"
    refresh_batch: Literal["full", "first"] = "full"
    moments_on_refresh: Literal["keep", "reset", "rotate"] = "keep"
    merge_rounding: Literal["nearest", "stochastic"] = "nearest"
    always_on: Literal["full", "low_rank", "none"] = "full"
    side: Literal["std", "left", "right"] = "std"


@dataclass(frozen=True)
class Train:
    """The run.

    Attributes:
        output_dir: Folder of the run. Required.
        epochs: Passes over the training rows.
        steps: Optimizer steps; null: as many as train.epochs asks for.
        global_batch_size: Sequences per optimizer step, over all ranks.
        micro_batch_size: Sequences per rank and forward pass; accumulation makes up the rest of the batch.
        gradient_checkpointing: Compute activations again in the backward pass: less memory, more time.
        seed: Seed of the order of rows, of dropout and of the draws.
        eval_steps: Optimizer steps between evaluations; null: only before and after training.
        eval_batch_size: Sequences per rank and forward pass in evaluation.
        save_steps: Optimizer steps between checkpoints; null: only at the end.
        save_total_limit: Newest checkpoints that are kept.
        checkpoint: What a checkpoint holds of the weights: incremental those that have ever trained, the rest is the
            base model's; full all of them.
        on_save_error: What a checkpoint that cannot be written does to the run, the last one aside: continue with a
            line that says so, or stop.
        resume: never, auto (the newest complete checkpoint, if there is one), or the folder of a checkpoint.
        sharding: Frozen weights on every rank (replicated) or in shards (zero3); auto: zero3 when the
            launcher set it up, otherwise replicated.
        ds_config: DeepSpeed file (JSON); null: the launcher's, or ours.
        max_nonfinite_steps: So many steps in a row whose loss or gradient is NaN or infinite stop the run; each of them
            is skipped. null: no number of them does.
        timeout_seconds: Seconds after which a rank that is not heard of, or a collective that does not complete, stops
            all ranks.
    """

    output_dir: str
    epochs: float = 1.0
    steps: int | None = None
    global_batch_size: int = 16
    micro_batch_size: int = 1
    gradient_checkpointing: bool = False
    seed: int = 0
    eval_steps: int | None = None
    eval_batch_size: int = 8
    save_steps: int | None = None
    save_total_limit: int = 2
    checkpoint: Literal["incremental", "full"] = "incremental"
    on_save_error: Literal["continue", "stop"] = "continue"
    resume: str = "never"
    sharding: Literal["auto", "replicated", "zero3"] = "auto"
    ds_config: str | None = None
    max_nonfinite_steps: int | None = 10
    timeout_seconds: int = 600


@dataclass(frozen=True)
class Log:
    """What is shown and recorded; metrics.jsonl is always written.

    Attributes:
        trackers: Trackers of accelerate: tensorboard, wandb, mlflow, trackio, ...; [] for none.
        progress: On the terminal: a live bar (rich), a line every few steps (plain), none, or auto.
    """

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    progress: Literal["auto", "rich", "plain", "none"] = "auto"


@dataclass(frozen=True)
class Recipe:
    """All settings of a run, one section each.

    Attributes:
        model: The pre-trained model.
        train: The run.
        data: The rows to train on and to evaluate with.
        method: How the model is trained.
        sampling: Which layers train, and for how long.
        optim: AdamW on the low-rank coordinates of the sampled layers.
        log: What is shown and recorded.
    """

    model: Model
    train: Train
    data: Data = field(default_factory=Data)
    method: Method = field(default_factory=Method)
    sampling: Sampling = field(default_factory=Sampling)
    optim: Optim = field(default_factory=Optim)
    log: Log = field(default_factory=Log)


# In the order in which people read and write a recipe.
SECTIONS: dict[str, type] = {
    "model": Model,
    "data": Data,
    "method": Method,
    "sampling": Sampling,
    "optim": Optim,
    "train": Train,
    "log": Log,
}
DATA_FILES = (".jsonl", ".json", ".parquet", ".csv")
HUB_NAME = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"
SPLIT = r"\w+(\.\w+)*(\[(-?\d+%?)?:(-?\d+%?)?\])?"
SPLIT_RIGHT = "expected a split, such as train, or a part of one, such as train[:1%] or train[100:]"
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


def hints() -> dict[str, Any]:
    """Type of every setting by its full name, such as `{"optim.rank": int, ...}`."""
    return {
        f"{section}.{name}": hint
        for section, kind in SECTIONS.items()
        for name, hint in typing.get_type_hints(kind).items()
    }


def instruction(hint: Any) -> str:
    """What to give for a setting of type `hint`, in words ("give an integer or null")."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"expected one of {', '.join(map(str, arguments))}"
    if isinstance(hint, types.UnionType):
        ways = [instruction(kind).removeprefix("expected ") for kind in arguments if kind is not types.NoneType]
        return f"expected {', '.join(ways)} or null"
    if typing.get_origin(hint) is tuple:
        return f"expected a list of {len(arguments)} numbers, such as [0.9, 0.999]"
    if typing.get_origin(hint) is list:
        kinds = {str: "texts, such as [tensorboard]", int: "integers, such as [0, 1]", float: "numbers, such as [1e-4]",
                 Source: "sources, such as [{path: a.jsonl, weight: 2}, {path: b.jsonl}]"}  # fmt: skip
        return f"expected a list of {kinds[arguments[0]]}"
    words = {
        int: "expected an integer",
        float: "expected a number",
        bool: "expected true or false",
        str: "expected text",
    }
    return words[hint]


def convert(key: str, value: object, hint: Any, whole: Any) -> Any:
    """`value`, as YAML gives it, as type `hint`; UserError naming `key` and what type `whole` asks for."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        lists = [kind for kind in arguments if typing.get_origin(kind) is list and isinstance(value, list | tuple)]
        return None if value is None else convert(key, value, (lists or arguments)[0], whole)
    if hint is Source and isinstance(value, str | Mapping):
        given = {"path": value} if isinstance(value, str) else value
        if given.get("path") is None:
            raise UserError(f"{key}.path", None, "it is required: expected a file, a folder or a name on the hub")
        return Source(**convert_all(given, Source, f"{key}."))
    if typing.get_origin(hint) is Literal and isinstance(value, str) and value in arguments:
        return value
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
        return tuple(convert(key, v, h, whole) for v, h in zip(value, arguments, strict=True))
    if typing.get_origin(hint) is list and isinstance(value, list | tuple):
        return [convert(key, v, arguments[0], whole) for v in value]
    if hint is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            return float(value)  # also of text: YAML 1.1 reads 3e-4 as text
        except (ValueError, OverflowError):
            pass
    if hint in (int, bool, str) and type(value) is hint:
        return value
    raise UserError(key, value, instruction(whole))


def unknown(key: str, value: object, known: list[str]) -> UserError:
    """The error for a key that does not exist, with the nearest of the `known` ones."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"is {near[0]} meant?" if near else f"the keys are {', '.join(known)}"
    return UserError(key, value, f"there is no such key; {hint}")


def refuse_unknown(tree: Mapping[str, Any], known: Iterable[str], prefix: str = "") -> None:
    """Raise UserError naming prefix + key for the first key of ``tree`` that is none of ``known``."""
    names = list(known)
    for key, value in tree.items():
        if key not in names:
            raise unknown(f"{prefix}{key}", value, [f"{prefix}{name}" for name in names])


def convert_all(tree: Mapping[str, Any], kind: type, prefix: str = "") -> dict[str, Any]:
    """The fields of dataclass ``kind`` that ``tree``, as YAML gives it, sets.

    Raises UserError naming prefix + key for unknown keys and wrong types.
    """
    wanted = typing.get_type_hints(kind)
    refuse_unknown(tree, wanted, prefix)
    return {key: convert(f"{prefix}{key}", value, wanted[key], wanted[key]) for key, value in tree.items()}


def from_dict(tree: Mapping[str, Any]) -> Recipe:
    """The recipe that a parsed YAML file describes: `{"optim": {"rank": 64}, ...}`.

    What is absent takes its default.

    Raises UserError naming `section.key` for unknown keys, wrong types and missing required keys.
    """
    sections: dict[str, Any] = {}
    for name in tree:
        if name not in SECTIONS:
            raise unknown(str(name), tree[name], list(SECTIONS))
        if not isinstance(tree[name], Mapping | None):
            raise UserError(name, tree[name], "expected a section: lines of `key: value`, indented")
    for name, kind in SECTIONS.items():
        given = tree.get(name) or {}  # None: a section whose lines are all commented out
        wanted = typing.get_type_hints(kind)
        refuse_unknown(given, wanted, f"{name}.")
        for f in dataclasses.fields(kind):
            if f.default is f.default_factory is dataclasses.MISSING and given.get(f.name) is None:
                raise UserError(f"{name}.{f.name}", None, f"it is required: {instruction(wanted[f.name])}")
        sections[name] = kind(**convert_all(given, kind, f"{name}."))
    return Recipe(**sections)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dicts, lists and numbers, every default written out; `from_dict` reverses it."""
    tree = {name: dataclasses.asdict(getattr(recipe, name)) for name in SECTIONS}
    tree["optim"]["betas"] = list(recipe.optim.betas)
    return tree


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML text, every default written out; `from_dict(yaml.safe_load(text))` gives it back."""
    import yaml

    return str(yaml.safe_dump(to_dict(recipe), sort_keys=False))


def used(run_dir: Path) -> list[str]:
    """What a run has left in its folder, of that which no other run may write over."""
    return [name for name in ("metrics.jsonl", "checkpoints", "model") if (run_dir / name).exists()]


def is_file(source: str) -> bool:
    """Whether a source of rows is meant as a local file (it ends like one, or is there), not as a data set."""
    return Path(source).suffix.lower() in DATA_FILES or os.path.isfile(source)


def check(recipe: Recipe, files: bool = True) -> None:
    """Refuse values that are out of range or contradict each other, as far as that shows without the model.

    files: also what the recipe names: data, scores, folders. Raises UserError for the first one.
    """
    for key, right in itertools.chain(_wrong(recipe), _missing(recipe) if files else ()):
        section, name = key.split(".")
        raise UserError(key, getattr(getattr(recipe, section), name), right)
    if recipe.optim.refresh == "sketch":
        check_sketch(recipe.optim.projector, recipe.optim.refresh_batch, recipe.optim.update_proj_gap)


def check_sketch(projector: str, refresh_batch: str, update_proj_gap: int) -> None:
    """Refuse (UserError) what contradicts projectors that are found from sketches, one over each of two whole steps."""
    if projector == "svd":
        raise UserError("optim.projector", projector, "expected randomized under optim.refresh sketch")
    if refresh_batch == "first":
        raise UserError("optim.refresh_batch", refresh_batch, "expected full under optim.refresh sketch")
    if update_proj_gap == 1:
        raise UserError("optim.update_proj_gap", update_proj_gap, "expected at least 2 under optim.refresh sketch")


def _wrong(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (key, what would be right) of every value that is wrong."""
    data, sampling, optim, train = recipe.data, recipe.sampling, recipe.optim, recipe.train
    for name in SECTIONS:
        for key, value in dataclasses.asdict(getattr(recipe, name)).items():
            numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, float)]
            if not all(map(math.isfinite, numbers)):
                yield f"{name}.{key}", "expected a finite number"
    at_least: dict[str, tuple[int | None, int]] = {
        "data.max_length": (data.max_length, 2),  # a token to predict needs one before it
        "data.buffer_size": (data.buffer_size, 1),
        "sampling.period": (sampling.period, 1),
        "sampling.calibration_samples": (sampling.calibration_samples, 1),
        "sampling.calibration_batch_size": (sampling.calibration_batch_size, 1),
        "sampling.seed": (sampling.seed, 0),
        "method.lora_rank": (recipe.method.lora_rank, 1),
        "optim.warmup_steps": (optim.warmup_steps, 0),
        "optim.rank": (optim.rank, 1),
        "optim.update_proj_gap": (optim.update_proj_gap, 1),
        "train.steps": (train.steps, 1),
        "train.global_batch_size": (train.global_batch_size, 1),
        "train.micro_batch_size": (train.micro_batch_size, 1),
        "train.seed": (train.seed, 0),
        "train.eval_steps": (train.eval_steps, 1),
        "train.eval_batch_size": (train.eval_batch_size, 1),
        "train.save_steps": (train.save_steps, 1),
        "train.save_total_limit": (train.save_total_limit, 1),
        "train.max_nonfinite_steps": (train.max_nonfinite_steps, 1),
        "train.timeout_seconds": (train.timeout_seconds, 1),
    }
    for key, (integer, least) in at_least.items():
        if integer is not None and integer < least:
            yield key, f"expected an integer of at least {least}"
        most = 2**63 - 1 if key.endswith("seed") else MOST
        if integer is not None and integer > most:
            yield key, f"expected an integer of at most {most}"
    above_zero: dict[str, float | None] = {
        "method.lora_alpha": recipe.method.lora_alpha,
        "method.epsilon": recipe.method.epsilon,
        "sampling.gamma": sampling.gamma,
        "sampling.tau": sampling.tau,
        "optim.eps": optim.eps,
        "optim.max_grad_norm": optim.max_grad_norm,
        "optim.scale": optim.scale,
        "train.epochs": train.epochs,
    }
    for key, number in above_zero.items():
        if number is not None and number <= 0:
            yield key, "expected a number above 0"
    if train.epochs > MOST:
        yield "train.epochs", f"expected a number of at most {MOST}"
    for key, number in {"optim.lr": optim.lr, "optim.weight_decay": optim.weight_decay}.items():
        if number < 0:
            yield key, "expected a number of at least 0"
    if not 0 <= recipe.method.lora_dropout < 1:
        yield "method.lora_dropout", "expected a number of at least 0 and below 1"
    if not all(0 <= beta < 1 for beta in optim.betas):
        yield "optim.betas", "expected two numbers, each at least 0 and below 1"
    if sampling.scheme == "fixed" and sampling.gamma != int(sampling.gamma):
        yield "sampling.gamma", "expected a whole number of layers, or sampling.scheme bernoulli"
    if train.global_batch_size % train.micro_batch_size:
        yield "train.global_batch_size", f"expected a multiple of train.micro_batch_size, {train.micro_batch_size}"
    if recipe.method.name in ("lisa", "lisa-d", "badam") and optim.always_on == "low_rank":
        yield "optim.always_on", f"expected full or none under {recipe.method.name}, which trains at full rank"
    if train.steps is not None and optim.warmup_steps > train.steps:
        yield "optim.warmup_steps", f"expected at most train.steps, {train.steps}"
    if not set(recipe.log.trackers) <= set(TRACKERS):
        yield "log.trackers", f"expected a list of some of {', '.join(TRACKERS)}"
    for key, given in {"data.train": data.train, "data.eval": data.eval}.items():
        weights = [source.weight for source in given if source.weight is not None] if isinstance(given, list) else []
        if given == []:
            yield key, "expected at least one source"
        if not all(0 < weight < math.inf for weight in weights):
            yield key, "expected weights above 0"
        if weights and key == "data.eval":
            yield key, "leave the weights out: every held-out row counts once"
    if data.streaming and train.steps is None:
        yield "train.steps", "expected their number: under data.streaming nobody knows how long an epoch is"
    several = data.train if isinstance(data.train, list) and len(data.train) > 1 else []
    if data.streaming and several and all(source.weight is None for source in several):
        yield "data.train", "expected weights: under data.streaming sources are read side by side"
    if data.streaming and any("[" in str(source.split) for source in sources(data, "data.train")):
        yield "data.train_split", "expected a whole split under data.streaming"
    if data.streaming and data.buffer_size < train.global_batch_size:
        yield "data.buffer_size", f"expected at least train.global_batch_size, {train.global_batch_size}"
    if train.eval_steps is not None and data.eval is None:
        yield "train.eval_steps", "leave it out, or give data.eval: there is nothing to evaluate with"
    if train.sharding == "replicated" and train.ds_config is not None:
        yield "train.ds_config", "leave it out under train.sharding replicated, or give zero3"
    if not recipe.model.path:
        yield "model.path", "expected a folder or a name on the hub"
    if "/" in (recipe.model.attn_implementation or "") and not recipe.model.trust_remote_code:
        right = "expected a kernel of transformers, or model.trust_remote_code true: this one is code from the hub"
        yield "model.attn_implementation", right


def _missing(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The same of every file and folder that is not there, or cannot be."""
    data, sampling, train = recipe.data, recipe.sampling, recipe.train
    if not train.output_dir or not can_be_made(train.output_dir):
        yield "train.output_dir", "expected a folder that can be written to, or a name at which one can be made"
    if not os.path.isdir(recipe.model.path) and (
        os.path.isfile(recipe.model.path) or not re.fullmatch(HUB_NAME, recipe.model.path)
    ):
        yield "model.path", "expected a folder that exists, or a name on the hub"
    if data.train is None:
        yield "data.train", "it is required: expected a file or a data set"
    for key, split in {"data.train_split": data.train_split, "data.eval_split": data.eval_split}.items():
        if not re.fullmatch(SPLIT, split):
            yield key, SPLIT_RIGHT
    for key in ("data.train", "data.eval"):
        for source in sources(data, key):
            _find(source, key)
    if data.cache is not None and not can_be_made(data.cache):
        yield "data.cache", "expected a folder that can be written to, or a name at which one can be made"
    files = {
        "data.chat_template": data.chat_template,
        "sampling.scores": sampling.scores,
        "train.ds_config": train.ds_config,
    }
    for key, path in files.items():
        if path is not None and not os.path.isfile(path):
            yield key, "expected a file that exists"
    if train.resume not in ("never", "auto") and not os.path.isdir(train.resume):
        yield "train.resume", "expected never, auto, or the folder of a checkpoint"


def _find(source: Source, key: str) -> None:
    """Refuse (UserError) a source that is not there, as far as that shows without the network."""
    path, split = source.path, source.split or ""
    if not os.path.isfile(path) and is_file(path):
        raise UserError(key, path, "expected a file that exists")
    if not os.path.exists(path) and not re.fullmatch(HUB_NAME, path):
        raise UserError(key, path, "expected a file or folder that exists, or the name of a data set on the hub")
    if not re.fullmatch(SPLIT, split):
        raise UserError(f"{key}.split", split, SPLIT_RIGHT)


def sources(data: Data, key: str) -> list[Source]:
    """What ``key``, data.train or data.eval, names: with the subset, split and format of ``data`` where one has none.

    A plain text is one source, null none.
    """
    name = key.partition(".")[2]
    given = getattr(data, name)
    listed = given if isinstance(given, list) else [] if given is None else [Source(given)]
    subset, split = getattr(data, f"{name}_subset"), getattr(data, f"{name}_split")
    return [
        dataclasses.replace(
            one,
            subset=one.subset or subset,
            split=one.split or split,
            format=data.format if one.format == "auto" else one.format,
        )
        for one in listed
    ]


def accumulation(recipe: Recipe, world_size: int) -> int:
    """Micro-batches per rank and optimizer step, on `world` ranks.

    Raises UserError naming train.global_batch_size when the batch does not divide evenly.
    """
    share = recipe.train.micro_batch_size * world_size
    if recipe.train.global_batch_size % share:
        raise UserError(
            "train.global_batch_size",
            recipe.train.global_batch_size,
            f"expected a multiple of {share}, train.micro_batch_size x {world_size} ranks",
        )
    return recipe.train.global_batch_size // share


MAY_CHANGE = {
    "train": {"resume", "save_steps", "save_total_limit", "checkpoint", "on_save_error", "eval_steps", "eval_batch_size",
              "sharding", "ds_config", "timeout_seconds", "max_nonfinite_steps", "micro_batch_size",
              "gradient_checkpointing", "output_dir"},
    "log": {"trackers", "progress"},
    "model": {"path", "attn_implementation"},
    "data": {"train", "eval", "eval_subset", "eval_split", "cache"},
    "sampling": {"scores", "calibration_samples", "calibration_batch_size"},
}  # fmt: skip


@dataclass(frozen=True)
class OWSConfig:
    """Stand-in until the models are there."""

    gamma: float = 5.0
    period: int = 50
    scheme: str = "bernoulli"
    rank: int | None = 128
    update_proj_gap: int = 200
    scale: float = 1.0
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    projector: str = "randomized"
    refresh: str = "full"
    refresh_batch: str = "full"
    moments_on_refresh: str = "keep"
    merge_rounding: str = "nearest"
    always_on: str = "full"
    accumulation: int = 1
    seed: int = 0


OWSConfig.model_fields = {f.name: f for f in dataclasses.fields(OWSConfig)}  # type: ignore[attr-defined]


def parse(kind: Any, tree: Any, prefix: str = "") -> Any:
    return kind(**tree)
