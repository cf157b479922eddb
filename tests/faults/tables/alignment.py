"""Faults of alignment and masks: a token meets the score of another."""

from tests.faults.fault import Fault

FAULTS = (
    # Alignment.
    Fault(
        "predicting position off by one",
        "learner/batching/micro_batch.py",
        "np.flatnonzero(rows[index].loss_mask) - 1)",
        "np.flatnonzero(rows[index].loss_mask))",
        ("tests/learner/batching/test_micro_batch.py",),
    ),
    Fault(
        "predicting positions count from the grid row",
        "learner/batching/micro_batch.py",
        "row * row_length + start + np.flatnonzero",
        "row * row_length + np.flatnonzero",
        ("tests/learner/batching/test_micro_batch.py",),
    ),
    Fault(
        "position ids go on through a packed row",
        "learner/batching/micro_batch.py",
        "start : start + length] = np.arange(length)",
        "start : start + length] = np.arange(start, start + length)",
        ("tests/learner/batching/test_micro_batch.py",),
    ),
    Fault(
        "last tokens taken for the sampled ones",
        "learner/batching/micro_batch.py",
        "row.token_ids[row.loss_mask != 0] for row",
        "row.token_ids[-len(row.rollout_logprobs) :] for row",
        ("tests/learner/batching/test_micro_batch.py",),
    ),
    Fault(
        "places of a route count from its own tokens",
        "learner/batching/micro_batch.py",
        "np.arange(end - len(row.rollout_logprobs), end)",
        "np.arange(len(row.rollout_logprobs))",
        ("tests/learner/batching/test_micro_batch.py",),
    ),
    Fault(
        "student log-probabilities in packed order",
        "learner/worker.py",
        "*(of_rows[index] for index in range(len(lengths)))",
        "*of_rows.values()",
        ("tests/learner/test_worker.py",),
    ),
    Fault(
        "teacher scores shifted by one",
        "cluster/vllm/token_scoring.py",
        'request["positions"] - (num_tokens - len(computed))',
        'request["positions"] + 1 - (num_tokens - len(computed))',
        ("tests/cluster/vllm/test_token_scoring.py",),
    ),
    Fault(
        "rows of a batch in the order in which they were read",
        "cluster/vllm/batch_requests.py",
        "batch.records[row.place] = records",
        "batch.records[-batch.num_left] = records",
        ("tests/cluster/vllm/test_batch_requests.py",),
    ),
    Fault(
        "scores of given candidates shifted by one",
        "cluster/models/token_scores.py",
        'scores["candidate_logprobs"] = logprobs[:, 1:]',
        'scores["candidate_logprobs"] = logprobs[:, :-1]',
        ("tests/cluster/models/test_token_scores.py",),
    ),
    Fault(
        "candidates of a rollout shifted by one",
        "cluster/vllm/generation.py",
        "candidate_logprobs=logprobs[:, 1:] if num_listed",
        "candidate_logprobs=logprobs[:, :-1] if num_listed",
        ("tests/cluster/vllm/test_generation.py",),
    ),
    Fault(
        "a slice is read from its parent's first row",
        "cluster/contracts/columns.py",
        "column.values.slice(offsets[0], offsets[-1] - offsets[0])",
        "column.values.slice(0, offsets[-1] - offsets[0])",
        ("tests/cluster/contracts/test_trajectory.py",),
    ),
    Fault(
        "a batch's rows counted as one",
        "learner/batching/arrivals.py",
        "            count += len(self._handles[batch].trajectory_ids)\n",
        "            count += 1\n",
        ("tests/learner/batching/test_arrivals.py",),
    ),
    # Mask.
    Fault(
        "observations trained on",
        "rollout_workers/trajectory_builder.py",
        "[isinstance(segment, Completion) for segment in segments]",
        "[index > 0 for index, _ in enumerate(segments)]",
        ("tests/rollout_workers/test_trajectory_builder.py", "tests/rollout_workers/test_rollout_worker.py"),
    ),
    Fault(
        "first tokens left out instead of kept",
        "learner/loss/token_weights.py",
        "early &= position < tokens",
        "early &= position >= tokens",
        ("tests/learner/loss/test_token_weights.py",),
    ),
    Fault(
        "token weights left out of a term",
        "learner/loss/term.py",
        "weights = config.weight * chunk.plan.weights\n",
        "weights = config.weight * torch.ones_like(chunk.plan.weights)\n",
        ("tests/learner/loss/test_terms.py",),
    ),
)
