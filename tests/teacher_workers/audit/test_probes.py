"""Which rows an audit asks about, and how their perturbed copies differ from them."""

import numpy as np

from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import make_generated, ragged
from teacher_workers.audit.probes import MAX_TOKENS, choose_rows, make_probes
from tests.builders import make_trajectory
from tests.teacher_workers.audit.test_checks import SCORES, make_rows


def test_a_perturbed_row_differs_in_one_token_and_each_row_in_another_place() -> None:
    rows = make_rows()
    probes = make_probes(rows, SCORES)
    ours, theirs = ragged(probes.rows, "token_ids"), ragged(probes.perturbed, "token_ids")
    for row, tokens in enumerate(rows):
        assert ours[row].tolist() == tokens.tolist()
        # Every token but the first is scored; row i's replaced token has 1 + i behind it.
        assert np.flatnonzero(ours[row] != theirs[row]).tolist() == [len(tokens) - 2 - row]
        assert probes.replaced[row] == len(tokens) - 3 - row


def test_the_shortest_rows_that_say_enough_are_chosen_and_long_ones_are_cut() -> None:
    tokens = list(range(4, 104))
    batch = make_generated(
        [
            make_trajectory(tokens[:20], tokens[20:50]),
            make_trajectory([1], [5]),  # too short to be asked about
            make_trajectory(tokens[:10], tokens[10:12]),
            make_trajectory(tokens[:10], tokens[10:12]),  # the same again
            make_trajectory([1, 2], [5, 6]),  # only when there is nothing better
            make_trajectory(tokens * 5, tokens),
        ]
    )
    chosen = choose_rows([batch], 9)
    assert [len(row) for row in chosen] == [12, 50, MAX_TOKENS, 4]
    # The completion's first 64 tokens, and what stands before them.
    assert chosen[2].tolist() == (tokens * 5)[-(MAX_TOKENS - 64) :] + tokens[:64]
    assert [len(row) for row in choose_rows([batch], 1)] == [12]


def test_rows_of_one_token_each_can_still_be_perturbed() -> None:
    same = np.full(6, 7, np.int32)
    probes = make_probes([same], ScoreRequest("teacher", given_candidates=True))
    assert ragged(probes.perturbed, "token_ids")[0].tolist() == [7, 7, 7, 7, 0, 7]
    assert ragged(probes.perturbed, "candidate_ids")[0].tolist() == [[7, 7]] * 5


def test_a_probe_ends_with_the_first_sampled_span() -> None:
    mask = np.array([0, 0, 1, 1, 0, 1], np.uint8)
    row = make_trajectory(
        token_ids=np.arange(6, dtype=np.int32), loss_mask=mask, rollout_logprobs=-np.ones(3, np.float32)
    )
    assert [tokens.tolist() for tokens in choose_rows([make_generated([row])], 1)] == [[0, 1, 2, 3]]
