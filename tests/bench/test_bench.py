"""`ows-ds bench time`, `memory` and `traffic`: what is measured, how it is counted and shown. No timings here."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ows_ds import tables
from ows_ds.bench import memory, run, time, traffic, worker
from ows_ds.bench import setting as settings
from ows_ds.bench.rivals import rival
from ows_ds.bench.setting import OURS, RIVALS, How, Setting, resolve
from ows_ds.bench.tracking import Tracker, peak
from ows_ds.bench.trial import Trial, batch_of, ours, sampled
from ows_ds.bench.workers import WorkerError, Workers
from ows_ds.config.settings import parse
from ows_ds.errors import UserError
from ows_ds.model.shapes import SHAPES, Shape
from ows_ds.planner import memory as planner
from ows_ds.tables import Table

TINY = resolve(
    Setting(hidden=32, heads=2, vocab=64, layers="2", tokens=16, rank=4, lora_rank=2, threads=1, device="cpu"), False
)


# ---- settings


def test_shapes_have_the_models_numbers_of_weights() -> None:
    """Parameters of LLaMA2 7B, 13B and 70B, from their checkpoints."""
    counts = {name: sum(settings.entries(shape)) for name, shape in SHAPES.items() if name.startswith("llama2")}
    assert counts == {"llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192}


def test_flops_of_the_limit() -> None:
    # hidden 4, MLP 8, vocabulary 10, one layer: 4*4*4 + 3*4*8 = 160 weights in matrices, 40 in the head
    assert settings.flops_of_limit(Shape(4, 8, 2, 2, 10, 1), 3) == 4 * 200 * 3 + 6 * 9 * 4


@pytest.mark.parametrize(
    ("given", "cuda", "expected"),
    [
        (Setting(), False, ("cpu", "float32", 4096, 11008, 32, 32, 1024, "1", 1)),
        (Setting(shape="llama2-70b", layers="all"), True, ("cuda", "bfloat16", 8192, 28672, 64, 8, 32000, "80", 80)),
        (Setting(layers="all", gamma=5), True, ("cuda", "bfloat16", 4096, 11008, 32, 32, 32000, "32", 5)),
        (Setting(hidden=2048), False, ("cpu", "float32", 2048, 5504, 16, 16, 1024, "1", 1)),
        (Setting(hidden=2048, vocab=9, device="cpu"), True, ("cpu", "float32", 2048, 5504, 16, 16, 9, "1", 1)),
    ],
)  # fmt: skip
def test_what_is_left_out_is_filled_in(given: Setting, cuda: bool, expected: tuple[Any, ...]) -> None:
    assert resolve(given, cuda).inside == (given.layers == "1")
    names = ("device", "dtype", *settings.WIDTHS, "layers", "gamma")
    assert tuple(getattr(resolve(given, cuda), name) for name in names) == expected


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (dict(tokens=0), "--tokens: 0 is invalid: expected an integer of at least 1"),
        (dict(layers="few"), "--layers: 'few' is invalid: expected an integer of at least 1, or all"),
        (dict(shape="gpt"), "--shape: 'gpt' is invalid: expected one of llama2-7b, llama2-13b, llama2-70b"),
        (dict(shape="llama2-7b", hidden=8), "--hidden: 8 is invalid: expected --shape or --hidden, not both"),
        (dict(gamma=2), "--gamma: 2 is invalid: expected at most 1, the number of layers"),
        (dict(hidden=64), "--rank: 128 is invalid: expected at most 64, the smallest side of a matrix"),
        (dict(hidden=64, heads=3), "--heads, --kv-heads: '3, 3' is invalid: expected --heads that share 64"),
        (dict(device="cuda"), "--device: 'cuda' is invalid: expected cpu: no GPU is to be seen"),
        (dict(model="nowhere"), "--model: 'nowhere' is invalid: expected the folder of a model of the LLaMA kind"),
        (dict(model="m", vocab=7), "--vocab: 7 is invalid: leave it out where --model is given"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(parse(Setting, given, "--"), False)
    assert str(caught.value).startswith(line)


def test_a_models_folder_brings_its_widths(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, '
        '"vocab_size": 49152, "num_hidden_layers": 30}'
    )
    found = resolve(Setting(model=str(tmp_path), gamma=5), False)
    assert (found.widths, found.gamma) == (Shape(576, 1536, 9, 3, 49152, 30), 5)


def test_lists_and_sweeps() -> None:
    assert settings.parse_methods(None, ("a", "b")) == ["a", "b"]
    assert settings.parse_methods("b, a", ("a", "b")) == ["b", "a"]
    assert settings.parse_sweep("gamma=1, 2,4") == ("gamma", [1, 2, 4])
    for wrong in ("a,c", "", "a,a"):
        with pytest.raises(UserError, match="--methods"):
            settings.parse_methods(wrong, ("a", "b"))
    for wrong in ("tau=1", "gamma", "gamma=", "rank=0", "rank=1.5", "rank=-1"):
        with pytest.raises(UserError, match="--sweep"):
            settings.parse_sweep(wrong)
    swept = settings.points(Setting(layers="4"), ("gamma", [1, 4]), False)
    assert [one.gamma for one in swept] == [1, 4]
    with pytest.raises(UserError, match="--gamma"):
        settings.points(Setting(layers="4"), ("gamma", [1, 5]), False)


@pytest.mark.parametrize(
    "given", [{"rounds": 0}, {"steps": 0}, {"warm_up": -1}, {"world_size": 1}, {"output": __file__}]
)
def test_how_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        settings.check(parse(How, given, "--"))


def test_the_limit_is_as_deep_as_what_it_is_compared_with() -> None:
    some = TINY.model_copy(update={"gamma": 1})
    assert (settings.limits(TINY), settings.limits(some)) == (["limit"], ["limit", "limit-lean"])
    assert [settings.limit_of(name, TINY) for name in ("ows", "ows-lean")] == ["limit", "limit"]
    assert [settings.limit_of(name, some) for name in ("ows", "ows-lean")] == ["limit", "limit-lean"]


def test_all_processes_at_once_only_where_they_fit() -> None:
    one = resolve(Setting(), False)
    assert settings.estimate(one, "full") - settings.estimate(one, "ows") > 202_000_000 * 16
    need = sum(settings.estimate(one, name) for name in ("limit", "ows"))
    assert time.fit_at_once(one, ["limit", "ows"], int(need / 0.79))
    assert not time.fit_at_once(one, ["limit", "ows"], int(need / 0.81))


# ---- trials


def test_every_method_takes_steps_in_the_same_layers() -> None:
    some = TINY.model_copy(update={"gamma": 1})
    layers = sampled(some)
    for name in OURS:
        trial = ours(some, name, 1)
        trial.step()
        method = trial.state
        assert method.steps == 1
        if name in ("ows", "ows-lean", "lisa"):
            assert trial.spec is not None
            assert (method.layer_set, trial.spec.layer_set) == (layers, layers)
        if trial.refresh is None:
            assert name not in ("ows", "ows-lean", "galore")
            continue
        before = {key: value.clone() for key, value in method.active.projectors.items()}
        assert before
        trial.step()
        assert all(torch.equal(before[key], value) for key, value in method.active.projectors.items())
        assert trial.refresh() == 2
        assert not any(torch.equal(before[key], value) for key, value in method.active.projectors.items())
        after = dict(method.active.projectors)
        trial.step()
        assert all(after[key] is value for key, value in method.active.projectors.items())


def test_rivals_train_what_they_say() -> None:
    pytest.importorskip("peft")
    pytest.importorskip("galore_torch")
    some = TINY.model_copy(update={"gamma": 1})
    layer = f"layers.{sampled(some)[0]}."
    for name in (name for name in RIVALS if name != "deepspeed"):
        trial = rival(some, name, 1)
        before = {key: value.detach().clone() for key, value in trial.model.named_parameters()}
        trial.step()
        trial.step()
        changed = {key for key, value in trial.model.named_parameters() if not torch.equal(value, before[key])}
        kept = before.keys() - changed
        if name == "peft-lora":
            assert changed
            assert all("lora_" in key for key in changed)
        elif name == "lmflow-lisa":
            assert kept
            assert all("layers." in key and layer not in key for key in kept)
            assert any(layer in key for key in changed)
        else:
            assert not kept
        assert trial.first_refreshes == (name == "galore_torch")


def test_the_limit_differentiates_activations_alone() -> None:
    some = TINY.model_copy(update={"gamma": 1, "inside": False})
    trial = rival(some, "limit", 1)
    reached: list[str] = []
    for name, module in trial.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(lambda *_, name=name: reached.append(name))
    trial.step()
    assert all(parameter.grad is None for parameter in trial.model.parameters())
    assert {name.split(".")[2] for name in reached if "layers" in name} == {"0", "1"}
    trial = rival(some, "limit-lean", 1)
    reached.clear()
    for name, module in trial.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(lambda *_, name=name: reached.append(name))
    trial.step()
    assert min(int(name.split(".")[2]) for name in reached if "layers" in name) == sampled(some)[0]


def test_inside_a_model_every_method_runs_down_to_the_input() -> None:
    for inside in (True, False):
        trial = ours(TINY.model_copy(update={"inside": inside}), "lora", 1)
        reached: list[Any] = []
        [module] = [m for name, m in trial.model.named_modules() if name.endswith("layers.0.self_attn.q_proj")]
        note = functools.partial(lambda found, _, grads, __: found.append(grads[0]), reached)
        module.register_full_backward_hook(note)
        trial.step()
        assert len(reached) == 1
        assert (reached[0] is not None) == inside


def test_a_missing_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    with pytest.raises(UserError) as caught:
        rival(TINY, "galore_torch", 1)
    assert worker.reason(caught.value) == "galore-torch is not installed"
    assert worker.reason(ValueError("one\ntwo")) == "ValueError: one"
    assert worker.reason(torch.OutOfMemoryError("much")) == "out of memory"


def test_processes_have_different_tokens_every_time_the_same() -> None:
    assert torch.equal(batch_of(TINY)["input_ids"], batch_of(TINY)["input_ids"])
    assert not torch.equal(batch_of(TINY)["input_ids"], batch_of(TINY, 1)["input_ids"])


# ---- counting


def test_medians_ratios_and_shares() -> None:
    answers = [
        {"seconds": [], "refresh": [7.0, 1]},
        {"seconds": [2.0, 4.0], "refresh": None},
        {"seconds": [3.0, 30.0, 3.0], "refresh": [11.0, 2]},
    ]
    found = time.summarize(answers, 100)
    assert found["seconds"] == {"min": 2.0, "median": 3.0, "iqr": 1.0}
    assert found["refresh"]["median"] == 4.5  # of 7 - 3 and 11 - 2 * 3
    assert found["refresh_share"] == pytest.approx(4.5 / (4.5 + 300))
    assert found["rounds"] == [[2.0, 4.0], [3.0, 30.0, 3.0]]
    assert time.summarize([{"seconds": [1.0], "refresh": None}], 100)["refresh_share"] is None


def test_the_peak_is_found_where_the_sum_is_largest() -> None:
    kinds = {0: "weights", 1: "activations", 2: "gradients", 3: "buffers"}
    events = [(0, 10), (1, 5), (2, 3), (1, -5), (3, 7), (3, -7), (2, -3)]
    expected = {"weights": 10, "gradients": 3, "optimizer": 0, "activations": 0, "buffers": 7}
    assert peak(events, kinds) == expected
    assert peak([], {}) == dict.fromkeys(expected, 0)


def test_live_bytes_are_counted_by_component() -> None:
    model = nn.Linear(256, 512, bias=False)
    adam = torch.optim.AdamW(model.parameters())
    inputs = torch.randn(8, 256)

    def step(forward: Any) -> None:
        with forward():
            loss = model(inputs).square().mean()
        loss.backward()
        adam.step()
        adam.zero_grad()

    weight = 256 * 512 * 4
    for _ in range(2):  # moments are made inside the first step, and there before the second one
        tracker = Tracker(model, [p.data for p in model.parameters()], adam)
        with tracker:
            step(tracker.forward)
        tracker.close()
        found = tracker.peak()
        # at the peak, inside AdamW, the loss is all that is left of the forward pass
        assert [found[kind] for kind in ("weights", "gradients", "activations")] == [weight, weight, 4]
    assert found["optimizer"] == 2 * weight + 4  # and the count of steps
    tracker = Tracker(model, [p.data for p in model.parameters()], adam)
    with tracker, tracker.forward():
        outputs = model(inputs)
    assert tracker.peak()["activations"] == outputs.nbytes == 8 * 512 * 4


def test_what_a_kernel_makes_within_itself_is_not_counted() -> None:
    """gloo's reduce-scatter gives out views of a copy of its own."""
    tracker = Tracker(nn.Linear(1, 1), [], None)
    with tracker, tracker.forward():
        with _disable_current_modes():
            copy = torch.zeros(1000)
        parts = copy.split(500)
        kept = parts[0].clone()
    assert tracker.peak()["activations"] == kept.nbytes


def test_memory_of_a_method_is_what_the_planner_says_it_keeps() -> None:
    """Coordinates, moments and masters to the byte; activations are the planner's own business."""
    for name in ("ows", "lisa", "full"):
        trial = ours(TINY, name, 1)
        trial.step()
        answer = worker.answer_memory(trial, TINY)
        assert trial.spec is not None
        kept = planner.state(trial.spec)
        assert answer["step"]["weights"] == kept["weights"]
        optimizer = sum(kept[part] for part in ("coordinates", "moments", "masters", "projectors"))
        assert 0 <= answer["step"]["optimizer"] - optimizer < 4096  # counts of steps
        assert answer["step"]["gradients"] >= kept["gradients"]
        assert (answer["refresh"] is not None) == (name == "ows")


def test_what_a_worker_answers_to_time() -> None:
    taken: list[str] = []

    def refresh() -> int:
        taken.append("refresh")
        return 2

    trial = Trial(None, [], lambda: taken.append("step"), refresh=refresh)
    answer = worker.answer_time(trial, TINY, 1, 3)
    assert taken == ["step"] * 4 + ["refresh"]
    assert (len(answer["seconds"]), answer["refresh"][1]) == (3, 2)


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(WorkerError, match=r"optim\.rank 1000: expected at most"):
        Workers(TINY.model_copy(update={"rank": 1000}), "ows")


def test_a_worker_that_takes_too_long_is_ended() -> None:
    with pytest.raises(WorkerError, match="it took too long"):
        Workers(TINY, "ows", seconds=0)


# ---- tables

TIMES: dict[str, Any] = {
    "limit": {"seconds": {"min": 0.9, "median": 1.0, "iqr": 0.1}, "refresh": None, "refresh_share": None,
              "rounds": [[1.0]], "of_limit": 1.0, "flops": 8, "flops_of_limit": 1.0, "tokens_per_second": 512.0},
    "ows": {"seconds": {"min": 0.9, "median": 1.0456, "iqr": 0.1}, "refresh": {"min": 1, "median": 0.5, "iqr": 0},
            "refresh_share": 0.0123, "rounds": [[1.0]], "of_limit": 1.0456, "flops": 9, "flops_of_limit": 1.125,
            "tokens_per_second": 489.67},
    "full": {"failed": "out of memory"},
}  # fmt: skip
PARTS = {"weights": 2**30, "gradients": 0, "optimizer": 2**29, "activations": 0, "buffers": 0}
MEMORIES: dict[str, Any] = {
    "ows": {"step": PARTS, "step_planned": 2**30, "step_allocated": None, "refresh": PARTS | {"buffers": 2**33},
            "refresh_planned": 2**33, "refresh_allocated": None},
    "full": {"failed": "out of memory"},
}  # fmt: skip
SENT = {"gradients": 2**20, "coordinates": 2**20}
TRAFFICS: dict[str, Any] = {
    "ows": {"step": SENT, "step_planned": SENT, "refresh": {"agree": 74, "projectors": 2**20},
            "refresh_planned": {"projectors": 2**20}, "full_rank": 2**23},
    "full": {"failed": "out of memory"},
}  # fmt: skip


def test_rows_of_the_tables() -> None:
    assert time.tables(TIMES, TINY)[0].rows == [
        ["limit", "1,000", "1.000", "1.000", "512.0", "n/a", "n/a"],
        ["ows", "1,046", "1.046", "1.125", "489.7", "500", "1.23"],
        ["full", "failed: out of memory"],
    ]
    bf16 = resolve(Setting(shape="llama2-7b", layers="all", dtype="bfloat16", device="cpu", vocab=32000), False)
    assert time.tables(TIMES, bf16, "NVIDIA H100 80GB")[0].rows[0][-1] == "1.4"  # 4 x 6.6 G x 512 flops in a second
    assert memory.tables(MEMORIES, TINY)[0].rows == [
        ["ows", "1.00", "0.00", "0.50", "0.00", "0.00", "1.50", "9.50", "8.00"],
        ["full", "failed: out of memory"],
    ]
    sums, parts = traffic.tables(TRAFFICS, TINY)
    assert sums.rows == [["ows", "2.0", "2.0", "0.250", "1.0", "1.0"], ["full", "failed: out of memory"]]
    assert ["ows", "refresh", "agree", "74"] in parts.rows


def test_numbers() -> None:
    cells = [tables.number(v, 4) for v in (None, 0.0, 1234.5, 12.3456, 0.00123456)]
    assert cells == ["n/a", "0.0000", "1,234", "12.35", "0.001235"]
    assert tables.size_in([2**32, None])[0] == "GiB"
    assert tables.size_in([])[0] == "MiB"


@pytest.mark.parametrize(("what", "results"), [("time", TIMES), ("memory", MEMORIES), ("traffic", TRAFFICS)])
def test_files_are_written_for_a_point_and_for_a_sweep(tmp_path: Path, what: str, results: dict[str, Any]) -> None:
    summary = {
        "format": 1, "date": "2026-01-01", "command": "ows-ds bench", "processes": 1, "hardware": "a machine",
        "versions": {"torch": "2"}, "what": what, "setting": TINY.model_dump(), "sweep": None,
        "points": [{"value": None, "results": results}],
    }  # fmt: skip
    swept = summary | {"sweep": "gamma", "points": [{"value": value, "results": results} for value in (1, 2)]}
    for name, one in (("one", summary), ("sweep", swept)):
        shown, notes = run.make_tables(one), run.make_notes(one)
        run.write(one, shown, notes, tmp_path / name)
        assert json.loads((tmp_path / name / f"{what}.json").read_text()) == json.loads(json.dumps(one))
        text = (tmp_path / name / f"{what}.md").read_text()
        assert "`ows-ds bench`" in text
        assert "out of memory" in text
        assert "| ows |" in text
        assert (tmp_path / name / f"{what}.png").stat().st_size > 5000
        printed = tables.terminal(shown, notes)
        assert "out of memory" in printed
        assert max(map(len, printed.splitlines())) <= 80
    assert run.make_tables(swept)[0].head == ["method", "gamma 1", "gamma 2"]


def test_a_row_may_span_the_columns() -> None:
    lines = tables.markdown(Table("t", ["a", "b", "c"], [["x", "failed: y"]]))
    assert lines == ["| a | b | c |", "| --- | ---: | ---: |", "| x | failed: y |  |"]
