"""DeepSpeed's configuration file: what it may say here, and what the recipe fills in."""

from __future__ import annotations

from typing import Any

from ows_ds.errors import UserError, first_line
from ows_ds.files import parse_json, read_text

DEFAULT_CONFIG: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        # entries: what may be gathered at a time, and how far ahead it is fetched
        "stage3_max_live_parameters": 5e8,
        "stage3_max_reuse_distance": 5e8,
        "stage3_prefetch_bucket_size": 5e7,
    },
    "steps_per_print": 1_000_000_000,
}
# sections that change how DeepSpeed trains where they are enabled
OWN_TRAINING = (
    "amp", "elasticity", "progressive_layer_drop", "curriculum_learning", "data_efficiency", "hybrid_engine",
)  # fmt: skip


def read_config(path: str) -> dict[str, Any]:
    """A DeepSpeed file. Raises UserError (``train.ds_config``) for what is no JSON object."""
    try:
        found = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError("train.ds_config", path, f"expected a JSON file ({error})") from None
    if not isinstance(found, dict):
        raise UserError("train.ds_config", path, "expected a JSON object of sections and settings")
    return found


def check_config(config: dict[str, Any], key: str = "train.ds_config") -> None:
    """Refuse (UserError) what does not work with frozen weights that are merged now and then."""
    zero = _section(config, "zero_optimization", key)
    if zero.get("stage") != 3:
        right = "expected 3: it is what shards frozen weights"
        raise UserError(f"{key}: zero_optimization.stage", zero.get("stage"), right)
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise UserError(f"{key}: {section}", config[section], "leave it out: the recipe's optim section decides")
    for section in OWN_TRAINING:
        if _section(config, section, key).get("enabled"):
            right = "leave it out: it changes what is trained, and how, without the recipe"
            raise UserError(f"{key}: {section}", config[section], right)
    if config.get("gradient_clipping", "auto") not in ("auto", 0):
        right = "leave it out: the recipe's optim.max_grad_norm decides"
        raise UserError(f"{key}: gradient_clipping", config["gradient_clipping"], right)
    in_memory = "expected none or cpu: shards on NVMe are not in memory when they are merged"
    own = "expected none: it offloads DeepSpeed's own optimizers, and none of them trains here"
    for name, refused, right in (("offload_param", ["nvme"], in_memory), ("offload_optimizer", ["cpu", "nvme"], own)):
        device = _section(zero, name, f"{key}: zero_optimization").get("device")
        if device in refused:
            raise UserError(f"{key}: zero_optimization.{name}.device", device, right)
    for name, right in (
        ("zero_quantized_weights", "expected false: every gather would round frozen weights to 8 bits, on GPUs only"),
        ("zero_quantized_nontrainable_weights", "expected false: merges into shards of 8 bits would be lost"),
    ):
        if zero.get(name):
            raise UserError(f"{key}: zero_optimization.{name}", zero[name], right)


def _section(config: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    """A section of a DeepSpeed file, empty where there is none. Raises UserError for what is no section."""
    found = config.get(name)
    if not isinstance(found, dict | None):
        raise UserError(f"{key}: {name}", found, "expected a section, such as {}")
    return found or {}


def check_by_deepspeed(config: dict[str, Any], key: str = "train.ds_config") -> None:
    """Refuse (UserError) settings of ``zero_optimization`` that DeepSpeed does not know, or of another type."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**config["zero_optimization"])
    except (TypeError, ValueError) as error:  # pydantic's is a ValueError, with one entry for each mistake
        mistakes: list[dict[str, Any]] = getattr(error, "errors", list)()
        first = mistakes[0] if mistakes else {}
        name = ".".join(map(str, ["zero_optimization", *first.get("loc", ())]))
        right = f"expected what DeepSpeed takes ({first.get('msg') or first_line(error)})"
        raise UserError(f"{key}: {name}", first.get("input"), right) from None


def resolve_config(
    config: dict[str, Any],
    dtype: str,
    micro_batch_size: int,
    accumulation: int,
    world_size: int,
    per_host: int | None = None,
    key: str = "train.ds_config",
) -> dict[str, Any]:
    """A copy of ``config`` with what must agree with the recipe filled in. Raises UserError as `check_config`.

    dtype: ``model.dtype``, the number format of the shards. per_host: ranks of a host (see `launch.per_host`), which is
    what hpZ's ``"auto"`` means. key: what errors name.
    """
    check_config(config, key)
    for name, format in (("bf16", "bfloat16"), ("fp16", "float16")):
        if _section(config, name, key).get("enabled", "auto") not in ("auto", dtype == format):
            right = f'expected "auto"; the recipe\'s model.dtype is {dtype}'
            raise UserError(f"{key}: {name}.enabled", config[name]["enabled"], right)
    zero = {
        **config["zero_optimization"],
        # the live copy of a parameter that stays gathered does not see what is written to its shard
        "stage3_param_persistence_threshold": 0,
    }
    group = zero.get("zero_hpz_partition_size", 1)
    if group == "auto":
        group = per_host or 1
    if type(group) is not int or group < 1 or world_size % group:
        right = f'expected "auto", or a divisor of the {world_size} ranks'
        raise UserError(f"{key}: zero_optimization.zero_hpz_partition_size", group, right)
    zero["zero_hpz_partition_size"] = 1 if group == world_size else group  # one group of all ranks is plain ZeRO-3
    sizes = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * world_size,
    }
    for name, value in sizes.items():
        if config.get(name, "auto") not in ("auto", value):
            raise UserError(f"{key}: {name}", config[name], f'expected "auto"; the recipe makes it {value}')
    rest = {key: value for key, value in config.items() if key not in ("bf16", "fp16", "gradient_clipping")}
    return {**rest, **sizes, "bf16": {"enabled": dtype == "bfloat16"}, "zero_optimization": zero}
