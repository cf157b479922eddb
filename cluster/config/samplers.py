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
    teacher = config.teachers[name]
    if teacher.source is not None:
        raise ValueError(f"{where} is the student itself (from = 'student'); leave `sampler` out, and it writes too")
    if teacher.is_aligned:
        raise ValueError(f"{where} has another tokenizer, and the student learns its own tokens; name another teacher")
    if config.objective.needs.sampled_candidates:
        raise ValueError(f"{where}: objective.support = 'samples' has draws of the student alone; use another support")
    if not teacher.num_workers:
        raise ValueError(f"{where} has num_workers = 0, so nothing would write; set it to 1 or more")
    if config.balance.mode != "off":
        raise ValueError(f"{where} writes, and the balancer counts scores alone; turn balance off")


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
