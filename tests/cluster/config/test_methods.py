"""A method's name stands for fields of several sections, under what the file says itself."""

import pytest

from cluster.config.methods import METHODS, expand_method
from cluster.config.run_config import Config
from cluster.config.run_file import config_from_json, dump_run_config, parse_run_config
from cluster.config.terms import DivergenceTerm
from cluster.contracts.errors import ConfigError
from rollout_workers.contexts.template import compiled

FILE = '[student]\nmodel = "student"\n[prompts]\ntrain = "p.jsonl"\n'
OWN_TEACHER = '[teachers.big]\nmodel = "teacher"\n'


def read(method: str, *overrides: str, teacher: str = OWN_TEACHER) -> Config:
    return parse_run_config(f'method = "{method}"\n{FILE}{teacher}', overrides)


@pytest.mark.parametrize("method", METHODS)
def test_a_teacher_of_its_own_gets_the_methods_context_and_the_run_its_objective(method: str) -> None:
    config = read(method)
    [(name, teacher)] = config.teachers.items()
    assert (name, teacher.model) == ("big", "teacher")
    assert teacher.context is not None
    assert "prompt" in compiled(teacher.context.template).names
    assert isinstance(config.objective.terms["main"], DivergenceTerm)
    assert config_from_json(dump_run_config(config)) == config


def test_what_the_file_says_comes_first() -> None:
    overrides = ("rollout.samples_per_prompt=4", "teachers.big.context.template={{ prompt }}!", "learner.epsilon=1e-6")
    config = read("sdpo", *overrides)
    context = config.teachers["big"].context
    assert context is not None
    assert (config.rollout.samples_per_prompt, config.learner.epsilon, context.template) == (4, 1e-6, "{{ prompt }}!")
    assert (config.learner.learning_rate, config.prompts.prompts_per_step) == (1e-5, 32)


def test_another_preset_replaces_the_methods_objective() -> None:
    config = read("opsd", "objective.preset=tail-topk", "rollout.top_p=1", "rollout.top_k=0")
    assert (config.objective.support, config.objective.preset) == ("topk", "tail-topk")


def test_a_file_without_teachers_gets_the_student_itself() -> None:
    teachers = expand_method({"method": "sdpo", "student": {"model": "s"}})["teachers"]
    assert (teachers["self"]["from"], teachers["self"]["refresh"]) == ("student", {"ema": 0.05})
    assert "from" not in expand_method({"method": "sdpo", "teachers": {"big": {"model": "m"}}})["teachers"]["big"]


def test_an_unknown_method_is_one_sentence_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"^method: no method is called 'sdpa'; there are opsd, sdpo, sdft, opcd$"):
        read("sdpa")


def test_the_templates_of_methods_say_nothing_where_there_is_nothing_to_say() -> None:
    template = compiled(METHODS["sdpo"]["teacher"]["context"]["template"])
    asked = {"prompt": "2 + 2?", "attempt": "", "feedback": ""}
    assert template.render(asked) == ""
    assert template.reads_group
    assert "failed:\nout of memory" in template.render(asked | {"feedback": "out of memory"})
    right = template.render(asked | {"attempt": "It is 4.", "feedback": "wrong"})
    assert right == "2 + 2?\n\nA correct solution:\nIt is 4.\n\nCorrectly solve the original question."
    solution = compiled(METHODS["opsd"]["teacher"]["context"]["template"])
    assert solution.columns == frozenset()  # without a column `solution`, it takes the answer
    assert "solution:\n4\n" in solution.render({"prompt": "2 + 2?", "answer": "4"})
    assert "solution:\ntwo and two\n" in solution.render({"prompt": "2 + 2?", "answer": "4", "solution": "two and two"})
