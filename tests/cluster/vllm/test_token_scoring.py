"""The LM head follows the weights that a model loads, and the pooler's last step scores what requests ask for."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from cluster.contracts.errors import ModelError
from cluster.models.lm_head import LmHead
from cluster.models.token_scores import HeadShard, Layout
from cluster.vllm.token_scoring import ArrivingHead, ScoringHead

WIDTH, VOCABULARY = 4, 10


def arriving(name: str = "lm_head.weight", has_bias: bool = False, first: int = 0, rows: int = 3) -> ArrivingHead:
    """Return the head of a rank; what is loaded may have more rows, which only pad it."""
    head = LmHead(torch.zeros(rows, 2), torch.zeros(rows) if has_bias else None, name=name)
    return ArrivingHead(HeadShard.of(head, first, first + rows))


def load(head: ArrivingHead, **weights: torch.Tensor) -> list[str]:
    """Return the names that the model gets to see."""
    return [name for name, _ in head.read((name.replace("__", "."), values) for name, values in weights.items())]


def test_the_heads_rows_come_in_its_own_dtype_and_the_model_still_gets_all_weights() -> None:
    head, new = arriving(), torch.arange(8).view(4, 2).to(torch.bfloat16)
    assert load(head, norm__weight=torch.ones(2), lm_head__weight=new) == ["norm.weight", "lm_head.weight"]
    assert torch.equal(head.shard.rows.weight, new[:3].float())


def test_a_rank_takes_its_own_rows() -> None:
    head = arriving(first=1, rows=2)
    load(head, lm_head__weight=torch.arange(8.0).view(4, 2))
    assert head.shard.rows.weight.tolist() == [[2, 3], [4, 5]]


def test_each_update_must_bring_the_matrix_and_the_bias() -> None:
    head = arriving(has_bias=True)
    load(head, lm_head__weight=torch.ones(4, 2))
    assert head.fault() == "the update lacks the teacher's LM head, 'lm_head.bias'"
    load(head, lm_head__bias=torch.tensor([1.0, 2, 3, 4]))
    assert head.fault() is None
    assert head.shard.rows.bias is not None
    assert head.shard.rows.bias.tolist() == [1, 2, 3]
    head.begin()
    load(head, norm__weight=torch.ones(2))
    assert head.fault() == "the update lacks the teacher's LM head, 'lm_head.weight'"


def test_names_of_an_update_may_have_another_prefix_and_heads_of_further_tokens_are_passed_over() -> None:
    head = arriving("embed_tokens.weight")
    load(head, model__embed_tokens__weight=torch.ones(4, 2), model__pre_embed_tokens__weight=torch.zeros(4, 2))
    assert head.shard.rows.weight.tolist() == [[1, 1]] * 3
    both = [("lm_head__weight", torch.ones(4, 2)), ("mtp__lm_head__weight", torch.zeros(4, 2))]
    for order in (1, -1):
        head = arriving()
        load(head, **dict(both[::order]))
        assert head.shard.rows.weight.tolist() == [[1, 1]] * 3


def test_a_model_that_was_loaded_without_the_head_is_refused_and_an_updates_bucket_is_not() -> None:
    head = arriving()
    load(head, norm__weight=torch.ones(2))
    with pytest.raises(ModelError, match=r"did not load the LM head 'lm_head\.weight'"):
        head.check_loaded()
    load(head, lm_head__weight=torch.ones(4, 2))
    head.check_loaded()
    head.begin()
    head.check_loaded()


def test_too_few_rows_are_an_error() -> None:
    with pytest.raises(RuntimeError):
        load(arriving(), lm_head__weight=torch.ones(2, 2))


@dataclass
class Params:
    extra_kwargs: dict[str, Any] | None = None


@dataclass
class Metadata:
    prompt_lens: torch.Tensor
    pooling_params: list[Params] = field(default_factory=list)


HEAD = LmHead(torch.randn(VOCABULARY, WIDTH, generator=torch.manual_seed(0)), name="lm_head.weight")


def head_and_states() -> tuple[ScoringHead, torch.Tensor]:
    def plain(pooled: list[Any], metadata: Metadata) -> list[Any]:
        return list(pooled)

    return ScoringHead(plain, ArrivingHead(HeadShard.of(HEAD))), torch.randn(12, WIDTH, generator=torch.manual_seed(1))


def request(positions: list[int], ids: list[list[int]], layout: Layout) -> Params:
    return Params({"positions": np.array(positions), "ids": np.array(ids, np.int32), "layout": layout})


def test_requests_of_one_step_get_what_each_asked_for() -> None:
    """Two spans with candidates; the most likely tokens; hidden states; a prompt that is not read to its end."""
    head, states = head_and_states()
    logprobs = (states @ HEAD.weight.T).log_softmax(-1)
    params = [
        request([1, 4], [[3, 5], [2, 9]], Layout(num_given=1)),
        request([1, 2], [[7], [8]], Layout(top_k=2, hidden=True)),
        Params(),
        request([0], [[1]], Layout()),
        request([2], [[6, 0]], Layout(num_given=1)),
    ]
    # The last one's first two positions were cached.
    pooled = [states[:6], states[6:9], states[9:11], None, states[11:]]
    first, second, third, fourth, fifth = head(pooled, Metadata(torch.tensor([6, 3, 2, 9, 3]), params))
    expected = torch.stack([logprobs[1, [3, 5]], logprobs[4, [2, 9]]])
    torch.testing.assert_close(first.view(torch.float32), expected)
    record = second.numpy().reshape(-1).view(Layout(top_k=2, hidden=True).dtype("<f4", WIDTH, 0))
    torch.testing.assert_close(torch.from_numpy(record["logprobs"][:, 0].copy()), logprobs[[7, 8], [7, 8]])
    assert record["candidate_ids"].tolist() == logprobs[7:9].topk(2).indices.tolist()
    assert record["hidden"].tolist() == states[7:9].tolist()
    assert third is pooled[2]
    assert fourth is None
    torch.testing.assert_close(fifth.view(torch.float32), logprobs[[11], [6, 0]][None])


def test_a_request_for_a_cached_position_gets_no_record_at_all() -> None:
    head, states = head_and_states()
    params = [request([1, 2], [[7], [8]], Layout()), request([2], [[7]], Layout())]
    cached, computed = head([states[:2], states[2:4]], Metadata(torch.tensor([4, 4]), params))
    assert (cached.shape, computed.shape) == ((0, 4), (1, 4))


def test_values_of_other_layers_stand_behind_the_last_states() -> None:
    head, states = head_and_states()
    layers = torch.arange(36.0).view(12, 3)
    layout = Layout(layers=True)
    (records,) = head([torch.cat([states, layers], -1)], Metadata(torch.tensor([12]), [request([3], [[1]], layout)]))
    assert records.view(torch.float32)[0, 1:].tolist() == [9, 10, 11]
