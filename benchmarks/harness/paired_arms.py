"""Makes the rows of the study of hard and dense prompts: means of its arms, and contrasts paired by seed."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from statistics import mean
from typing import Any

from benchmarks.harness.report import Row, at_least, at_most, row
from benchmarks.harness.shifted_digits import sign_flip_p

OF_SAMPLERS = ("hinted_solve_rate", "acceptance", "gentleness")
OF_LEARNING = ("first_reward", "last_reward", "first_gentleness", "last_gentleness")
ByArm = Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]  # set, arm -> seed -> outcome


def rows_of(outcomes: Sequence[Mapping[str, Any]], arms: Mapping[str, Sequence[str]]) -> list[Row]:
    """Return means over the seeds that an arm has, and the contrasts with every paired difference."""
    by_arm = _by_arm(outcomes, arms)
    rows: list[Row] = []

    def add_mean(label: str, arm: tuple[str, str], value: Callable[[Mapping[str, Any]], float]) -> None:
        values = [value(one) for one in by_arm[arm].values()]
        if values:
            rows.append(row(label, f"{len(values)} seeds", mean(values), "share"))

    for key, label in (
        ("measured_anew_hard", "hard: pass rate without a hint, measured anew"),
        ("measured_anew_dense", "dense: pass rate without a hint, measured anew"),
        ("hint_on_hard", "hard: pass rate with a hint"),
    ):
        add_mean(label, ("hard", "blind"), itemgetter(key))
    for name, arm in by_arm:
        for on in ("hard", "dense"):
            label = f"trained on {name}, {arm}: held-out {on} prompts at the end"
            add_mean(label, (name, arm), lambda one, on=on: one["curves"][on][-1][1])  # type: ignore[misc]
    of_arms = [(arm, "other way of writing", "other_way") for arm in arms["hard"]]
    of_arms += [(arm, key, key) for arm in ("privileged", "teacher", "gentle") for key in OF_SAMPLERS]
    of_arms += [("gentle", f"its sampler's {key}", key) for key in OF_LEARNING]
    for arm, label, key in of_arms:
        add_mean(f"trained on hard, {arm}: {label}", ("hard", arm), itemgetter(key))
    return rows + _contrasts(by_arm)


def _by_arm(outcomes: Sequence[Mapping[str, Any]], arms: Mapping[str, Sequence[str]]) -> ByArm:
    in_order = sorted(outcomes, key=lambda one: one["seed"])
    return {
        (name, arm): {one["seed"]: one for one in in_order if (one["set"], one["arm"]) == (name, arm)}
        for name, of_set in arms.items()
        for arm in of_set
    }


def _contrasts(by_arm: ByArm) -> list[Row]:
    def difference(name: str, arm: str, other: str, on: str) -> dict[int, float]:
        seeds = [seed for seed in by_arm[name, arm] if seed in by_arm[name, other]]
        return {seed: _gain(by_arm[name, arm][seed], on) - _gain(by_arm[name, other][seed], on) for seed in seeds}

    on_hard, on_dense = (difference(name, "privileged", "blind", name) for name in ("hard", "dense"))
    interaction = {seed: on_hard[seed] - on_dense[seed] for seed in on_hard if seed in on_dense}
    rows = []
    of_teacher = difference("hard", "teacher", "blind", "hard")
    claims = {"privileged - blind, hard": on_hard, "the same, hard - dense": interaction}
    for label, differences in (claims | ({"teacher - blind, hard": of_teacher} if of_teacher else {})).items():
        size, values = f"{len(differences)} seeds", list(differences.values())
        smallest = row(f"{label}, smallest", size, min(values), "share")
        rows.append({**at_least(smallest, 0), "differences": _list(values)})
        rows.append(at_most(row(f"{label}, sign-flip p", size, sign_flip_p(values), "p"), 0.05))
    for label, differences in (
        ("privileged - blind, dense", on_dense),
        ("teacher - privileged, hard", difference("hard", "teacher", "privileged", "hard")),
        ("gentle - privileged, hard", difference("hard", "gentle", "privileged", "hard")),
        ("privileged - unselected, hard", difference("hard", "privileged", "unselected", "hard")),
        ("privileged - reference, hard", difference("hard", "privileged", "reference", "hard")),
        ("privileged - blind, both, on hard", difference("both", "privileged", "blind", "hard")),
        ("privileged - blind, both, on dense", difference("both", "privileged", "blind", "dense")),
    ):
        if differences:
            size, values = f"{len(differences)} seeds", list(differences.values())
            rows.append({**row(f"{label}, mean", size, mean(values), "share"), "differences": _list(values)})
    return rows


def _gain(outcome: Mapping[str, Any], on: str) -> float:
    curve = outcome["curves"][on]
    return float(curve[-1][1] - curve[0][1])


def _list(differences: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in differences)
