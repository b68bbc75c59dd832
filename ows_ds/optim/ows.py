"""OWS as an optimizer (Algorithm 1).

    ows = OWS(model, "scores.json", OWSConfig(rank=128))
    loss = model(**batch).loss
    ows.backward(loss); ows.step(); ows.zero_grad()

A step has three phases:

    1  backward     coordinates' gradients -> buffer (`update`), reduced over ranks beside the backward pass
                    full gradients or sketches -> new projectors (`refresh`)
    2  step         clip -> AdamW on each rank's rows -> every rank's coordinates and vectors (`update`, `full_rank`)
    3  prepare      every K steps a new set: rank 0 draws, all ranks compare, layers leave and enter (`active_set`);
                    what is due for new projectors is merged and armed (`refresh`)

Between two steps each matrix of the coming step's set either has coordinates attached or, where a refresh is due, is
merged and lets its full gradient through once (under ``refresh="sketch"``: has a sketch attached for two steps).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ows_ds.compat.torch import mark_stepped, scale_all, squared_norms
from ows_ds.config import OWSConfig, parse
from ows_ds.distributed.adopt import as_weights
from ows_ds.distributed.weights import Weights
from ows_ds.errors import UserError
from ows_ds.importance.scores import Scores, ratios_of
from ows_ds.model.blocks import ModelLayers
from ows_ds.model.layers import find_layers
from ows_ds.optim.active_set import ActiveSet
from ows_ds.optim.draws import Draws
from ows_ds.optim.gradient_norms import GradientNorms
from ows_ds.optim.layout import Plan
from ows_ds.optim.refresh import FullGradients, Refresh
from ows_ds.optim.sampling import AdaptiveSampler, Cycle, LayerSet, Sampler
from ows_ds.optim.sizes import check_fits
from ows_ds.optim.sketch import Sketches
from ows_ds.optim.state import OWSState
from ows_ds.optim.update import Accept, AdamWSettings, always, clip_factor


class OWS(OWSState):
    """Outlier-weighed layerwise sampling with low-rank coordinates (OWS, Algorithm 1), on one rank or many.

    ``param_groups[0]["lr"]`` is the learning rate; torch's and transformers' schedulers work on it as on any optimizer.

    Attributes:
        config: The settings.
        active: What trains in the coming step.
        block_set: The sampled blocks among it: layers, or modules of them (``sampling.block``).
        steps: Optimizer steps so far; ``skipped`` of them took no update.
        grad_norm: Global norm of the last step's gradient before clipping, () on the device.
    """

    def __init__(
        self,
        model: nn.Module | Weights,
        scores: str | Path | Scores | Sequence[float] | None,
        config: OWSConfig | None = None,
        *,
        sampler: Sampler | Cycle | None = None,
        **settings: Any,
    ) -> None:
        """Collective. Freezes all weights of ``model`` but those that train; replaces its linear modules' forward.

        Args:
            model: A plain model on its device (rank 0's weights are copied to all), a DeepSpeed engine made with ZeRO-3
                and no optimizer, or `Weights`.
            scores: A file (refused for another model), `Scores`, or the ratios D, one a layer; None: all alike.
            config: The settings; or their names as keywords, in ``settings``.
            sampler: Draws the sets in place of scores, gamma and scheme.

        Raises:
            UserError: For values that cannot work with this model.
        """
        if config is not None and settings:
            raise UserError("config", type(config).__name__, "expected an OWSConfig or its names as keywords, not both")
        self.config = config = parse(OWSConfig, settings) if config is None else config
        self.weights = as_weights(model)
        self.comm, self.module, self.device = self.weights.comm, self.weights.module, self.weights.device
        self.accumulation = config.accumulation
        layers = find_layers(self.module, self.weights.shape).with_routers(config.router == "train")
        layers = layers.at_rank(config.rank, config.expert_rank)
        count = len(layers.layers)
        ratios = [1.0] * count if scores is None else ratios_of(scores, self.weights, count)
        check_fits(layers, config.gamma_of(ratios), config.rank, config.always_on)
        self.draws = Draws(layers, ratios, config, sampler)
        self.layers: ModelLayers = self.draws.layers
        self.active = ActiveSet(self.weights, self.layers, config)
        self._norms = GradientNorms(self.active) if config.adaptive else None
        defaults = {name: getattr(config, name) for name in ("lr", "betas", "eps", "weight_decay")}
        super().__init__([{"params": list(self.weights.parameters().values())}], defaults)
        self.refresh: Refresh = (Sketches if config.refresh == "sketch" else FullGradients)(self.active, config)
        self.steps = self.skipped = self._micro = 0
        self.block_set: LayerSet = ()
        self.next_set: LayerSet | None = None  # drawn a period ahead, so that its weights can be read beside the steps
        self.grad_norm: Tensor | None = None
        self._reduced: list[Tensor] | None = None
        self._energies: dict[str, Tensor] = {}
        self._prepare()

    @property
    def plan(self) -> Plan:
        """Layout of the coordinates of the coming step."""
        return self.active.plan

    @property
    def layer_set(self) -> LayerSet:  # type: ignore[override]
        """The sampled layers, or those that sampled modules are of."""
        return self.draws.layers_of(self.block_set)

    @property
    def probabilities(self) -> list[float]:
        """Of each layer to be in the next set that is drawn; where modules are drawn, the expected share of it."""
        return self.draws.layer_probabilities

    @property
    def new_probabilities(self) -> list[float] | None:
        """See `Method.new_probabilities`."""
        return None if self._norms is None or self.steps % self.config.period else self.probabilities

    @property
    def nothing_to_train(self) -> bool:
        """Whether nothing trains in the coming step: the layer set is empty and nothing is always on."""
        return not self.plan.blocks and not self.active.full.parameters

    @property
    def trained_layers(self) -> frozenset[int]:
        """See `Method.trained_layers`."""
        names = self.active.trained_names
        trained = [i for i, block in enumerate(self.layers.layers) if names & block.names]
        return frozenset(self.draws.layers_of(trained))

    def set_accumulation_steps(self, steps: int) -> None:
        """From the coming step on, ``backward`` is called this often a step, the same on all ranks. A step that was
        begun and not taken counts as skipped, and nothing of it stays.
        """
        if steps < 1:
            raise UserError("accumulation", steps, "expected an integer of at least 1")
        if self._micro:
            self.refresh.cancel()
            self._micro = self.accumulation
            self.skip()
            self.zero_grad()
        self.accumulation = steps
        self.refresh.set_accumulation_steps(steps)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate one micro-batch. Gradients of all ranks and micro-batches are averaged and added, in this
        order: ``loss`` is this rank's mean, divided by the number of micro-batches as in plain PyTorch. Collective.
        """
        if self.nothing_to_train:
            return
        if self._micro == self.accumulation:
            raise RuntimeError(f"backward was called more than accumulation = {self.accumulation} times a step")
        self.active.buffer.last_pass(self._micro + 1 == self.accumulation)
        self.weights.backward(loss)
        self.active.full.end_pass()
        self._micro += 1
        self.refresh.after_backward()

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Average the gradients over ranks, after the step's last `backward`. Collective. Returns their global norm, ()
        on the device; 0 where nothing trains. `step` and `skip` do it if need be.
        """
        self.weights.after_step()
        if self.nothing_to_train:
            self._reduced = []
            return torch.zeros((), dtype=self.active.dtype, device=self.device)
        if self._micro != self.accumulation:
            raise RuntimeError(f"step after {self._micro} of accumulation = {self.accumulation} backward passes")
        self.refresh.reduce()
        self._reduced = grads = self.active.buffer.reduce()
        # `not_finite` adds nothing but what is not finite, of which no basis must be made
        squares = [*squared_norms(grads), *self.refresh.not_finite(), *self.active.full.squares()]
        energies = {} if self.active.gap is None and self._norms is None else self.active.buffer.energies(grads)
        sums = self.comm.all_reduce(torch.stack([torch.stack(squares).sum(), *energies.values()]), "grad_norm")
        self._energies = dict(zip(energies, sums[1:], strict=True))
        self.grad_norm = norm = sums[0].sqrt()
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One optimizer step, then everything the next one needs: a new set every K steps, refreshes armed. Collective.

        A step in which nothing trains is counted in `skipped`.
        """
        if closure is not None:
            raise RuntimeError("OWS takes no closure: it evaluates the loss once a step")
        if self._reduced is None:
            self.reduce()
        if self.nothing_to_train:
            self.skipped += 1
        else:
            self._update()
        for name in self.active.clocks:
            self.active.clocks[name] += 1
        self._advance()

    @torch.no_grad()
    def skip(self) -> None:
        """In place of `step`, where gradients are not finite: what trains and its moments stay as they are. Collective.

        The step is counted, also in `skipped`; projectors that were due in it are taken in the next one.
        """
        if self._reduced is None:
            self.reduce()
        mark_stepped(self)
        self.refresh.skip()
        self.skipped += 1
        self._advance()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        self.active.buffer.zero_grad()
        self.refresh.zero_grad()
        self.active.full.zero_grad()

    def train_step(self, losses: Iterable[Callable[[], Tensor]], accept: Accept = always) -> Tensor:
        """`backward` on each micro-batch's loss, `step` or `skip`, `zero_grad`: see `Method.train_step`. Losses are not
        computed in a step in which nothing trains. Collective.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for compute in () if self.nothing_to_train else losses:
            loss = compute()
            self.backward(loss)
            total += loss.detach()
        if accept(total, self.reduce()):
            self.step()
        else:
            self.skip()
        self.zero_grad()
        return total

    # ------------------------------------------------------------------ the model

    @torch.no_grad()
    def merge(self) -> None:
        """Add all coordinates to the weights and set them to zero: the model alone then is what was trained.

        Training may continue. Not between `backward` and `step`. Collective.
        """
        self.active.merge_all()

    def merged(self) -> AbstractContextManager[None]:
        """Within it the model alone is what was trained, for saving; afterwards all is as before, to the bit.

        Not between `backward` and `step`. What this rank holds of the merged weights is kept on the host meanwhile.
        Collective.
        """
        return self.active.merged()

    def close(self) -> None:
        """Merge, and give the model its own forward passes back, every weight frozen. Collective."""
        self.merge()
        self._drop()
        self.active.close()

    def projector_energy(self) -> dict[int, Tensor]:
        """Of each layer whose projectors the step in hand finds, from `reduce` to `step`: (2,), float64, on the device,
        this rank's part of ||G Q||^2 and ||G||^2, summed over its matrices. Empty under ``refresh="sketch"``.
        """
        return self.draws.sums(self.refresh.energy())

    @torch.no_grad()
    def update_norm(self, all_layers: bool = False) -> dict[int, Tensor]:
        """How far the last step has moved layers since their last merge: those merged after it, or all that train.

        By layer ||C||, a scalar on the device, the same on all ranks: the Frobenius norm of its matrices' change
        C Q^T together, weight decay aside, since Q has orthonormal columns. Does not wait for the device.
        """
        return self.draws.norms(self.active.update_norm(all_layers))

    # ------------------------------------------------------------------ phases 2 and 3

    def _update(self) -> None:
        projectors = self.refresh.take()
        self.active.take(projectors)
        self.active.note(self._energies, projectors)
        grads, norm, group = self._reduced, self.grad_norm, self.param_groups[0]
        assert grads is not None
        assert norm is not None
        settings = AdamWSettings(*(group[name] for name in ("lr", "betas", "eps", "weight_decay")))
        clip = clip_factor(norm, self.config.max_grad_norm)
        if self._norms is not None:
            self._norms.add(self._energies)
        scale_all(grads, clip)
        self.active.buffer.update(settings)
        self.active.full.update(settings, clip)
        self.active.after_update(1.0 - settings.lr * settings.weight_decay)

    def _advance(self) -> None:
        self.steps += 1
        self._micro, self._reduced, self.active.merged_norms = 0, None, {}
        self._prepare()

    @torch.no_grad()
    def _prepare(self) -> None:
        active = self.active
        active.steps = self.steps
        projectors = self.refresh.after_step()
        for block in self.plan.blocks if projectors else ():
            if any(matrix.name in projectors for matrix in block.matrices):
                active.merge(block)
        active.take(projectors)
        changed, plan = self.steps % self.config.period == 0, self.plan
        if changed:
            if self._norms is not None and isinstance(self.draws.sampler, AdaptiveSampler):
                self.draws.sampler.observe(self._norms.take(self.block_set))
            self.block_set = self._draw() if self.next_set is None else self.next_set
            self.next_set = self._draw()
            plan = active.plan_of(self.block_set)
        active.decide(plan)
        due = active.due(plan)
        passes = self.refresh.plans(plan, due)
        if changed or any(one.parts for one in passes):
            described = {"layers": list(self.block_set), "plan": plan.describe()}
            described |= {f"refresh {number}": one.describe() for number, one in enumerate(passes)}
            self.comm.assert_consistent(f"the layers and the plan of step {self.steps + 1}", described)
        active.change(plan)
        if changed:
            self._read_ahead()
        for block in due if self.config.refresh != "sketch" else ():
            active.merge(block)
        self._arm(passes)

    def _draw(self) -> LayerSet:
        """Rank 0's draw on all ranks. Collective."""
        return tuple(
            self.comm.broadcast_object(self.draws.sampler.draw() if self.comm.rank == 0 else None, "layer_set")
        )

    def _read_ahead(self) -> None:
        """Begin to read what the next set will need, beside the steps until then."""
        if self.next_set is not None:
            self.weights.stage(self.active.weights_of(self.active.plan_of(self.next_set).blocks))

    def _arm(self, passes: Sequence[Any]) -> None:
        self.refresh.begin(passes, self.steps)
        self.active.await_gradients()

    def _drop(self) -> None:
        """Forget the current set without merging."""
        self.refresh.cancel()
        self._reduced = None
        self.active.drop()
