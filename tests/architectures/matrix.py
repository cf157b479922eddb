"""Runs `preceptor check` on a pair of tiny models."""

import re
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from tests.architectures.models import write_pair, write_prompts
from tests.end_to_end.runs import preceptor

RUN_FILE = """
[run]
steps = 1
directory = "{folder}/runs"
name = "run"

[student]
model = "{student}"

[teachers.main]
model = "{teacher}"

[teachers.main.engine]
dtype = "float32"
kv_cache_gib = 0.1

[prompts]
train = "{prompts}"
prompts_per_step = 8

[rollout]
max_completion_tokens = 16
rows_per_batch = 8

[rollout.engine]
dtype = "float32"
kv_cache_gib = 0.1

[learner]
dtype = "float32"
micro_batch_tokens = 2048
"""
CHECK = re.compile(r"^  (ok  |FAIL)  ([^:]+): (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """Says what the check of one pair came to."""

    architecture: str
    verdict: str  # "passes", "refused" before any engine started, "FAILS"
    detail: str  # what was measured; the sentence; what failed
    seconds: float

    @property
    def is_fine(self) -> bool:
        return self.verdict in ("passes", "refused")


def check_pair(architecture: str, folder: Path) -> Outcome:
    """Write a pair, and let the command look at it."""
    student, teacher = write_pair(architecture, folder)
    prompts = write_prompts(folder / "prompts.jsonl")
    run_file = folder / "run.toml"
    run_file.write_text(RUN_FILE.format(folder=folder, student=student, teacher=teacher, prompts=prompts))
    began = perf_counter()
    done = preceptor("check", str(run_file))
    seconds = perf_counter() - began
    checks = CHECK.findall(done.output)
    failed = "; ".join(f"{name}: {measured}" for word, name, measured in checks if word == "FAIL")
    if done.code == 0:
        measured = {name: text for _, name, text in checks}
        agree = measured["rollout engine and learner agree"].removesuffix(" per token")
        return Outcome(architecture, "passes", f"engine and learner {agree} apart", seconds)
    last = (done.error.strip() or done.output.strip() or "no word").splitlines()[-1]
    # The placement is printed once the inputs are read, before the first engine.
    is_early = not done.output.strip() and done.error.count("\n") == 1
    return Outcome(architecture, "refused" if is_early else "FAILS", failed or last, seconds)
