"""A run's model -> a repository on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from ows_ds.config import HUB_NAME
from ows_ds.errors import UserError, first_line


def push(run: str, repo: str, private: bool, message: str | None) -> str:
    """Upload the model of a finished run, or an exported one, with its card; returns its address.

    Raises UserError for a folder without a model, and where the hub does not take it.
    """
    folder = Path(run)
    model = folder / "model" if (folder / "config.yaml").is_file() else folder
    if not (model / "config.json").is_file():
        right = "expected a finished run, or the folder of a model with its config.json"
        raise UserError("RUN", run, right)
    if not re.fullmatch(HUB_NAME, repo):
        raise UserError("REPO", repo, "expected a repository such as name/model")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi(library_name="ows_ds")
    try:
        full = api.create_repo(repo, private=private, exist_ok=True).repo_id
        found = api.upload_folder(
            repo_id=full, folder_path=model, commit_message=message or f"{folder.resolve().name}, trained with ows_ds"
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
        right = f"expected a repository that `hf auth login` lets you write to ({first_line(error)})"
        raise UserError("REPO", repo, right) from error
    return str(getattr(found, "commit_url", found))
