"""Names published objectives: `objective = "gkd"`, or `preset = "gkd"` beside fields that change it.

Each entry is what a run file's [objective] table would say. `docs/objective.md` cites the papers.
"""

from typing import Any

from cluster.contracts.errors import ConfigError


def _sampled(**fields: Any) -> dict[str, Any]:
    """Return log target - log student of the sampled token, with the importance ratio and no clip, but for fields."""
    return {"loss": "policy_gradient", **fields}


def _divergence(name: str, **fields: Any) -> dict[str, Any]:
    return {"loss": "divergence", "divergence": name, **fields}


def _on(support: str, size: int | None = None, **terms: Any) -> dict[str, Any]:
    return {"support": support, **({} if size is None else {"support_size": size}), "terms": terms}


_PPO = {"kind": "ppo_clip", "low": 0.8, "high": 1.2}
_ICEPOP = {"kind": "icepop", "low": 0.5, "high": 5.0}
_COVER = _divergence("forward_kl", truncation="generalized")

DEFAULT = "tail-topk"
PRESETS: dict[str, dict[str, Any]] = {
    # One number per token from the teacher.
    "thinking-machines": _on("sampled", main=_sampled()),
    "thinking-machines-frozen": _on("sampled", main=_sampled(student="rollout")),
    "ppo-k1": _on("sampled", main=_sampled(student="rollout", importance=_PPO)),
    "minillm": _on("sampled", main=_sampled(discount=1.0)),
    "clipped": _on("sampled", main=_sampled(log_ratio_map="clip", bound=5.0)),
    "soft-log": _on("sampled", main=_sampled(log_ratio_map="soft_log")),
    "power-opd": _on("sampled", main=_sampled(log_ratio_map="power", alpha=1.0)),
    "top-d": _on("sampled", main=_sampled(log_ratio_map="proximal", alpha=0.1)),
    "opd-plus-forward-kl": _on("sampled", main=_sampled(log_ratio_map="forward_kl")),
    "opd-plus-jsd": _on("sampled", main=_sampled(log_ratio_map="jsd")),
    "iw-opd": _on("sampled", main=_sampled()) | {"token_weights": {"position_importance": 0.5}},
    "icepop": _on("sampled", main=_sampled(importance=_ICEPOP)),
    "mopd": _on("sampled", main=_sampled(log_ratio_map="clip", bound=5.0, importance=_ICEPOP)),
    # Several tokens per position.
    "gkd": _on("full", main=_divergence("jsd", beta=0.5)),
    "exact-reverse-kl": _on("full", main=_divergence("reverse_kl")),
    "exact-forward-kl": _on("full", main=_divergence("forward_kl")),
    "distillm": _on("full", main=_divergence("skewed_forward_kl", skew=0.1)),
    "generalized-topk": _on("topk", 64, main=_divergence("reverse_kl", truncation="generalized")),
    "tail-topk": _on("topk", 16, main=_divergence("reverse_kl", truncation="tail")),  # with its residual: `res-opd`
    "res-opd": _on("topk", 16, main=_divergence("reverse_kl", truncation="tail", residual=True)),
    # Of rows that another student wrote, whose sampled tokens count nothing by themselves: [rollout] replay.
    "semi-opd": _on("topk", 64, main=_divergence("reverse_kl", truncation="tail", residual=False)),
    "tt-opd": _on(
        "topk",
        16,
        main=_divergence("reverse_kl", truncation="generalized"),
        outside=_sampled(when="outside_support"),
    ),
    "many-faces": _on("intersection", 20, main=_divergence("reverse_kl", truncation="renormalized")),
    # Of a teacher with another tokenizer: [teachers.NAME] tokenizer = "aligned".
    "cross-tokenizer": _on("student_topk", 16, main=_divergence("reverse_kl", truncation="renormalized")),
    "sdpo": _on("student_topk", 100, main=_divergence("jsd", beta=0.5, truncation="tail")),
    "sdpo-feedback": _on("student_topk", 100, main=_divergence("reverse_kl", truncation="tail", residual=False)),
    "rethinking": _on(
        "student_topk",
        16,
        main=_sampled(over="support", normalize_weights=True, student="rollout", importance={**_PPO, "dual_clip": 3.0}),
    ),
    "async-opd": _on("samples", 16, main=_sampled(over="support")),
    "vopd": _on("student_topk", 16, main=_sampled(baseline="kl")),
    # Routed by token.
    "eopd": _on(
        "topk", 16, main=_sampled(), unsure_teacher=_COVER | {"when": "teacher_entropy_above", "threshold": 0.8}
    ),
    "aopd": _on(
        "topk", 16, main=_sampled(when="log_ratio_positive"), rejected=_COVER | {"when": "log_ratio_not_positive"}
    ),
    "tropd": _on("topk", 64, main=_sampled(when="trusted"), outliers=_COVER | {"when": "untrusted"}),
    # Several models in the target.
    "exopd": _on("sampled", main=_sampled(target={"teacher": 1.25, "initial_student": -0.25})),
    "direct-opd": _on(
        "student_topk",
        16,
        main=_sampled(over="support", target={"teacher": 1.0, "base": -1.0, "initial_student": 1.0}),
    ),
    "delta-opd": _on("sampled", main=_sampled(target={"teacher": 1.0, "base": -1.0}, student="none")),
    "beta-opsd": _on("full", main=_divergence("reverse_kl", target={"teacher": 0.5, "initial_student": 0.5})),
    "beta-opsd-returns": _on("sampled", main=_sampled(target={"teacher": 0.5, "initial_student": 0.5}, discount=0.99)),
    # Hidden states.
    "oprd": _on("sampled", main={"loss": "representation", "layers": "all"}),
    "last-opd": _on(
        "topk",
        16,
        main=_divergence("reverse_kl", truncation="tail", weight={"from": 0.0, "to": 1.0, "over_steps": 10}),
        states={"loss": "representation", "weight": {"from": 1.0, "to": 0.0, "over_steps": 10}},
    ),
    # With the verifier's reward.
    "opd-grpo": _on("sampled", main=_sampled(), reward={"loss": "task_reward"}),
}


def expand_preset(written: Any) -> Any:
    """Return the [objective] table with its preset's fields under what is written; what is no table stays as it is.

    Without a preset, a term that has the name of the default's, and no kind of its own, is that one, changed.

    Example:
        >>> expand_preset({"preset": "thinking-machines"})["support"]
        'sampled'
    """
    name = written.get("preset") if isinstance(written, dict) else None
    if not isinstance(name, str):
        return _on_default_terms(written)
    if name not in PRESETS:
        raise ConfigError(f"objective.preset: no preset is called '{name}'; there are {', '.join(PRESETS)}")
    return merged(PRESETS[name], written)


def _on_default_terms(written: Any) -> Any:
    terms = written.get("terms") if isinstance(written, dict) and "preset" not in written else None
    if not isinstance(terms, dict):
        return written
    default = PRESETS[DEFAULT]["terms"]
    changed = {
        name: merged(default[name], term) if name in default and isinstance(term, dict) and "loss" not in term else term
        for name, term in terms.items()
    }
    return {**written, "terms": changed}


def merged(below: Any, above: Any) -> Any:
    """Lay one tree over the other; a target is replaced whole, for its coefficients mean something together only."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    laid = {key: value if key == "target" else merged(below.get(key), value) for key, value in above.items()}
    return {**below, **laid}
