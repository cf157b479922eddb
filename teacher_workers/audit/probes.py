"""Makes the probes of an audit: short rows of the run's own text, and a copy of each with one token replaced.

A language model reads from left to right, so its answers to a row and to the perturbed copy must differ from a certain
position on and be the same before it, whatever the model is. With completion token m replaced:

- the score of the sampled token is the same before m and differs at m, since another token is scored there;
- signals of a position without its token (entropy, own top-k, scores of the same given candidates, hidden state) are
  the same up to m and differ at m + 1, the first position that has read token m.

The sampled tokens' scores alone cannot show that hidden states lie one position off: scored too late or too early, the
score of token m is still the first one to change. The second column kind does: read one position too late, it changes
at m already; one too early, not before m + 2. A column shifted after scoring moves its own pattern. So every request of
an audit asks for the entropy, and one perturbed copy per row is enough. Token m is the last but one or stands before
it, so that both sides have a position. Each row has another m, and rows and copies travel in different batches, so that
answers that change places within a batch do not fit either.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import Floats, GeneratedTrajectory, Ints, make_generated, ragged

MAX_TOKENS = 256  # of a probe: enough to tell models apart, and little beside a step
MAX_SCORED_TOKENS = 64  # at the end of a probe; where the completion is shorter, the prompt's end is scored too
MIN_SCORED_TOKENS = 8  # of a row that says enough; shorter ones are taken when there are no others
MIN_TOKENS = 4  # one that is not scored, one before the replaced token, that one, and one after it


@dataclass(frozen=True)
class Probes:
    """Holds two generated batches of the same shape, row by row."""

    rows: pa.RecordBatch
    perturbed: pa.RecordBatch
    replaced: tuple[int, ...]  # per row: the completion token, from 0, that is replaced in the perturbed row


def choose_rows(batches: Sequence[pa.RecordBatch], count: int) -> list[Ints]:
    """Return the tokens of the `count` shortest rows that differ; of long ones, the part where the completion begins.

    Rows with enough tokens to be scored come first; rows too short to be audited are never among them.
    """
    distinct: dict[bytes, Ints] = {}
    for batch in batches:
        token_ids, loss_mask = ragged(batch, "token_ids"), ragged(batch, "loss_mask")
        for row in range(batch.num_rows):
            tokens = _window(token_ids[row], loss_mask[row])
            if len(tokens) >= MIN_TOKENS:
                distinct.setdefault(tokens.tobytes(), tokens)
    return sorted(distinct.values(), key=lambda tokens: (len(tokens) <= MIN_SCORED_TOKENS, len(tokens)))[:count]


def make_probes(rows: Sequence[Ints], request: ScoreRequest, stop_class: Sequence[int] = ()) -> Probes:
    """Build rows, of at least MIN_TOKENS each, and perturbed rows; with candidates if the request gives them.

    The first id of the class stands in them for all, for it is what teachers say something of.
    """
    rows = [np.where(np.isin(tokens, stop_class), stop_class[:1] or 0, tokens).astype(np.int32) for tokens in rows]
    replaced = tuple(_position(_num_scored(tokens), row) for row, tokens in enumerate(rows))
    perturbed = []
    for row, tokens in enumerate(rows):
        row_tokens = tokens.copy()
        position = len(tokens) - _num_scored(tokens) + replaced[row]
        row_tokens[position] = _other_token(rows, row, int(tokens[position]))
        perturbed.append(row_tokens)
    given = [_candidates(tokens) if request.given_candidates else None for tokens in rows]
    return Probes(_batch(rows, given), _batch(perturbed, given), replaced)


def _window(token_ids: Ints, loss_mask: np.ndarray) -> Ints:
    """Return the first tokens of the first sampled span, and as much of what stands before them as fits."""
    sampled = np.flatnonzero(loss_mask)
    span = sampled[sampled - np.arange(len(sampled)) == sampled[:1]][:MAX_SCORED_TOKENS]
    end = int(span[-1]) + 1 if len(span) else len(token_ids)
    return np.ascontiguousarray(token_ids[max(0, end - MAX_TOKENS) : end])


def _num_scored(tokens: Ints) -> int:
    """Return how many tokens at the end count as the completion: the same for a row and its copy, now and later."""
    return min(len(tokens) - 1, MAX_SCORED_TOKENS)


def _position(num_scored: int, row: int) -> int:
    """Return which completion token is replaced: neither the first nor the last, and another one in each row."""
    return num_scored - 2 - row % (num_scored - 2)


def _other_token(rows: Sequence[Ints], row: int, token: int) -> int:
    """Return a token of the probes that does not fit where `token` stands, better one that this row has nowhere.

    All ids are in use, so that every teacher knows them. That a model gives two tokens the same score by chance is
    possible in one row, and not in all.
    """
    everywhere = {int(other) for tokens in rows for other in tokens}
    elsewhere = sorted(everywhere - {int(own) for own in rows[row]}) or sorted(everywhere - {token})
    return elsewhere[row % len(elsewhere)] if elsewhere else (0 if token else 1)


def _candidates(tokens: Ints) -> Ints:
    """Return [scored, 2]: the sampled token, whose score is known twice then, and the one before it.

    The perturbed row has the same ones, also where its sampled token is another.
    """
    num_scored = _num_scored(tokens)
    return np.stack([tokens[-num_scored:], tokens[-num_scored - 1 : -1]], axis=1)


def _batch(rows: Sequence[Ints], given: Sequence[Ints | None]) -> pa.RecordBatch:
    trajectories = []
    for index, (tokens, candidates) in enumerate(zip(rows, given, strict=True)):
        num_scored = _num_scored(tokens)
        unknown: Floats = np.zeros(num_scored, np.float32)  # no rollout worker sampled these tokens
        trajectory = GeneratedTrajectory(
            trajectory_id=index,
            prompt_id=index,
            sample_index=0,
            teacher="",
            domain="",
            min_policy_version=0,
            max_policy_version=0,
            token_ids=tokens.astype(np.int32),
            loss_mask=(np.arange(len(tokens)) >= len(tokens) - num_scored).astype(np.uint8),
            rollout_logprobs=unknown,
            finish_reason="stop",
            reward=None,
        )
        if candidates is not None:
            zeros: Floats = np.zeros(candidates.shape, np.float32)
            trajectory = replace(
                trajectory, candidate_ids=candidates.astype(np.int32), candidate_rollout_logprobs=zeros
            )
        trajectories.append(trajectory)
    return make_generated(trajectories)
