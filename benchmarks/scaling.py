"""Training on 8 to 1,024 GPUs, simulated: OWS replicated, OWS under ZeRO-3, and full fine-tuning under ZeRO-3.

    python benchmarks/scaling.py --model llama2-7b --output benchmarks/results/scaling.md

Nothing runs on a GPU. The planner gives what a step computes and sends; this program replays it in time on one GPU,
which stands for all: a link that moves one message after the other, and arithmetic that waits for the weights that it
needs.

    link     |gather 1|gather 2|  |gather 3|            |reduce|
    compute           |layer 1 |layer 2    |layer 3 ...         |update|

Gathers leave when DeepSpeed's prefetcher sends them (`ows_ds.planner.gathering`); a collective takes what rings, or
rings of rings, take with the latency and bandwidth of the links (`ows_ds.planner.cluster`). Each GPU has the same work
at any number of them.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ows_ds import config
from ows_ds.model.shapes import Model, read_model
from ows_ds.planner.choices import scaling_sizes
from ows_ds.planner.cluster import Cluster, collective, read_cluster
from ows_ds.planner.forecast import Forecast, Planner, Replays
from ows_ds.planner.roofline import times
from ows_ds.tables import Table, lines, markdown, terminal

SYSTEMS = {"OWS, replicated": ("ows", "replicated"), "OWS, ZeRO-3": ("ows", "zero3"), "full, ZeRO-3": ("full", "zero3")}
# between nodes, for a GPU: GB a second in one direction, microseconds a hop
NETWORKS = {
    "InfiniBand 400 Gb/s a GPU": (50.0, 14.0),
    "InfiniBand 200 Gb/s a node": (3.125, 14.0),
    "Ethernet 100 Gb/s a node": (1.5625, 50.0),
}


def step_seconds(one: Forecast, algorithm: str | None = None) -> tuple[float, float]:
    """Seconds of a step, and those of them in which arithmetic waits for links.

    algorithm: of `collective`; None: the faster one.
    """
    cluster, spec = one.cluster, one.usual
    work = one.times.work
    passes = sum(seconds for phase, seconds in work.items() if phase not in ("update", "refresh"))
    links = times(cluster, {}, one.sent, algorithm=algorithm).links
    # what is reduced during the backward pass: coordinates' gradients, or those of DeepSpeed's own optimizer
    meanwhile = links.get("full_rank_gradients" if spec.deepspeed_trains else "gradients", 0.0)
    after = sum(seconds for op, seconds in links.items() if op != "weights") - meanwhile
    if spec.gathered is None:  # nothing is gathered
        before = work.get("forward", 0.0) + work.get("loss", 0.0)
        end = before + max(passes - before, meanwhile)
    else:
        end = spec.accumulation * _replay(one, passes / spec.accumulation, meanwhile / spec.accumulation, algorithm)
    total = end + after + work.get("update", 0.0) + work.get("refresh", 0.0)
    return total, total - passes - work.get("update", 0.0) - work.get("refresh", 0.0)


def _replay(one: Forecast, passes: float, reduced: float, algorithm: str | None) -> float:
    """Seconds of a micro-batch under ZeRO-3. passes: of its arithmetic. reduced: of reductions in its backward pass.

    Arithmetic is spread over the uses of modules by their weights, a backward pass counting twice where weights train.
    """
    spec = one.usual
    assert spec.gathered is not None
    gathered, w = spec.gathered, spec.world_size
    own: dict[str, int] = defaultdict(int)
    for name, numel in gathered.trace.numel.items():
        own[name.rpartition(".")[0]] += numel
    shares = [own[f.use.module] * (1 if f.use.forward or spec.method != "full" else 2) for f in gathered.course]
    whole, backward = sum(shares), sum(s for s, f in zip(shares, gathered.course, strict=True) if not f.use.forward)
    now = free = 0.0  # when arithmetic, and when the link, is done with all so far
    arrives: dict[tuple[str, ...], float] = {}
    for share, fetch in zip(shares, gathered.course, strict=True):
        for message in fetch.sent:
            sent = sum(-(-gathered.trace.numel[name] // w) for name in message) * spec.itemsize * (w - 1)
            free = max(free, now) + collective(one.cluster, sent, algorithm=algorithm)
            arrives[message] = free
        now = max([now, *(arrives[message] for message in fetch.awaited)]) + passes * share / whole
        if not fetch.use.forward:
            free = max(free, now) + reduced * share / backward if reduced else free
    return max(now, free if reduced else now)


def simulate(model: Model, recipe: config.Recipe, cluster: Cluster, largest: int, algorithm: str | None) -> Any:
    """{system: {GPUs: {"seconds", "waiting", "tokens_per_second", "sent", "peak", "fits"}}}."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    planner = Planner(recipe, model, replays=Replays(lambda: model.config))
    for name, (method, home) in SYSTEMS.items():
        found[name] = {}
        for world_size in (size for size in scaling_sizes(cluster, largest) if size >= cluster.gpus):
            one = planner.under(method).scaled(cluster, world_size, home)
            seconds, waiting = step_seconds(one, algorithm)
            found[name][world_size] = {
                "seconds": seconds, "waiting": waiting, "tokens_per_second": one.tokens / seconds,
                "sent": one.sent_bytes, "peak": one.peak, "fits": one.fits,
            }  # fmt: skip
    return found


def tables(found: dict[str, Any]) -> list[Table]:
    """A table a network: milliseconds of a step, and the share of them that is waiting."""
    shown = []
    for network, systems in found.items():
        rows = []
        for world_size in next(iter(systems.values())):
            row = [f"{world_size:,}"]
            for by_world in systems.values():
                one = by_world[world_size]
                cell = f"{1e3 * one['seconds']:,.0f}"
                row += [cell if one["fits"] else f"({cell})", f"{100 * one['waiting'] / one['seconds']:.0f}"]
            rows.append(row)
        head = ["GPUs", *(part for name in systems for part in (f"{name} [ms]", "waits [%]"))]
        shown.append(Table(network, head, rows))
    return shown


def sent(found: dict[str, Any]) -> Table:
    """What a GPU sends; the same over any network."""
    systems = next(iter(found.values()))
    sizes = next(iter(systems.values()))
    rows = [
        [f"{world_size:,}", *(f"{one[world_size]['sent'] / 1e9:.2f}" for one in systems.values())]
        for world_size in sizes
    ]
    return Table("sent by a GPU in a step [GB]", ["GPUs", *systems], rows)


def notes(planner: Planner, cluster: Cluster) -> list[str]:
    """What a reader must know."""
    recipe, train = planner.recipe, planner.recipe.train
    return [
        "SIMULATED: no GPU and no network was used. These are what latencies, bandwidths and flops give, not times.",
        f"{planner.model.name}, {recipe.model.dtype}, length {recipe.data.max_length}, {train.micro_batch_size} "
        f"sequences of a GPU and pass, {train.global_batch_size // train.micro_batch_size // cluster.world_size} "
        f"passes a step, rank {recipe.optim.rank}, gamma {planner.gamma:g}, always_on {recipe.optim.always_on}.",
        f"Nodes of {cluster.gpus} GPUs: {cluster.tflops:g} TFLOP/s, NVLink {cluster.nvlink:g} GB/s; "
        f"{100 * cluster.reach:.0f} % of all data sheets' numbers is reached. Numbers in brackets: does not fit into "
        f"{cluster.memory:g} GB.",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama2-7b", help="a name, or a folder with a config.json")
    parser.add_argument("--cluster", default="8xH100", help="one node, as `ows-ds plan` takes it")
    parser.add_argument("--largest", type=int, default=1024, help="GPUs")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of a GPU and pass")
    parser.add_argument("--algorithm", choices=("ring", "hierarchical"), help="of collectives; default: the faster one")
    parser.add_argument("--output", type=Path, help="FILE.md; FILE.json and FILE.png lie beside it")
    given = parser.parse_args(argv)
    node = read_cluster(given.cluster)
    recipe = config.from_dict(
        {
            "model": {"path": given.model},
            "data": {"max_length": given.length},
            "train": {
                "output_dir": "simulated",
                "micro_batch_size": given.micro_batch,
                "global_batch_size": given.micro_batch * node.world_size,
                "gradient_checkpointing": True,
            },
        }
    )
    model = read_model(given.model)
    found = {}
    for name, (network, latency) in NETWORKS.items():
        cluster = node.model_copy(update={"network": network, "network_latency": latency})
        found[name] = simulate(model, recipe, cluster, given.largest, given.algorithm)
    shown, said = [*tables(found), sent(found)], notes(Planner(recipe, model), node)
    print(terminal(shown, said))
    if given.output is None:
        return
    given.output.parent.mkdir(parents=True, exist_ok=True)
    text = [f"# Scaling of {model.name}, simulated, {date.today()}", "", *(f"* {line}" for line in said)]
    for one in shown:
        text += ["", f"## {one.title}", "", *markdown(one)]
    given.output.write_text("\n".join([*text, "", f"![simulated]({given.output.stem}.png)", ""]), encoding="utf-8")
    given.output.with_suffix(".json").write_text(
        json.dumps({"simulated": True, "notes": said, "found": found}, indent=1)
    )
    series = {
        f"{system}, {network}": {world_size: one["tokens_per_second"] for world_size, one in by_world.items()}
        for network, systems in found.items()
        for system, by_world in systems.items()
        if all(one["fits"] for one in by_world.values())
    }
    lines(series, "GPUs", "tokens a second, SIMULATED", given.output.with_suffix(".png"), log=True)


if __name__ == "__main__":
    main()
