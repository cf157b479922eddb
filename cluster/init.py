"""Writes a first run file for a student, a teacher and prompts, from what it sees of them and of the machine.

Each value stands in the file and on the terminal with the reason for it. Before the file is written it is read back as
a run would read it, its workers are placed, and their memory is estimated.
"""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config.data_source import parse_source
from cluster.config.draft import TEACHER, Draft
from cluster.config.methods import METHODS
from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ConfigError, ModelError, PromptError
from cluster.models.model_files import context_length, load_model_config, load_tokenizer
from cluster.models.model_size import STUDENT, ModelSize, model_sizes
from cluster.placement.placement import describe, plan_placement
from cluster.placement.proposal import Machine, choose_hardware
from cluster.run.inputs import Inputs, load_inputs
from rollout_workers.environments.verifiers import check_answer
from rollout_workers.prompt_rows import USUAL_COLUMNS
from rollout_workers.prompt_sources import HELD_OUT_SPLITS, guess_columns, hub_or_cache, read_rows, value_at
from teacher_workers.backends.http import served_model

HELD_OUT_NAMES = ("held_out", "validation", "valid", "val", "dev", "test", "eval")  # in the place of "train"
# Published runs of on-policy distillation, whole models: 1e-6 to 1e-5 from 1.7B to 8B. Those of small models are from
# this repository's examples.
LEARNING_RATES = ((1e7, 1e-3), (3e8, 1e-4), (1e9, 1e-5), (4e9, 5e-6), (math.inf, 2e-6))
GPU_COMPLETION_TOKENS, CPU_COMPLETION_TOKENS = 1024, 64
GPU_PROMPTS, CPU_PROMPTS = 64, 32  # of a step
STEPS = 100
SHOWN_ROWS = 200  # whose columns are looked at
ANSWER_MARK = "####"  # of GSM8K, between the reasoning and the number
SAMPLED_PROMPTS = 2000  # whose lengths are looked at
# Signs of regular expressions, and numbers or formulas.
REGEX = re.compile(r"\\[dswb+*().?\[]|\.\*|\(\?|\[[^\]]+\][+*?]")
FORMULA = re.compile(r"^\s*(\$|\\|-?[\d(.])")


@dataclass(frozen=True)
class InitOptions:
    """Holds the options of the command line."""

    student: str
    teacher: str | None  # a folder, a hub id, or the URL of a server; None: the student itself, as the method has it
    data: str
    out: Path
    method: str | None = None
    teacher_model: str | None = None  # the server's name for it; None: the only one that it serves
    api_key_env: str | None = None
    trust_remote_code: bool = False
    gpus: int | None = None  # None: those of this machine
    gpu_memory: float | None = None  # GiB of each

    @property
    def is_served(self) -> bool:
        """Return whether the teacher is a server's."""
        return self.teacher is not None and self.teacher.startswith(("http://", "https://"))


def write_run_file(options: InitOptions) -> None:
    """Choose, write the run file and say what was chosen; raise a PreceptorError where no run could start."""
    if options.out.exists():
        raise ConfigError(f"{options.out}: is there already; name another file with --out")
    if options.teacher is None and options.method is None:
        raise ConfigError(f"name a teacher with --teacher, or a method with --method: {', '.join(METHODS)}")
    machine = Machine.read(options.gpus, options.gpu_memory)
    draft = Draft()
    _choose_data(draft, options)
    teacher_tokens = _choose_teacher(draft, options)
    inputs = _read_inputs(draft)
    sizes = model_sizes(draft.config())
    _choose_verifier(draft, inputs)
    longest = _choose_lengths(draft, inputs, options, machine, teacher_tokens)
    if options.method is None:
        draft.set("objective.preset", "tail-topk", "the teacher's 16 most likely tokens and a bucket for all others")
    _choose_learning(draft, sizes[STUDENT])
    plan = choose_hardware(draft, sizes, longest, machine)
    head = [
        f"student {options.student}: {sizes[STUDENT].describe()}",
        f"teacher {options.teacher or 'student'}: {sizes[TEACHER].describe() if TEACHER in sizes else 'served there'}",
        f"data {options.data}: {inputs.train.num_prompts} prompts",
        f"machine: {machine.describe()}",
    ]
    if machine.gpus and machine.is_named:
        head.append(f"planned with {machine.planned_gib:.1f} GiB of each GPU, which has less than its name says")
    config = draft.config()
    placement = plan_placement(config, machine.nodes(config.ray.share_gpu))
    try:
        options.out.write_text(draft.render(head), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{options.out}: cannot write the run file: {error.strerror}") from error
    lines = [*head, *inputs.pairs.lines, *inputs.notes, *draft.reasons(), *plan.lines()]
    lines += [f"{pool}: {share}" for pool, share in describe(placement)]
    lines += [f"{options.out} is written; next: preceptor check {options.out}, then preceptor train {options.out}"]
    sys.stdout.write("\n".join(lines) + "\n")


def _choose_data(draft: Draft, options: InitOptions) -> None:
    draft.set("run.name", re.sub(r"[^A-Za-z0-9_-]", "-", options.out.stem).lstrip("_-") or "run")
    draft.set("run.steps", STEPS)
    draft.set("student.model", options.student)
    if options.trust_remote_code:
        draft.set("student.trust_remote_code", True, "as --trust-remote-code asks")
    draft.set("prompts.train", options.data)
    held_out = _held_out(options.data)
    if held_out is not None:
        draft.set("prompts.held_out", held_out, "found beside the training prompts")
        draft.set("evaluation.every_steps", 25)
        draft.set("evaluation.num_prompts", 200, "of the held-out ones, or all if there are fewer")
    _choose_columns(draft, options.data)
    template = load_tokenizer(options.student, options.trust_remote_code).chat_template
    if template is None:
        draft.set("prompts.template", "raw", "the student's tokenizer has no chat template")
    else:
        draft.set("prompts.template", "chat", "the student's tokenizer has a chat template")
    if "enable_thinking" in str(template):
        draft.set("prompts.chat_template_kwargs", {"enable_thinking": False}, "thoughts would fill the completions")
    draft.set("prompts.too_long", "skip", "of prompts that leave no room; the run says how many")
    draft.set("rollout.max_completion_tokens", 1)


def _choose_teacher(draft: Draft, options: InitOptions) -> int:
    """Name the teacher; return the tokens of its context, the most there are where a server does not say."""
    section = f"teachers.{TEACHER}"
    if options.method is not None:
        draft.set("method", options.method, "its context, objective and sampling, which this file may change")
    if not options.is_served and (options.teacher_model or options.api_key_env):
        raise ConfigError(f"--teacher-model and --api-key-env are for a URL, found --teacher {options.teacher}")
    if options.teacher is None:
        draft.set(f"{section}.from", "student", "as its method has it")
        return sys.maxsize
    if not options.is_served:
        draft.set(f"{section}.model", options.teacher)
        if options.trust_remote_code:
            draft.set(f"{section}.trust_remote_code", True, "as --trust-remote-code asks")
        return context_length(load_model_config(options.teacher, options.trust_remote_code))
    try:
        server = TeacherConfig(options.teacher_model or "", url=options.teacher, api_key_env=options.api_key_env)
    except ValueError as error:
        raise ConfigError(f"--teacher: {error}") from error
    served = served_model(server)
    draft.set(f"{section}.url", options.teacher)
    draft.set(f"{section}.model", served.id, f"set {section}.tokenizer to its tokenizer to have the two compared")
    if options.api_key_env:
        draft.set(f"{section}.api_key_env", options.api_key_env)
    return served.max_model_len or sys.maxsize


def _held_out(data: str) -> str | None:
    """Return where held-out prompts are: another split of the data set, or a file that is named like it."""
    source = parse_source(data)
    if source.kind == "file":
        path = Path(data)
        names = [path.name.replace("train", name) for name in HELD_OUT_NAMES if "train" in path.name]
        return next((str(path.with_name(name)) for name in names if path.with_name(name).is_file()), None)
    if source.kind in ("reasoning-gym", "verifiers"):
        return None  # the user chooses another seed
    import datasets

    try:
        with hub_or_cache(source):
            splits = datasets.get_dataset_split_names(source.place, source.subset)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError):
        return None  # reading the prompts says what is wrong
    place = source.place if source.subset is None else f"{source.place}/{source.subset}"
    return next((f"{place}:{name}" for name in HELD_OUT_SPLITS if name in splits), None)


def _choose_columns(draft: Draft, data: str) -> None:
    """Choose from the first rows where prompts and answers are, and what of them is meant."""
    rows = [row for _, row in islice(read_rows(data), SHOWN_ROWS) if isinstance(row, dict)]
    if not rows:
        return  # reading the prompts says what is wrong
    columns = guess_columns(rows[0])
    renamed = {field: column for field, column in columns.items() if column not in USUAL_COLUMNS[field]}
    if renamed:
        draft.set("prompts.columns", renamed, f"the columns are {', '.join(rows[0])}")
    prompts, answers = ([value_at(row, columns.get(field, field)) for row in rows] for field in ("prompt", "answer"))
    if all(isinstance(answer, str) and ANSWER_MARK in answer for answer in answers):
        draft.set("prompts.answer_after", ANSWER_MARK, "what stands behind it is the answer")
    if any(isinstance(prompt, list) and prompt and _is_assistants(prompt[-1]) for prompt in prompts):
        draft.set("prompts.last_answer", "drop", "of conversations that end with the assistant's message")


def _is_assistants(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _read_inputs(draft: Draft) -> Inputs:
    """Read models and prompts; a pair whose turns end at different tokens gets the word that lets it in."""
    try:
        return load_inputs(draft.config())
    except ModelError as refusal:
        why = "each ends its turns at another token, and completions end at both"
        draft.set(f"teachers.{TEACHER}.accept_differences", ["eos"], why)
        try:
            return load_inputs(draft.config())
        except ModelError:
            raise refusal from None


def _choose_verifier(draft: Draft, inputs: Inputs) -> None:
    answers = [inputs.prompts.prompt(number).answer for number in range(inputs.train.num_prompts)]
    known = [answer for answer in answers if answer is not None]
    if not known:
        return
    verifier, why = _verifier_for(known)
    draft.set("environment.verifier", verifier, f"{len(known) / len(answers):.0%} of the prompts have an answer; {why}")


def _verifier_for(answers: Sequence[str]) -> tuple[str, str]:
    """Return the verifier that the answers seem to be written for, if it can read all of them."""
    try:
        if sum(REGEX.search(answer) is not None for answer in answers) > len(answers) / 2:
            for answer in answers:
                check_answer("regex", answer)
            return "regex", "most contain signs of regular expressions"
        if all(FORMULA.search(answer) for answer in answers):
            for answer in answers:
                check_answer("math", answer)
            return "math", "all are numbers or formulas"
    except PromptError:
        pass  # a run with this verifier would be refused
    return "exact", "compared as texts"


def _choose_lengths(draft: Draft, inputs: Inputs, options: InitOptions, machine: Machine, teacher_tokens: int) -> int:
    """Choose completions' length so that 99 % of the prompts fit; return the tokens of the longest sequence."""
    tokens = [len(inputs.prompts.prompt(number).token_ids) for number in _sampled(inputs)]
    median, most = (int(np.quantile(tokens, share)) for share in (0.5, 0.99))
    longest = inputs.prompts.longest_tokens
    context = min(context_length(load_model_config(options.student, options.trust_remote_code)), teacher_tokens)
    further = max(0, inputs.scorer_prompt_tokens.get(TEACHER, 0) - longest)  # of the teacher's own prompts
    left = context - most - further - 1
    if left < 1:
        raise PromptError(f"{options.data}: the teacher's contexts leave no room in {context} tokens; shorten them")
    completion = min(GPU_COMPLETION_TOKENS if machine.gpus else CPU_COMPLETION_TOKENS, left)
    why = f"prompts have {median} tokens (median), {most} (99 %), {longest} (longest), the context {context}"
    draft.set("rollout.max_completion_tokens", completion, why)
    count = min(GPU_PROMPTS if machine.gpus else CPU_PROMPTS, inputs.train.num_prompts)
    draft.set("prompts.prompts_per_step", count)
    return min(longest + further + completion + 1, context)


def _sampled(inputs: Inputs) -> range:
    """Return some of the training prompts, from everywhere in their file."""
    return range(0, inputs.train.num_prompts, -(-inputs.train.num_prompts // SAMPLED_PROMPTS))


def _choose_learning(draft: Draft, student: ModelSize) -> None:
    rate = next(rate for parameters, rate in LEARNING_RATES if student.parameters <= parameters)
    draft.set("learner.learning_rate", rate, f"usual for {student.describe()}")
    draft.set("learner.warmup_steps", 5)
    draft.set("checkpoint.every_steps", 25, "what a fault costs at most")
