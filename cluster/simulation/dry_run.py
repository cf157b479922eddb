"""Does for `preceptor plan` without rates what a run does before anything starts, for GPUs that need not be there.

It reads the models' configurations and tokenizers, renders the prompts, places every worker and estimates its memory;
no weight is read, and no teacher's server is asked.
"""

import dataclasses
import sys

import numpy as np
from msgspec.structs import replace

from cluster.config.run_config import Config
from cluster.config.stages import TeacherConfig
from cluster.contracts.requests import ScoreRequest
from cluster.models.model_checks import ModelFacts
from cluster.models.model_files import load_tokenizer
from cluster.models.model_size import model_sizes
from cluster.placement.gpu_sharing import with_gpus
from cluster.placement.memory import Lengths
from cluster.placement.memory_plan import plan_memory
from cluster.placement.placement import describe, plan_placement
from cluster.placement.proposal import Machine
from cluster.run.inputs import Inputs, load_inputs
from teacher_workers.backends.http import HttpBackend

SHOWN_CHARACTERS = 400  # of the first prompt


def print_dry_run(config: Config, gpus: int | None, gpu_gib: float | None) -> None:
    """Print what a run would be on so many GPUs of so many GiB, or on this machine; raise if it cannot work there."""
    machine = Machine.read(gpus, gpu_gib)
    inputs = load_inputs(_without_servers(config))
    sizes = model_sizes(config)
    gib = machine.gpu_gib if machine.gpus else None
    lengths = Lengths(inputs.max_model_len, inputs.scoring_model_len, inputs.rollout_model_len(config))
    plan = plan_memory(config, sizes, lengths, gib)
    lines = [
        f"machine: {machine.describe()}",
        *(f"{name}: {size.describe()}" for name, size in sizes.items()),
        *inputs.pairs.lines,
        *inputs.notes,
        *describe_prompts(config, inputs),
        *plan.choices,
        *plan.lines(),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    plan.refuse()
    config = with_gpus(plan.config, on_gpu=machine.gpus > 0)
    placement = plan_placement(config, machine.nodes(config.ray.share_gpu))
    sys.stdout.writelines(f"{pool}: {share}\n" for pool, share in describe(placement))


class UnaskedServer(HttpBackend):
    """Checks a teacher behind a URL as far as that is possible without its server."""

    @classmethod
    def fault(cls, teacher: TeacherConfig, request: ScoreRequest) -> str | None:
        return super().fault(teacher, dataclasses.replace(request, top_k=0))

    @classmethod
    def check(cls, teacher: TeacherConfig, student: ModelFacts) -> ModelFacts:
        if teacher.tokenizer is None:
            return student
        return dataclasses.replace(student, tokenizer=load_tokenizer(teacher.tokenizer, teacher.trust_remote_code))


def _without_servers(config: Config) -> Config:
    unasked = f"{__name__}:{UnaskedServer.__name__}"
    teachers = {name: replace(one, backend=unasked) if one.urls else one for name, one in config.teachers.items()}
    return replace(config, teachers=teachers)


def describe_prompts(config: Config, inputs: Inputs) -> list[str]:
    """Return how long prompts are, and the first of them as the student reads it."""
    prompts = [inputs.prompts.prompt(number) for number in range(min(inputs.train.num_prompts, 2000))]
    tokens = [len(prompt.token_ids) for prompt in prompts]
    text = load_tokenizer(config.student.model, config.student.trust_remote_code).decode(prompts[0].token_ids)
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
    lengths = f"{np.median(tokens):.0f} tokens (median), {inputs.prompts.longest_tokens} (longest)"
    return [
        f"prompts: {inputs.train.num_prompts} for training, {len(inputs.held_out_ids)} held out; {lengths}; "
        f"every engine has room for {inputs.max_model_len}",
        f"first prompt: {shown!r}",
        f"its answer: {prompts[0].answer!r}",
    ]
