"""The agent of examples/extend, with a scripted student."""

import pytest
from transformers import PreTrainedTokenizerFast

from tests.rollout_workers.harness.driver import ScriptedEpisode, play

AGENT = "examples.extend.agent:second_try"


@pytest.mark.parametrize(("answers", "reward"), [(["one", "answer"], 0.5), (["one", "two"], 0.0)])
def test_the_agent_gives_a_second_try(tokenizer: PreTrainedTokenizerFast, answers: list[str], reward: float) -> None:
    episode = ScriptedEpisode(tokenizer, AGENT, arguments={"hint": "again"})
    sampled = [[*episode.ids(answer), tokenizer.eos_token_id] for answer in answers]
    assert play(episode, *sampled).reward == reward
    opening = episode.ids("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n")
    hint = episode.ids("\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n")
    assert episode.rows == [[*opening, *sampled[0], *hint, *sampled[1]]]
