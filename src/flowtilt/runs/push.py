"""Publishes a run's LoRA on the Hugging Face hub: weights, model card, recipe and report."""

import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from flowtilt.errors import UserError
from flowtilt.io.run_folder import RunFolder
from flowtilt.io.user_errors import first_line
from flowtilt.runs.export import export
from flowtilt.runs.folder import check_run
from flowtilt.runs.sharing import shared_recipe, shared_report


def push(run: Path | str, repo: str, *, private: bool = False) -> str:
    """Uploads what `gather` collects to a model repository, which is made if it is not there; returns its address.

    Raises:
        UserError: the folder is no run or has no LoRA yet, the name is not OWNER/NAME, or the hub refuses.
    """
    run = Path(run)
    _check_name(repo)
    check_run(run)
    import huggingface_hub

    api: Any = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory() as temporary:
        folder = gather(run, Path(temporary) / "lora", repo)
        try:
            address = api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
            api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=f"LoRA of {run.resolve().name}, by flowtilt")
        except Exception as error:  # the hub's, the network's, a missing login's
            raise UserError(f"push {repo}: {first_line(error)}; `hf auth login` logs in, HF_TOKEN is a token with write access") from error
    return str(address)


def gather(run: Path, folder: Path, repo: str) -> Path:
    """The folder to upload: the LoRA, joined with those that it was trained on top of, its card, the recipe and the report.

    Recipe and report tell nothing of this machine and its servers; see `runs.sharing`.
    """
    if not (run / "lora" / "README.md").is_file():
        raise UserError(f"{run}: has no LoRA yet; train until its first checkpoint")
    export([run], folder, "diffusers")
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace(json.dumps(str(folder)), json.dumps(repo)), encoding="utf-8")
    RunFolder(folder).recipe.write_text(shared_recipe(run), encoding="utf-8")
    if RunFolder(run).report.is_file():
        RunFolder(folder).report.write_text(shared_report(run), encoding="utf-8")
    return folder


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError:
        valid = False
    else:
        valid = repo.count("/") == 1
    if not valid:
        raise UserError(f"push: {repo!r} is no name of a repository; give OWNER/NAME, as in alice/my-lora")
