"""Whatever a user gives wrong: one line on standard error with key and value, exit code 2, and nothing is written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from ows_ds import checkpoint, config
from ows_ds.cli.main import main
from ows_ds.distributed.communicator import Communicator
from ows_ds.errors import UserError
from ows_ds.optim.ows import OWS
from tests.support.families import tiny
from tests.support.pool import Pools
from tests.support.tiny_run import recipe

Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class Bad:
    """A mistake, and what is said about it.

    line: how it begins: key and value. says: a part of the rest. words: further options of `train --config r.yaml`, or
    with a verb of their own the whole command line. spoil: what is done to the folder before: it holds the recipe
    r.yaml, the model, train.jsonl and eval.jsonl.
    """

    line: str
    words: str | list[str] = ""
    spoil: Spoil | None = None
    says: str = ""

    @property
    def argv(self) -> list[str]:
        """What is typed."""
        words = self.words.split() if isinstance(self.words, str) else self.words
        own = words[:1] and not words[0].startswith("-")
        return words if own else ["train", "--config", "r.yaml", *words]


def text(name: str, content: str | bytes) -> Spoil:
    """Write a file."""

    def spoil(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def as_json(name: str, **changes: Any) -> Spoil:
    """Change keys of a JSON object in a file; None takes one away. A file that is not there is made."""

    def spoil(folder: Path) -> None:
        path = folder / name
        old = json.loads(path.read_text()) if path.exists() else {}
        new = {key: value for key, value in (old | changes).items() if value is not None}
        path.write_text(json.dumps(new))

    return spoil


def without(*names: str) -> Spoil:
    """Remove files."""

    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def rows(*given: Any) -> Spoil:
    """Other rows in train.jsonl."""
    return text("train.jsonl", "".join(json.dumps(row) + "\n" for row in given))


def weights(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Spoil:
    """Other tensors in the model's file."""

    def spoil(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        save_file(change(load_file(path)), path)

    return spoil


def scores(**changes: Any) -> Spoil:
    """A file of scores for three layers of another model, with changes."""
    good = {"metric": "outlier", "tau": 2.0, "model": "f" * 64, "layers": [0.1, 0.2, 0.3], "tokens": 9, "format": 1}
    return text("s.json", json.dumps(good | changes))


def ds(**changes: Any) -> Spoil:
    """A DeepSpeed file, with changes; those of ``zero`` within its section."""
    zero = {"stage": 3} | changes.pop("zero", {})
    return text("ds.json", json.dumps({"zero_optimization": zero} | changes))


def run_of(**changes: Any) -> Spoil:
    """A folder run/ with the configuration of a run that had begun, and had other settings."""

    def spoil(folder: Path) -> None:
        tree = yaml.safe_load((folder / "r.yaml").read_text())
        for key, value in changes.items():
            section, _, name = key.partition("__")
            tree.setdefault(section, {})[name] = value
        text("run/config.yaml", yaml.safe_dump(tree))(folder)
        text("run/metrics.jsonl", "")(folder)

    return spoil


def saved(change: Callable[[dict[str, Any]], Any], link: bool = False) -> Spoil:
    """A run with a checkpoint, its manifest changed. link: its file of tensors is a link to one outside."""

    def spoil(folder: Path) -> None:
        run_of()(folder)
        place = checkpoint.folder_of(folder / "run", 3)
        checkpoint.save(place, [], {"method": {}, "scheduler": {}}, Communicator())
        path = place / checkpoint.MANIFEST
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        if link:
            [file] = place.glob("*.safetensors")
            file.replace(folder / "elsewhere")
            file.symlink_to(folder / "elsewhere")

    return spoil


def recipe_text(content: str | bytes) -> Spoil:
    """Another r.yaml."""
    return text("r.yaml", content)


def renamed(name: str) -> Callable[[dict[str, Any]], Any]:
    """A manifest whose file has another name."""

    def change(manifest: dict[str, Any]) -> Any:
        manifest["files"][0]["name"] = name
        return manifest

    return change


def of_gpt2(folder: Path) -> None:
    """A model with learned positions, 64 of them, and longer rows."""
    model: Any = tiny("gpt2", True, torch.bfloat16)
    model.resize_token_embeddings(300, mean_resizing=False)
    model.save_pretrained(folder / "model")
    rows(*[{"text": "a" * 99}] * 12)(folder)


def of_bloom(folder: Path) -> None:
    """A model with Alibi, whose attention goes from row to row."""
    torch.manual_seed(0)
    settings = transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=3, n_head=4)
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(folder / "model")


def chat(**more: Any) -> dict[str, Any]:
    """A row whose answer has further keys."""
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **more}]}


MINIMUM = "model: {path: model}\ndata: {train: train.jsonl}\ntrain: {output_dir: run}\n"
STEP = "--train.resume run/checkpoints/step-3"
SCORES = "--sampling.scores s.json"
ZERO3 = "--train.sharding zero3 --train.ds_config ds.json"

# What shows before anything runs: a few, as users give them; all others are tests of the models.
SETTINGS = {
    "unknown option": Bad("optim.rnk: '3'", "--optim.rnk 3", says="is optim.rank meant?"),
    "no such data": Bad("data.train: 'none.jsonl'", "--data.train none.jsonl", says="expected a file that exists"),
    "no YAML": Bad("config: 'r.yaml:3'", spoil=recipe_text("optim:\n  rank: [3\n"), says="expected valid YAML"),
    "cluster with a command": Bad(
        "cluster.partition: 'gpu; touch hacked'",
        ["launch", "--slurm", "c.yaml", "--config", "r.yaml"],
        text("c.yaml", "partition: gpu; touch hacked"),
    ),
    "study of no recipe": Bad(
        "data: 3",
        ["bench", "quality", "--config", "s.yaml", "--output", "o"],
        text(
            "s.yaml", "recipe: {data: 3, model: {path: m}, train: {output_dir: o}}\ntest: eval.jsonl\nvariants: {a: }"
        ),
    ),
    "export over something": Bad("out_dir: 'model'", ["export", "run", "model"], run_of()),
    "export into a file": Bad("out_dir: 'r.yaml/out'", ["export", "run", "r.yaml/out"], run_of()),
    "export of nothing": Bad("run_dir: 'run'", ["export", "run", "out"], says="with its config.yaml"),
    "export from outside": Bad(
        "--checkpoint: '../../x'", ["export", "run", "out", "--checkpoint", "../../x"], run_of()
    ),
}

# What shows only when processes, model and data are there.
LATER = {
    # ---- model
    "model: nothing in it": Bad("model.path: 'empty'", "--model.path empty", text("empty/notes", "")),
    "model: no config.json": Bad("model.path: 'model'", spoil=without("model/config.json")),
    "model: config.json is none": Bad("model.path: 'model'", spoil=text("model/config.json", "{")),
    "model: config.json is a list": Bad("model.path: 'model'", spoil=text("model/config.json", "[]")),
    "model: of no family": Bad("model.path: 'model'", spoil=as_json("model/config.json", model_type="lama")),
    "model: of no known kind": Bad("model.path: 'model'", spoil=as_json("model/config.json", model_type="t5"),
                                   says="T5"),
    "model: widths that are none": Bad("model.path: 'model'", spoil=as_json("model/config.json", hidden_size="wide")),
    "model: code of its own": Bad("model.trust_remote_code: False", spoil=as_json(
        "model/config.json", model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
        says="expected true to run the Python code"),
    "model: quantised": Bad("model.path: 'model'", says="not quantised", spoil=as_json(
        "model/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})),
    "model: whole numbers": Bad("model.path: 'model'", says="not quantised", spoil=weights(
        lambda found: {name: t.to(torch.int8) if "down" in name else t for name, t in found.items()})),
    "model: a file that is cut": Bad("model.path: 'model'", spoil=lambda folder: os.truncate(
        folder / "model" / "model.safetensors", 5000)),
    "model: a file that is none": Bad("model.path: 'model'", spoil=text("model/model.safetensors", "x" * 99)),
    "model: no file": Bad("model.path: 'model'", spoil=without("model/model.safetensors"), says="safetensors files"),
    "model: pickled": Bad("model.path: 'model'", says="safetensors files", spoil=lambda folder: (
        torch.save(load_file(folder / "model" / "model.safetensors"), folder / "model" / "pytorch_model.bin"),
        without("model/model.safetensors")(folder))[1]),
    "model: a tensor is missing": Bad("model.path: 'model'", says="1 of its weights are missing", spoil=weights(
        lambda found: {name: t for name, t in found.items() if name != "model.norm.weight"})),
    "model: another width": Bad("model.path: 'model'", says="another shape", spoil=weights(
        lambda found: found | {"model.norm.weight": torch.zeros(31, dtype=torch.bfloat16)})),
    "model: a file outside": Bad("model.path: 'model: ../elsewhere.safetensors'", says="its own folder",
        spoil=lambda folder: (
        (folder / "model" / "model.safetensors").replace(folder / "elsewhere.safetensors"),
        as_json("model/model.safetensors.index.json", weight_map={"a": "../elsewhere.safetensors"})(folder))[1]),
    "model: cannot generate": Bad("model.path: 'model'", says="max_new_tokens", spoil=as_json(
        "model/generation_config.json", max_new_tokens=-1)),
    "model: generation_config.json is none": Bad("model.path: 'model'",
        spoil=text("model/generation_config.json", "{")),
    "model: no tokenizer": Bad("model.path: 'model'", says="tokenizer", spoil=without(
        "model/tokenizer.json", "model/tokenizer_config.json")),
    "model: tokenizer.json is none": Bad("model.path: 'model'", says="tokenizer", spoil=text(
        "model/tokenizer.json", '{"version": "1.0"}')),
    "model: fewer words than its tokenizer": Bad("model.path: 'model'", says="embeds all tokens", spoil=lambda folder: (
        as_json("model/config.json", vocab_size=200)(folder),
        weights(lambda found: found | {"model.embed_tokens.weight": found["model.embed_tokens.weight"][:200].clone()})(
            folder))[1]),
    "kernels of GPUs": Bad("train.kernels: 'liger'", "--train.kernels liger", says="Liger's kernels run on GPUs"),
    "model: no such kernel": Bad("model.attn_implementation: 'flash'", "--model.attn_implementation flash"),
    "model: too few positions": Bad("data.max_length: 80", "--data.max_length 80", of_gpt2, says="expected at most 64"),
    "model: too few layers": Bad("sampling.gamma: 4.0", "--sampling.gamma 4", says="at most 3, the number of layers"),
    "model: too narrow": Bad("optim.rank: 33", "--optim.rank 33", says="at most 32, the smaller side of"),
    # ---- eval
    "eval: not finished": Bad("MODEL: 'run'", "eval run --mt-bench train.jsonl", run_of(), says="not finished"),
    "eval: no model": Bad("MODEL: 'empty'", "eval empty --mt-bench train.jsonl", text("empty/notes", "")),
    "eval: a broken model": Bad("MODEL: 'model'", "eval model --mt-bench q.jsonl", lambda folder: (
        text("q.jsonl", '{"question_id": 1, "category": "math", "turns": ["1+1?"]}')(folder),
        text("model/config.json", "{")(folder))[1], says="can load from safetensors"),
    "eval: pickled": Bad("MODEL: 'model'", "eval model --mt-bench q.jsonl", lambda folder: (
        text("q.jsonl", '{"question_id": 1, "category": "math", "turns": ["1+1?"]}')(folder),
        torch.save(load_file(folder / "model" / "model.safetensors"), folder / "model" / "pytorch_model.bin"),
        without("model/model.safetensors")(folder))[2]),
    "eval: no questions": Bad("--mt-bench: None", "eval model --mt-bench train.jsonl", says="a question_id of its own"),
    "eval: no comparison": Bad("--compare: 'train.jsonl'", "eval model --mt-bench train.jsonl --compare train.jsonl",
        says="expected a result file"),
    "eval: no base": Bad("--compare: 'base'", "eval run --mt-bench train.jsonl --compare base", lambda folder: (
        run_of(model__path="run/gone/away")(folder), shutil.copytree(folder / "model", folder / "run" / "model"))[0]),
    # ---- scores
    "scores: no JSON": Bad("sampling.scores: 's.json'", SCORES, text("s.json", "layers:")),
    "scores: no scores": Bad("sampling.scores: 's.json'", SCORES, text("s.json", "[]")),
    "scores: another format": Bad("sampling.scores: 's.json'", SCORES, scores(format=2)),
    "scores: no number": Bad("sampling.scores: layers: nan", SCORES,
                             scores(layers=[0.1, float("nan"), 0.3])),
    "scores: beyond numbers": Bad("sampling.scores: layers: 1", SCORES, scores(layers=[10**400])),
    "scores: nested without end": Bad("sampling.scores: 's.json'", SCORES, text("s.json", "[" * 99999)),
    "scores: other layers": Bad("sampling.scores: 'scores of 2 layers'", SCORES,
                                scores(layers=[0.1, 0.2]), says="this model has 3"),
    "scores: another model": Bad("sampling.scores: 'scores of model ffffffffffff'", SCORES, scores()),
    "scores: unknown metric": Bad("sampling.scores: metric: 'size'", SCORES, scores(metric="size")),
    "scores: no outlier": Bad("sampling.tau: 1000000.0", "--sampling.tau 1e6", says="expected a smaller threshold"),
    # ---- data
    "data: no JSON in a line": Bad("data.train: 'train.jsonl:2'",
        spoil=text("train.jsonl", '{"text": "a"}\n{"text": \n')),
    "data: a column is missing": Bad("data.train: 'train.jsonl:1'", spoil=rows({"txt": "a"}), says="the columns"),
    "data: half a character": Bad("data.train: 'train.jsonl:1'", spoil=text("train.jsonl", '{"text": "\\ud83d"}\n')),
    "data: nested without end": Bad("data.train: 'train.jsonl:1'", spoil=text("train.jsonl", "[" * 99999)),
    "data: digits without end": Bad("data.train: 'train.jsonl:1'", spoil=text("train.jsonl", "9" * 9999)),
    "data: no text": Bad("data.train: 'train.jsonl'", spoil=text("train.jsonl", b"\x80\x81"), says="JSON Lines"),
    "data: empty": Bad("data.train: 'train.jsonl'", spoil=text("train.jsonl", "\n"), says="at least one row"),
    "data: no Parquet": Bad("data.eval: 'e.parquet'", "--data.eval e.parquet", text("e.parquet", "PAR1")),
    "data: another name": Bad("data.train: 'rows.dat:1'", "--data.train rows.dat", text("rows.dat", "text\na\n")),
    "data: no assistant": Bad("data.train: '1 rows'", says="1 have none at any length", spoil=rows(
        {"messages": [{"role": "user", "content": "a"}]})),
    "data: no answer": Bad("data.train: '1 rows'", spoil=rows({"prompt": "p" * 99, "completion": "a"}),
        says="first 64"),
    "data: nobody speaks": Bad("data.train: 'train.jsonl:1'", spoil=rows({"messages": [{"role": "user"}]})),
    "data: no template": Bad("data.template: 'plain'", "--data.template plain", says="expected auto or chat"),
    "data: nobody known speaks": Bad("data.train: 'train.jsonl:1'", says="expected from as one of human", spoil=rows(
        {"conversations": [{"from": "me", "value": "a"}]})),
    "data: half a mask": Bad("data.train: 'train.jsonl:1'", says="weight as 0 or 1", spoil=rows(chat(weight=0.5))),
    "data: a mask under all": Bad("data.loss_on: 'all'", "--data.loss_on all", rows(chat(train=False)),
        says="(train.jsonl:1)"),
    "data: no template at all": Bad("data.chat_template: 't.jinja:2'", "--data.chat_template t.jinja",
        text("t.jinja", "{{ 1 }}\n{% for %}"), says="expected a Jinja template"),
    "data: a template that refuses": Bad("data.train: 'train.jsonl:1'", "--data.chat_template t.jinja",
        text("t.jinja", "{{ raise_exception('never') }}"), says="(never)"),
    "data: all of it bad": Bad("data.train: '2 rows'", "--data.on_bad_row skip", rows({"txt": "a"}, chat(train=2)),
        says="2 are bad, the first is train.jsonl:1: expected the columns"),
    "data: too few packed": Bad("train.global_batch_size: 12", "--data.packing true --data.max_length 512",
        says="at most the number of packed sequences, "),
    "data: packed, not kept apart": Bad("data.packing: True", "--data.packing true", says="false", spoil=of_bloom),
    "data: a block that is no batch": Bad("train.global_batch_size: 12", "--data.streaming true --data.buffer_size 12",
        rows(*[{"text": ""}] * 11, {"text": "ab"}), says="as many as all rows make"),
    "data: a bad row in a stream": Bad("data.train: 'train.jsonl:2'", "--data.streaming true --data.buffer_size 12",
        rows({"text": "ab"}, {"txt": "b"})),
    "data: too few": Bad("train.global_batch_size: 12", spoil=rows({"text": "a b"}), says="the number of rows, 1"),
    "data: a script": Bad("data.train: 'set'", "--data.train set", text("set/set.py", "open('hacked', 'w')"),
                          says="scripts are no longer supported"),
    "data: no such part": Bad("data.train_split: 'train[99:]'", "--data.train_split train[99:]",
        says="at least one of the 20"),
    # ---- ds_config
    "ds_config: no JSON": Bad("train.ds_config: 'ds.json'", ZERO3, text("ds.json", "{")),
    "ds_config: a list": Bad("train.ds_config: 'ds.json'", ZERO3, text("ds.json", "[]")),
    "ds_config: not asked for": Bad("train.ds_config: 'ds.json'",
        "--train.sharding auto --train.ds_config ds.json", ds(), says="sharding zero3"),
    "ds_config: stage 2": Bad("train.ds_config: zero_optimization.stage: 2", ZERO3, ds(zero={"stage": 2})),
    "ds_config: no section": Bad("train.ds_config: zero_optimization: 3", ZERO3,
        text("ds.json", '{"zero_optimization": 3}')),
    "ds_config: an optimizer": Bad("train.ds_config: optimizer: {'type': 'AdamW'}", ZERO3,
        ds(optimizer={"type": "AdamW"})),
    "ds_config: a schedule": Bad("train.ds_config: scheduler: {}", ZERO3, ds(scheduler={})),
    "ds_config: clipping": Bad("train.ds_config: gradient_clipping: 1.0", ZERO3, ds(gradient_clipping=1.0)),
    "ds_config: another batch": Bad("train.ds_config: train_batch_size: 24", ZERO3, ds(train_batch_size=24)),
    "ds_config: another micro-batch": Bad("train.ds_config: train_micro_batch_size_per_gpu: 3", ZERO3,
        ds(train_micro_batch_size_per_gpu=3)),
    "ds_config: fp16": Bad("train.ds_config: fp16.enabled: True", ZERO3, ds(fp16={"enabled": True})),
    "ds_config: float32": Bad("train.ds_config: bf16.enabled: False", ZERO3, ds(bf16={"enabled": False})),
    "ds_config: bf16 is none": Bad("train.ds_config: bf16: True", ZERO3, ds(bf16=True), says="expected a section"),
    "ds_config: disks": Bad("train.ds_config: zero_optimization.offload_param.device: 'nvme'", ZERO3,
        ds(zero={"offload_param": {"device": "nvme"}})),
    "ds_config: uneven groups": Bad("train.ds_config: zero_optimization.zero_hpz_partition_size: 3", ZERO3,
        ds(zero={"zero_hpz_partition_size": 3})),
    "ds_config: unknown key": Bad("train.ds_config: zero_optimization.stage3_prefetch: 1", ZERO3,
        ds(zero={"stage3_prefetch": 1})),
    "ds_config: no number": Bad("train.ds_config: zero_optimization.stage3_max_live_parameters: 'many'", ZERO3,
        ds(zero={"stage3_max_live_parameters": "many"})),
    "ds_config: its own course": Bad("train.ds_config: curriculum_learning: {'enabled': True}", ZERO3,
        ds(curriculum_learning={"enabled": True})),
    # ---- output_dir and resume
    "output_dir: another run": Bad("train.output_dir: 'run'", spoil=run_of(), says="--train.resume auto"),
    "output_dir: another recipe": Bad("optim.rank: 4", "--train.resume auto", run_of(optim__rank=3),
        says="expected 3, as the run"),
    "output_dir: another version": Bad("train.resume: 'auto'", "--train.resume auto", run_of(optim__rnk=3),
                                       says="not one of this version"),
    "output_dir: no recipe": Bad("train.resume: 'auto'", "--train.resume auto", text("run/config.yaml", "a: [")),
    "output_dir: a file outside": Bad("train.resume: 'run/checkpoints/step-3'", STEP,
                                      saved(renamed("../../../train.jsonl"))),
    "output_dir: any file": Bad("train.resume: 'run/checkpoints/step-3'", STEP,
                                saved(renamed("/etc/passwd"))),
    "output_dir: a link": Bad("train.resume: 'run/checkpoints/step-3'", STEP,
                              saved(lambda manifest: manifest, link=True)),
    "output_dir: no manifest": Bad("train.resume: 'run/checkpoints/step-3'", STEP,
                                   saved(lambda manifest: [])),
    "processes: uneven": Bad("train.global_batch_size: 13", "--train.global_batch_size 13 --train.micro_batch_size 1",
                             says="expected a multiple of 2, train.micro_batch_size x 2 ranks"),
    "tracker: not installed": Bad("log.trackers: 'swanlab'", "--log.trackers [swanlab]", says="install swanlab"),
    "steps: a warm-up beyond them": Bad("optim.warmup_steps: 2", says="number of steps, 1",
                                        spoil=recipe_text(
        MINIMUM + "optim: {rank: 4, warmup_steps: 2}\nsampling: {gamma: 1}")),
}  # fmt: skip


def tree(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything below a folder: size, time of the last change and content by name."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (about.st_size if content else 0, about.st_mtime_ns, content)
    return found


def lay_out(bad: Bad, inputs: Path, folder: Path) -> Path:
    """What a user has, spoiled."""
    shutil.copytree(inputs, folder)
    (folder / "r.yaml").write_text(config.to_yaml(recipe(Path("."), Path("run"))))
    if bad.spoil is not None:
        bad.spoil(folder)
    return folder


@contextlib.contextmanager
def within(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def judge(bad: Bad, code: int, err: str, before: Any, folder: Path) -> None:
    """One line with key and value, exit code 2, nothing written."""
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"ows-ds: error: {bad.line}"), err
    assert " is invalid: " in err
    assert bad.says in err
    assert err.removesuffix("\n").isprintable()
    assert tree(folder) == before


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = SETTINGS[name]
    folder = lay_out(bad, inputs, tmp_path / "user")
    before = tree(tmp_path)
    with within(folder):
        code = main(bad.argv)
    judge(bad, code, capfd.readouterr().err, before, tmp_path)


def refusal(rank: int, world_size: int, argv: list[str], folder: Path) -> tuple[int, str]:
    """Exit code, and what the process writes to its standard error, libraries included."""
    sys.stderr.flush()
    kept = os.dup(2)
    path = folder.with_name(f"{folder.name}.{rank}.err")
    with path.open("w") as file, within(folder):
        os.dup2(file.fileno(), 2)
        try:
            code = main(argv)
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
    return code, path.read_text()


@pytest.mark.parametrize("name", [name for name in LATER if not name.startswith(("ds_config", "processes"))])
def test_one_process(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])  # a run changes it
    bad = LATER[name]
    folder = lay_out(bad, inputs, tmp_path / "user")
    capfd.readouterr()
    before = tree(tmp_path)
    with within(folder):
        code = main(bad.argv)
    judge(bad, code, capfd.readouterr().err, before, tmp_path)


# every kind; the others take a second each
OFTEN = (
    "ds_config",
    "processes",
    "model: a file",
    "model: too n",
    "scores: a",
    "data: no a",
    "output_dir: a f",
    "st",
    "eval: no",
)


@pytest.mark.parametrize(
    "name", [name if name.startswith(OFTEN) else pytest.param(name, marks=pytest.mark.slow) for name in LATER]
)
def test_two_processes_say_the_same(name: str, pools: Pools, inputs: Path, tmp_path: Path) -> None:
    bad = LATER[name]
    folder = lay_out(bad, inputs, tmp_path / "user" / "here")
    before = tree(tmp_path / "user" / "here")
    first, second = pools(2).run(refusal, bad.argv, folder)
    assert first == second
    judge(bad, *first, before, folder)


def test_too_few_gpus(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each process of the host says so, before it waits for the others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    bad = Bad("processes of this host: 2", says="at most 1 processes here, one for each GPU")
    folder = lay_out(bad, inputs, tmp_path / "user")
    before = tree(tmp_path)
    for rank in "01":
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        with within(folder):
            code = main(bad.argv)
        judge(bad, code, capfd.readouterr().err, before, tmp_path)


def test_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = tiny("llama", False)
    with pytest.raises(UserError, match="model: 'weights on the meta device' is invalid: load its weights first"):
        OWS(model, scores=[0.1, 0.2, 0.3], gamma=1, rank=4)
