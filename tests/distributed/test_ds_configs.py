"""ds_configs/: each file trains the same bits as plain ZeRO-3, over periods with merges; what cannot is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.utils import groups

from ows_ds import config
from ows_ds.distributed.ds_config import DEFAULT_CONFIG, resolve_config
from ows_ds.errors import UserError
from tests.support.pool import Pools
from tests.support.tiny_run import recipe
from tests.train.test_trainer import contents, run

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
FILES = {path.stem: path for path in FOLDER.glob("*.json")}


def run_alone(rank: int, world_size: int, recipe: config.Recipe) -> None:
    """Train; what DeepSpeed keeps for the rest of a process goes with the run."""
    try:
        run(rank, world_size, recipe, None)
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def trained(
    pools: Pools, world_size: int, inputs: Path, output: Path, file: Path | None, method: str = "ows"
) -> tuple[list[dict[str, Any]], dict[str, str], int]:
    """Records, files and DeepSpeed's gathers in bytes of a run with the settings of ``file``, None: the default."""
    ds_config = None if file is None else str(file)
    optim = {"lr": 1e-2 if method == "ows" else 1e-3}
    one = recipe(inputs, output, method=method, optim=optim, sharding="zero3", ds_config=ds_config, micro_batch_size=1)
    pools(world_size).run(run_alone, one)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return *contents(output), sum(line["comm_bytes"]["weights"] for line in lines)


def with_settings(folder: Path, name: str, **zero: Any) -> Path:
    """A copy of the file with other settings in zero_optimization."""
    settings = json.loads(FILES[name].read_text())
    settings["zero_optimization"] |= zero
    (folder / "ds.json").write_text(json.dumps(settings))
    return folder / "ds.json"


@pytest.mark.parametrize("name", ["zero3_offload_cpu", pytest.param("zero3_bf16", marks=pytest.mark.slow)])
def test_each_file_trains_the_same_bits(pools: Pools, inputs: Path, tmp_path: Path, name: str) -> None:
    expected = trained(pools, 2, inputs, tmp_path / "plain", None)
    assert trained(pools, 2, inputs, tmp_path / name, FILES[name]) == expected
    sets = [record["sampled_layers"] for record in expected[0][1:]]
    assert len({tuple(one) for one in sets}) > 1  # blocks have left: merges


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("ows", marks=pytest.mark.ci),
        *(pytest.param(method, marks=pytest.mark.slow) for method in ("mezo", "lora")),
    ],
)
def test_hpz_sees_every_merge_and_gathers_within_its_group(
    pools: Pools, inputs: Path, tmp_path: Path, method: str
) -> None:
    """Four processes in two groups: a copy that missed an edit would show in the losses."""
    file = with_settings(tmp_path, "zero3_hpz", zero_hpz_partition_size=2)
    plain = trained(pools, 4, inputs, tmp_path / "plain", None, method)
    hpz = trained(pools, 4, inputs, tmp_path / "hpz", file, method)
    assert hpz[:2] == plain[:2]
    assert hpz[2] < plain[2]


def refused(changes: dict[str, Any], world_size: int = 4) -> str:
    settings = json.loads(json.dumps(DEFAULT_CONFIG))
    settings["zero_optimization"] |= changes.pop("zero", {})
    with pytest.raises(UserError) as caught:
        resolve_config(settings | changes, "bfloat16", 2, 3, world_size)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"zero": {"stage": 2}}, "zero_optimization.stage: 2 is invalid: expected 3"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer: {'type': 'AdamW'} is invalid: leave it out"),
        ({"scheduler": {}}, "scheduler: {} is invalid: leave it out"),
        ({"gradient_clipping": 1.0}, "gradient_clipping: 1.0 is invalid: leave it out"),
        ({"fp16": {"enabled": True}}, 'fp16.enabled: True is invalid: expected "auto"'),
        ({"bf16": {"enabled": False}}, 'bf16.enabled: False is invalid: expected "auto"'),
        ({"train_batch_size": 23}, 'train_batch_size: 23 is invalid: expected "auto"; the recipe makes it 24'),
        ({"train_micro_batch_size_per_gpu": 1}, 'train_micro_batch_size_per_gpu: 1 is invalid: expected "auto"'),
        ({"gradient_accumulation_steps": 2}, 'gradient_accumulation_steps: 2 is invalid: expected "auto"'),
        (
            {"zero": {"offload_param": {"device": "nvme"}}},
            "offload_param.device: 'nvme' is invalid: expected none",
        ),
        (
            {"zero": {"offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer.device: 'cpu' is invalid: expected none",
        ),
        ({"zero": {"zero_quantized_weights": True}}, "zero_quantized_weights: True is invalid: expected false"),
        (
            {"zero": {"zero_quantized_nontrainable_weights": True}},
            "nontrainable_weights: True is invalid: expected",
        ),
        (
            {"zero": {"zero_hpz_partition_size": 3}},
            'zero_hpz_partition_size: 3 is invalid: expected "auto"',
        ),
    ],
)
def test_what_contradicts_or_does_not_work_is_refused(changes: dict[str, Any], text: str) -> None:
    message = refused(changes)
    assert message.startswith("train.ds_config: ")
    assert text in message


@pytest.mark.parametrize("name", sorted(FILES))
def test_auto_is_filled_in(name: str) -> None:
    dtype = "float32" if name == "zero3_fp32" else "bfloat16"
    found = resolve_config(json.loads(FILES[name].read_text()), dtype, 2, 3, 8, per_host=4)
    assert "auto" not in json.dumps(found)
    assert found["bf16"] == {"enabled": dtype == "bfloat16"}
    sizes = [found[f"{key}"] for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    assert (*sizes, found["train_batch_size"]) == (2, 3, 48)
    assert found["zero_optimization"]["zero_hpz_partition_size"] == (4 if name == "zero3_hpz" else 1)


@pytest.mark.parametrize(("per_host", "expected"), [(8, 1), (4, 4), (1, 1), (None, 1)])
def test_hpz_spans_a_host_and_is_off_on_a_single_one(per_host: int | None, expected: int) -> None:
    found = resolve_config(json.loads(FILES["zero3_hpz"].read_text()), "bfloat16", 1, 1, 8, per_host)
    assert found["zero_optimization"]["zero_hpz_partition_size"] == expected
