"""How a model is trained: the recipe's sections method, sampling and optim, and the settings of the optimizer alone."""

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ows_ds.config.settings import (
    MAY_CHANGE,
    MOST,
    Count,
    Expected,
    NotNegative,
    Positive,
    Seed,
    Settings,
    Share,
    Wrong,
)

Betas = Annotated[
    tuple[Share, Share],
    Field(strict=False),  # a list as well
    Expected("a list of 2 numbers, each at least 0 and below 1, such as [0.9, 0.999]"),
]


class Method(Settings):
    """How the model is trained."""

    name: Literal["ows", "lisa", "lisa-d", "galore", "badam", "hift", "full", "lora", "dora", "mezo"] = Field(
        "ows",
        description="ows samples layers by importance and trains them at low rank; lisa samples evenly, lisa-d less "
        "towards the output, both at full rank; galore trains all layers at low rank; badam one layer after the other "
        "at full rank; hift one layer a step at full rank and keeps its moments; full all weights; lora and dora "
        "adapters of all linear layers; mezo all weights by forward passes alone.",
    )
    lora_rank: Count = Field(8, description="Rank of the adapters of lora and dora.")
    lora_alpha: Positive = Field(
        16.0, description="Numerator of the adapters' scale; the denominator is method.lora_rank."
    )
    lora_dropout: Share = Field(0.0, description="Share of an adapter's inputs that is zeroed in training.")
    epsilon: Positive = Field(
        1e-3, description="Length of mezo's step to both sides of the weights, in units of its noise."
    )


class SamplingCore(Settings):
    """What the recipe's sampling and `OWSConfig` share."""

    gamma: Positive = Field(5.0, description="Expected number of sampled layers, in layers.")
    period: Count = Field(50, description="Optimizer steps between two draws (K).")
    scheme: Literal["bernoulli", "fixed"] = Field(
        "bernoulli", description="bernoulli draws each layer on its own; fixed draws exactly gamma layers."
    )

    def contradictions(self) -> Iterator[Wrong]:
        yield from super().contradictions()
        if self.scheme == "fixed" and self.gamma != int(self.gamma):
            right = "expected a whole number of layers, or sampling.scheme bernoulli"
            yield Wrong("gamma", right, ("scheme",))


class Sampling(SamplingCore):
    """Which layers train, and for how long."""

    importance: Literal["outlier", "reverse", "uniform", "decreasing", "rm", "bi", "alpha"] = Field(
        "outlier",
        description="What layers are sampled by under ows: outlier, the share of weights that stand out (equation 2); "
        "reverse, the opposite; uniform; decreasing towards the output; rm, a layer's relative magnitude; bi, its "
        "block influence; alpha, how heavy the tails of its spectra are.",
    )
    order: Literal["ascending", "descending", "random"] = Field(
        "random",
        description="Course of badam and hift through the layers: from the input, from the output, or at random (badam "
        "again in each round, hift once before training).",
    )
    tau: Positive = Field(13.0, description="An entry is an outlier when it exceeds tau times its layer's mean.")
    scores: str | None = Field(
        None,
        description="File of scores to use; null: scores.json in train.output_dir, computed when it is absent.",
        json_schema_extra=MAY_CHANGE,
    )
    calibration_samples: Count = Field(
        128, description="Training rows that the scores are computed on.", json_schema_extra=MAY_CHANGE
    )
    calibration_batch_size: Count = Field(
        8, description="Rows per rank and forward pass while scoring.", json_schema_extra=MAY_CHANGE
    )
    seed: Seed | None = Field(None, description="Seed of the draws; null: train.seed.")


class OptimCore(Settings):
    """What the recipe's optimizer and `OWSConfig` share."""

    renamed: ClassVar[Mapping[str, str]] = {
        "refresh_gap": "it is called {prefix}update_proj_gap",
        "fold_rounding": "it is called {prefix}merge_rounding",
        "side": "leave it out: the shorter side of each matrix is projected",
    }

    lr: NotNegative = Field(3e-4, description="Peak learning rate.")
    betas: Betas = Field((0.9, 0.999), description="Decay per step of Adam's first and second moment.")
    eps: Positive = Field(1e-8, description="Added to the root of Adam's second moment.")
    weight_decay: NotNegative = Field(
        0.0, description="Decoupled decay of the effective weights, per step and learning rate."
    )
    max_grad_norm: Positive | None = Field(1.0, description="Largest global norm of the gradient; null: no clipping.")
    rank: Count = Field(128, description="Dimension of the subspace of each matrix; at most its smaller side.")
    update_proj_gap: Count = Field(200, description="Active steps of a layer between two projectors (T_p).")
    scale: Positive = Field(1.0, description="Factor on the projected update.")
    projector: Literal["randomized", "svd"] = Field(
        "randomized", description="How the top singular vectors are found: randomized range finder, or exact svd."
    )
    refresh: Literal["full", "sketch"] = Field(
        "full",
        description="What new projectors are found from: full gradients, one matrix at a time, or a sketch of them "
        "over two steps, without a full gradient of any matrix of the sampled layers.",
    )
    refresh_batch: Literal["full", "first"] = Field(
        "full",
        description="Gradient that a projector is computed from: the full batch, or the first micro-batch.",
    )
    moments_on_refresh: Literal["keep", "reset", "rotate"] = Field(
        "keep", description="Adam's moments at a refresh: kept, reset to 0, or rotated into the new basis."
    )
    merge_rounding: Literal["nearest", "stochastic"] = Field(
        "nearest",
        description="How merging coordinates into bfloat16 weights rounds: to the nearest value, or stochastic, up or "
        "down at random so that it is exact on average. Wider weights are not rounded.",
    )
    always_on: Literal["full", "low_rank", "none"] = Field(
        "full", description="Training of embedding and head beside the sampled layers: full rank, low_rank, or none."
    )

    def contradictions(self) -> Iterator[Wrong]:
        yield from super().contradictions()
        if self.refresh == "sketch":  # one over each of two whole steps
            if self.projector == "svd":
                yield Wrong("projector", "expected randomized under optim.refresh sketch", ("refresh",))
            if self.refresh_batch == "first":
                yield Wrong("refresh_batch", "expected full under optim.refresh sketch", ("refresh",))
            if self.update_proj_gap == 1:
                yield Wrong("update_proj_gap", "expected at least 2 under optim.refresh sketch", ("refresh",))


class Optim(OptimCore):
    """AdamW on the low-rank coordinates of the sampled layers."""

    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear",
        description="Course of the learning rate after the warm-up: linear or cosine to 0, or constant.",
    )
    warmup_steps: int = Field(
        0, ge=0, le=MOST, description="Optimizer steps over which the learning rate rises from 0."
    )


class OWSConfig(SamplingCore, OptimCore):
    """Settings of the optimizer `ows_ds.OWS`: the recipe's own, by the same names."""

    rank: Count | None = Field(  # type: ignore[assignment]
        128, description="Dimension of the subspace of each matrix; null: the sampled layers train at full rank."
    )
    accumulation: Count = Field(1, description="Calls of backward a step.")
    seed: Seed = Field(0, description="Seed of the draws.")

    def contradictions(self) -> Iterator[Wrong]:
        yield from super().contradictions()
        if self.rank is None and self.always_on == "low_rank":
            yield Wrong("always_on", "expected full or none where the layers train at full rank", ("rank",))
