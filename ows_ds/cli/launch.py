"""`ows-ds launch`."""

from pathlib import Path

from ows_ds.cli.main import VERBS
from ows_ds.cli.options import Options, Parser, need, read_recipe, recipe_options, recipe_parser


def parser() -> Parser:
    """The options."""
    made = recipe_parser("launch", VERBS["launch"], "--slurm CLUSTER.yaml --config RECIPE.yaml [options]")
    made.value("slurm", "CLUSTER.yaml", "the cluster, and what the job takes of it")
    made.flag("dry-run", "check and print the script; submit nothing")
    made.add_recipe()
    return made


def run(options: Options, argv: list[str]) -> None:
    """Check, and submit."""
    recipe = read_recipe(options)
    if recipe is None:
        return
    need(options, slurm="a file", config="a file")
    from ows_ds.slurm import job as slurm

    job, planned = slurm.read(options["slurm"]), None
    if Path(recipe.model.path).is_dir():
        from ows_ds.model.shapes import read_model
        from ows_ds.planner.fit import by_speed, fit
        from ows_ds.planner.forecast import Planner

        model = read_model(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
        planner = Planner(recipe, model)
        choice = planner.choice(job.world_size)
        if job.gpu_memory is None:
            planned = planner.peak(choice)
        else:
            homes = [choice.home]
            fitted = fit(planner, by_speed(planner, job.world_size, homes), job.gpu_memory * 2**30, recipe.auto)
            recipe, planned = fitted.recipe, fitted.peak
    given, file = recipe_options(options), str(Path(options["config"]).resolve())
    slurm.launch(recipe, job, file, given, bool(options.get("dry_run")), planned)
