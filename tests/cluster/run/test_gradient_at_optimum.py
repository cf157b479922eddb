"""The check of the gradient at student = teacher passes rounding of any model, and no fault of the scores."""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cohere2Config, Cohere2ForCausalLM

from cluster.config.objective import ObjectiveConfig
from cluster.config.run_config import Config
from cluster.config.run_file import parse_run_config
from cluster.config.stages import Dtype
from cluster.contracts.metrics import report
from cluster.contracts.trajectory import make_generated, ragged
from cluster.contracts.wire import to_wire
from cluster.demo import EMBEDDED
from cluster.run.preflight import gradient_checks
from learner.batching.arrivals import RankShare
from learner.batching.plan import plan_step
from learner.engines.torch import ReferenceEngine
from learner.model.student import load_student
from learner.worker import LearnerActor
from tests.builders import make_trajectory
from tests.learner.support import ROUTE, completion_tokens, objective_of, score_by

NUM_ROWS, PROMPT_TOKENS, COMPLETION_TOKENS = 6, 8, 24
MICRO_BATCH_TOKENS = 256
# Steps of a dtype, for what computes more exactly than the learner and so differs from it by the learner's rounding.
MORE_EXACT = {"float32": torch.float64, "bfloat16": torch.float32}


class Scorer:
    """Scores as the model does, with logits that a fault may change."""

    def __init__(self, causal_lm: Any, fault: Callable[[Tensor], Tensor] = lambda logits: logits) -> None:
        self._causal_lm, self._fault = causal_lm, fault

    def get_decoder(self) -> Any:
        return self._causal_lm.get_decoder()

    def get_output_embeddings(self) -> Callable[[Tensor], Tensor]:
        head, scale = self._causal_lm.get_output_embeddings(), getattr(self._causal_lm.config, "logit_scale", 1.0)
        return lambda hidden: self._fault((head(hidden) * scale).float())


def blurred(causal_lm: Any) -> Any:
    """Return the model with weights that are off by a twentieth of their spread."""
    other = copy.deepcopy(causal_lm)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05 * parameter.std())
    return other


FAULTS: Mapping[str, Callable[[Any], Scorer]] = {
    "temperature": lambda model: Scorer(model, lambda logits: logits / 1.2),
    "weights": lambda model: Scorer(blurred(model)),
    "shift by one": lambda model: Scorer(model, lambda logits: logits.roll(1, 0)),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch from spinning: products this small take many times as long in two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cohere2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random model whose logits are scaled and whose predictions are nearly uniform."""
    folder = tmp_path_factory.mktemp("cohere2")
    config = Cohere2Config(
        vocab_size=112,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    Cohere2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["embedded", "cohere2"])
def student(request: pytest.FixtureRequest) -> Path:
    folder: Path = EMBEDDED / "student" if request.param == "embedded" else request.getfixturevalue("cohere2")
    return folder


class Optimum:
    """Measures the gradients of a student on completions of its own."""

    def __init__(self, folder: Path, dtype: Dtype, preset: str) -> None:
        text = f"student.model = '{folder}'\nteachers.only.model = '{folder}'\nprompts.train = 'unused'"
        self.config: Config = parse_run_config(text, [f"learner.dtype={dtype}", "learner.zero_stage=0"])
        self.objective, self.dtype = objective_of(preset), dtype
        causal_lm = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._exact = copy.deepcopy(causal_lm).to(MORE_EXACT[dtype])
        torch.manual_seed(1)
        rows = []
        for index in range(NUM_ROWS):
            prompt = torch.randint(3, 112, (1, PROMPT_TOKENS))
            lengths = {"max_new_tokens": COMPLETION_TOKENS, "min_new_tokens": COMPLETION_TOKENS}
            written = causal_lm.generate(prompt, do_sample=True, top_k=0, pad_token_id=0, **lengths)[0].tolist()
            ids = {"trajectory_id": index, "prompt_id": index, "teacher": ROUTE}
            rows.append(make_trajectory(prompt[0].tolist(), written[PROMPT_TOKENS:], **ids))
        # The rollout engine differs from the learner by rounding.
        self._generated = score_by(Scorer(self._exact), self.objective, make_generated(rows))
        self._worker = LearnerActor(self.config, fetch=lambda batches: list(map(to_wire, batches)))
        self._worker.use(
            ReferenceEngine(load_student(self.config.student, self.config.learner), self.config.learner), {}
        )

    def passes(self, fault: str | None = None) -> bool:
        """Return whether the check passes when a scorer with this fault, or none, is the teacher."""
        scorer = FAULTS[fault](self._exact) if fault else Scorer(self._exact)
        scored = score_by(scorer, self.objective, self._generated)
        rollouts = scored.schema.get_field_index("rollout_logprobs")
        field = scored.schema.field(rollouts)
        scored = scored.set_column(rollouts, field, self._generated["rollout_logprobs"])
        nats = float(np.abs(ragged(scored, "teacher_logprobs").values).mean())
        measure = lambda objective: self._measure(scored, objective)  # noqa: E731
        (result,) = gradient_checks(self.objective, measure, nats, self.dtype)
        return result.passed

    def _measure(self, scored: pa.RecordBatch, objective: ObjectiveConfig) -> Mapping[str, float]:
        (grids,) = plan_step(ragged(scored, "token_ids").lengths.tolist(), 1, MICRO_BATCH_TOKENS)
        share = RankShare((scored,), (0.0,) * scored.num_rows, grids)
        parts = self._worker.accumulate(share, completes_step=True, objective=objective)
        return report({**parts, **self._worker.discard_step(completion_tokens(scored))})


@pytest.mark.parametrize("preset", ["thinking-machines", "tail-topk"])
def test_in_float32_rounding_passes_and_every_fault_of_the_scores_fails(student: Path, preset: str) -> None:
    optimum = Optimum(student, "float32", preset)
    assert optimum.passes()
    assert [fault for fault in FAULTS if optimum.passes(fault)] == []


def test_in_bfloat16_rounding_passes_and_every_fault_of_the_scores_fails() -> None:
    optimum = Optimum(EMBEDDED / "student", "bfloat16", "thinking-machines")
    assert optimum.passes()
    assert [fault for fault in FAULTS if optimum.passes(fault)] == []
