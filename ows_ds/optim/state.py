"""What a checkpoint holds of OWS, and how it is taken up again, at any world size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ows_ds.distributed.weights import ReadShard, Shard, interval, load_weights, weight_shards
from ows_ds.errors import UserError
from ows_ds.optim.full_rank import adam_steps, load_states, state_shards
from ows_ds.optim.method import Method
from ows_ds.optim.sizes import sketch_width

if TYPE_CHECKING:
    from ows_ds.optim.ows import OWS


class OWSState(Method):
    """The state of `ows_ds.optim.ows.OWS`."""

    def shards(self: OWS) -> list[Shard]:  # type: ignore[misc]
        self.weights.after_step()
        active, result = self.active, list(self.active.buffer.shards())
        for kind, tensors in (("projector", active.projectors), ("sketch_basis", self.refresh.second_bases())):
            for name, tensor in tensors.items():
                start, stop = interval(tensor.numel(), self.comm.rank, self.comm.world_size)
                result.append(Shard(f"{kind}/{name}", tuple(tensor.shape), start, tensor.reshape(-1)[start:stop]))
        result += state_shards(self.weights, active.parameters, active.full.states())
        return result + weight_shards(self.weights, active.parameters, sorted(active.trained_names))

    def state_values(self: OWS) -> dict[str, Any]:  # type: ignore[misc]
        active = self.active
        decays = {name: attached.decay for name in active.plan.matrices if (attached := active.coordinates(name))}
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "rank": self.config.rank,
            "expert_rank": self.config.expert_rank,
            "rule": self.config.rule,
            "layer_set": list(self.block_set),
            "next_set": None if self.next_set is None else list(self.next_set),
            "probabilities": self.draws.given,
            "sampler": self.draws.sampler.state_dict(),
            "gradient_norms": None if self._norms is None else self._norms.state_dict(),
            "clocks": dict(active.clocks),
            "gap": None if active.gap is None else active.gap.state_dict(),
            "decays": decays,
            "projectors": sorted(active.projectors),
            "sketch_bases": sorted(self.refresh.second_bases()),
            "adam_steps": [[*key, count] for key, count in active.buffer.steps.items()],
            "full_rank_steps": adam_steps(active.full.states()),
            "full_rank_kept": active.full.describe(),
            "trained_names": sorted(active.trained_names),
            "lr": self.param_groups[0]["lr"],
        }

    @torch.no_grad()
    def load_shards(self: OWS, values: dict[str, Any], read: ReadShard) -> None:  # type: ignore[misc]
        for key in ("rank", "expert_rank"):
            if values.get(key) != (given := getattr(self.config, key)):
                raise UserError(f"optim.{key}", given, f"expected {values.get(key)}, the rank of the checkpoint")
        if (rule := values.get("rule", "adamw")) != self.config.rule:
            raise UserError("optim.rule", self.config.rule, f"expected {rule}, the rule of the checkpoint")
        if (values.get("gap") is None) != (self.active.gap is None):
            right = f"expected {'a number' if values.get('gap') is None else 'auto'}, as in the checkpoint"
            raise UserError("optim.update_proj_gap", self.config.update_proj_gap, right)
        if values["probabilities"] != self.draws.given:
            expected = "expected those of the checkpoint: resume with its scores and gamma"
            raise UserError("sampling", "other probabilities", expected)
        active, r = self.active, self.active.r
        self.weights.after_step()
        self._drop()
        self.steps, self.skipped = values["steps"], values["skipped"]
        active.steps = self.steps
        self.block_set, active.trained_names = tuple(values["layer_set"]), set(values["trained_names"])
        self.draws.sampler.load_state_dict(values["sampler"])
        if self._norms is not None:
            self._norms.load_state_dict(values["gradient_norms"])
        ahead = values.get("next_set")
        self.next_set = None if ahead is None else tuple(ahead)
        self.param_groups[0]["lr"] = values["lr"]
        load_weights(self.weights, active.parameters, values["trained_names"], read)

        plan = active.plan_of(self.block_set)
        active.restore(plan, dict(values["clocks"]))
        if active.gap is not None:
            active.gap.load_state_dict(values["gap"], self.device)
        active.buffer.load(read)
        active.buffer.set_steps({(block, kind): count for block, kind, count in values["adam_steps"]})
        kept = values.get("full_rank_kept")
        load_states(self.weights, active.parameters, active.full.states(), values["full_rank_steps"], read, kept)
        for matrix in plan.matrices.values():
            name, device, dtype = matrix.name, self.device, active.weight_dtype
            if name in values["projectors"]:
                shape = matrix.side(matrix.short, r)
                flat = read(f"projector/{name}", 0, math.prod(shape))
                active.projectors[name] = flat.view(shape).to(device, dtype)
                active.attach(name, active.projectors[name], values["decays"].get(name, 1.0))
            if name in values["sketch_bases"]:
                shape = (*matrix.side(matrix.long, r)[:-1], sketch_width(matrix.low_rank(r), matrix.short))
                flat = read(f"sketch_basis/{name}", 0, math.prod(shape))
                self.refresh.bases[name] = flat.view(shape).to(device, dtype)
        self._read_ahead()
        self._arm(self.refresh.plans(plan, active.due(plan)))
