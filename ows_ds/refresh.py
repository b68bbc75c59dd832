"""Full gradients on their way to projectors: streamed out of the backward pass, one matrix at a time.

backward reaches W      G  (every process, its own part of the batch)
    reduce              G  summed, on W's owner only; the others drop theirs
    owner               Q = projector(G),  R = G Q  (its low-rank gradient)        G is freed
... next W ...
finish                  all_gather of all Q
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ows_ds.communicate import Communicator
from ows_ds.plan import RefreshPlan
from ows_ds.project import low_rank_gradient

FindProjector = Callable[[str, Tensor], Tensor]


class Refresh:
    """One refresh of the projectors of some matrices; alive from before a forward pass until `finish`.

    micro_batches: backward passes whose gradients the projector is found from. With one, an owner keeps nothing of a
    gradient's size; with more, an accumulator for each matrix it owns.
    """

    def __init__(
        self,
        comm: Communicator,
        plan: RefreshPlan,
        parameters: Mapping[str, nn.Parameter],
        micro_batches: int,
        find: FindProjector,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """parameters: the weights of the plan's matrices, which require gradients until `finish` or `cancel`.

        find: (name, G) -> Q, float32. dtype: of the low-rank gradients. device: of the projectors.
        """
        self.comm = comm
        self.plan = plan
        self.parameters = dict(parameters)
        self.projectors: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self._dtype, self._device = dtype, device
        self._find = find
        self._left = dict.fromkeys(parameters, micro_batches)
        self._sums: dict[str, Tensor] = {}
        self._handles = []
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(True)
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook(name)))

    def _hook(self, name: str) -> Any:
        owner = self.plan.owners[name]

        def stream(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            self.comm.reduce(gradient, owner, "refresh_gradients")
            self._left[name] -= 1
            if self.comm.index != owner:
                return
            if name in self._sums:
                gradient = self._sums[name].add_(gradient)
            elif self._left[name]:
                self._sums[name] = gradient.to(self._dtype)
            if not self._left[name]:
                self._sums.pop(name, None)
                # rounded as it will be stored, so that R and later coordinates share one subspace
                projector = self._find(name, gradient).to(parameter.dtype)
                self.projectors[name] = projector
                self.gradients[name] = low_rank_gradient(gradient, projector.to(self._dtype))

        return stream

    def finish(self, rank: int) -> dict[str, Tensor]:
        """All projectors (min(m, n), r) by matrix name, in the weights' dtype, on every process. Collective.

        `gradients` then holds R (max(m, n), r) of the matrices this process owns, over the whole of what was seen.
        """
        missing = [name for name, left in self._left.items() if left]
        if missing:
            raise RuntimeError(
                f"no gradient of {missing[0]} arrived in {self._left[missing[0]]} of the backward passes that a "
                "refresh takes: call OWS.backward once a micro-batch, `accumulation` times a step"
            )
        self.cancel()
        dtype = next(iter(self.parameters.values())).dtype
        part = torch.zeros(self.plan.stride, rank, dtype=dtype, device=self._device)
        first = self.comm.index * self.plan.stride
        for name, projector in self.projectors.items():
            start, stop = self.plan.slots[name]
            part[start - first : stop - first] = projector
        whole = self.comm.all_gather(part, "projectors")
        # cloned, so that a matrix that leaves gives its memory back
        return {name: whole[start:stop].clone() for name, (start, stop) in self.plan.slots.items()}

    def cancel(self) -> None:
        """Freeze the weights again and stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sums.clear()
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
