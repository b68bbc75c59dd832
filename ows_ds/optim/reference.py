"""The whole algorithm in one process, with plain tensors and full gradients. Slow and meant to be read.

What `ows_ds.optim.ows.OWS` does with shards, coordinates and messages must come out as what is written here.

    every K steps      the layers to train are those drawn K steps before; draw the next ones; a layer that leaves
                       loses its moments
    every step         G <- full gradient of each matrix of the drawn layers
                       every T_p steps of a layer's activity: Q <- projector of G
                       R <- G inside Q's subspace;  N <- Adam's normalised step on R, or Muon's
                       W <- (1 - lr * decay) * W - lr * scale * (N back in the full space)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ows_ds.distributed.communicator import Communicator
from ows_ds.importance.probabilities import probabilities
from ows_ds.model.blocks import Block, Matrix
from ows_ds.model.layers import find_layers
from ows_ds.optim.gap import Gap
from ows_ds.optim.layout import Scale, scale_of
from ows_ds.optim.muon import COEFFICIENTS, EPS, adjustment
from ows_ds.optim.projection import (
    find_projector,
    leading,
    low_rank_gradient,
    orthonormal,
    rotation,
    seeds,
    start_basis,
)
from ows_ds.optim.sampling import AdaptiveSampler, LayerSet, Sampler
from ows_ds.optim.sizes import sketch_width


@dataclass
class State:
    """What is kept for one trained weight: Adam's moments and their steps; for a matrix in a subspace its Q, and the
    steps since it entered the set."""

    mean: Tensor
    square: Tensor
    steps: int = 0
    age: int = 0
    projector: Tensor | None = None
    basis: Tensor | None = None  # what the first of two sketches found
    coming: Tensor | None = None  # the projector from the next step on, which the second one found


@dataclass
class Reference:
    """OWS on ``model`` (changed in place). The fields are the recipe's names; ratios are the layers' D."""

    model: nn.Module
    ratios: list[float]
    gamma: float = 5
    period: int = 50
    scheme: str = "bernoulli"
    rank: int | None = 128
    expert_rank: int | None = None
    router: str = "freeze"
    update_proj_gap: int | Literal["auto"] = 200
    proj_gap_range: tuple[int, int] = (50, 1000)
    kept_energy: float = 0.5
    scale: Scale = 1.0
    rule: str = "adamw"
    momentum: float = 0.95
    adjust_lr: str = "match_rms_adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    projector: str = "randomized"
    refresh: str = "full"
    refresh_batch: str = "full"
    moments_on_refresh: str = "align"
    always_on: str = "full"
    seed: int = 0
    adaptive: bool = False
    importance_decay: float = 0.5
    importance_floor: float = 0.2
    block: str = "layer"

    step_number: int = 0
    layer_set: LayerSet = ()
    next_set: LayerSet = ()
    squares: dict[int, list[float]] = field(default_factory=dict)  # of a coordinate's gradient, by layer and step
    blocks: list[Block] = field(default_factory=list)
    new: set[str] = field(default_factory=set)  # matrices that this step's own gradients gave a projector
    state: dict[str, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parts = find_layers(self.model).with_routers(self.router == "train").at_rank(self.rank, self.expert_rank)
        ratios, count = self.ratios, len(self.parts.layers)
        sizes = [1.0] * count
        if self.block == "module":
            self.parts, layer_of = self.parts.by_module()
            ratios = [ratios[layer] for layer in layer_of]
            sizes = [block.numel for block in self.parts.layers]
            sizes = [count * size / sum(sizes) for size in sizes]
        blocks = (*self.parts.layers, Block("always", self.parts.embeddings, ()))
        self.matrices = {matrix.name: matrix for block in blocks for matrix in block.matrices}
        self.parameters = dict(self.model.named_parameters())
        self.gap = Gap(*self.proj_gap_range, self.kept_energy)
        self.block_of = {matrix.name: block.name for block in blocks for matrix in block.matrices}
        self.sampler = Sampler(probabilities(ratios, self.gamma, sizes=sizes), self.scheme, self.seed)
        if self.adaptive:
            numbers = {"decay": self.importance_decay, "floor": self.importance_floor}
            self.sampler = AdaptiveSampler(sizes, self.gamma, self.scheme, self.seed, **numbers)
        self.next_set = self.sampler.draw()

    def step(self, losses: Iterable[Callable[[], Tensor]]) -> None:
        """One optimizer step. losses: one function a micro-batch; the mean of their values is what is minimised."""
        if self.step_number % self.period == 0:
            self.draw()
        names = self.trained()
        self.model.requires_grad_(False)
        for name in names:
            self.parameters[name].requires_grad_(True)
        functions = list(losses)
        seen: dict[str, Tensor] = {}  # what a projector is found from
        for loss in functions if names else ():
            (loss() / len(functions)).backward()
            if self.refresh_batch == "full" or not seen:
                seen = {
                    name: gradient.clone() for name in names if (gradient := self.parameters[name].grad) is not None
                }
        with torch.no_grad():
            self.update(names, seen)
        self.model.zero_grad()
        self.step_number += 1

    def draw(self) -> None:
        """The layers of the next period; what leaves loses its state."""
        if isinstance(self.sampler, AdaptiveSampler):
            self.sampler.observe({i: math.sqrt(sum(some) / len(some)) for i, some in self.squares.items()})
            self.squares = {}
        self.layer_set, self.next_set = self.next_set, self.sampler.draw()
        always = Block(
            "always",
            self.parts.embeddings if self.always_on != "none" else (),
            self.parts.final if self.always_on != "none" else (),
        )
        self.blocks = [*(self.parts.layers[i] for i in self.layer_set), always]
        names = self.trained()
        self.state = {name: state for name, state in self.state.items() if name in names}
        for name in set(self.block_of.values()) - {block.name for block in self.blocks}:
            self.gap.drop(name)

    def trained(self) -> dict[str, bool]:
        """Names of all weights that train now, and whether in a subspace."""
        names = {}
        for block in self.blocks:
            for matrix in block.matrices:
                names[matrix.name] = self.rank is not None and (block.name != "always" or self.always_on == "low_rank")
            for vector in block.vectors:
                names[vector.name] = False
        return names

    def update(self, names: dict[str, bool], seen: dict[str, Tensor]) -> None:
        """Project, clip, and take Adam's step on every trained weight."""
        gradients: dict[str, Tensor] = {}
        self.new = set()
        for name, low_rank in names.items():
            gradient = self.parameters[name].grad
            assert gradient is not None
            projected = self.project(name, gradient, seen[name]) if low_rank else gradient
            if projected is not None:
                gradients[name] = projected
        if self.adaptive:
            self.observe(gradients)
        self.look([name for name, low_rank in names.items() if low_rank], gradients)
        squares = [gradient.square().sum() for gradient in gradients.values()]
        norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
        clip = 1.0 if self.max_grad_norm is None else float((self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))

        for name, gradient in gradients.items():
            weight, low_rank = self.parameters[name], names[name]
            direction = (self.muon if low_rank and self.rule == "muon" else self.adam)(name, gradient * clip)
            if name in self.matrices:
                weight.mul_(1 - self.lr * self.weight_decay)
            if low_rank:
                q, matrix = self.state[name].projector, self.matrices[name]
                assert q is not None
                assert self.rank is not None
                full = direction @ q.mT if matrix.tall else q @ direction.mT
                weight.sub_(full, alpha=self.lr * scale_of(matrix, self.rank, self.scale))
            else:
                weight.sub_(direction, alpha=self.lr)

    def observe(self, gradients: dict[str, Tensor]) -> None:
        """Note the mean square of a coordinate's gradient in each sampled layer."""
        assert self.rank is not None
        for index in self.layer_set:
            matrices = self.parts.layers[index].matrices
            total = sum(float(gradients[m.name].square().sum()) for m in matrices if m.name in gradients)
            size = sum(math.prod(m.side(m.long, self.rank)) for m in matrices)
            self.squares.setdefault(index, []).append(total / max(size, 1))

    def project(self, name: str, gradient: Tensor, seen: Tensor) -> Tensor | None:
        """R of G, with a new projector (of what was ``seen`` of G) where one is due; None as long as there is none."""
        assert self.rank is not None
        state, matrix = self.state.get(name), self.matrices[name]
        if state is None:
            rows = torch.zeros(matrix.side(matrix.long, self.rank), dtype=gradient.dtype)
            state = self.state[name] = State(rows, rows.clone())
        seed = self.seeds(matrix, self.step_number)
        if self.refresh == "sketch":
            if state.coming is not None:
                self.turn(state, state.coming)
                state.coming = None
                self.gap.taken([self.block_of[name]])
            self.sketch(matrix, state, gradient if matrix.tall else gradient.mT, seed)
        elif self.due(name, state):
            start = self.start(matrix, state)
            new = find_projector(
                seen, matrix.low_rank(self.rank), self.projector, seed, state.projector, start, self.aligned
            )
            self.turn(state, new.to(gradient.dtype))
            self.new.add(name)
        state.age += 1
        return None if state.projector is None else low_rank_gradient(gradient, state.projector)

    def due(self, name: str, state: State) -> bool:
        """Whether a new projector is."""
        if self.update_proj_gap == "auto":
            return self.gap.due(self.block_of[name], state.age)
        return state.age % self.update_proj_gap == 0

    def look(self, names: list[str], gradients: dict[str, Tensor]) -> None:
        """Decide, by the step's gradients of the matrices ``names`` inside their subspaces, where new projectors are
        due from the next step on (``update_proj_gap: auto``)."""
        squares: dict[str, list[Tensor]] = {self.block_of[name]: [] for name in names}
        for name in names:
            squares[self.block_of[name]] += [gradients[name].square().sum()] if name in gradients else []
        new = {self.block_of[name] for name in self.new}
        self.gap.taken(new)
        for block, some in squares.items():
            if some and block not in new:
                self.gap.add(block, torch.stack(some).sum())
        self.gap.decide({self.block_of[name]: self.state[name].age for name in names}, Communicator())

    def turn(self, state: State, new: Tensor) -> None:
        """Continue in the subspace of the projector ``new``."""
        if state.projector is not None and self.moments_on_refresh == "rotate":
            turn = rotation(state.projector, new).to(new.dtype)
            state.mean, state.square = state.mean @ turn, state.square @ turn.square()
        elif state.projector is not None and self.moments_on_refresh == "reset":
            state.mean, state.square, state.steps = state.mean * 0, state.square * 0, 0
        state.projector = new

    def seeds(self, matrix: Matrix, step: int) -> int | list[int]:
        """Of a matrix's randomness in a step; of a stack, of each of its matrices."""
        return seeds(f"{self.seed}/{step}/{matrix.name}", None if matrix.experts is None else range(matrix.experts))

    def start(self, matrix: Matrix, state: State) -> Tensor:
        """The old projector, at first noise: under align, what the basis of the new subspace is to be near to."""
        assert self.rank is not None
        if state.projector is not None:
            return state.projector
        return start_basis(matrix.short, matrix.low_rank(self.rank), self.seeds(matrix, 0))

    @property
    def aligned(self) -> bool:
        """Whether it is."""
        return self.moments_on_refresh == "align"

    def sketch(self, matrix: Matrix, state: State, tall: Tensor, seed: int | list[int]) -> None:
        """Where a projector is due: what G does to some columns in this step, and to their image in the next one.

        tall: G or G^T, with the side of the projector last.
        """
        assert self.rank is not None
        r = matrix.low_rank(self.rank)
        if self.due(matrix.name, state):
            start = start_basis(matrix.short, sketch_width(r, matrix.short), seed, state.projector).to(tall.dtype)
            state.basis = orthonormal(tall @ start)[0].to(tall.dtype)
        elif state.basis is not None:
            start = self.start(matrix, state)
            state.coming = leading(tall.mT @ state.basis, r, start, self.aligned).to(tall.dtype)
            state.basis = None

    def adam(self, name: str, gradient: Tensor) -> Tensor:
        """Adam's normalised step N = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) after taking in ``gradient``."""
        state = self.state.setdefault(name, State(torch.zeros_like(gradient), torch.zeros_like(gradient)))
        beta1, beta2 = self.betas
        state.steps += 1
        state.mean = beta1 * state.mean + (1 - beta1) * gradient
        state.square = beta2 * state.square + (1 - beta2) * gradient.square()
        mean = state.mean / (1 - beta1**state.steps)
        square = state.square / (1 - beta2**state.steps)
        return mean / (square.sqrt() + self.eps)

    def muon(self, name: str, gradient: Tensor) -> Tensor:
        """Momentum after Nesterov, made orthonormal by Newton-Schulz, times the adjustment of its learning rate."""
        state = self.state[name]
        state.mean = self.momentum * state.mean + (1 - self.momentum) * gradient
        x = (1 - self.momentum) * gradient + self.momentum * state.mean
        x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
        for a, b, c in COEFFICIENTS:
            gram = x.mT @ x
            x = a * x + b * x @ gram + c * x @ gram @ gram
        return x * adjustment(x.shape[-2], x.shape[-1], self.adjust_lr)
