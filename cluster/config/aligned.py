"""Checks what a run may do with teachers of another tokenizer, `[teachers.NAME] tokenizer = "aligned"`.

They score single positions of a text, by its bytes. What adds up along the text, or compares whole distributions, would
leave out what lies between.
"""

from typing import TYPE_CHECKING

from cluster.config.terms import AnyTerm, DivergenceTerm, PolicyGradientTerm

if TYPE_CHECKING:
    from cluster.config.objective import ObjectiveConfig
    from cluster.config.run_config import Config


def check_aligned(config: "Config") -> None:
    """Raise ValueError for what does not go with the run's aligned teachers, if it has any."""
    names = [name for name, teacher in config.teachers.items() if teacher.is_aligned]
    if not names:
        return
    where = f"teachers.{names[0]}: tokenizer = 'aligned'"
    if config.environment.kind != "single_turn":
        raise ValueError(f"{where} takes prompts with one completion; use environment.kind = 'single_turn'")
    if with_context := [name for name in names if config.teachers[name].context is not None]:
        raise ValueError(f"teachers.{with_context[0]}: a context is written in the student's tokens; leave it out")
    others = [name for name in config.routes if not config.teachers[name].is_aligned]
    if others:
        raise ValueError(f"{where}, but teachers.{others[0]} has the student's; teachers of prompts are of one kind")
    models = config.objective.needs.models[1:]
    beside = {config.scoring_teacher(model, route) for model in models for route in config.routes}
    if wrong := sorted(beside.intersection(names)):
        raise ValueError(
            f"teachers.{wrong[0]}: tokenizer = 'aligned' is for the teachers of prompts, and a target has it beside one"
        )
    if fault := _objective_fault(config.objective):
        raise ValueError(f"{where} scores positions by themselves; {fault}")


def _objective_fault(objective: "ObjectiveConfig") -> str | None:
    if objective.support not in ("student_topk", "sampled"):
        return f"use objective.support = 'student_topk' or 'sampled', found '{objective.support}'"
    weights = objective.token_weights
    if weights.position_importance or weights.entropy != "none":
        return "objective.token_weights.position_importance and entropy look at the whole text; leave them out"
    for name, term in objective.terms.items():
        if fault := _term_fault(term):
            return f"objective.terms.{name}: {fault}"
    return None


def _term_fault(term: AnyTerm) -> str | None:
    if isinstance(term, DivergenceTerm):
        if term.truncation != "renormalized":
            return (
                f"truncation = '{term.truncation}' compares what is left beside the candidates, which are other tokens "
                "on either side; use 'renormalized'"
            )
    elif not isinstance(term, PolicyGradientTerm):
        return "only divergences and policy gradients read single positions; leave the term out"
    elif term.over != "sampled" or term.baseline != "none" or term.discount:
        return "of a policy_gradient, only the sampled token without baseline and discount counts"
    elif term.importance.kind == "sequence_mask":
        return "importance.kind = 'sequence_mask' looks at the whole text; use another"
    if term.when.startswith("teacher_entropy"):
        return f"when = '{term.when}' reads a distribution over other tokens than the student's; use another"
    return None
