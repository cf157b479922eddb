"""Turns a checkpoint of a run into a Hugging Face directory, and sends it to the hub where that is asked for.

It needs no engine and no cluster: a run whose own export failed, or that was killed, has its student too.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import CheckpointError, ConfigError
from cluster.run.checkpoints import find_resume_point
from cluster.run.model_readme import MARK, README, add_readme
from learner.checkpointing.checkpoint import checkpoints, step_folder, step_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKEN_VARIABLE = "HF_TOKEN"


def export_run(directory: RunDirectory, step: int | None, folder: Path | None, say: Callable[[str], object]) -> Path:
    """Write the student after `step`, or after the last intact checkpoint's, to a new folder; return the folder.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or the folder is there already.
    """
    config = directory.read_config()
    checkpoint = _checkpoint(directory, config, step, say)
    target = folder or directory.export.with_name(f"{directory.export.name}-step-{step_of(checkpoint)}")
    if target.exists():
        raise CheckpointError(f"{target}: is there already; remove it, or choose another folder with --to")
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which transformers imports, warns
    from learner.checkpointing.export import export_checkpoint

    transformers.utils.logging.disable_progress_bar()
    export_checkpoint(config, checkpoint, target)
    add_readme(target, directory, config, step_of(checkpoint), say)
    say(f"student after step {step_of(checkpoint)}: {target}")
    return target


def _checkpoint(directory: RunDirectory, config: Config, step: int | None, say: Callable[[str], object]) -> Path:
    written = checkpoints(directory.checkpoints)
    if step is None:
        latest = find_resume_point(directory, config, say)
        if latest is None:
            raise CheckpointError(f"{directory.path}: the run wrote no checkpoint; set checkpoint.every_steps")
        step = latest.step
    checkpoint = step_folder(directory.checkpoints, step)
    if checkpoint not in written:
        steps = ", ".join(str(step_of(folder)) for folder in written) or "none"
        raise CheckpointError(f"{directory.path}: has no checkpoint of step {step}; there are: {steps}")
    return checkpoint


def hub_api() -> "HfApi":
    """Return the hub with the token of the environment, which a command line would leave in the shell's history."""
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise ConfigError(f"--push-to-hub needs a token that may write, in the environment variable {TOKEN_VARIABLE}")
    from huggingface_hub import HfApi

    return HfApi(token=token)


def push(api: "HfApi", folder: Path, repo_id: str) -> str:
    """Upload a folder to a model repository, made as a private one if there is none; return its address.

    A README.md that its owner wrote there stays.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        address = api.create_repo(repo_id, private=True, exist_ok=True)
        kept = [README] if _has_own_readme(api, repo_id) else None
        message = "Student distilled by Preceptor"
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=kept)
    except (HTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{folder}: is written, but could not be sent to the hub as {repo_id}: {error}"
        ) from error
    return str(address)


def _has_own_readme(api: "HfApi", repo_id: str) -> bool:
    """Return whether the repository has a README.md that Preceptor did not write."""
    if not api.file_exists(repo_id, README):
        return False
    return MARK not in Path(api.hf_hub_download(repo_id, README)).read_text(encoding="utf-8", errors="replace")
