"""The processors as vLLM's two model runners call them: whose logits are merged, wherever a request stands."""

from types import SimpleNamespace

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

from cluster.vllm.stop_class_processor import StopClassProcessor, StopClassProcessorV2, request_merging

MERGING, PLAIN = SamplingParams(extra_args=request_merging((3, 1))), SamplingParams()


def flat_logits(rows: int) -> torch.Tensor:
    return torch.zeros(rows, 4)


def merged_rows(logits: torch.Tensor) -> list[bool]:
    """Return which rows give id 3 half of the probability, and id 1 none; the others are as they were."""
    found = []
    for row in logits.softmax(-1).tolist():
        assert [round(p, 6) for p in row] in ([0.25] * 4, [0.25, 0.0, 0.25, 0.5])
        found.append(row[1] == 0)
    return found


def make_v1() -> StopClassProcessor:
    return StopClassProcessor(SimpleNamespace(), torch.device("cpu"), False)


def update(**changes: object) -> BatchUpdate:
    return BatchUpdate(**{"batch_size": 3, "removed": [], "added": [], "moved": [], **changes})  # type: ignore[arg-type]


def test_a_class_follows_its_request_through_the_batch() -> None:
    processor = make_v1()
    processor.update_state(update(added=[(0, MERGING, None, []), (1, PLAIN, None, []), (2, MERGING, None, [])]))
    assert merged_rows(processor.apply(flat_logits(3))) == [True, False, True]
    processor.update_state(update(removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert merged_rows(processor.apply(flat_logits(2))) == [True, False]
    processor.update_state(update(removed=[0, 1], added=[(0, PLAIN, None, [])]))
    logits = flat_logits(1)
    assert processor.apply(logits) is logits
    assert merged_rows(logits) == [False]


def test_a_greedy_request_ends_where_the_class_is_the_most_likely() -> None:
    """So vLLM may not leave the processor out where it samples nothing."""
    assert not make_v1().is_argmax_invariant()


def test_the_second_runners_rows_belong_to_slots() -> None:
    processor = StopClassProcessorV2(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    assert processor.add_request(2, MERGING)
    assert not processor.add_request(0, PLAIN)
    assert merged_rows(processor.apply(flat_logits(2), context([0, 2]))) == [False, True]
    assert merged_rows(processor.apply(flat_logits(2), context([2, 0]))) == [True, False]
    processor.add_request(2, PLAIN)  # the slot's next request
    assert merged_rows(processor.apply(flat_logits(1), context([2]))) == [False]


def context(slots: list[int]) -> LogitsContext:
    device = ("expanded_idx_mapping", "idx_mapping", "expanded_local_pos", "input_ids", "pos")
    host = {"idx_mapping_np": np.array(slots), "seq_lens_upper_bound_np": np.zeros(len(slots))}
    return LogitsContext(**host, **dict.fromkeys(device, torch.empty(0)))
