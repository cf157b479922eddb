"""Checks a teacher that writes for the student, and one for which the student learns to write.

The first is `[rollout.privileged] sampler = "NAME"`, the second `[teachers.NAME.gentleness]`.
"""

from typing import TYPE_CHECKING

from cluster.config.terms import TaskRewardTerm

if TYPE_CHECKING:
    from cluster.config.run_config import Config


def check_sampling_teacher(config: "Config") -> None:
    """Raise ValueError if a teacher is to write for hard prompts what the student could not learn from."""
    name = config.sampling_teacher
    if name is None:
        return
    where = f"rollout.privileged.sampler = '{name}'"
    if name not in config.teachers:
        raise ValueError(f"{where} is none of the teachers; there are {sorted(config.teachers)}")
    teacher, rollout, needs = config.teachers[name], config.rollout, config.objective.needs
    is_served, is_plain = teacher.url is not None, (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1.0, 0)
    faults = {
        "is the student itself (from = 'student'); leave `sampler` out, and it writes too": teacher.source is not None,
        "has another tokenizer, and the student learns its own tokens; name another teacher": teacher.is_aligned,
        "writes, and objective.support = 'samples' has draws of the student alone; use another support": (
            needs.sampled_candidates
        ),
        "writes at servers, which list no candidates; set objective.support = 'topk'": (
            is_served and needs.candidates_from == "student"
        ),
        "writes at servers, whose log-probabilities are those of temperature 1; set rollout.temperature and top_p to 1 "
        "and top_k to 0": is_served and not is_plain,
        "has num_workers = 0, so nothing would write; set it to 1 or more": not teacher.num_workers,
        "writes, and the balancer counts scores alone; turn balance off": config.balance.mode != "off",
    }
    if fault := next((fault for fault, holds in faults.items() if holds), None):
        raise ValueError(f"{where} {fault}")


def check_gentleness(config: "Config") -> None:
    """Raise ValueError for rewards that a teacher shall multiply, and that none compares, or it has no favourites."""
    for name, teacher in config.teachers.items():
        if teacher.gentleness is None:
            continue
        where = f"teachers.{name}.gentleness"
        if name not in config.routes:
            raise ValueError(f"{where} is of a teacher that prompts go to, found one that stands beside them")
        if config.objective.needs.candidates_from != "teacher":
            raise ValueError(
                f"{where} reads the teacher's favourites: set objective.support = 'topk' (support_size = 1 will do), "
                f"found '{config.objective.support}'"
            )
        if not any(isinstance(term, TaskRewardTerm) for term in config.objective.terms.values()):
            raise ValueError(f"{where} multiplies rewards, and no term learns from them; add loss = 'task_reward'")
        if config.rollout.privileged is not None or config.rollout.replay is not None:
            raise ValueError(
                f"{where} trains a sampler in a run of its own; rollout.privileged and rollout.replay read rewards as "
                "they are, so remove one of the two"
            )
