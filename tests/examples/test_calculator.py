"""The calculator example: what its models are trained on is what they read in a run."""

from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from cluster.config.run_file import load_run_config
from cluster.config.sections import PromptsConfig
from examples.calculator.task import Problem, build_tokenizer, conversation, draw_batch, draw_problem
from rollout_workers.environments.chat import Chat, Conversation
from rollout_workers.environments.tool_calls import hermes_calls, tool_schemas
from rollout_workers.environments.verifier_process import call_tool
from rollout_workers.prompt_row import PromptRow

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("problem", [Problem(12, 34), Problem(7, 8, 9), Problem(99, 98, 97, 96)])
def test_the_models_are_trained_on_what_a_run_makes_of_their_calls(problem: Problem) -> None:
    environment = load_run_config(ROOT / "examples/calculator/run.toml", []).environment
    paths = {path.partition(":")[2]: path for path in environment.tools}
    text = conversation(problem, np.random.default_rng(0), guesses=0.0)
    row = PromptRow(problem.text, tools=tool_schemas(environment.tools))
    chat = Chat(build_tokenizer(), PromptsConfig("none"), datetime(2026, 1, 1))
    seen, talk = chat.text(row, []), Conversation(chat, row)
    turns = 0
    while True:
        turns += 1
        written = text[len(seen) :].partition("<|end|>")[0] + "<|end|>"
        seen += written
        [*calls] = hermes_calls(talk.add_completion(chat.encode(written)))
        if not calls:
            break
        [call] = calls
        read, is_whole = talk.add(
            [{"role": "tool", "content": call_tool(paths[call["name"]], dict(call["arguments"]))}]
        )
        assert not is_whole
        seen += chat.decode(read)
    assert seen == text
    assert written == f"{problem.answer}<|end|>"
    assert turns == 2 + (problem.c > 0) + (problem.d > 0) <= environment.max_turns


def test_what_the_assistant_writes_is_learned_and_no_held_out_problem_is_trained_on() -> None:
    tokenizer, random = build_tokenizer(), np.random.default_rng(1)
    batch = draw_batch(random, 8, guesses=0.5)
    for ids, mask in zip(batch.token_ids, batch.loss_mask, strict=True):
        said = tokenizer.decode(ids[ids != 0], clean_up_tokenization_spaces=False)
        parts = [part.partition("<|end|>")[0] + "<|end|>" for part in said.split("<|assistant|>")[1:]]
        assert tokenizer.decode(ids[mask], clean_up_tokenization_spaces=False) == "".join(parts)
    assert not any(draw_problem(random).is_held_out for _ in range(200))
    assert all(draw_problem(random, held_out=True).is_held_out for _ in range(20))
