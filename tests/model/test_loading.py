"""load.py and tensor_files.py: the same models as transformers', whatever their files look like, or one clear line."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import deepspeed_config

from ows_ds import config
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.launch import per_host
from ows_ds.distributed.weights import Replicated
from ows_ds.errors import Failed, UserError
from ows_ds.model import tensor_files
from ows_ds.model.loading import Source, Unsharded
from ows_ds.model.pretrained import load_tokenizer, pretrained
from ows_ds.model.tensor_files import Files, Writer
from ows_ds.train import export
from ows_ds.train.export import let_older_read, save_model
from tests.support.families import FAMILIES, MIXED, tiny

CPU = torch.device("cpu")


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    source = Source(config.Model(path=str(folder)), dtype)
    assert source.why_not is None
    return source.fill(Unsharded(CPU, True), CPU)


def tensors(model: Any) -> dict[str, Tensor]:
    """Parameters by all of their names, and all buffers."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def assert_same(model: Any, expected: Any) -> None:
    mine, theirs = tensors(model), tensors(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name].dtype, mine[name].device) == (tensor.dtype, tensor.device)
        assert torch.equal(mine[name], tensor), name
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in expected.named_parameters()]  # ties
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert not model.training


@pytest.mark.parametrize("family", [name for name in MIXED if name not in ("qwen3_5", "granitemoehybrid")])
def test_experts_come_out_of_files_of_single_ones(tmp_path: Path, family: str) -> None:
    """Any run of entries of a stack, as a rank of ZeRO-3 asks for it."""
    tiny(family).save_pretrained(tmp_path, max_shard_size="20KB")
    model = loaded(tmp_path)
    expected = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(model, expected)
    source = Source(config.Model(path=str(tmp_path)), torch.float32)
    name = next(name for name, keys in source.keys.items() if "experts" in name)
    whole = expected.get_parameter(name).detach().flatten()
    run = torch.empty(whole.numel() // 2)
    source._reader(source.keys[name])(whole.numel() // 3, run)
    assert torch.equal(run, whole[whole.numel() // 3 :][: run.numel()])


@pytest.mark.parametrize("file_size", ["5GB", "20KB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_and_writes_what_transformers_does(tmp_path: Path, family: str, tied: bool, file_size: str) -> None:
    saved: Any = tiny(family, tied)
    saved.generation_config.max_new_tokens = 7
    saved.save_pretrained(tmp_path, max_shard_size=file_size)  # gpt_neox's files have other names than the model
    assert (tmp_path / "model.safetensors.index.json").exists() == (file_size == "20KB")
    for dtype in (torch.float32, torch.bfloat16):
        mine, expected = loaded(tmp_path, dtype), tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert_same(mine, expected)
    save_model(Replicated(mine, Communicator()), SimpleNamespace(save_pretrained=str), tmp_path / "mine", file_size)
    expected.save_pretrained(tmp_path / "theirs", max_shard_size=file_size)
    let_older_read(tmp_path / "theirs")
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("mine", "theirs")]
    assert files[0] == files[1]


def test_a_full_disk_ends_an_export_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.Writer, "write", full)
    with pytest.raises(Failed) as caught:
        save_model(Replicated(tiny("llama"), Communicator()), SimpleNamespace(save_pretrained=str), tmp_path / "model")
    assert (
        str(caught.value) == f"{tmp_path / 'model'} could not be written (OSError: [Errno 28] No space left on device)"
    )
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    recipe = config.from_dict({"model": {"path": str(tmp_path)}, "train": {"output_dir": "unused"}})
    with pytest.raises(UserError, match="this folder holds an adapter, which peft's merge_and_unload merges"):
        load_tokenizer(recipe)


def test_a_file_of_the_model_without_its_head(tmp_path: Path) -> None:
    model: Any = tiny("llama", True)
    model.save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "body")
    content = load_file(tmp_path / "whole" / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in content.items()}, tmp_path / "body" / "model.safetensors")
    assert_same(loaded(tmp_path / "body"), tf.AutoModelForCausalLM.from_pretrained(tmp_path / "body"))


def test_a_tied_weight_under_its_other_name(tmp_path: Path) -> None:
    change(tmp_path, True, lambda content: content | {"lm_head.weight": content.pop("model.embed_tokens.weight")})
    assert_same(loaded(tmp_path), tf.AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_launcher_that_has_told_transformers_of_shards(tmp_path: Path) -> None:
    model: Any = tiny("llama", True)
    model.save_pretrained(tmp_path)
    settings = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    found = loaded(tmp_path)
    assert deepspeed_config() is settings.config  # as before
    del settings
    assert_same(found, tf.AutoModelForCausalLM.from_pretrained(tmp_path))


def change(folder: Path, tied: bool, how: Any) -> None:
    """A tiny LLaMA in ``folder``, its file's content changed."""
    model: Any = tiny("llama", tied)
    model.save_pretrained(folder)
    save_file(how(load_file(folder / "model.safetensors")), folder / "model.safetensors")


@pytest.mark.parametrize(
    ("how", "text"),
    [
        (
            lambda content: {n: t for n, t in content.items() if "mlp.down_proj" not in n and "model.norm" not in n},
            "4 of its weights are missing: model.layers.0.mlp.down_proj.weight, model.layers.1.mlp.down_proj.weight, "
            "model.layers.2.mlp.down_proj.weight, ...",
        ),
        (lambda content: content | {"extra": torch.zeros(2)}, "1 tensors are not the model's: extra"),
        (
            lambda content: content | {"model.norm.weight": torch.zeros(31)},
            "1 tensors have another shape: model.norm.weight is (31,) in place of (32,)",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, how: Any, text: str) -> None:
    change(tmp_path, False, how)
    with pytest.raises(UserError) as caught:
        loaded(tmp_path)
    assert str(caught.value).startswith("model.path: ")
    assert str(caught.value).endswith(f"is invalid: expected a checkpoint that fits its config.json ({text})")


def test_left_overs_of_old_files_are_skipped(tmp_path: Path) -> None:
    change(tmp_path, False, lambda content: content | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert_same(loaded(tmp_path), tf.AutoModelForCausalLM.from_pretrained(tmp_path))


def recipe(folder: Path) -> config.Recipe:
    return config.from_dict({"model": {"path": str(folder), "dtype": "float32"}, "train": {"output_dir": "none"}})


def both_names(content: dict[str, Tensor]) -> dict[str, Tensor]:
    return content | {"lm_head.weight": content["model.embed_tokens.weight"].clone()}


def test_transformers_loads_the_rest_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ows_ds"), "propagate", True)  # off where the command line has run
    caplog.set_level(logging.INFO, "ows_ds")
    change(tmp_path, True, both_names)
    found = pretrained(recipe(tmp_path), Communicator(), CPU)
    assert_same(found, tf.AutoModelForCausalLM.from_pretrained(tmp_path))
    why_not = "tied weights are stored as model.embed_tokens.weight and lm_head.weight"
    assert caplog.messages[-1].startswith(f"model.path: {why_not}: transformers loads it")


def test_what_transformers_does_not_find_is_not_made_up(tmp_path: Path) -> None:
    """It would continue with random numbers."""
    change(tmp_path, True, lambda content: {n: t for n, t in both_names(content).items() if n != "model.norm.weight"})
    with pytest.raises(UserError, match=r"1 of its weights are missing: model\.norm\.weight"):
        pretrained(recipe(tmp_path), Communicator(), CPU)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    model: Any = tiny("llama")
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="expected a model with safetensors files"):
        pretrained(recipe(tmp_path), Communicator(), CPU)


@pytest.mark.parametrize("damage", ["cut", "no file", "no part", "no folder"])
def test_damaged_files_are_told_in_one_line(tmp_path: Path, damage: str) -> None:
    model: Any = tiny("llama")
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="20KB" if damage == "no part" else "5GB")
    if damage == "cut":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "no file":
        (folder / "model.safetensors").unlink()
    elif damage == "no part":
        sorted(folder.glob("model-00002-*"))[0].unlink()
    else:
        shutil.rmtree(folder)
    right = "with safetensors files; .+" if damage == "no file" else r"that transformers can load \(.+\)"
    with pytest.raises(UserError, match=rf"^model.path: .* is invalid: expected a model {right}$"):
        pretrained(recipe(folder), Communicator(), CPU)


def test_reads_any_run_of_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "CHUNK", 11)
    content = {
        "flat": torch.randn(37),
        "matrix": torch.randn(9, 5),
        "cube": torch.randn(4, 3, 2).to(torch.float16),
        "one": torch.tensor(3.5),
        "none": torch.empty(0, 4),
    }
    save_file(content, tmp_path / "file.safetensors")
    files = Files([tmp_path / "file.safetensors"])
    assert files.shapes == {name: tuple(tensor.shape) for name, tensor in content.items()}
    for name, tensor in content.items():
        for start in range(tensor.numel() + 1):
            for stop in range(start, tensor.numel() + 1):
                out = torch.full((stop - start,), torch.nan, dtype=torch.float64)
                files.read(name, start, out)
                assert torch.equal(out, tensor.flatten()[start:stop].double())


def test_writes_the_bytes_of_safetensors(tmp_path: Path) -> None:
    content = {f"{i % 3}.{dtype}": torch.ones(i, 3).to(dtype) for i, dtype in enumerate(tensor_files.DTYPES)}
    content |= {"a": torch.tensor(1.5), "b": torch.empty(0), 'a "name"\n of ümläuts': torch.randn(5, 5).t()}
    writer = Writer(tmp_path / "mine", {name: tensor.to("meta") for name, tensor in content.items()})
    for name in reversed(writer.names):  # in any order, in pieces
        for start in range(content[name].numel() - 1, -1, -1):
            writer.write(name, start, content[name].reshape(-1)[start : start + 1])
    writer.close()
    save_file({name: t.contiguous() for name, t in content.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "mine").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [("aaaa", 4), ("aabb", 2), ("abcd", 1), ("abab", None), ("aab", None), ("abb", None), ("aabba", None)],
)
def test_processes_per_host(hosts: str, expected: int | None) -> None:
    assert per_host(list(hosts)) == expected
