"""OWS in transformers' `Trainer`, and in what is made of it, such as TRL's `SFTTrainer`.

    class OWSSFTTrainer(OWSTrainerMixin, SFTTrainer): ...  # the mixin first

    trainer = OWSSFTTrainer(model, args, train_dataset=rows, ows={"rank": 128})
    trainer.train()

Data, schedule, logs, folders and callbacks stay the Trainer's. It meets OWS in a few places:

    what the Trainer calls           what happens here
    accelerator.prepare(model)       nothing: OWS averages gradients itself, so nothing wraps the model
    get_batch_samples                sets how many micro-batches the coming step has
    accelerator.backward(loss)       OWS.backward
    accelerator.clip_grad_norm_      OWS.reduce, the norm; OWS clips by itself
    optimizer.step()                 OWS.step, or OWS.skip where the norm is not finite
    save_model                       merged weights, while the coordinates stay as they are
    checkpoint-N/                    also has a folder `ows`: a checkpoint as ows_ds.checkpoint writes it
    the end of training              OWS.close: the model is a plain one again

A Trainer that was already made cannot be changed without changing its class under the user's hands, and cannot be made
again from its attributes (TRL's have prepared their data by then): so there is no function that takes one.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import re
import socket
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ows_ds import checkpoint
from ows_ds.compat.transformers import CheckpointHooks
from ows_ds.config import OWSConfig, parse
from ows_ds.distributed.communicator import fail_together, join
from ows_ds.distributed.ds_config import check_by_deepspeed, check_config, resolve_config
from ows_ds.distributed.launch import per_host
from ows_ds.distributed.weights import Replicated, Weights
from ows_ds.distributed.zero3 import Zero3
from ows_ds.errors import UserError
from ows_ds.importance.outliers import outlier_scores
from ows_ds.importance.scores import Scores
from ows_ds.integrations.refusals import check
from ows_ds.model.fingerprint import fingerprint
from ows_ds.model.layers import find_layers
from ows_ds.model.pretrained import DTYPES
from ows_ds.optim.ows import OWS
from ows_ds.train import resume
from ows_ds.train.export import save_weights

FOLDER = "ows"  # in a checkpoint-N
FROM_ARGUMENTS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "accumulation": "gradient_accumulation_steps",
}  # settings of OWS that TrainingArguments has

# events at which coordinates can be merged; at the end of training they are for good
BETWEEN_STEPS = ("on_train_begin", "on_epoch_begin", "on_epoch_end", "on_step_begin", "on_step_end", "on_evaluate",
                 "on_predict", "on_save", "on_log", "on_prediction_step")  # fmt: skip
OURS = ("transformers.", "ows_ds.")  # packages whose callbacks report and control, and read no weights

logger = logging.getLogger(__name__)


class OWSTrainerMixin(CheckpointHooks):
    """To be put before a Trainer's class. While training runs, `save_model` is to be called on all ranks."""

    model: Any
    args: Any
    accelerator: Any
    state: Any
    optimizer: Any  # a `TrainerOWS`; None once it is closed

    def __init__(
        self,
        *args: Any,
        ows: OWSConfig | Mapping[str, Any] | None = None,
        scores: str | Path | Scores | list[float] | None = None,
        tau: float = 13.0,
        calibration_samples: int = 128,
        **kwargs: Any,
    ) -> None:
        """The Trainer's own arguments, and those of OWS. Collective.

        ows: settings of OWS that `TrainingArguments` does not have; seed is that of the arguments unless it is given.
        scores: as for `OWS`; None: those of scores.json in the Trainer's output_dir if they are of this model,
        otherwise they are measured now, with ``tau``, on ``calibration_samples`` rows of the training data, and written
        there.

        From now on the model is frozen except for what trains, and rank 0's weights are those of all. Under DeepSpeed's
        ZeRO-3, as the arguments or Accelerate have set it up, weights lie in its shards, and its optimizer is not used.
        Raises UserError for what does not go with OWS.
        """
        given = dict(ows) if isinstance(ows, Mapping) else ows.model_dump(exclude_unset=True) if ows else {}
        for name in FROM_ARGUMENTS.keys() & given.keys():
            raise UserError(f"ows.{name}", given[name], f"leave it out: TrainingArguments has {FROM_ARGUMENTS[name]}")
        parse(OWSConfig, given, "ows.")  # before the Trainer is made
        super().__init__(*args, **kwargs)  # type: ignore[call-arg]
        trainer: Any = self
        check(trainer, given.get("always_on", "full"))
        self.ows_weights = weights = _weights(trainer)
        self.ows_base = fingerprint(weights)  # of the base model
        self._to_resume: checkpoint.Checkpoint | None = None
        if scores is None:
            scores = _measured(trainer, weights, self.ows_base, tau, calibration_samples)
        elif isinstance(scores, (str, Path)):
            scores = Scores.read(Path(scores))
        if isinstance(scores, Scores):
            scores.check(self.ows_base, len(find_layers(weights.module, weights.shape).layers))
        self.ows_scores = scores
        from_arguments = {
            "lr": self.args.learning_rate,
            "betas": (self.args.adam_beta1, self.args.adam_beta2),
            "eps": self.args.adam_epsilon,
            "weight_decay": self.args.weight_decay,
            "max_grad_norm": self.args.max_grad_norm or None,
            "accumulation": self.args.gradient_accumulation_steps,
        }
        self.ows_config = parse(OWSConfig, {"seed": self.args.seed, **given, **from_arguments}, "ows.")
        self.is_deepspeed_enabled = False  # it shards and gathers; what else it does to a Trainer must not happen
        self.accelerator = _Accelerator(self.accelerator)
        trainer.callback_handler.callbacks.insert(0, _Closing(self))
        _merge_around_callbacks(self)
        self._make_ows()

    def _make_ows(self) -> None:
        self.optimizer = self.accelerator.ows = TrainerOWS(self.ows_weights, self.ows_scores, self.ows_config)

    def close_ows(self) -> None:
        """Make the model a plain one again. The end of training does it."""
        if self.optimizer is not None:
            self.optimizer.close()
        self.optimizer = self.accelerator.ows = None

    # ------------------------------------------------------------------ a step

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:  # trained before
            self.ows_base = fingerprint(self.ows_weights)
            self._make_ows()
        # checkpointing makes the embedding's output require gradients: each backward pass would go down to it
        self.model.disable_input_require_grads()
        return self.optimizer  # type: ignore[no-any-return]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if batches:
            self.optimizer.set_accumulation_steps(len(batches))
        return batches, items

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(*args, **kwargs)  # type: ignore[misc]
        self.ows_weights.after_step()
        return result

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        ows = self.optimizer
        if "loss" in logs and isinstance(ows, TrainerOWS):
            logs |= {
                "sampled_layers": ",".join(map(str, ows.trained)),  # of the last step
                "skipped_steps": ows.skipped,
                "sent_bytes": sum(ows.comm.sent.values()),  # by this rank
            }
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    # ------------------------------------------------------------------ files

    def write_model(self, folder: str | None, in_checkpoint: bool) -> None:
        weights, ows = self.ows_weights, self.optimizer
        if ows is None and not weights.sharded:
            super().write_model(folder, in_checkpoint)
            return
        path = Path(folder or self.args.output_dir)
        with nullcontext() if ows is None else ows.merged():
            with fail_together(weights.comm):
                if not weights.sharded:
                    super().write_model(str(path), in_checkpoint)
                elif weights.comm.rank == 0:
                    self.write_all_but_weights(path)
            if weights.sharded:
                save_weights(weights, path)
        if weights.sharded and self.args.push_to_hub and not in_checkpoint:
            self.push_to_hub(commit_message="Model save")  # type: ignore[attr-defined]

    def write_state(self, checkpoint_dir: Path) -> None:
        # the best model at the end may be one in which layers had not trained yet that have trained since
        shards, state = resume.contents(self.optimizer, everything=self.args.load_best_model_at_end)
        facts = {"model": self.ows_base}
        checkpoint.save(checkpoint_dir / FOLDER, shards, state, self.ows_weights.comm, facts)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest()
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _newest(self) -> str | bool:
        """The newest complete checkpoint; True, where there is none, lets the Trainer say so. Collective."""
        there = [path for path in Path(self.args.output_dir).glob("*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        newest_first = sorted(there, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
        for folder in self.ows_weights.comm.broadcast_object([str(path) for path in newest_first]):
            try:
                self._to_resume = self._open(Path(folder))
            except UserError as error:
                logger.warning("skipped a checkpoint: %s", error)
            else:
                return str(folder)
        return True

    def _open(self, folder: Path) -> checkpoint.Checkpoint:
        """Collective. Raises UserError for an incomplete one."""
        comm = self.ows_weights.comm
        opened = checkpoint.open_checkpoint(folder / FOLDER, comm, "resume_from_checkpoint")
        rest = ("trainer_state.json", "scheduler.pt")
        missing = comm.broadcast_object([name for name in rest if not (folder / name).is_file()])
        if missing:
            right = f"expected a complete checkpoint: {missing[0]} is missing"
            raise UserError("resume_from_checkpoint", str(folder), right)
        return opened

    def open_state(self, checkpoint_dir: Path) -> None:
        """Open what is loaded later: the model's file in the checkpoint is merged."""
        if self._to_resume is None or self._to_resume.folder.parent != checkpoint_dir:
            self._to_resume = self._open(checkpoint_dir)
        began = str(self._to_resume.facts.get("model"))
        now = self.ows_base if self.optimizer is not None else fingerprint(self.ows_weights)  # trained before
        if began != now:
            right = f"expected the model that {checkpoint_dir.name} began with ({began[:12]}): this one is {now[:12]}"
            raise UserError("model", str(getattr(self.model.config, "name_or_path", "")), right)

    def load_state(self) -> None:
        opened, self._to_resume = self._to_resume, None
        if opened is not None:
            resume.restore(self.optimizer, opened)

    def load_best(self, checkpoint_dir: Path) -> None:
        resume.restore(self.optimizer, self._open(checkpoint_dir))


class OWSTrainer(OWSTrainerMixin, Trainer):
    """transformers' `Trainer` with OWS."""


class _Accelerator:
    """The Trainer's Accelerator, which prepares data loaders alone and hands what concerns gradients to OWS."""

    ows: TrainerOWS | None = None

    def __init__(self, accelerator: Any) -> None:
        self.wrapped = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def prepare(self, *objects: Any, **options: Any) -> Any:
        ours = (nn.Module, OWS, torch.optim.lr_scheduler.LRScheduler)
        ready = [one if isinstance(one, ours) else self.wrapped.prepare(one, **options) for one in objects]
        return ready[0] if len(ready) == 1 else tuple(ready)

    def prepare_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return model

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        assert self.ows is not None
        self.ows.backward(loss)

    def clip_grad_norm_(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self.ows is not None
        return self.ows.reduce()


class TrainerOWS(OWS):
    """OWS as a Trainer drives it. trained: layers of the last step."""

    trained: tuple[int, ...] = ()
    _norm: Tensor | None = None  # of the coming step, once it is reduced

    def reduce(self) -> Tensor:
        if self._norm is None:
            self._norm = super().reduce()
        return self._norm

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.trained = tuple(self.layer_set)
        norm = self.reduce()
        if norm.isfinite():
            super().step(closure)
            self._norm = None
        else:
            self.skip()
            logger.warning("step %d is skipped: the gradient's norm is %s", self.steps, float(norm))
        self.zero_grad()

    def skip(self) -> None:
        super().skip()
        self._norm = None

    def state_dict(self) -> dict[str, Any]:
        """What the Trainer puts into optimizer.pt; the state itself is in `FOLDER`, a part of it from each rank."""
        return {"kept_in": FOLDER}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: see `OWSTrainerMixin.load_state`."""


def _merge_around_callbacks(trainer: Any) -> None:
    """Let callbacks of others see the weights as they were trained, and not those without coordinates: some copy them
    (a reference model, an average) or save them. Not within a step, where nothing can be merged, and only for events
    that such a callback takes."""
    handler = trainer.callback_handler
    call_event = handler.call_event

    def called(event: str, *args: Any, **kwargs: Any) -> Any:
        foreign = (type(one) for one in handler.callbacks if not type(one).__module__.startswith(OURS))
        takes_it = any(getattr(kind, event) is not getattr(TrainerCallback, event) for kind in foreign)
        merges = event in BETWEEN_STEPS and takes_it and trainer.optimizer is not None
        with trainer.optimizer.merged() if merges else nullcontext():
            return call_event(event, *args, **kwargs)

    handler.call_event = called


class _Closing(TrainerCallback):
    """At the end of training, before any other callback sees the model."""

    def __init__(self, trainer: OWSTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.close_ows()


def _measured(trainer: Trainer, weights: Weights, model: str, tau: float, samples: int) -> Scores:
    """Scores of the model, whose fingerprint is ``model``: see `OWSTrainerMixin`. Collective."""
    comm, args, path = weights.comm, trainer.args, Path(trainer.args.output_dir) / "scores.json"
    if comm.broadcast_object(path.is_file()):
        with fail_together(comm):
            found = Scores.read(path)
        if found.model == model:
            return found
    with torch.random.fork_rng(devices=[]):  # the order of the data in training is that without this pass
        count = math.ceil(samples / (args.train_batch_size * comm.world_size))
        batches = list(itertools.islice(trainer.get_train_dataloader(), count))
    if not all(isinstance(batch, Mapping) and "input_ids" in batch for batch in batches):
        right = "expected a file of `ows-ds score`, or one number a layer: this Trainer's batches are not tokens"
        raise UserError("scores", None, right)
    known = ("input_ids", "attention_mask", "position_ids")
    inputs = [{key: batch[key].to(args.device) for key in known if key in batch} for batch in batches]
    found = outlier_scores(weights, find_layers(weights.module, weights.shape), inputs, tau, model)
    with fail_together(comm):
        if comm.rank == 0:
            found.write(path)
    return found


def _weights(trainer: Trainer) -> Weights:
    """The Trainer's model, replicated or in DeepSpeed's shards. Collective."""
    args, model, comm = trainer.args, trainer.model, join(trainer.args.device)
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return Replicated(model.to(args.device), comm)
    config = plugin.hf_ds_config
    check_config({**config.config, "gradient_clipping": "auto"}, "deepspeed")
    config.trainer_config_finalize(args, model, 0)  # fills in "auto", and refuses what the arguments contradict
    settings = {
        # the others follow the arguments, which are checked, or the model's weights
        key: copy.deepcopy(value)
        for key, value in config.config.items()
        if key not in ("bf16", "fp16", "gradient_clipping")
    }
    [dtype] = [name for name, dtype in DTYPES.items() if dtype == next(model.parameters()).dtype]
    hosts = comm.all_gather_object(socket.gethostname())
    micro, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    settings = resolve_config(settings, dtype, micro, steps, comm.world_size, per_host(hosts), "deepspeed")
    check_by_deepspeed(settings, "deepspeed")
    return Zero3(model, settings, comm)
