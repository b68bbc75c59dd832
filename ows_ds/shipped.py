"""Recipes, launcher files and DeepSpeed files that come along: a checkout has them at its top, a wheel installs them
under share/ows_ds."""

from importlib import metadata
from pathlib import Path

FOLDERS = {"recipes": "launch/recipes", "accelerate": "launch/accelerate", "slurm": "launch/slurm",
           "bench": "launch/bench", "ds_configs": "ds_configs"}  # fmt: skip
SHARE = "share/ows_ds/"


def files() -> dict[str, Path]:
    """All of them, by names such as recipes/llama2_7b_gsm8k.yaml."""
    top = Path(__file__).resolve().parent.parent
    if (top / FOLDERS["recipes"]).is_dir():
        there = {folder: sorted((top / folder).glob("*.*")) for folder in FOLDERS.values()}
    else:
        there = {folder: [] for folder in FOLDERS.values()}
        for file in metadata.files("ows_ds") or ():
            _, found, name = file.as_posix().partition(SHARE)
            if found:
                there[name.rpartition("/")[0]].append(Path(str(file.locate())).resolve())
    return {f"{kind}/{one.name}": one for kind, folder in FOLDERS.items() for one in sorted(there[folder])}


def about(path: Path) -> str:
    """What the first comment of a file says of it."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("#!") and line.strip("# "):
            return line.strip("# ")
        if line.strip() and not line.startswith("#"):
            break
    return ""
