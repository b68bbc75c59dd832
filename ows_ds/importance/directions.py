"""The directions that inputs of frozen matrices have most of, in which their format is exact (`Format.directions`).

Letters: X (tokens x C_in) the inputs of a matrix W over calibration tokens; Omega (k x tokens) random signs; r the
number of directions. What rounding W to Q does to products is (W - Q) X^T. If W - Q has no direction of its own, its
expected square is in proportion to X's, and X is smallest without its part in its leading directions U. Inputs of a
transformer's matrices have much of their squares in few directions, so that these are worth their bytes.

    S = Omega X   (k x C_in), summed over batches       U = the leading right singular vectors of S

which is the range finder of Halko et al. 2011 for the rows of X, in one pass over the tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ows_ds.distributed.communicator import fail_together
from ows_ds.distributed.frozen import Frozen, frozen_of
from ows_ds.distributed.merging import stream
from ows_ds.distributed.weights import Weights
from ows_ds.importance.calibrate import Batches, Select, calibrate

MORE = 16  # rows of S beyond r, for which its directions are nearly those of X


def needs_directions(weights: Weights) -> bool:
    """Whether the format of any frozen matrix is exact in some directions."""
    return any(map(_count, weights.parameters().values()))


def find_directions(weights: Weights, batches: Batches) -> None:
    """Find them over ``batches``, and make codes and scales again. Collective.

    batches: the same on all ranks, so that the result does not depend on how many there are. Where a matrix sees no
    token at all, any directions are as good. Raises RuntimeError where activations are not finite.
    """
    parameters = [parameter for parameter in weights.parameters().values() if _count(parameter)]
    found = [frozen for frozen in map(frozen_of, parameters) if frozen is not None]
    sketches = {
        frozen: torch.zeros(frozen.format.directions + MORE, frozen.format.in_features, device=weights.device)
        for frozen in found
    }
    signs = {frozen: stream("input directions", torch.device("cpu")) for frozen in found}

    def attach(select: Select) -> Iterator[RemovableHandle]:
        def add(frozen: Frozen, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x, sketch = select("the input of a frozen matrix", inputs[0]).float(), sketches[frozen]
            omega = torch.randint(2, (len(sketch), len(x)), generator=signs[frozen], dtype=torch.float32)
            sketch.addmm_(omega.mul_(2).sub_(1).to(x.device), x)

        for frozen in found:
            for module, _ in frozen.places:
                yield module.register_forward_pre_hook(functools.partial(add, frozen))

    with nullcontext() if weights.sharded else fail_together(weights.comm):  # in shards, passes fail together
        calibrate(weights, batches, attach, padding=False)
    for frozen, sketch in sketches.items():
        leading = torch.zeros(frozen.format.in_features, frozen.format.directions, device=weights.device)
        if weights.comm.rank == 0:
            leading.copy_(_leading(sketch, frozen.format.directions))
        frozen.directions = weights.comm.broadcast(leading, "score").to("cpu", torch.bfloat16)
    if not all(frozen.directions.isfinite().all() for frozen in found if frozen.directions is not None):
        raise RuntimeError("activations of the model are not finite: nothing can be trained on them")
    weights.publish(parameters)


def _count(parameter: nn.Parameter) -> int:
    frozen = frozen_of(parameter)
    return 0 if frozen is None else frozen.format.directions


def _leading(sketch: Tensor, r: int) -> Tensor:
    """(C_in, r), orthonormal; NaN where the sketch is not finite."""
    if not sketch.isfinite().all():
        return torch.full((sketch.shape[1], r), torch.nan)
    return torch.linalg.svd(sketch.double().cpu(), full_matrices=False)[2][:r].T
