"""What a run file may say beside a teacher of another tokenizer."""

import pytest

from cluster.contracts.errors import ConfigError
from tests.builders import make_config

ALIGNED = ("teachers.main.tokenizer=aligned", "objective.preset=cross-tokenizer")
TERM = "objective.terms.main"


def test_an_aligned_teacher_is_asked_where_its_tokens_and_the_students_coincide() -> None:
    config = make_config(*ALIGNED)
    [(name, request)] = config.scorers("main")
    assert (name, request.aligned, request.given_candidates) == ("main", True, True)
    assert request.signals == {"logprobs", "candidate_logprobs", "aligned", "shared"}
    [(_, sampled)] = make_config(ALIGNED[0], "objective.preset=thinking-machines").scorers("main")
    assert sampled.signals == {"logprobs", "aligned"}


def test_the_same_tokenizer_is_the_default() -> None:
    for config in (make_config(), make_config("teachers.main.tokenizer=same")):
        assert not config.teachers["main"].is_aligned
        assert not config.scorers("main")[0][1].aligned


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["objective.preset=tail-topk"], "use objective.support = 'student_topk' or 'sampled', found 'topk'"),
        (["objective.preset=gkd"], "found 'full'"),
        ([f"{TERM}.truncation=tail"], "truncation = 'tail' compares what is left beside the candidates"),
        (["objective.preset=minillm"], "only the sampled token without baseline and discount counts"),
        (["objective.preset=vopd"], "only the sampled token without baseline and discount counts"),
        (["objective.preset=rethinking"], "only the sampled token without baseline and discount counts"),
        (["objective.preset=opd-grpo"], "only divergences and policy gradients read single positions"),
        (["objective.preset=iw-opd"], "look at the whole text"),
        ([f"{TERM}.when=teacher_entropy_above"], "reads a distribution over other tokens"),
        (["environment.kind=a.b:C"], "use environment.kind = 'single_turn'"),
        (["teachers.other.model=x"], "teachers.other has the student's; teachers of prompts are of one kind"),
        (["teachers.main.url=http://host/v1"], "tokenizer = 'aligned' needs the teacher's own files"),
        (["teachers.main.context.template={{ prompt }}"], "a context is written in the student's tokens"),
        (
            [f"{TERM}.target.other=-0.5", "teachers.other.model=x", "teachers.other.tokenizer=aligned"],
            "teachers.other: tokenizer = 'aligned' is for the teachers of prompts",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused_with_the_reason(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason.replace("{", r"\{")):
        make_config(*ALIGNED, *overrides)


def test_a_path_is_for_servers() -> None:
    with pytest.raises(ConfigError, match="tokenizer is 'some/model'; expected 'same' or 'aligned', or a url"):
        make_config("teachers.main.tokenizer=some/model")
