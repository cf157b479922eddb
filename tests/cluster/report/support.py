"""Writes run directories as runs leave them, for the tests of the report."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.config.run_directory import RunDirectory
from cluster.contracts.files import RecordsFile
from cluster.contracts.kept_rows import KeptRowFiles
from tests.builders import make_config

K = 3  # candidates of each token


def make_run(folder: Path, *overrides: str, name: str = "run", steps: int = 0, state: str = "ended") -> RunDirectory:
    """Write a run with so many steps, without samples and kept rows."""
    config = make_config(f"run.directory={folder}", f"run.name={name}", "run.steps=100", *overrides)
    directory = RunDirectory.create(config)
    for step in range(1, steps + 1):
        RecordsFile(directory.metrics).write(make_record(step))
    status = {"state": state, "pid": 1, "host": "elsewhere", "started_at": 0.0, "changed_at": 0.0, "step": steps}
    if state == "failed":
        status["error"] = f"{directory.path}/x: the disk is full"
    directory.status.write_text(json.dumps(status))
    RecordsFile(directory.starts).write({"step": 0, "at": 1e9, "hardware": "1 node, 2 CPU cores", "placement": {}})
    return directory


def make_record(step: int, **metrics: float) -> dict[str, float]:
    pools = {f"pool/{pool}/{name}": 0.1 for pool in ("rollout", "learner") for name in ("idle_share", "busy_share")}
    stages = {f"{stage}/seconds": 1.0 for stage in ("generate", "score", "step", "sync")} | {"learn/wait_seconds": 0.5}
    return {"step": step, "train/kl": 1 / step, "train/entropy": 1.0, **stages, **pools, **metrics}


def make_rows(step: int, texts: list[list[str]], num_prompt: int = 2, top: str | None = None, **columns) -> pa.Table:
    """Build kept rows of one step: per row its tokens' texts, of which the first `num_prompt` are the prompt."""
    random = np.random.default_rng(step)
    lengths = [len(row) - num_prompt for row in texts]

    def each(width: int = 0, kind: type = np.float32) -> list:
        shape = (lambda n: (n, width)) if width else (lambda n: (n,))
        values = [-random.exponential(size=shape(length)).astype(np.float32) for length in lengths]
        return [value.astype(np.float64).tolist() if kind is np.float32 else value.tolist() for value in values]

    floats, nested = pa.list_(pa.float32()), pa.list_(pa.list_(pa.float32()))
    ids, nested_ids = pa.list_(pa.int32()), pa.list_(pa.list_(pa.int32()))
    table = {
        "step": pa.array([step] * len(texts), pa.int32()),
        "reason": ["chosen"] * (len(texts) - 1) + ["worst"],
        "trajectory_id": pa.array([step * 100 + row for row in range(len(texts))], pa.int64()),
        "prompt_id": pa.array([step * 100 + row for row in range(len(texts))], pa.int64()),
        "log_ratio": pa.array(random.normal(size=len(texts)), pa.float32()),
        "reward": pa.array([None] * len(texts), pa.float32()),
        "min_policy_version": pa.array([step - 1] * len(texts), pa.int64()),
        "version_changes": pa.array([[1]] * len(texts), ids),
        "token_ids": pa.array([list(range(len(row))) for row in texts], ids),
        "token_texts": pa.array(texts, pa.list_(pa.string())),
        "loss_mask": pa.array([[0] * num_prompt + [1] * length for length in lengths], pa.list_(pa.uint8())),
    }
    for name in ("rollout_logprobs", "teacher_logprobs", "student_logprobs", "student_entropy", "loss", "loss_weight"):
        table[name] = pa.array(each(), floats)
    if top is None:
        table["candidate_ids"] = pa.array([[[90, 91, 92]] * length for length in lengths], nested_ids)
        for model in ("student", "teacher"):
            table[f"{model}_candidate_logprobs"] = pa.array(each(K), nested)
    for model in ("student",) if top != "full" else ("student", "teacher"):
        table[f"{model}_top_ids"] = pa.array([[[90, 93, 94]] * length for length in lengths], nested_ids)
        table[f"{model}_top_logprobs"] = pa.array(each(K), nested)
    vocabulary = [[(90 + place, f"word {place}") for place in range(5)]] * len(texts)
    table["vocabulary"] = pa.array(vocabulary, pa.map_(pa.int32(), pa.string()))
    return pa.table(table | columns)


def keep(directory: RunDirectory, *tables: pa.Table) -> None:
    files = KeptRowFiles(directory.kept_rows)
    for table in tables:
        files.write(table["step"][0].as_py(), table)
