"""The LM heads that turn shipped hidden states into logits: frozen, whole on every rank, no part of the student."""

from collections.abc import Mapping

import torch

from cluster.contracts.config import Config
from cluster.models.lm_head import LmHead, load_lm_head

TeacherHeads = Mapping[str, Mapping[str, LmHead]]  # route -> model of the objective's target -> its head


def load_teacher_heads(config: Config, device: torch.device) -> TeacherHeads:
    """Read the heads that the run's objective needs, each once; none unless it compares whole distributions.

    Raises:
        ModelError: a teacher's head cannot be read.
    """
    if config.objective.support != "full":
        return {}
    names = {
        route: {model: config.scoring_teacher(model, route) for model in config.objective.models}
        for route in config.routes
    }
    loaded = {}
    for name in sorted({name for of_route in names.values() for name in of_route.values()}):
        teacher = config.teachers[name]
        head = load_lm_head(teacher.model, teacher.trust_remote_code, teacher.engine.dtype)
        loaded[name] = head.to(device)
    return {route: {model: loaded[name] for model, name in of_route.items()} for route, of_route in names.items()}
