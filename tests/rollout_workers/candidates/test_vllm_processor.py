"""The processors as vLLM's two model runners call them: who stands where in the batch, and which token comes next."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

from rollout_workers.candidates.sampled import CandidateLog, CandidateRequest
from rollout_workers.candidates.vllm_processor import CandidateProcessor, CandidateProcessorV2, request_candidates
from tests.rollout_workers.candidates.test_sampled import certain, ids_of

SILENT = SamplingParams()  # asks for nothing


def asking(key: str, **settings: Any) -> SamplingParams:
    return SamplingParams(extra_args=request_candidates(CandidateRequest(key, count=1, seed=3)), **settings)


def taken_from(log: CandidateLog, key: str, num_tokens: int) -> list[int]:
    return [ids[0] for ids in ids_of(log, key, num_tokens)]


def update(**changes: Any) -> BatchUpdate:
    return BatchUpdate(**{"batch_size": 3, "removed": [], "added": [], "moved": [], **changes})


def make_v1() -> CandidateProcessor:
    return CandidateProcessor(SimpleNamespace(), torch.device("cpu"), False)


def test_candidates_follow_their_request_through_the_batch() -> None:
    processor = make_v1()
    written_a: list[int] = []
    written_b: list[int] = []
    added = [(0, asking("a"), None, written_a), (1, SILENT, None, []), (2, asking("b"), None, written_b)]
    processor.update_state(update(added=added))
    processor.apply(certain(5, 0, 6))
    written_a.append(5)
    written_b.append(6)
    processor.update_state(update(moved=[(0, 2, MoveDirectionality.SWAP)]))
    processor.apply(certain(8, 0, 7))
    written_b.append(8)
    processor.update_state(update(removed=[1, 2], moved=[(0, 1, MoveDirectionality.UNIDIRECTIONAL)]))
    processor.apply(certain(0, 9))
    assert taken_from(processor.log, "a", 2) == [5, 7]
    assert taken_from(processor.log, "b", 3) == [6, 8, 9]


def test_a_request_that_vllm_interrupts_goes_on_where_it_stood() -> None:
    processor = make_v1()
    sampled: list[int] = []
    processor.update_state(update(added=[(0, asking("a"), None, sampled)]))
    processor.apply(certain(5))
    sampled.append(5)
    processor.update_state(update(removed=[0]))
    processor.apply(certain(1))  # another request's
    processor.update_state(update(added=[(1, asking("a"), None, [5])]))
    processor.apply(certain(1, 6))
    assert taken_from(processor.log, "a", 2) == [5, 6]


def test_a_batch_that_asked_for_nothing_keeps_nothing() -> None:
    processor = make_v1()
    logits = certain(5)
    processor.update_state(update(added=[(0, SILENT, None, [])]))
    assert processor.apply(logits) is logits
    assert len(processor.log) == 0


def make_v2(prompt_tokens: list[int], prefill_tokens: list[int]) -> CandidateProcessorV2:
    states = {"prompt_len": SimpleNamespace(np=prompt_tokens), "prefill_len": SimpleNamespace(np=prefill_tokens)}
    return CandidateProcessorV2(SimpleNamespace(), SimpleNamespace(**states))  # type: ignore[arg-type]


def context(slots: list[int], seen_tokens: list[int]) -> LogitsContext:
    host = {"idx_mapping_np": np.array(slots), "seq_lens_upper_bound_np": np.array(seen_tokens)}
    device = ("expanded_idx_mapping", "idx_mapping", "expanded_local_pos", "input_ids", "pos")
    return LogitsContext(**host, **dict.fromkeys(device, torch.empty(0)))


def test_the_second_runners_rows_belong_to_slots() -> None:
    processor = make_v2(prompt_tokens=[4, 4, 9], prefill_tokens=[4, 4, 9])
    assert processor.add_request(2, asking("a"))
    assert processor.add_request(0, asking("b"))
    assert not processor.add_request(1, SILENT)
    processor.apply(certain(6, 0, 5), context([0, 1, 2], [4, 4, 9]))
    processor.apply(certain(7, 8), context([2, 0], [10, 5]))
    assert taken_from(processor.log, "a", 2) == [5, 7]
    assert taken_from(processor.log, "b", 2) == [6, 8]


def test_the_second_runner_candidates_only_once_all_known_tokens_are_read() -> None:
    processor = make_v2(prompt_tokens=[4], prefill_tokens=[6])  # interrupted after two tokens
    candidates = processor.log.open(CandidateRequest("a", count=1, seed=3))
    processor.add_request(0, asking("a"))
    processor.apply(certain(1), context([0], [5]))  # a part of what is read again
    processor.apply(certain(7), context([0], [6]))
    assert list(candidates.places) == [2]


def test_the_second_runner_shows_logits_before_the_temperature() -> None:
    processor = make_v2(prompt_tokens=[1], prefill_tokens=[1])
    processor.add_request(0, asking("a", temperature=0.5))
    processor.apply(torch.tensor([[0.25, 0.75]]).log(), context([0], [1]))
    taken = processor.log.take("a", 1)
    assert taken is not None
    [[token]], [[logprob]] = taken
    assert np.exp(logprob) == pytest.approx([0.1, 0.9][token])  # squares 1 : 9


def test_a_slots_next_request_does_not_draw_for_the_one_before() -> None:
    processor = make_v2(prompt_tokens=[1], prefill_tokens=[1])
    processor.add_request(0, asking("a"))
    processor.add_request(0, SILENT)
    processor.apply(certain(3), context([0], [1]))
    assert taken_from(processor.log, "a", 1) == []


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
@pytest.mark.parametrize("processor", [CandidateProcessor, CandidateProcessorV2])
def test_candidates_from_a_truncated_distribution_are_refused(processor: Any, settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="whole distribution"):
        processor.validate_params(asking("a", **settings))
    processor.validate_params(SamplingParams(**settings))  # asks for nothing
