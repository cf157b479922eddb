"""Published objectives by name: `objective = "gkd"`, or `preset = "gkd"` beside fields that change it.

Each entry is what a run file's [objective] table would say. `docs/objective.md` cites the papers.
"""

from typing import Any

from cluster.contracts.errors import ConfigError

_SAMPLED = {"loss": "policy_gradient"}  # log target - log student of the written token, importance ratio, no clip
_FORWARD_KL = {"loss": "divergence", "divergence": "forward_kl", "truncation": "generalized"}
_PPO = {"kind": "ppo_clip", "low": 0.8, "high": 1.2}

PRESETS: dict[str, dict[str, Any]] = {
    # One number per token from the teacher.
    "thinking-machines": {"support": "sampled", "terms": {"main": _SAMPLED}},
    "ppo-k1": {"support": "sampled", "terms": {"main": _SAMPLED | {"student": "rollout", "importance": _PPO}}},
    "minillm": {"support": "sampled", "terms": {"main": _SAMPLED | {"discount": 1.0}}},
    "clipped": {"support": "sampled", "terms": {"main": _SAMPLED | {"log_ratio_map": "clip", "bound": 5.0}}},
    "soft-log": {"support": "sampled", "terms": {"main": _SAMPLED | {"log_ratio_map": "soft_log"}}},
    "power-opd": {"support": "sampled", "terms": {"main": _SAMPLED | {"log_ratio_map": "power", "alpha": 1.0}}},
    "top-d": {"support": "sampled", "terms": {"main": _SAMPLED | {"log_ratio_map": "proximal", "alpha": 0.1}}},
    "opd-plus-forward-kl": {"support": "sampled", "terms": {"main": _SAMPLED | {"log_ratio_map": "forward_kl"}}},
    "opd-plus-jsd": {"support": "sampled", "terms": {"main": _SAMPLED | {"log_ratio_map": "jsd"}}},
    "iw-opd": {
        "support": "sampled",
        "terms": {"main": _SAMPLED},
        "token_weights": {"position_importance": 0.5},
    },
    "icepop": {
        "support": "sampled",
        "terms": {"main": _SAMPLED | {"importance": {"kind": "icepop", "low": 0.5, "high": 5.0}}},
    },
    "mopd": {
        "support": "sampled",
        "terms": {
            "main": _SAMPLED
            | {"log_ratio_map": "clip", "bound": 5.0, "importance": {"kind": "icepop", "low": 0.5, "high": 5.0}},
        },
    },
    # Several tokens per position.
    "gkd": {"support": "full", "terms": {"main": {"loss": "divergence", "divergence": "jsd", "beta": 0.5}}},
    "exact-reverse-kl": {"support": "full", "terms": {"main": {"loss": "divergence", "divergence": "reverse_kl"}}},
    "exact-forward-kl": {"support": "full", "terms": {"main": {"loss": "divergence", "divergence": "forward_kl"}}},
    "distillm": {
        "support": "full",
        "terms": {"main": {"loss": "divergence", "divergence": "skewed_forward_kl", "skew": 0.1}},
    },
    "generalized-topk": {
        "support": "topk",
        "support_size": 64,
        "terms": {"main": {"loss": "divergence", "divergence": "reverse_kl", "truncation": "generalized"}},
    },
    "tail-topk": {
        "support": "topk",
        "support_size": 16,
        "terms": {"main": {"loss": "divergence", "divergence": "reverse_kl", "truncation": "tail"}},
    },
    "many-faces": {
        "support": "intersection",
        "support_size": 20,
        "terms": {"main": {"loss": "divergence", "divergence": "reverse_kl", "truncation": "renormalized"}},
    },
    "sdpo": {
        "support": "student_topk",
        "support_size": 20,
        "terms": {"main": {"loss": "divergence", "divergence": "jsd", "beta": 0.5, "truncation": "tail"}},
    },
    "rethinking": {
        "support": "student_topk",
        "support_size": 16,
        "terms": {"main": _SAMPLED | {"over": "support", "importance": _PPO | {"dual_clip": 3.0}}},
    },
    "async-opd": {"support": "samples", "support_size": 16, "terms": {"main": _SAMPLED | {"over": "support"}}},
    "vopd": {"support": "student_topk", "support_size": 16, "terms": {"main": _SAMPLED | {"baseline": "kl"}}},
    # Routed by token.
    "eopd": {
        "support": "topk",
        "support_size": 16,
        "terms": {
            "main": _SAMPLED,
            "unsure_teacher": _FORWARD_KL | {"when": "teacher_entropy_above", "threshold": 0.8},
        },
    },
    "aopd": {
        "support": "topk",
        "support_size": 16,
        "terms": {
            "main": _SAMPLED | {"when": "log_ratio_positive"},
            "rejected": _FORWARD_KL | {"when": "log_ratio_not_positive"},
        },
    },
    "tropd": {
        "support": "topk",
        "support_size": 64,
        "terms": {"main": _SAMPLED | {"when": "trusted"}, "outliers": _FORWARD_KL | {"when": "untrusted"}},
    },
    # Several models in the target.
    "exopd": {
        "support": "sampled",
        "terms": {"main": _SAMPLED | {"target": {"teacher": 1.25, "initial_student": -0.25}}},
    },
    "direct-opd": {
        "support": "student_topk",
        "support_size": 16,
        "terms": {
            "main": _SAMPLED | {"over": "support", "target": {"teacher": 1.0, "base": -1.0, "initial_student": 1.0}}
        },
    },
    "delta-opd": {
        "support": "sampled",
        "terms": {"main": _SAMPLED | {"target": {"teacher": 1.0, "base": -1.0}, "student": "none"}},
    },
    "beta-opsd": {
        "support": "full",
        "terms": {
            "main": {
                "loss": "divergence",
                "divergence": "reverse_kl",
                "target": {"teacher": 0.5, "initial_student": 0.5},
            }
        },
    },
    # With the verifier's reward.
    "opd-grpo": {"support": "sampled", "terms": {"main": _SAMPLED, "reward": {"loss": "task_reward"}}},
}


def expand_preset(written: Any) -> Any:
    """Return the [objective] table with its preset's fields filled in under what is written.

    Args:
        written: the table, or the name of a preset alone. Anything else is returned for the type check to refuse.

    Raises:
        ConfigError: no preset has this name.

    Example:
        >>> expand_preset("thinking-machines")["support"]
        'sampled'
    """
    if isinstance(written, str):
        written = {"preset": written}
    if not isinstance(written, dict):
        return written
    name = written.get("preset")
    preset: dict[str, Any] = {}
    if isinstance(name, str):
        if name not in PRESETS:
            raise ConfigError(f"objective.preset: no preset is called '{name}'; there are {', '.join(PRESETS)}")
        preset = PRESETS[name]
    return _merged(preset, written)


def _merged(below: Any, above: Any) -> Any:
    """Lay one tree over the other; a target is replaced whole, for its coefficients mean something together only."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    kept = {key: value for key, value in below.items() if key not in above}
    return {
        **kept,
        **{
            key: value if key == "target" or key not in below else _merged(below[key], value)
            for key, value in above.items()
        },
    }
