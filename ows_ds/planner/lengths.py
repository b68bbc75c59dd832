"""What rows of other lengths need: of each the fastest of what fits on the whole cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ows_ds.errors import UserError
from ows_ds.model.shapes import check_shared
from ows_ds.planner.choices import HOMES, Choice, powers
from ows_ds.planner.cluster import Cluster
from ows_ds.planner.forecast import Forecast, Planner
from ows_ds.tables import Table, number

UNITS = {"": 1, "k": 1 << 10, "M": 1 << 20}


def parse_lengths(words: Sequence[str]) -> list[int]:
    """Tokens, of words such as 4k, 1M or 3000. Raises UserError (``--lengths``)."""
    found = [re.fullmatch("([1-9][0-9]{0,8})([kM]?)", word) for word in words]
    if not found or None in found:
        raise UserError("--lengths", ",".join(words), "expected tokens with commas between them, such as 4k,32k,1M")
    return [int(one[1]) * UNITS[one[2]] for one in found if one]


def by_length(planner: Planner, cluster: Cluster, homes: Sequence[str], lengths: Sequence[int]) -> dict[int, Forecast]:
    """Under gradient checkpointing, a row of each group of ranks in a step: the fastest that fits, or the leanest where
    none does."""
    found = {}
    for length in lengths:
        some = [*_forecasts(planner, cluster, homes, length)]
        fitting = [one for one in some if one.fits]
        found[length] = (
            max(fitting, key=lambda one: one.tokens_per_day) if fitting else min(some, key=lambda one: one.peak)
        )
    return found


def _forecasts(planner: Planner, cluster: Cluster, homes: Sequence[str], length: int) -> Iterator[Forecast]:
    for shared_by in powers(cluster.gpus):
        try:
            if shared_by > 1:
                check_shared(planner.model.config, shared_by)
        except UserError:
            continue
        for offload in (False, True):
            train = {
                "sequence_parallel": shared_by,
                "global_batch_size": cluster.world_size // shared_by,
                "micro_batch_size": 1,
                "activation_offload": offload,
            }
            changed = planner.changed(data={"max_length": length}, train=train)
            for home in homes:
                yield changed.forecast(cluster, Choice(cluster.world_size, home, 1, True))


def table(found: dict[int, Forecast]) -> Table:
    """A row a length."""
    rows = []
    for length, one in found.items():
        train = one.largest
        peak, host = (number(size / 2**30, 1, fixed=True) for size in (one.peak, one.on_host))
        rows.append(
            [
                f"{length:,}", str(train.shared_by), HOMES[one.choice.home], peak, host if train.offload else "",
                number(one.seconds, 3), number(one.tokens_per_day / 1e6, 3), "" if one.fits else "too big",
            ]
        )  # fmt: skip
    head = ["tokens", "shared by", "weights", "GiB", "on host", "s", "Mtok/day", ""]
    return Table("lengths of rows: the fastest of what fits, with checkpointing", head, rows)
