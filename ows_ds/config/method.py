"""How a model is trained: the recipe's sections method, sampling and optim, and the settings of the optimizer alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ows_ds.config.settings import (
    MOST,
    Count,
    Expected,
    MayChange,
    NotNegative,
    Planned,
    Positive,
    Seed,
    Settings,
    Share,
    Wrong,
)

LONGEST_PERIOD, LEAST_DRAWS = 50, 10  # of sampling.period auto
MOST_LAYERS, AT_FULL_RANK, LAYER_SHARE = 12.0, 5.0, 0.4  # of sampling.gamma auto

Betas = Annotated[
    tuple[Share, Share],
    Field(strict=False),  # a list as well
    Expected("a list of 2 numbers, each at least 0 and below 1, such as [0.9, 0.999]"),
]


GapRange = Annotated[
    tuple[Count, Count],
    Field(strict=False),  # a list as well
    Expected("a list of 2 integers, the first at least 2 and at most the second, such as [50, 1000]"),
]


class Method(Settings):
    """How the model is trained."""

    name: Literal["ows", "lisa", "lisa-d", "galore", "badam", "hift", "full", "lora", "dora", "mezo"] = "ows"
    """ows samples layers by importance and trains them at low rank; lisa samples evenly, lisa-d less towards the
    output, both at full rank; galore trains all layers at low rank; badam one layer after the other at full rank; hift
    one layer a step at full rank and keeps its moments; full all weights; lora and dora adapters of all linear layers;
    mezo all weights by forward passes alone."""
    lora_rank: Count = 8
    """Rank of the adapters of lora and dora."""
    lora_alpha: Positive = 16.0
    """Numerator of the adapters' scale; the denominator is method.lora_rank."""
    lora_dropout: Share = 0.0
    """Share of an adapter's inputs that is zeroed in training."""
    epsilon: Positive = 1e-3
    """Length of mezo's step to both sides of the weights, in units of its noise."""


class SamplingCore(Settings):
    """What the recipe's sampling and `OWSConfig` share."""

    gamma: Annotated[Positive, Planned()] = MOST_LAYERS
    """Expected number of sampled layers, in layers; auto: 12 (5 at full rank, as under lisa), at most two fifths of
    the layers, and less where that does not fit."""
    scheme: Literal["bernoulli", "fixed"] = "bernoulli"
    """bernoulli draws each layer on its own; fixed draws exactly gamma layers."""
    block: Literal["layer", "module"] = "layer"
    """What is drawn: whole layers; or each of their matrices on its own, gamma then being how many layers' worth of
    weights are drawn."""
    importance_decay: Share = 0.5
    """Under importance gradient, the weight of earlier periods in a layer's mean when it has trained again."""
    importance_floor: Share = 0.2
    """Under importance gradient, the share of the draws that goes to all layers evenly, so that each one is drawn."""

    def contradictions(self) -> Iterator[Wrong]:
        yield from super().contradictions()
        if self.scheme == "fixed" and self.block == "module":
            yield Wrong("scheme", "expected bernoulli under sampling.block module: modules differ in size", ("block",))
        if self.scheme == "fixed" and isinstance(self.gamma, float) and self.gamma != int(self.gamma):
            right = "expected a whole number of layers, or sampling.scheme bernoulli"
            yield Wrong("gamma", right, ("scheme",))


def usual_gamma(importance: Sequence[float], full_rank: bool, scheme: str) -> float:
    """What ``auto`` is for gamma: as many as learned better than fewer in the paper (Table 8, to 12 of 32 layers) and
    here (docs/settings.md), but no more than can be drawn. importance: a layer each."""
    most = min(AT_FULL_RANK if full_rank else MOST_LAYERS, max(1.0, LAYER_SHARE * len(importance)))
    found = min(most, sum(one > 0 for one in importance)) or most
    return float(int(found)) if scheme == "fixed" else found


class Sampling(SamplingCore):
    """Which layers train, and for how long."""

    period: Annotated[Count, Planned()] = LONGEST_PERIOD
    """Optimizer steps between two draws (K); auto: 50, or fewer where a run would have fewer than 10 draws."""
    importance: Literal["outlier", "reverse", "uniform", "decreasing", "rm", "bi", "alpha", "gradient"] = "outlier"
    """What layers are sampled by under ows: outlier, the share of weights that stand out (equation 2); reverse, the
    opposite; uniform; decreasing towards the output; rm, a layer's relative magnitude; bi, its block influence; alpha,
    how heavy the tails of its spectra are; gradient, the moving mean of the norms of its gradients in training."""
    order: Literal["ascending", "descending", "random"] = "random"
    """Course of badam and hift through the layers: from the input, from the output, or at random (badam again in each
    round, hift once before training)."""
    tau: Positive = 13.0
    """An entry is an outlier when it exceeds tau times its layer's mean."""
    scores: MayChange[str | None] = None
    """File of scores to use; null: scores.json in train.output_dir, computed when it is absent."""
    calibration_samples: MayChange[Count] = 128
    """Training rows that the scores are computed on."""
    calibration_length: MayChange[Count] = 2048
    """Tokens of each of them; longer rows are cut at the end."""
    calibration_batch_size: MayChange[Count] = 8
    """Rows per rank and forward pass while scoring."""
    seed: Seed | None = None
    """Seed of the draws; null: train.seed."""


class OptimCore(Settings):
    """What the recipe's optimizer and `OWSConfig` share."""

    renamed: ClassVar[Mapping[str, str]] = {
        "refresh_gap": "it is called {prefix}update_proj_gap",
        "fold_rounding": "it is called {prefix}merge_rounding",
        "side": "leave it out: the shorter side of each matrix is projected",
    }

    betas: Betas = (0.9, 0.999)
    """Decay per step of Adam's first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of Adam's second moment."""
    weight_decay: NotNegative = 0.0
    """Decoupled decay of the effective weights, per step and learning rate."""
    max_grad_norm: Positive | None = 1.0
    """Largest global norm of the gradient; null: no clipping."""
    rank: Count = 128
    """Dimension of the subspace of each matrix; at most its smaller side."""
    expert_rank: Count | None = None
    """The same of each matrix of a stack of experts, at most optim.rank and a divisor of it; null: so that coordinates
    of all experts take as much memory as those of the experts of one token would at optim.rank."""
    moments: Annotated[Literal["float32", "int8"], Planned()] = "float32"
    """Adam's moments of weights that train at full rank (always_on full, lisa, badam, hift, full, adapters): float32,
    or int8 in blocks of 256 entries, by bitsandbytes; auto: float32 where it fits."""
    master: Annotated[Literal["float32", "none"], Planned()] = "float32"
    """Of the same weights a float32 copy beside bfloat16 ones; none: there is no copy, and an update is rounded to
    bfloat16 up or down at random, so that it is exact on average; auto: float32 where it fits."""
    router: Literal["freeze", "train"] = "freeze"
    """The weights that choose experts: frozen, or trained with their layer."""
    update_proj_gap: Annotated[Count | Literal["auto"], Expected("an integer of at least 1, or auto")] = 200
    """Active steps of a layer between two projectors (T_p); auto: a new one when the layer's gradients inside the
    subspace have fallen below optim.kept_energy of what they were in the first steps of the old one."""
    proj_gap_range: GapRange = (50, 1000)
    """Least and most such steps under update_proj_gap auto."""
    kept_energy: Share = 0.5
    """Share of the squares of these gradients below which there is a new projector under update_proj_gap auto."""
    scale: Annotated[Positive | Literal["auto"], Expected("a number above 0, or auto")] = 1.0
    """Factor on the projected update of a matrix; auto: sqrt(shorter side / rank), with which a step is about as long
    as one at full rank, so that a learning rate serves any rank."""
    rule: Literal["adamw", "muon"] = "adamw"
    """Rule of the steps inside a subspace: adamw, or muon, orthonormalised momentum by Newton-Schulz (Jordan et al.
    2024), with one moment in place of two. Biases, norms and what trains at full rank keep adamw."""
    momentum: Share = 0.95
    """Decay per step of muon's momentum."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor on muon's learning rate of coordinates (n, r): match_rms_adamw, 0.2 sqrt(n), so that a step is about as
    long as one of adamw; original, sqrt(n / r)."""
    projector: Literal["randomized", "svd"] = "randomized"
    """How the top singular vectors are found: randomized range finder, or exact svd."""
    refresh: Annotated[Literal["full", "compressed", "sketch"], Planned()] = "full"
    """What new projectors are found from: full gradients, one matrix at a time, under accumulation their sum; in its
    place, compressed, the leading directions of the sum after each micro-batch; or a sketch over two steps, without a
    full gradient of any matrix of the sampled layers. auto: full where it fits."""
    refresh_batch: Annotated[Literal["full", "first"], Planned()] = "full"
    """Gradient that a projector is computed from: the full batch, or the first micro-batch; auto: full where it
    fits."""
    moments_on_refresh: Literal["align", "keep", "reset", "rotate"] = "align"
    """Adam's moments at a refresh: kept, with the new basis turned to the old one (align) or as it comes (keep, as
    GaLore); reset to 0; or rotated into the new basis."""
    merge_rounding: Literal["nearest", "stochastic"] = "nearest"
    """How merging coordinates into bfloat16 weights rounds: to the nearest value, or stochastic, up or down at random
    so that it is exact on average. Wider weights are not rounded."""
    always_on: Annotated[Literal["full", "low_rank", "none"], Planned()] = "full"
    """Training of embedding and head beside the sampled layers: full rank, low_rank, or none; auto: full where it
    fits."""

    def contradictions(self) -> Iterator[Wrong]:
        yield from super().contradictions()
        if self.rank is not None and self.expert_rank is not None and self.rank % self.expert_rank:
            yield Wrong("expert_rank", f"expected a divisor of optim.rank, {self.rank}", ("rank",))
        least, most = self.proj_gap_range
        if not 2 <= least <= most:
            yield Wrong("proj_gap_range", "expected [least, most], the least of them at least 2")
        if self.refresh == "compressed" and self.projector == "svd":
            yield Wrong("projector", "expected randomized under optim.refresh compressed", ("refresh",))
        if self.refresh == "sketch":  # one over each of two whole steps
            if self.projector == "svd":
                yield Wrong("projector", "expected randomized under optim.refresh sketch", ("refresh",))
            if self.refresh_batch == "first":
                yield Wrong("refresh_batch", "expected full under optim.refresh sketch", ("refresh",))
            if self.update_proj_gap == 1:
                yield Wrong("update_proj_gap", "expected at least 2 under optim.refresh sketch", ("refresh",))


# where a recipe gives none: what a method's authors, or who made it widely used, train 7B with (docs/settings.md)
LEARNING_RATES = {
    "ows": 3e-4,
    "galore": 2e-5,
    "lisa": 2e-5,
    "lisa-d": 2e-5,
    "badam": 1e-5,
    "hift": 2e-5,
    "full": 2e-5,
    "lora": 2e-4,
    "dora": 2e-4,
    "mezo": 1e-6,
}


class Optim(OptimCore):
    """AdamW on the low-rank coordinates of the sampled layers."""

    lr: Annotated[NotNegative | Literal["auto"], Expected("a number of at least 0, or auto")] = "auto"
    """Peak learning rate; auto: the method's own (docs/settings.md), 3e-4 under ows."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up: linear or cosine to 0, or constant."""
    warmup_steps: int = Field(0, ge=0, le=MOST)
    """Optimizer steps over which the learning rate rises from 0."""


class OWSConfig(SamplingCore, OptimCore):
    """Settings of the optimizer `ows_ds.OWS`: the recipe's own, by the same names."""

    gamma: Annotated[Positive | Literal["auto"], Expected("a number above 0, or auto")] = "auto"  # type: ignore[assignment]
    """Expected number of sampled layers; auto: 12 (5 at full rank), at most two fifths of the layers."""
    lr: NotNegative = 3e-4
    """Peak learning rate."""
    period: Count = 50
    """Optimizer steps between two draws (K)."""
    adaptive: bool = False
    """Layers are drawn by the gradients that they have had (the recipe's sampling.importance gradient)."""
    rank: Count | None = 128  # type: ignore[assignment]
    """Dimension of the subspace of each matrix; null: the sampled layers train at full rank."""
    accumulation: Count = 1
    """Calls of backward a step."""
    seed: Seed = 0
    """Seed of the draws."""

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, tree: Any) -> Any:
        """Nothing is planned here: ``auto`` is the default of what may be planned, and of the learning rate."""
        if not isinstance(tree, Mapping):
            return tree
        own = ("gamma", "scale", "update_proj_gap")  # they have an auto of their own
        return {k: v for k, v in tree.items() if v != "auto" or k in own}

    def gamma_of(self, importance: Sequence[float]) -> float:
        """Expected number of sampled layers, of layers with these importances."""
        return usual_gamma(importance, self.rank is None, self.scheme) if self.gamma == "auto" else self.gamma

    def contradictions(self) -> Iterator[Wrong]:
        yield from super().contradictions()
        if self.rank is None and self.adaptive:
            right = "expected a rank under adaptive: layers adapt by gradients inside their subspaces"
            yield Wrong("rank", right, ("adaptive",))
        if self.rank is None and self.always_on == "low_rank":
            yield Wrong("always_on", "expected full or none where the layers train at full rank", ("rank",))
        if self.rank is None and self.rule == "muon":
            yield Wrong("rule", "expected adamw where the layers train at full rank", ("rank",))
