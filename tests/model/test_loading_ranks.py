"""Loading into shards and exporting from them: the same bits as transformers', and no process ever holds the model."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ows_ds import config
from ows_ds.distributed import weights
from ows_ds.distributed.communicator import join
from ows_ds.distributed.ds_config import DEFAULT_CONFIG, resolve_config
from ows_ds.distributed.weights import CHUNK, Replicated, Weights
from ows_ds.distributed.zero3 import Zero3, join_deepspeed
from ows_ds.errors import Failed, UserError
from ows_ds.model import tensor_files
from ows_ds.model.pretrained import pretrained
from ows_ds.train.export import let_older_read, save_model
from tests.support.pool import Pools
from tests.support.training import NAMES


class Alive(TorchDispatchMode):
    """The most bytes that tensors made within it have had at once. Files that are mapped are not memory."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), new=False)
        out = func(*args, **(kwargs or {}))
        self._see(out, new=func is not torch.ops.aten.set_.source_Storage)  # so safetensors gives out what is mapped
        return out

    def _see(self, tensors: Any, new: bool) -> None:
        for one in tree_iter(tensors):
            if not isinstance(one, Tensor) or one.device.type == "meta":
                continue
            storage = one.untyped_storage()
            address, size = storage._cdata, storage.nbytes() if new else 0
            if address not in self.seen:
                self.seen.add(address)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.now -= size


def write_model(folder: Path, file_size: str) -> Any:
    """A LLaMA in float32 whose largest tensor is a sixteenth of it."""
    shape = {"vocab_size": 250, "hidden_size": 64, "intermediate_size": 130, "num_hidden_layers": 6}
    torch.manual_seed(0)
    described = tf.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)  # type: ignore[arg-type]
    model = tf.AutoModelForCausalLM.from_config(described)
    model.save_pretrained(folder, max_shard_size=file_size)
    return model


@contextlib.contextmanager
def patched(chunk: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in (tensor_files, weights):
            stack.enter_context(mock.patch.object(module, "CHUNK", chunk))
        yield


def load_and_export(
    rank: int,
    world_size: int,
    folder: Path,
    output: Path,
    sharding: str,
    dtype: torch.dtype,
    file_size: str,
    chunk: int = CHUNK,
) -> dict[str, Any]:
    """Peaks of both, what this process holds, and the largest tensor, in bytes; the entries it holds.

    chunk: how many entries are read and sent at once.
    """
    comm = join("cpu")
    made = config.from_dict(
        {"model": {"path": str(folder), "dtype": NAMES[dtype]}, "train": {"output_dir": str(output)}}
    )
    ds_config = None
    if sharding == "zero3":
        join_deepspeed()
        ds_config = resolve_config(DEFAULT_CONFIG, NAMES[dtype], 1, 1, world_size)
    with patched(chunk), Alive() as loading:
        model = pretrained(made, comm, comm.device if world_size > 1 else torch.device("cpu"), ds_config)
    home: Weights = Replicated(model, comm) if ds_config is None else Zero3(model, ds_config, comm)
    named = dict(home.module.named_parameters())
    entries = {name: (home.resident_slice(p)[0], home.resident_slice(p)[1].clone()) for name, p in named.items()}
    shapes = [torch.Size(home.shape(p)) for p in named.values()]
    with patched(chunk), Alive() as saving:
        save_model(home, SimpleNamespace(save_pretrained=lambda folder: None), output, file_size)
    return {
        "load": loading.most,
        "export": saving.most,
        "held": sum(run.nbytes for _, run in entries.values()),
        "largest": max(shape.numel() for shape in shapes) * dtype.itemsize,
        "entries": entries,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("world_size", "sharding"), [(1, "zero3"), (2, "zero3"), (3, "zero3"), (1, "none"), (2, "none")]
)
def test_a_process_holds_its_part_and_a_tensor(
    pools: Pools, tmp_path: Path, world_size: int, sharding: str, dtype: torch.dtype
) -> None:
    file_size, chunk = ("5GB", CHUNK) if dtype == torch.float32 else ("100KB", 999)
    write_model(tmp_path / "model", file_size)
    expected: Any = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    paths = tmp_path / "model", tmp_path / "out"
    found = pools(world_size).run(load_and_export, *paths, sharding, dtype, file_size, chunk)
    whole = sum(parameter.nbytes for parameter in expected.parameters())
    for one in found:
        assert one["held"] <= whole / (world_size if sharding == "zero3" else 1) + 1000
        assert one["held"] <= one["load"] <= 1.1 * (one["held"] + one["largest"])
        # a run or two; of short ones more, for gloo's threads let go of them only a moment later
        assert one["export"] <= one["largest"] * (2.1 if chunk == CHUNK else 0.5)
        for name, parameter in expected.named_parameters():
            start, run = one["entries"][name]
            assert torch.equal(run, parameter.detach().flatten()[start : start + run.numel()])
    expected.save_pretrained(tmp_path / "expected", max_shard_size=file_size)
    let_older_read(tmp_path / "expected")
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("out", "expected")]
    assert files[0] == files[1]
    assert ("model.safetensors" in files[0]) == (dtype == torch.float32)


@pytest.mark.parametrize("sharding", ["zero3", "none"])
def test_what_transformers_has_to_load(pools: Pools, tmp_path: Path, sharding: str) -> None:
    """A file that config.json names, loaded and exported over two processes; only memory is another matter."""
    saved = write_model(tmp_path / "model", "5GB")
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(described | {"transformers_weights": "own.safetensors"}))
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "own.safetensors")
    arguments = (tmp_path / "model", tmp_path / "out", sharding, torch.bfloat16, "100KB")
    for one in pools(2).run(load_and_export, *arguments):
        for name, parameter in saved.named_parameters():
            start, run = one["entries"][name]
            assert torch.equal(run, parameter.detach().flatten()[start : start + run.numel()].bfloat16())
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "expected", max_shard_size="100KB")
    let_older_read(tmp_path / "expected")
    for file in (tmp_path / "expected").glob("model*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def cannot_write(rank: int, world_size: int, folder: Path, output: Path) -> str:
    """What a process raises where the disk of rank 0 is full in the middle of an export."""
    write, calls = tensor_files.Writer.write, []

    def full(self: Any, *run: Any) -> None:
        calls.append(run)
        if len(calls) == 5:
            raise OSError("No space left on device")
        write(self, *run)

    tensor_files.Writer.write = full  # type: ignore[method-assign]
    try:
        load_and_export(rank, world_size, folder, output, "zero3", torch.float32, "100KB")
    except Failed as error:
        return f"{type(error).__name__}: {error}"
    finally:
        tensor_files.Writer.write = write  # type: ignore[method-assign]
    return "written"


def test_a_full_disk_stops_all_processes_and_leaves_no_model(pools: Pools, tmp_path: Path) -> None:
    write_model(tmp_path / "model", "5GB")
    first, second = pools(2).run(cannot_write, tmp_path / "model", tmp_path / "out")
    assert first == second == f"Failed: {tmp_path / 'out'} could not be written (OSError: No space left on device)"
    assert not (tmp_path / "out").exists()


def refused(rank: int, world_size: int, folder: Path) -> str:
    join_deepspeed()
    made = config.from_dict({"model": {"path": str(folder)}, "train": {"output_dir": "none"}})
    ds_config = resolve_config(DEFAULT_CONFIG, "bfloat16", 1, 1, world_size)
    try:
        pretrained(made, join("cpu"), torch.device("cpu"), ds_config)
    except UserError as error:
        return str(error)
    return "loaded"


def test_all_processes_refuse_what_does_not_fit(pools: Pools, tmp_path: Path) -> None:
    write_model(tmp_path, "100KB")
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"num_hidden_layers": 5, "vocab_size": 251}))
    first, second = pools(2).run(refused, tmp_path)
    assert first == second
    assert "9 tensors are not the model's: model.layers.5.input_layernorm.weight, " in first
    assert "2 tensors have another shape: lm_head.weight is (250, 64) in place of (251, 64), " in first


@pytest.mark.slow
def test_a_model_of_a_gigabyte(tmp_path: Path) -> None:
    """The same in fresh processes, by the anonymous memory of each: what allocators and collectives take is in it."""
    from benchmarks import loading

    loading.main(["--gigabytes", "0.5,1", "--worlds", "2,4", "--shardings", "zero3", "--json", str(tmp_path / "j")])
    peaks = {}
    for one in json.loads((tmp_path / "j").read_text()):
        for rank in one["ranks"]:
            assert rank["load"] <= 1.1 * (rank["held"] + rank["largest"])
            assert rank["held"] + rank["export"] <= 1.1 * (rank["held"] + rank["largest"])
        peaks[round(one["bytes"], -8), one["world_size"]] = max(rank["load"] for rank in one["ranks"])
    (small, half), (_, quarter), (large, _), _ = peaks
    assert (half, quarter, small < large) == (2, 4, True)
    assert peaks[large, 4] < 0.7 * peaks[large, 2]
