"""Names published methods as whole: `method = "sdpo"` stands for a teacher, its context, an objective and sampling.

Each entry is what a run file would say; whatever the file says itself comes first. What lies under `teacher` goes to
every teacher that the file has, or to `[teachers.self]`, the student itself. Sources: `docs/self_distillation.md`.
"""

from typing import Any

from cluster.config.presets import merged
from cluster.contracts.errors import ConfigError

_SOLUTION = "{{ solution if solution is defined else answer }}"

METHODS: dict[str, dict[str, Any]] = {
    # Self-distilled reasoner, 2601.18734 and siyan-zhao/OPSD: the initial student reads a solution.
    "opsd": {
        "teacher": {
            "from": "student",
            "refresh": "frozen",
            "context": {
                "template": "{{ prompt }}\n\nA reference solution:\n"
                + _SOLUTION
                + "\n\nNow that you have understood it, solve the problem in your own way."
            },
        },
        "objective": {
            "support": "full",
            "terms": {"main": {"loss": "divergence", "divergence": "jsd", "beta": 0.5, "entry_clip": 0.05}},
        },
        "rollout": {"temperature": 1.1, "top_p": 0.95, "top_k": 20},
    },
    # Self-distillation policy optimisation, lasgroup/SDPO: a right attempt of the group, or feedback.
    "sdpo": {
        "teacher": {
            "from": "student",
            "refresh": {"ema": 0.05},
            "context": {
                "template": "{% if attempt or feedback %}{{ prompt }}\n\n"
                "{% if attempt %}A correct solution:\n{{ attempt }}\n\n"
                "{% else %}Your last attempt failed:\n{{ feedback }}\n\n{% endif %}"
                "Correctly solve the original question.{% endif %}"
            },
        },
        "objective": {"preset": "sdpo"},
        "rollout": {"samples_per_prompt": 8},
        "prompts": {"prompts_per_step": 32},
        "learner": {"learning_rate": 1e-5},
    },
    # Self-distillation fine-tuning, as in TRL: a demonstration of the prompt's own answer.
    "sdft": {
        "teacher": {
            "from": "student",
            "refresh": {"ema": 0.05},
            "context": {
                "template": "{{ prompt }}\n\nThis is an example of a response to it:\n"
                + _SOLUTION
                + "\n\nNow answer with a response of your own, in the same spirit."
            },
        },
        "objective": {
            "support": "student_topk",
            "support_size": 100,
            "terms": {"main": {"loss": "divergence", "divergence": "jsd", "beta": 0.5, "truncation": "renormalized"}},
        },
    },
    # On-policy context distillation, microsoft/LMOps: what a prompt says of earlier experience moves into weights.
    "opcd": {
        "teacher": {
            "from": "student",
            "refresh": "frozen",
            "context": {"template": "{{ experience }}\n\n{{ prompt }}"},
        },
        "objective": {
            "support": "topk",
            "support_size": 256,
            "terms": {"main": {"loss": "divergence", "divergence": "reverse_kl", "residual": False}},
        },
        "rollout": {"temperature": 0.6},
        "prompts": {"prompts_per_step": 128},
    },
}
OWN_MODEL = ("model", "url")  # of a teacher in the file: it is not the student itself


def expand_method(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a run file's tree with its method's fields under what is written.

    Example:
        >>> expand_method({"method": "sdft", "teachers": {"big": {"model": "m"}}})["teachers"]["big"].keys()
        dict_keys(['context', 'model'])
    """
    name = tree.get("method")
    if not isinstance(name, str):
        return tree
    if name not in METHODS:
        raise ConfigError(f"method: no method is called '{name}'; there are {', '.join(METHODS)}")
    sections = dict(METHODS[name])
    of_teacher = sections.pop("teacher")
    objective = tree.get("objective")
    if isinstance(objective, dict) and objective.get("preset") not in (None, sections["objective"].get("preset")):
        del sections["objective"]  # the file's preset is an objective of its own
    teachers = tree.get("teachers") or {"self": {}}
    if isinstance(teachers, dict):
        teachers = {name: _teacher(of_teacher, written) for name, written in teachers.items()}
    return {**merged(sections, tree), "teachers": teachers}


def _teacher(of_method: dict[str, Any], written: Any) -> Any:
    if isinstance(written, dict) and any(field in written for field in OWN_MODEL):
        of_method = {"context": of_method["context"]}
    return merged(of_method, written)
