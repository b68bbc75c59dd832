"""What `ows-ds bench time | memory | traffic` measure: a model's widths, how much of it, and which methods. Pure.

Nothing here imports torch, so that mistakes and `--help` answer at once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ows_ds.config.settings import MOST, Count, Expected, Settings
from ows_ds.errors import UserError
from ows_ds.model.shapes import SHAPES, Shape

SMALL_VOCAB = 1024  # of a slice on a CPU
ITEMSIZE = {"float32": 4, "bfloat16": 2}  # bytes of a weight

OURS = ("ows", "ows-lean", "lisa", "galore", "badam", "hift", "full", "lora", "dora", "mezo")
RIVALS = {
    "galore_torch": "GaLoreAdamW of galore_torch on all matrices of the layers",
    "peft-lora": "LoRA by peft on all linear layers, torch's AdamW",
    "lmflow-lisa": "random layers take turns in one torch AdamW, as LMFlow's callback does it",
    "torch-adamw": "all weights, torch's AdamW",
    "deepspeed": "all weights, ZeRO-3 with DeepSpeed around torch's AdamW",
}
WAYS: dict[str, dict[str, Any]] = {  # how layers run, after a method of ours and a plus: keys of a recipe's train
    "compile": {"kernels": "compile"},
    "liger": {"kernels": "liger"},
    "tiled": {"tiled_mlp": True},
    "offload": {"activation_offload": True},
}
LIMITS = ("limit", "limit-lean")  # down to the input; down to the lowest sampled layer
DISTRIBUTED = (*OURS, "deepspeed")


class Setting(Settings):
    """What is measured."""

    renamed: ClassVar[Mapping[str, str]] = {"refresh_gap": "it is called {prefix}update-proj-gap"}

    model: str | None = None
    """Folder of a Hugging Face model; null: random weights of --shape or --hidden."""
    shape: str | None = None
    """Widths of the random model, such as llama2-7b or qwen2.5-32b; null: those of --hidden, or llama2-7b."""
    hidden: Count | None = None
    """Features of a hidden state."""
    intermediate: Count | None = None
    """Features inside the MLP; null: 43/16 of --hidden, as LLaMA2-7B."""
    heads: Count | None = None
    """Attention heads; null: of 128 features each."""
    kv_heads: Count | None = None
    """Heads of keys and values; null: as --heads."""
    vocab: Count | None = None
    """Entries of the vocabulary; null: 1024 on a CPU, where the head would hide the layers, else 32000."""
    layers: Annotated[str, Expected("an integer of at least 1, or all")] = Field(
        "1", pattern="^(all|0*[1-9][0-9]{0,8})$"
    )
    """Number of layers of a random model, or all of the shape's; a model has its own."""
    inside: bool = False
    """The layers stand inside a model: under every method their input takes a gradient, as where layers below them
    train. Always so where a random model has fewer layers than its shape."""
    tokens: Count = 512
    """Tokens of a step: one sequence."""
    gamma: Count | None = None
    """Sampled layers, the same ones all the time; null: all layers, so that every method runs as deep."""
    rank: Count = 128
    """Rank of ows and galore."""
    lora_rank: Count = 8
    """Rank of lora and dora."""
    update_proj_gap: Count = 200
    """Steps between two projectors (T_p), over which the time of a refresh is spread."""
    refresh: Literal["full", "sketch"] = "full"
    """What projectors are found from: full gradients, or sketches over two steps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; auto: on a GPU where there is one (traffic: always on the CPU)."""
    threads: Count = 2
    """Threads of each rank on a CPU."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass."""
    sharding: Literal["replicated", "zero3"] = "replicated"
    """Frozen weights on every rank (replicated) or in shards (zero3), for our methods."""

    @property
    def n_layers(self) -> int:
        """Of a resolved setting."""
        return int(self.layers)

    @property
    def widths(self) -> Shape:
        """Of a resolved setting."""
        hidden, intermediate, heads, kv_heads, vocab = (int(getattr(self, name) or 0) for name in WIDTHS)
        return Shape(hidden, intermediate, heads, kv_heads, vocab, self.n_layers)


class How(Settings):
    """How it is measured and shown."""

    methods: str | None = None
    """List with commas; null: all that can be measured. ows+compile, also +liger, +tiled and +offload: the same with
    layers that run so."""
    sweep: str | None = None
    """gamma or rank with its values, such as gamma=1,2,4,8: one column for each; null: one point."""
    rounds: Count = 5
    """Of time: rounds through all methods."""
    steps: Count = 4
    """Of time: timed steps of a method in a round."""
    warm_up: int = Field(1, ge=0, le=MOST)
    """Of time: steps before them that are not counted."""
    one_at_a_time: bool = False
    """Of time: end each method's processes before the next one starts, as is done where memory does not suffice for
    all."""
    world_size: int = Field(2, ge=2, le=MOST)
    """Of traffic: ranks, on this machine."""
    output: str | None = None
    """Folder of the files that are written; null: none."""
    as_json: bool = Field(False, alias="json")
    """Print the result as JSON and nothing else."""


WIDTHS = ("hidden", "intermediate", "heads", "kv_heads", "vocab")


def resolve(setting: Setting, cuda: bool) -> Setting:
    """``setting`` with every null and auto filled in (but for model and shape).

    cuda: whether there is a GPU. Raises UserError for what is out of range or contradicts itself.
    """
    device = ("cuda" if cuda else "cpu") if setting.device == "auto" else setting.device
    if device == "cuda" and not cuda:
        raise UserError("--device", "cuda", "expected cpu: no GPU is to be seen")
    shape = _shape(setting, device) if setting.model is None else _shape_of_model(setting)
    layers = shape.layers
    gamma = layers if setting.gamma is None else setting.gamma
    if gamma > layers:
        raise UserError("--gamma", gamma, f"expected at most {layers}, the number of layers")
    smallest = min(shape.hidden // shape.heads * shape.kv_heads, shape.hidden, shape.intermediate)
    if setting.rank > smallest:
        raise UserError("--rank", setting.rank, f"expected at most {smallest}, the smallest side of a matrix")
    filled: dict[str, Any] = {width: getattr(shape, width) for width in WIDTHS}
    dtype = ("bfloat16" if device == "cuda" else "float32") if setting.dtype == "auto" else setting.dtype
    whole = setting.model is not None or setting.layers == "all"
    inside = setting.inside or (not whole and layers < SHAPES.get(setting.shape or "", Shape(0, 0, 1, 1)).layers)
    filled |= {"device": device, "dtype": dtype, "layers": str(layers), "inside": inside, "gamma": gamma}
    return setting.model_copy(update=filled)


def _shape(setting: Setting, device: str) -> Shape:
    """Of a random model."""
    if setting.shape is not None and setting.hidden is not None:
        raise UserError("--hidden", setting.hidden, "expected --shape or --hidden, not both")
    name = setting.shape or "llama2-7b"
    if name not in SHAPES:
        raise UserError("--shape", name, f"expected one of {', '.join(SHAPES)}")
    shape = SHAPES[name]
    if setting.hidden is not None:
        heads = setting.heads or max(1, setting.hidden // 128)
        shape = Shape(setting.hidden, 43 * setting.hidden // 16, heads, heads)
    given = {width: getattr(setting, width) for width in WIDTHS if getattr(setting, width) is not None}
    if device == "cpu":
        given.setdefault("vocab", SMALL_VOCAB)
    layers = shape.layers if setting.layers == "all" else int(setting.layers)
    shape = replace(shape, **given, layers=layers)
    if shape.hidden % (2 * shape.heads) or shape.heads % shape.kv_heads:
        right = f"expected --heads that share {shape.hidden} features in even parts, and --kv-heads that divide --heads"
        raise UserError("--heads, --kv-heads", f"{shape.heads}, {shape.kv_heads}", right)
    return shape


def _shape_of_model(setting: Setting) -> Shape:
    for name in ("shape", *WIDTHS):
        if getattr(setting, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')}", getattr(setting, name), "leave it out where --model is given"
            )
    try:
        found = json.loads((Path(str(setting.model)) / "config.json").read_text(encoding="utf-8"))
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
        hidden, intermediate, heads, kv_heads, vocab = (int(found[name]) for name in names)
        return Shape(hidden, intermediate, heads, kv_heads, vocab, int(found["num_hidden_layers"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        right = f"expected the folder of a model of the LLaMA kind ({type(error).__name__}: {error})"
        raise UserError("--model", setting.model, right) from error


def check(how: How) -> None:
    """Raises UserError for an output that is no folder."""
    if how.output is not None and Path(how.output).exists() and not Path(how.output).is_dir():
        raise UserError("--output", how.output, "expected a folder, or a name at which one can be made")


def parse_methods(given: str | None, known: Sequence[str]) -> list[str]:
    """A list with commas -> methods; null: all that are ``known``. Raises UserError naming ``--methods``."""
    names = list(known) if given is None else [word.strip() for word in given.split(",")]
    right = f"expected different ones of {', '.join(known)}, with commas between them"
    if not names or not {name.partition("+")[0] for name in names} <= set(known) or len(set(names)) < len(names):
        raise UserError("--methods", given, right)
    for name in names:
        method, ways = ways_of(name)
        if ways and (method not in OURS or not set(ways) <= WAYS.keys()):
            right = f"expected a method of ours ({', '.join(OURS)}) before +, and after it {', '.join(WAYS)}"
            raise UserError("--methods", name, right)
    return names


def ways_of(name: str) -> tuple[str, list[str]]:
    """``ows+compile+tiled`` -> ("ows", ["compile", "tiled"])."""
    method, *ways = name.split("+")
    return method, ways


def parse_sweep(given: str | None) -> tuple[str, list[int]] | None:
    """``gamma=1,2,4`` -> ("gamma", [1, 2, 4]). Raises UserError naming ``--sweep``."""
    if given is None:
        return None
    name, _, values = given.partition("=")
    words = [word.strip() for word in values.split(",")]
    if name not in ("gamma", "rank") or not all(word.isdecimal() and int(word) for word in words):
        raise UserError("--sweep", given, "expected gamma or rank with its values, such as gamma=1,2,4")
    return name, [int(word) for word in words]


def points(setting: Setting, sweep: tuple[str, list[int]] | None, cuda: bool) -> list[Setting]:
    """The resolved settings that are measured, one after the other. Raises UserError for any that cannot be."""
    changes: list[dict[str, Any]] = [{}] if sweep is None else [{sweep[0]: value} for value in sweep[1]]
    return [resolve(setting.model_copy(update=change), cuda) for change in changes]


def limits(setting: Setting) -> list[str]:
    """The limits that the methods are compared with: one where every method runs down to the input."""
    return list(LIMITS if setting.gamma is not None and setting.gamma != setting.n_layers else LIMITS[:1])


def limit_of(method: str, setting: Setting) -> str:
    """The limit as deep as ``method``: where nothing below the sampled layers trains, it stops at the lowest one."""
    return limits(setting)[-1 if ways_of(method)[0] == "ows-lean" else 0]


def entries(shape: Shape, layers: int | None = None) -> tuple[int, int]:
    """Weights of ``layers`` layers (null: all) of a LLaMA without biases; of embedding, head and final norm."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    layer = 2 * shape.hidden * (shape.hidden + kv) + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
    return layer * (shape.layers if layers is None else layers), (2 * shape.vocab + 1) * shape.hidden


def flops_of_limit(shape: Shape, tokens: int) -> int:
    """Of one forward pass and one backward pass through activations, a multiply-add being two: the least of any step.

    Each is 2 a token and weight of layers and head, and 2 * tokens * hidden a token for the two products of causal
    attention; the backward pass has four of these.
    """
    layers, outside = entries(shape)
    matrices = layers - 2 * shape.hidden * shape.layers + (outside - shape.hidden) // 2
    return 4 * matrices * tokens + 3 * 2 * tokens**2 * shape.hidden * shape.layers


def estimate(setting: Setting, method: str) -> int:
    """About how many bytes a process of ``method`` takes; only decides whether all fit at once."""
    layers, outside = entries(setting.widths)
    wide = ITEMSIZE[setting.dtype]
    # beside the weight itself, for every weight that trains: gradient, two moments, and a float32 copy
    state = {"lisa": 16, "badam": 16, "hift": 16, "full": 16, "deepspeed": 16, "lmflow-lisa": 3 * wide}
    state |= {"torch-adamw": 3 * wide, "galore_torch": wide}
    method = ways_of(method)[0]
    share = (setting.gamma or 1) / setting.n_layers if method in ("lisa", "lmflow-lisa") else 1.0
    trained = int(layers * share) + outside
    activations = setting.tokens * setting.n_layers * (20 * setting.widths.hidden + 5 * setting.widths.intermediate)
    return 700 * 2**20 + (layers + outside + activations) * wide + trained * state.get(method, 0)
