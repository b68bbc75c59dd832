"""shapes.py, gathering.py and forecast.py: what fits where, for models as large as they are, without their weights."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import transformers as tf

from ows_ds import config
from ows_ds.config import Recipe
from ows_ds.errors import UserError
from ows_ds.model.shapes import SHAPES, configuration, model_of, read_model, without_weights
from ows_ds.planner.choices import Choice, choices, scaling_sizes
from ows_ds.planner.cluster import read_cluster
from ows_ds.planner.fit import require
from ows_ds.planner.forecast import DEVIATIONS, Forecast, Planner, Replays, ranked
from ows_ds.planner.gathering import Limits, replay
from ows_ds.planner.memory import memory
from ows_ds.planner.recording import record
from ows_ds.planner.step import StepSpec, entries, numel, parts_of
from ows_ds.planner.traffic import gathers
from tests.support.families import FAMILIES, tiny

read = functools.cache(read_model)
EIGHT = read_cluster("8xA100-80")


def recipe(path: str = "llama2-7b", **sections: Any) -> Recipe:
    tree = {"model": {"path": path}, "train": {"output_dir": "none", **sections.pop("train", {})}, **sections}
    return config.from_dict(tree)


replays = functools.cache(lambda path: Replays(lambda: read(path).config))


def planner(recipe_: Recipe, path: str = "llama2-7b", **more: Any) -> Planner:
    return Planner(recipe_, read(path), **more)


def on_eight(path: str, home: str, recipe_: Recipe) -> Forecast:
    found = planner(recipe_, path, replays=replays(path))
    return found.forecast(EIGHT, found.choice(8, home))


# ------------------------------------------------------------------ shapes


def test_shapes_have_the_models_numbers_of_weights() -> None:
    """Parameters of the checkpoints, from models of one layer."""
    counts = {}
    for name, shape in ((name, shape) for name, shape in SHAPES.items() if not shape.more):
        config = tf.AutoConfig.for_model(**configuration(replace(shape, layers=1)))
        layers = model_of(config).layers
        counts[name] = sum(map(numel, (*layers.embeddings, *layers.final)))
        counts[name] += shape.layers * sum(map(numel, parts_of(layers.layers[0])))
    assert counts == {
        "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192,
        **dict.fromkeys(("llama3-8b", "llama3.1-8b"), 8_030_261_248), "mistral-7b": 7_241_732_096,
        **dict.fromkeys(("llama3-70b", "llama3.1-70b", "llama3.3-70b"), 70_553_706_496),
        "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
        "qwen2.5-72b": 72_706_203_648,
    }  # fmt: skip


def test_shapes_with_experts_have_the_models_numbers_of_weights() -> None:
    """All, and those that work on a token, embeddings included."""
    stacked = {name: shape for name, shape in SHAPES.items() if "num_experts_per_tok" in shape.more}
    configs = {name: tf.AutoConfig.for_model(**configuration(shape)) for name, shape in stacked.items()}
    assert {name: entries(model_of(config).layers) for name, config in configs.items()} == {
        "mixtral-8x7b": (46_702_792_704, 12_879_925_248), "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),
        "gpt-oss-20b": (20_914_757_184, 4_193_246_784), "gpt-oss-120b": (116_829_156_672, 5_750_551_872),
        "glm-4.5-air": (106_852_245_504, 13_424_123_904), "deepseek-v3": (671_026_404_352, 37_552_282_624),
    }  # fmt: skip


def test_a_folder_needs_no_weights(tmp_path: Any) -> None:
    model: Any = tiny("gemma2", True)
    model.config.save_pretrained(tmp_path)
    found = read_model(str(tmp_path))
    assert (found.name, len(found.layers.layers), found.whole_logits) == (tmp_path.name, 3, True)
    assert not read("llama2-7b").whole_logits
    with pytest.raises(UserError, match=r"model.path: '.*' is invalid: expected a folder with a config"):
        read_model(str(tmp_path / "absent"))


# ------------------------------------------------------------------ gathers


def tiny_trace(trained: tuple[int, ...]) -> Any:
    model: Any = tiny("llama", False)
    blocks = read_layers(model)
    names = [part.name for i in trained for part in (*blocks[i].matrices, *blocks[i].vectors)]
    return record(without_weights(model.config), names)


def read_layers(model: Any) -> Any:
    from ows_ds.model.layers import find_layers

    return find_layers(model).layers


def test_without_limits_each_weight_is_gathered_once() -> None:
    trace = tiny_trace((0, 2))
    found = replay(trace, Limits(10**9, 10**9, 10**9))
    assert set(found.first.values()) == {1}
    assert found.shares(2, 1) == sum(trace.numel.values()) // 2  # all are even
    # one message: its buffer, and the weights copied out of it, but for the embedding, which is done; the head is the
    # last to be copied, and runs when the buffer has gone
    weights = sum(trace.numel.values()) - 2048
    assert found.at("lm_head", False) == (2048 + 2 * weights, weights)


def test_without_prefetch_each_use_gathers() -> None:
    """Forward all, backward those of layers 1 and 2 and, of layer 1, all that the gradient reaches."""
    trace = tiny_trace((1,))
    found = replay(trace, Limits(0, 0, 0))
    counts = {name: count for name, count in found.first.items() if "layers" in name}
    assert {name for name, count in counts.items() if count == 1} == {n for n in counts if ".layers.0." in n}
    assert set(counts.values()) == {1, 2}
    assert max(map(max, found.most.values())) == 64 * 32  # never more than one module's
    assert found.messages == (sum(found.first.values()),) * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_replayed(family: str) -> None:
    model: Any = tiny(family, True)
    layers = read_layers(model)
    from ows_ds.model.layers import find_layers

    spec = StepSpec(find_layers(model), layer_set=(1,), rank=5, world_size=2, sharded=True, always_on="none")
    whole = Replays(lambda: model.config).complete(spec, lambda plain: plain)
    least, most = gathers(spec)
    assert whole.gathered is not None
    assert least <= whole.gathered.shares(2, 1) <= most
    assert len(layers) == 3


# ------------------------------------------------------------------ layer sets


def test_layer_sets() -> None:
    given = planner(recipe(sampling={"gamma": 4}))
    usual, largest = given.layer_set(), given.layer_set(DEVIATIONS)
    assert (len(usual), len(largest)) == (4, 10)  # 4 + 3 sqrt(32 / 8 * 7 / 8) = 9.6
    assert usual[0] == largest[0] == 0  # any layer may be drawn
    fixed = recipe(sampling={"gamma": 4, "scheme": "fixed"})
    assert planner(fixed).layer_set(DEVIATIONS) == usual
    assert planner(fixed, ratios=[0.0, *[1.0] * 31]).layer_set()[0] == 1  # never the first one
    galore = planner(recipe(method={"name": "galore"}))
    assert galore.layer_set() == galore.layer_set(DEVIATIONS) == tuple(range(32))
    assert planner(recipe(method={"name": "badam"})).layer_set(DEVIATIONS) == (0,)


def test_refreshes() -> None:
    # each of 32 layers enters with 12/32 * 20/32 every 50 steps, and is refreshed every 200
    assert planner(recipe()).refreshes == pytest.approx(20 / 32 / 50 + 1 / 200)
    assert planner(recipe(method={"name": "galore"})).refreshes == pytest.approx(1 / 200)
    assert planner(recipe(method={"name": "lisa"})).refreshes == 0


# ------------------------------------------------------------------ what fits


def test_seventy_billion_on_eight_gpus() -> None:
    """ZeRO-3, length 4096, checkpointing: under 40 GB a GPU, refreshes and a large draw of layers included."""
    asked = recipe("llama2-70b", data={"max_length": 4096}, train={"gradient_checkpointing": True})
    found = on_eight("llama2-70b", "zero3", asked)
    assert len(found.largest.sampled) == 22
    assert found.plain.peak < found.refresh.peak == found.peak < 40e9
    assert found.fits
    assert not on_eight("llama2-70b", "replicated", asked).fits
    # LLaMA3's vocabulary is four times as large: with the embedding frozen, and ZeRO-3's largest bound of gathers
    lean = planner(asked, "llama3-70b").changed(optim={"always_on": "none"})
    assert lean.forecast(EIGHT, lean.choice(8, "zero3")).peak < 40e9


@pytest.mark.parametrize("path", ["llama2-7b", pytest.param("llama2-13b", marks=pytest.mark.slow)])
def test_replicated_where_it_fits(path: str) -> None:
    """Nothing but R and its like travels, and the planner recommends it."""
    asked = recipe(path, optim={"always_on": "none"}, train={"gradient_checkpointing": True})
    replicated, sharded = (on_eight(path, home, asked) for home in ("replicated", "zero3"))
    small = {"gradients", "coordinates", "grad_norm", "merge", "projectors", "refresh_gradients"}
    assert set(replicated.sent) == small
    assert set(sharded.sent) == {*replicated.sent, "weights"}
    assert sharded.sent["weights"].sent > 200 * sum(message.sent for message in replicated.sent.values()) / 2
    assert ranked([sharded, replicated])[0] is replicated
    assert replicated.seconds < sharded.seconds


def test_choices() -> None:
    found = list(choices(16, read_cluster("2x4xH100")))
    assert {one.world_size for one in found} == {1, 2, 4, 8}
    assert {one.home for one in found if one.world_size == 1} == {"replicated"}
    assert {one.world_size for one in found if one.home == "hpz"} == {8}
    assert {one.micro_batch for one in found if one.world_size == 8} == {1, 2}
    assert len(found) == len(set(found))


def test_second_shards_and_what_they_save() -> None:
    """hpZ holds the weights once more in each node, and gathers inside of it."""
    asked = planner(recipe(train={"global_batch_size": 32}), replays=replays("llama2-7b"))
    two = read_cluster("2x8xA100-80")
    plain, second = (asked.forecast(two, asked.choice(16, home)) for home in ("zero3", "hpz"))
    assert second.peak - plain.peak == 6_738_415_616 * 2 // 8
    assert second.times.links["weights"] < plain.times.links["weights"]
    assert second.times.links["gradients"] == plain.times.links["gradients"]


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"train.global_batch_size: 12 is invalid: expected a multiple of 8: 1 seq"):
        on_eight("llama2-7b", "zero3", recipe(train={"global_batch_size": 12}))


def test_scaling_keeps_the_work_of_a_gpu() -> None:
    assert scaling_sizes(EIGHT) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    asked = planner(recipe(train={"global_batch_size": 32, "micro_batch_size": 2}))
    many = asked.scaled(EIGHT, 1024, "replicated")
    assert (many.usual.rows, many.usual.accumulation, many.tokens) == (2, 2, 4 * 512 * 1024)
    one = asked.scaled(EIGHT, 8, "replicated")
    assert one.tokens_per_day < many.tokens_per_day < 128 * one.tokens_per_day


def test_under_other_methods() -> None:
    low = planner(recipe(optim={"always_on": "low_rank"}))
    found = [low.under(name).recipe for name in ("ows", "lisa")]
    assert [one.method.name for one in found] == ["ows", "lisa"]
    assert [one.optim.always_on for one in found] == ["low_rank", "full"]


PARAMETERS = {  # in billions, as the models' makers publish them
    "llama3.2-1b": 1.24, "llama3.2-3b": 3.21, "mistral-nemo": 12.2, "phi-4": 14.7, "qwen3-0.6b": 0.6, "qwen3-1.7b": 1.7,
    "qwen3-4b": 4.0, "qwen3-8b": 8.2, "qwen3-14b": 14.8, "qwen3-32b": 32.8, "gemma3-4b": 3.88, "gemma3-12b": 11.8,
    "gemma3-27b": 27.0,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_other_shapes_have_the_models_numbers_of_weights(name: str) -> None:
    assert entries(read_model(name).layers)[0] / 1e9 == pytest.approx(PARAMETERS[name], rel=0.02)


# ------------------------------------------------------------------ for the trainer


def test_a_refusal_says_what_would_fit() -> None:
    asked = planner(recipe("llama2-13b", data={"max_length": 2048}), "llama2-13b")
    replicated, sharded = (asked.choice(8, home) for home in ("replicated", "zero3"))
    require(asked, replicated, 80_000_000_000)
    with pytest.raises(UserError) as caught:
        require(asked, replicated, 35_000_000_000)
    said = str(caught.value)
    assert said.startswith("train.sharding: 'replicated' is invalid: a step needs ")
    assert " GiB of a GPU that has 32.6 GiB; expected --train.gradient_checkpointing true, which needs " in said
    with pytest.raises(UserError, match=r"22.4 GiB; expected --train.sharding zero3, .*, which needs [0-9.]+ GiB$"):
        require(asked, replicated, 24_000_000_000)
    with pytest.raises(UserError, match=r"expected --optim\.refresh compressed, --sampling\.scheme fixed, "):
        require(asked, sharded, 5_000_000_000)
    with pytest.raises(UserError, match="expected more GPUs under zero3"):
        require(asked, sharded, 2_000_000_000)


def test_the_set_that_is_expected_decides() -> None:
    asked, alone = planner(recipe()), Choice(1, "replicated", 1, False)
    expected, most = (memory(asked.step(alone, asked.layer_set(d)), True).peak for d in (0.0, DEVIATIONS))
    assert expected < most
    require(asked, alone, expected)
    with pytest.raises(UserError):
        require(asked, alone, expected - 1)
