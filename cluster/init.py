"""Writes a first run file for a student, a teacher and prompts, from what it sees of them and of the machine.

Each value stands in the file and on the terminal with the reason for it. Before the file is written it is read back as
a run would read it, its workers are placed, and their memory is estimated.
"""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.config.draft import TEACHER, Draft
from cluster.contracts.errors import ConfigError
from cluster.models.model_files import context_length, load_model_config, load_tokenizer
from cluster.models.model_size import ModelSize, model_size
from cluster.placement.memory import STUDENT
from cluster.placement.placement import describe, plan_placement
from cluster.placement.proposal import Machine, choose_hardware
from cluster.run.inputs import Inputs, load_inputs

HELD_OUT_NAMES = ("held_out", "validation", "valid", "val", "dev", "test", "eval")  # in the place of "train"
# Published runs of on-policy distillation, whole models: 1e-6 to 1e-5 from 1.7B to 8B. Those of small models are from
# this repository's examples.
LEARNING_RATES = ((1e7, 1e-3), (3e8, 1e-4), (1e9, 1e-5), (4e9, 5e-6), (math.inf, 2e-6))
GPU_COMPLETION_TOKENS, CPU_COMPLETION_TOKENS = 1024, 64
GPU_PROMPTS, CPU_PROMPTS = 64, 32  # of a step
STEPS = 100
SAMPLED_PROMPTS = 2000  # whose lengths and answers are looked at
# Signs of regular expressions, and numbers or formulas.
REGEX = re.compile(r"\\[dswb+*().?\[]|\.\*|\(\?|\[[^\]]+\][+*?]")
FORMULA = re.compile(r"^\s*(\$|\\|-?[\d(.])")


@dataclass(frozen=True)
class InitOptions:
    """Holds the options of the command line."""

    student: str
    teacher: str
    data: str
    out: Path
    gpus: int | None = None  # None: those of this machine
    gpu_memory: float | None = None  # GiB of each


def write_run_file(options: InitOptions) -> None:
    """Choose, write the run file and say what was chosen; raise a PreceptorError where no run could start."""
    if options.out.exists():
        raise ConfigError(f"{options.out}: is there already; name another file with --out")
    machine = Machine.read(options.gpus, options.gpu_memory)
    draft = Draft()
    _choose_data(draft, options)
    inputs = load_inputs(draft.config())
    config = draft.config()
    sizes = {STUDENT: model_size(config.student), TEACHER: model_size(config.teachers[TEACHER])}
    _choose_verifier(draft, inputs)
    _choose_lengths(draft, inputs, options, machine)
    _choose_learning(draft, sizes[STUDENT])
    longest = inputs.prompts.longest_tokens + draft.value("rollout.max_completion_tokens") + 1
    memory = choose_hardware(draft, sizes, longest, machine)
    head = [
        f"student {options.student}: {sizes[STUDENT].describe()}",
        f"teacher {options.teacher}: {sizes[TEACHER].describe()}",
        f"data {options.data}: {inputs.train.num_prompts} prompts",
        f"machine: {machine.describe()}",
    ]
    placement = plan_placement(draft.config(), machine.nodes)
    options.out.write_text(draft.render(head), encoding="utf-8")
    pools = dict(describe(placement))
    lines = [*head, *draft.reasons()]
    lines += [f"{one.pool}: {pools.get(one.pool, '')}, {one.describe()}" for one in memory]
    lines += [f"{options.out} is written; next: preceptor check {options.out}, then preceptor train {options.out}"]
    sys.stdout.write("\n".join(lines) + "\n")


def _choose_data(draft: Draft, options: InitOptions) -> None:
    draft.set("run.name", re.sub(r"[^A-Za-z0-9_-]", "-", options.out.stem).lstrip("_-") or "run")
    draft.set("run.steps", STEPS)
    draft.set("student.model", options.student)
    draft.set(f"teachers.{TEACHER}.model", options.teacher)
    draft.set("prompts.train", options.data)
    held_out = _held_out_file(Path(options.data))
    if held_out is not None:
        draft.set("prompts.held_out", str(held_out), "found beside the training prompts")
        draft.set("evaluation.every_steps", 25)
        draft.set("evaluation.num_prompts", 200, "of the held-out ones, or all if there are fewer")
    template = load_tokenizer(options.student).chat_template
    if template is None:
        draft.set("prompts.template", "raw", "the student's tokenizer has no chat template")
    else:
        draft.set("prompts.template", "chat", "the student's tokenizer has a chat template")
    draft.set("rollout.max_completion_tokens", 1)


def _held_out_file(train: Path) -> Path | None:
    names = [train.name.replace("train", name) for name in HELD_OUT_NAMES if "train" in train.name]
    return next((train.with_name(name) for name in names if train.with_name(name).is_file()), None)


def _choose_verifier(draft: Draft, inputs: Inputs) -> None:
    answers = [inputs.prompts.prompt(number).answer for number in _sampled(inputs)]
    known = [answer for answer in answers if answer is not None]
    if not known:
        return
    verifier, why = _verifier_for(known)
    draft.set("environment.verifier", verifier, f"{len(known) / len(answers):.0%} of the prompts have an answer; {why}")


def _verifier_for(answers: Sequence[str]) -> tuple[str, str]:
    if sum(REGEX.search(answer) is not None for answer in answers) > len(answers) / 2:
        return "regex", "most contain signs of regular expressions"
    if all(FORMULA.search(answer) for answer in answers):
        return "math", "all are numbers or formulas"
    return "exact", "compared as texts"


def _choose_lengths(draft: Draft, inputs: Inputs, options: InitOptions, machine: Machine) -> None:
    """Choose how long completions may be, from the prompts' lengths and the shorter context."""
    tokens = [len(inputs.prompts.prompt(number).token_ids) for number in _sampled(inputs)]
    median, most, longest = (*np.quantile(tokens, (0.5, 0.99)).astype(int), inputs.prompts.longest_tokens)
    context = min(context_length(load_model_config(model)) for model in (options.student, options.teacher))
    wanted = GPU_COMPLETION_TOKENS if machine.gpus else CPU_COMPLETION_TOKENS
    why = f"prompts have {median} tokens (median), {most} (99 %), {longest} (longest), the context {context}"
    draft.set("rollout.max_completion_tokens", min(wanted, context - longest - 1), why)
    count = min(GPU_PROMPTS if machine.gpus else CPU_PROMPTS, inputs.train.num_prompts)
    draft.set("prompts.prompts_per_step", count)


def _sampled(inputs: Inputs) -> range:
    """Return some of the training prompts, from everywhere in their file."""
    return range(0, inputs.train.num_prompts, -(-inputs.train.num_prompts // SAMPLED_PROMPTS))


def _choose_learning(draft: Draft, student: ModelSize) -> None:
    draft.set("objective.preset", "tail-topk", "the teacher's 16 most likely tokens and a bucket for all others")
    rate = next(rate for parameters, rate in LEARNING_RATES if student.parameters <= parameters)
    draft.set("learner.learning_rate", rate, f"usual for {student.parameters / 1e6:,.3g}M parameters")
    draft.set("learner.warmup_steps", 5)
    draft.set("checkpoint.every_steps", 25, "what a fault costs at most")
