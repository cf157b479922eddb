"""Rows of which a teacher with its own tokenizer has scored single positions."""

import numpy as np
import pyarrow as pa
import torch

from cluster.actors.object_store import pack
from cluster.contracts.trajectory import add_scores, make_generated, strict_tokens
from learner.batching.arrivals import BatchBuffer
from learner.batching.micro_batch import build_micro_batch, trajectories
from tests.builders import make_config, make_trajectory

STRICT = ([1, 0, 1, 0], [0, 0], [1, 1, 0])


def scored(*models: tuple[str, tuple[list[int], ...]]) -> pa.RecordBatch:
    """Return rows with prompts of two tokens, whose completion tokens are 10, 11, ... 20, 21, ..."""
    rows = [
        make_trajectory(
            (1, 2),
            [10 * (row + 1) + place for place in range(len(strict))],
            trajectory_id=row,
            candidate_ids=np.arange(len(strict) * 2, dtype=np.int32).reshape(-1, 2) + 10 * row,
            candidate_rollout_logprobs=np.full((len(strict), 2), -1.0, np.float32),
        )
        for row, strict in enumerate(STRICT)
    ]
    batch = make_generated(rows)
    for model, columns in models:
        aligned = np.concatenate([np.array(column, np.uint8) for column in columns])
        scores = {
            "logprobs": -np.arange(len(aligned), dtype=np.float32),
            "candidate_logprobs": np.full((len(aligned), 2), -2.0, np.float32),
            "aligned": aligned,
            "shared": np.stack([aligned, np.zeros_like(aligned)], axis=1),
        }
        batch = add_scores(batch, model, scores)
    return batch


def test_only_strict_tokens_are_learned_from_and_keep_their_places() -> None:
    batch = scored(("teacher", STRICT))
    whole = build_micro_batch(((0,), (1,), (2,)), trajectories([scored()]), seed=7)
    found = build_micro_batch(((0,), (1,), (2,)), trajectories([batch]), seed=7)
    assert found.tokens.target_ids.tolist() == [10, 12, 30, 31]
    assert found.tokens.candidate_ids.tolist() == [[0, 1], [4, 5], [20, 21], [22, 23]]
    assert found.tokens.logprobs["teacher"].tolist() == [0, -2, -6, -7]
    assert found.tokens.position.tolist() == [0, 2, 0, 1]
    assert found.tokens.length.tolist() == [4, 4, 3, 3]
    assert found.tokens.trajectory.tolist() == [0, 0, 2, 2]
    kept = [0, 2, 6, 7]  # of all nine tokens
    assert found.predicting.tolist() == whole.predicting[kept].tolist()
    assert torch.equal(found.tokens.uniform, whole.tokens.uniform[kept])
    assert torch.equal(found.input_ids, whole.input_ids)  # the others are read
    [route] = found.routes
    assert route.places.tolist() == [0, 1, 2, 3]
    shared = found.tokens.shared
    assert shared is not None
    assert shared.tolist() == [[True, False]] * 4


def test_a_token_counts_where_all_models_scored_it() -> None:
    batch = scored(("teacher", STRICT), ("base", ([1, 1, 0, 1], [1, 1], [0, 1, 0])))
    strict = strict_tokens(batch)
    assert strict is not None
    assert np.flatnonzero(strict).tolist() == [0, 7]
    tokens = build_micro_batch(((0,), (1,), (2,)), trajectories([batch]), seed=7).tokens
    assert tokens.target_ids.tolist() == [10, 31]
    assert strict_tokens(scored()) is None


def test_the_step_is_divided_by_its_strict_tokens() -> None:
    arrivals = BatchBuffer(make_config().objective, samples_per_prompt=1)
    _, handle = pack(scored(("teacher", STRICT)), {})
    _, plain = pack(scored(), {})
    assert handle.num_loss_tokens == (2, 0, 2)
    assert handle.num_completion_tokens == plain.num_completion_tokens == (4, 2, 3)
    arrivals.add(handle)
    assert arrivals.num_loss_tokens == 4
    arrivals.add(plain)
    assert arrivals.num_loss_tokens == 4 + 9
