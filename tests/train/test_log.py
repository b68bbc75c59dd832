"""What a run records and shows."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ows_ds.config import Log, Model, Recipe, Train
from ows_ds.errors import UserError
from ows_ds.importance.plot import plot
from ows_ds.importance.scores import Scores
from ows_ds.train.log import RunLog, as_json, keep_until
from ows_ds.train.screen import numbered, strip
from ows_ds.train.trackers import PICTURE, check_trackers, picture


def recipe(progress: Any = "auto", trackers: tuple[str, ...] = ()) -> Recipe:
    return Recipe(
        model=Model(path="m"), train=Train(output_dir="o"), log=Log(trackers=list(trackers), progress=progress)
    )


QUIET = recipe("none")


def record(step: int, **other: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2.0 / max(step, 1),
        "lr": 3e-4,
        "grad_norm": 0.5,
        "sampled_layers": [0, 3] if step <= 2 else [1],
        "tokens": 64,
        "tokens_per_second": 1234.5,
        "step_seconds": 0.1,
        "peak_memory_bytes": 42_500_000_000,
        "comm_bytes": {"all_reduce": 7, "broadcast": 1},
        **other,
    }


def terminal(is_terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=is_terminal, width=80, _environ={"TERM": "xterm"}), file


def test_one_json_object_a_step(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", 3, 4, True, QUIET) as log:
        for step in (1, 2, 3):
            log.step(record(step))
            lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
            assert json.loads(lines[-1]) == record(step)  # there at once, for whoever follows the file
    assert len(lines) == 3


def test_a_full_disk_loses_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, 4, 4, True, recipe("plain")) as log:
        file, room = log._file, [10_000]

        class Full:
            """Takes ``room`` bytes more."""

            def write(self, content: bytes) -> int:
                if not room[0]:
                    raise OSError(28, "No space left on device")
                taken = file.write(content[: room[0]])
                room[0] -= taken
                return taken

            def close(self) -> None:
                file.close()

        log._file = Full()  # type: ignore[assignment]
        log.step(record(1))
        room[0] = 20  # a part of a line
        log.step(record(2))
        log.step(record(3))
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == 20
        room[0] = 10_000
        log.step(record(4))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record(step) for step in (1, 2, 3, 4)]
    assert capsys.readouterr().out.count("metrics.jsonl is behind until it can be written again") == 1


def test_a_tracker_that_fails_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, 3, 4, True, recipe("plain", ("tensorboard",)), Accelerator(cpu=True)) as log:
        assert log._trackers is not None
        [tracker] = log._trackers.active

        def broken(*args: Any, **more: Any) -> None:
            raise RuntimeError("the service is gone")

        log.step(record(1))
        monkeypatch.setattr(tracker, "log", broken)
        log.step(record(2))
        log.step(record(3))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert capsys.readouterr().out.count("tensorboard gets no more records (") == 1


def test_numbers_that_json_cannot_write() -> None:
    assert as_json({"loss": float("nan"), "grad_norm": float("-inf"), "lr": 1.0}) == (
        '{"loss": null, "grad_norm": null, "lr": 1.0, "nonfinite": {"loss": "nan", "grad_norm": "-inf"}}'
    )
    assert as_json({"loss": None, "skipped": True}) == '{"loss": null, "skipped": true}'
    assert as_json({"update_norm": {"3": 0.5, "4": float("inf")}}) == (
        '{"update_norm": {"3": 0.5}, "nonfinite": {"update_norm/4": "inf"}}'
    )


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    text = "".join(as_json(record(step)) + "\n" for step in (1, 2, 3, 4))
    metrics.write_text(text + '{"step": 5, "lo')
    with RunLog(tmp_path, 6, 4, True, QUIET, start_step=2) as log:
        log.step(record(3))
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3]
    # Byte for byte what an undisturbed run would have written.
    assert text.startswith(metrics.read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_metrics_file_with_nothing_to_drop_is_left_alone(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert keep_until(metrics, 3) == []
    metrics.write_text(as_json(record(1)) + "\n")
    before = metrics.stat().st_ino
    assert keep_until(metrics, 1) == [record(1)]
    assert metrics.stat().st_ino == before
    assert keep_until(metrics, 0) == []
    assert metrics.read_text() == ""


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", 3, 4, False, recipe()) as log:
        log.step(record(1))
        log.event("hello")
    assert not (tmp_path / "run").exists()


def test_a_strip_of_layers() -> None:
    assert strip([0, 3], 5, "#", ".") == "#..#."
    assert strip([], 5, "#", ".") == "....."
    assert strip([0, 1, 79], 80, "#", ".") == "#" + "." * 38 + "#"  # two layers a cell
    assert [len(strip([], layers)) for layers in (32, 64, 65, 126)] == [32, 64, 33, 63]


def test_layers_in_words() -> None:
    assert numbered([0, 4, 5, 6, 7, 9, 10]) == "0,4-7,9,10"
    assert numbered(range(80)) == "0-79"
    assert numbered([]) == "none"


def test_the_picture_of_sampled_layers() -> None:
    width, cell = PICTURE
    image = picture([(1, (0,)), (3, (1, 2))], n_layers=3, last_step=4)
    assert image.shape == (3 * cell, width, 3)
    on = [
        [bool(image[layer * cell + 1, x, 0] == 31) for x in (0, width // 2 - 1, width // 2, -1)] for layer in range(3)
    ]
    assert on == [[True, True, False, False], [False, False, True, True], [False, False, True, True]]
    assert picture([], 2, 0).shape == (2 * cell, width, 3)


def test_plain_lines_say_what_the_bar_says(tmp_path: Path) -> None:
    console, file = terminal(False)
    with RunLog(tmp_path, 200, 4, True, recipe(), console=console) as log:
        log.event("step 0: held-out loss 2.5")
        for step in range(1, 201):
            log.step(record(step, loss=None) if step == 200 else record(step))
    lines = file.getvalue().splitlines()
    assert lines[0] == "step 0: held-out loss 2.5"
    assert lines[1].startswith(
        "step 1/200  loss 2.0000 (mean 2.0000)  lr 3.00e-04  1,234 tokens/s  peak 39.6 GiB  layers 0,3 of 4  0:00:0"
    )
    assert lines[1].endswith(" left")
    assert lines[-1].startswith("step 200/200  loss skipped")
    assert 50 <= len(lines) <= 54
    assert "\x1b" not in file.getvalue()


def test_the_bar_fits_80_columns(tmp_path: Path) -> None:
    console, file = terminal(True)
    with RunLog(tmp_path, 100_000, 80, True, recipe(), console=console) as log:
        log.event("an [event]")
        log.step(record(99_999, loss=12.3456, tokens_per_second=1_234_567.0, sampled_layers=[0, 79], epoch=1.25))
    out = file.getvalue()
    assert "an [event]" in out
    assert out.endswith("\x1b[?25h")  # the cursor is back
    shown = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", out)]
    assert max(map(len, shown)) <= 80
    bar, numbers, layers = shown[-4:-1]
    assert re.fullmatch(r"step 99999/100000, epoch 1.25 ━+╸? 0:00:00 gone, 0:00:00 left", bar.rstrip())
    assert numbers.rstrip() == "loss 12.3456 (mean 12.3456)  lr 3.00e-04  1,234,567 tokens/s  peak 39.6 GiB"
    assert layers.rstrip() == "layers █" + "·" * 38 + "█"


def test_nothing_is_shown_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, 3, 4, True, QUIET) as log:
        log.event("hello")
        log.step(record(1))
        assert capsys.readouterr() == ("", "")
        log.warn("a checkpoint could not be\nwritten")  # nobody wants that hidden
    assert capsys.readouterr() == ("a checkpoint could not be written\n", "")


@pytest.mark.parametrize("progress", ["plain", "rich"])
def test_what_is_shown_does_not_steer_the_terminal(tmp_path: Path, progress: Any) -> None:
    console = Console(file=io.StringIO(), force_terminal=progress == "rich", width=200)
    with RunLog(tmp_path, 3, 4, True, recipe(progress), console=console) as log:
        log.event("resuming from runs/\x1b]0;title\a\nstep 9/9")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "resuming from runs/\\x1b]0;title\\x07 step 9/9" in shown
    assert "\x1b]0" not in shown


def test_tensorboard_gets_scalars_and_the_picture(tmp_path: Path) -> None:
    log_only = recipe("none", ("tensorboard",))
    plot([("m", Scores("outlier", 13.0, "0" * 64, (0.1, 0.2, 0.3, 0.4), 1))], tmp_path / "scores.png")
    with RunLog(tmp_path, 4, 4, True, log_only, Accelerator(cpu=True)) as log:
        for step in (1, 2, 3, 4):
            moved = {} if step % 2 else {"update_norm": {"3": 1.0 / step}}
            log.step(record(step, loss=None if step == 2 else 1.0, **moved))
    log.close()
    assert [p.name.startswith("events.out.tfevents") for p in (tmp_path / "tensorboard").iterdir()] == [True]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "comm_bytes/all_reduce", "sampled_layers/count"} <= set(
        events.Tags()["scalars"]
    )
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (3, 1.0), (4, 1.0)]
    assert [e.value for e in events.Scalars("sampled_layers/count")] == [2, 2, 1, 1]
    assert [(e.step, e.value) for e in events.Scalars("update_norm/3")] == [(2, 0.5), (4, 0.25)]
    assert [e.step for e in events.Images("sampled_layers")] == [1, 3, 4]
    assert [(e.step, e.width, e.height) for e in events.Images("scores")] == [(0, 1080, 540)]
    [text] = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("recipe/text_summary")]
    assert "| optim.betas | [0.9, 0.999] |" in text


class Lines(GeneralTracker):
    """A tracker of somebody else's: each call is a line of a file."""

    name = "dvclive"
    requires_logging_directory = True
    main_process_only = True

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.path = Path(logging_dir) / f"{run_name}.lines"

    @property
    def tracker(self) -> Path:
        return self.path

    def write(self, *line: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.write("recipe", values)

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        self.write("log", step, values)

    def log_images(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        self.write("images", step, {name: image.shape for name, image in values.items()}, more)

    def log_table(self, table_name: str, columns: list[str], data: list[list[str]], step: int) -> None:
        self.write("table", step, table_name, columns, data)

    def finish(self) -> None:
        self.write("finish")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> type[Lines]:
    """`Lines` in the place of one of Accelerate's own trackers."""
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "dvclive", Lines)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD, LoggerType.DVCLIVE])
    return Lines


def test_any_tracker_of_accelerate_gets_the_same(tmp_path: Path, lines: type[Lines]) -> None:
    both = recipe("none", ("tensorboard", "dvclive"))
    check_trackers(both.log)
    with RunLog(tmp_path, 3, 4, True, both, Accelerator(cpu=True)) as log:
        log.step({**record(0), "eval_loss": 2.5})
        log.step(record(1, projector_energy={"0": 0.75}))
        log.step(record(3, update_norm={"3": 0.5}))
    got = [json.loads(line) for line in (tmp_path / "ows_ds.lines").read_text().splitlines()]
    kinds = [line[0] for line in got]
    assert kinds == ["recipe", "log", "log", "images", "log", "images", "images", "finish"]
    assert got[0][1]["optim.rank"] == 128
    assert got[0][1]["optim.betas"] == "[0.9, 0.999]"
    assert got[0][1]["train.steps"] == "null"
    assert (got[1][1], got[1][2]["eval_loss"]) == (0, 2.5)
    assert (got[2][1], got[2][2]["projector_energy/0"], got[2][2]["comm_bytes/broadcast"]) == (1, 0.75, 1)
    assert (got[4][1], got[4][2]["update_norm/3"]) == (3, 0.5)
    assert all(isinstance(value, float | int) for line in got if line[0] == "log" for value in line[2].values())
    assert got[-2] == ["images", 3, {"sampled_layers": [1, 32, 900, 3]}, {}]
    assert (tmp_path / "tensorboard").is_dir()


def test_trackers_that_take_text_get_the_samples(
    tmp_path: Path, lines: type[Lines], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = recipe("plain", ("tensorboard", "dvclive"))
    with RunLog(tmp_path, 3, 4, True, both, Accelerator(cpu=True)) as log:
        log.step({**record(0), "samples": [["a|b", "1\n2"]]})
        monkeypatch.setattr(lines, "log_table", lambda *given, **more: 1 / 0)
        log.step(record(1, samples=[["a|b", "2"]]))
        log.step(record(2, samples=[["a|b", "3"]]))
    got = [json.loads(line) for line in (tmp_path / "ows_ds.lines").read_text().splitlines()]
    assert [line for line in got if line[0] == "table"] == [
        ["table", 0, "samples", ["message", "answer"], [["a|b", "1\n2"]]]
    ]
    assert [line[1] for line in got if line[0] == "log"] == [0, 1, 2]
    assert capsys.readouterr().out.count("dvclive gets no more text (division by zero)") == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("samples/text_summary")]
    assert texts[0] == (0, "| message | answer |\n| --- | --- |\n| a\\|b | 1<br>2 |")
    assert [step for step, _ in texts] == [0, 1, 2]


def test_a_tracker_that_fails_at_images_gets_the_numbers(
    tmp_path: Path, lines: type[Lines], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lines, "log_images", lambda *given, **more: 1 / 0)
    with RunLog(tmp_path, 3, 4, True, recipe("plain", ("dvclive",)), Accelerator(cpu=True)) as log:
        log.step(record(1))
        log.step(record(3))
    kinds = [json.loads(line)[0] for line in (tmp_path / "ows_ds.lines").read_text().splitlines()]
    assert kinds == ["recipe", "log", "log", "finish"]
    assert capsys.readouterr().out.count("dvclive gets no more images (division by zero)") == 1


def test_a_tracker_that_does_not_start_is_named(
    tmp_path: Path, lines: type[Lines], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: Lines) -> None:
        raise RuntimeError("no API key\nLog in first.")

    monkeypatch.setattr(lines, "start", start)
    with pytest.raises(UserError, match=r"log\.trackers: \['dvclive'\] is invalid: make it start \(no API key\), or"):
        RunLog(tmp_path, 3, 4, True, recipe("none", ("dvclive",)), Accelerator(cpu=True))
    assert not (tmp_path / "metrics.jsonl").exists()  # nothing that would be taken for a run


def test_wandb_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, where it is installed, writes its own file."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with RunLog(tmp_path / "run", 2, 4, True, recipe("plain", ("wandb",)), Accelerator(cpu=True)) as log:
        log.step(record(1))
        log.step(record(2, update_norm={"3": 0.5}))
        assert [tracker.name for tracker in log._trackers.active] == ["wandb"]
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert all(text in content for text in (b"update_norm", b"tokens_per_second", b"optim.rank"))
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/sampled_layers_*.png"))) == 2


def test_a_tracker_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match=r"log\.trackers: 'swanlab' is invalid: install swanlab"):
        check_trackers(Log(trackers=["tensorboard", "swanlab"]))
