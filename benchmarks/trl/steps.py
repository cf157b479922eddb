"""What a TRL trainer is told, which prompts its steps have, and what it writes of each; loads no torch."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from cluster.config.run_config import Config
from rollout_workers.load_prompts import load_prompts
from rollout_workers.prompts import PromptOrder

Trainer = Literal["gkd", "distillation"]
Precision = Literal["float32", "autocast", "bfloat16"]


@dataclass(frozen=True)
class Settings:
    """What TRL alone decides."""

    trainer: Trainer
    precision: Precision  # autocast: fp32 weights, bf16 arithmetic; bfloat16: weights and optimizer state too
    device_batch: int  # prompts per forward; a step accumulates as many forwards as its prompts take


@dataclass(frozen=True)
class StepLine:
    """One line of the output."""

    step: int
    seconds: float  # from the end of the step before to the end of this one
    cpu_seconds: float  # of all threads; other processes hardly move it, so settings are compared by it
    completion_tokens: int  # end-of-text included, as our own loop counts them
    longest_completion_tokens: int
    prompt_tokens: int
    loss: float  # reverse KL per completion token, in nats


class StepRecorder:
    """Adds up what the forwards of one step report, and writes a line when the step ends."""

    def __init__(self, output: Path) -> None:
        output.write_text("")
        self._output = output
        self._step = 0
        self.start_step()

    def start_step(self) -> None:
        """Forget what was added and set the clocks to zero."""
        self._lengths: list[int] = []
        self._prompt_tokens = 0
        self._loss_sum = 0.0
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def add(self, mean_loss: float, completion_lengths: list[int], prompt_tokens: int) -> None:
        """Take in one forward: its loss per completion token, and how many tokens it had."""
        self._loss_sum += mean_loss * sum(completion_lengths)
        self._lengths += completion_lengths
        self._prompt_tokens += prompt_tokens

    def end_step(self) -> None:
        """Write the step's line and start the next step."""
        line = StepLine(
            step=self._step,
            seconds=time.perf_counter() - self._started,
            cpu_seconds=time.process_time() - self._cpu_started,
            completion_tokens=sum(self._lengths),
            longest_completion_tokens=max(self._lengths),
            prompt_tokens=self._prompt_tokens,
            loss=self._loss_sum / sum(self._lengths),
        )
        with self._output.open("a") as file:
            file.write(json.dumps(asdict(line)) + "\n")
        self._step += 1
        self.start_step()


@dataclass(frozen=True)
class Prompt:
    """One prompt as the file gives it, and as our own loop tokenizes it."""

    text: str
    token_ids: list[int]


def step_prompts(config: Config, steps: int, tokenizer: PreTrainedTokenizerBase, context_tokens: int) -> list[Prompt]:
    """Return the prompts of all steps, in the order in which our own loop asks them."""
    prompts = load_prompts(Path(config.prompts.train), tokenizer, config, context_tokens)
    order = PromptOrder(len(prompts), config.run.seed, config.prompts.shuffle)
    prompt_ids = order.take(0, steps * config.prompts.prompts_per_step)
    return [Prompt(prompts.text(index), prompts.prompt(index).token_ids.tolist()) for index in prompt_ids]
