"""What the tests on a card hold rollout engines against; this needs no card."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.gpu.models import logprobs_in
from tests.tiny_qwen3 import CONTEXT_TOKENS, load, write_tiny_qwen3


@torch.no_grad()
def test_a_learner_asked_in_bfloat16_says_what_a_model_loaded_in_it_says_and_stays_as_it_was(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path)
    learner, loaded = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    token_ids = torch.randint(4, 112, (1, CONTEXT_TOKENS), generator=torch.Generator().manual_seed(0))
    before = logprobs_in("float32", learner, token_ids)
    found = logprobs_in("bfloat16", learner, token_ids)
    expected = loaded(token_ids).logits[0, :-1].float().log_softmax(-1)
    assert torch.equal(found, expected)
    assert torch.equal(logprobs_in("float32", learner, token_ids), before)
