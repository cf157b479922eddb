"""Whether a run can do without a teacher from some step on."""

from collections.abc import Collection

from cluster.contracts.config import Config
from cluster.pipeline import Inputs


def need_of(teachers: Collection[str], config: Config, inputs: Inputs, next_step: int) -> str | None:
    """Say what a run that has `next_step` steps behind it needs one of these teachers for; None: nothing.

    Example of what it says: "step 13 asks prompts that teacher math scores".
    """
    served = {
        route: [name for name, _ in config.scorers(route) if name in teachers]
        for route in config.routes
        if any(name in teachers for name, _ in config.scorers(route))
    }
    per_step = config.prompts.prompts_per_step
    left = (config.run.steps - next_step) * per_step
    # Two epochs' worth holds a whole one, and that every prompt.
    asked = inputs.train.take(next_step * per_step, max(0, min(left, 2 * len(inputs.prompts))))
    for position, prompt_id in enumerate(asked):
        names = served.get(inputs.prompts.teacher(prompt_id))
        if names:
            step = next_step + position // per_step + 1
            return f"step {step} asks prompts that teacher {names[0]} scores"
    for prompt_id in inputs.held_out_ids:
        names = served.get(inputs.prompts.teacher(prompt_id))
        if names:
            return f"held-out prompts are scored by teacher {names[0]}"
    return None
