"""`python -m benchmarks.cases.privileged_sampling`: where a sampler that reads a hint helps, and where it does not.

One process, a transformer of 0.1M parameters, the learner's own objective and the rollout workers' own selection. A
text is a slot for a hint, a mark, and six digits modulo 7, each followed by an answer: the digit plus a shift that
belongs to the mark. Only a text whose six answers are right has reward 1. Beforehand the model learns to obey a hint,
which names the shift, up to noise; without one it mostly knows the shifts of three marks and guesses those of four
evenly. An answer can be written in two ways, and the model prefers one of them without a hint, none with it.

Sets, by 32 completions without a hint: HARD, none right and some right with a hint; DENSE, 20 to 60 % right; both are
measured anew on 32 others. Each has training and held-out prompts. An arm trains one student on one set:

- blind: GRPO on its own samples (8 a prompt)
- privileged: 8 samples a prompt without a hint, then 8 with; of the right ones, the most likely under the student
  without a hint; 50 steps of gated cross-entropy on these; then GRPO
- unselected: the same with the first right text in the place of the most likely
- reference: 50 steps of the same cross-entropy on reference solutions, in the other way of writing; then GRPO

All arms sample equally many tokens, those of the hinted sampler included. Fixed before running: the gain of privileged
over blind in the pass rate of held-out prompts is larger on HARD than on DENSE, by an exact sign-flip test over five
seeds, and positive on HARD. Nothing is claimed of DENSE, and of the other two arms. Rates were chosen with seed 0,
which is not among the five.

Outcomes are appended to a JSON-lines file as they come, and a second call does only what is missing there.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from benchmarks.cases.figures import draw_privileged_sampling
from benchmarks.cases.privileged_context import (
    BASE,
    EMPTY,
    FIRST_CONTEXT,
    FIRST_MARK,
    Model,
    read_outcomes,
    sign_flip_p,
    text_of,
    write,
)
from benchmarks.harness.report import RESULTS, Row, at_least, at_most, describe_machine, print_rows, row
from cluster.config.objective import ObjectiveConfig
from cluster.config.privileged import PrivilegedConfig
from learner.batching.arrivals import group_advantages
from learner.loss.objective import Objective
from learner.loss.tokens import CompletionTokens
from rollout_workers.privileged import BlindScores, select

COMMAND = "python -m benchmarks.cases.privileged_sampling"
DIGITS = 6
OTHER_WAY = 22  # the first of the answers in the other way of writing; those of the usual way are 0 to 6
VOCABULARY, TEXT_TOKENS = OTHER_WAY + BASE, 2 + 2 * DIGITS
KNOWN_MARKS = 3  # of 7, whose shifts the model mostly knows without a hint
NOISE = {"hint": 0.1, "known": 0.13, "unknown": 1.0}  # share of answers that are random in what the model learns from
USUAL = {"hint": 0.5, "blind": 0.9}  # share of texts in the usual way of writing
PRETRAINING_STEPS, PRETRAINING_ROWS, PRETRAINING_RATE = 600, 128, 3e-3
DRAWN, PROMPTS, HELD_OUT = 640, 64, 96
TRIES = 32  # completions of a prompt by which it is hard or dense
SAMPLES, PROMPTS_PER_STEP, RATE = 8, 16, 1e-3
IMITATION_STEPS, IMITATION_RATE = 50, 1e-3
BUDGET = 80 * PROMPTS_PER_STEP * SAMPLES * DIGITS  # sampled tokens of each arm
EVALUATED_EVERY = 8  # steps of GRPO
ARMS = {"hard": ("blind", "privileged", "unselected", "reference"), "dense": ("blind", "privileged")}

GRPO = {"support": "sampled", "terms": {"main": {"loss": "task_reward"}}}
IMITATION = {"support": "sampled", "terms": {"main": {"loss": "cross_entropy", "gate": {}, "rows": "privileged"}}}


@dataclass(frozen=True)
class Questions:
    """Holds prompts with an empty slot, and the shift that is right for each."""

    prompts: Tensor  # [rows, 2 + DIGITS] slot, mark, digits
    shifts: Tensor  # [rows]

    def __getitem__(self, rows: Tensor) -> "Questions":
        return Questions(self.prompts[rows], self.shifts[rows])

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def answers(self) -> Tensor:
        return (self.prompts[:, 2:] + self.shifts[:, None]) % BASE

    @property
    def hinted(self) -> Tensor:
        return torch.cat([FIRST_CONTEXT + self.shifts[:, None], self.prompts[:, 1:]], dim=1)

    def rewards(self, answers: Tensor) -> Tensor:
        """Return 1 for texts of six right answers, in either way of writing, [rows]."""
        values = torch.where(answers >= OTHER_WAY, answers - OTHER_WAY, answers)
        return (values == self.answers).all(1).float()

    def repeat(self, count: int) -> "Questions":
        return self[torch.arange(len(self)).repeat_interleave(count)]


def draw_questions(draw: torch.Generator, count: int, table: Tensor) -> Questions:
    marks = torch.randint(BASE, (count,), generator=draw)
    digits = torch.randint(BASE, (count, DIGITS), generator=draw)
    prompts = torch.cat([torch.full((count, 1), EMPTY), FIRST_MARK + marks[:, None], digits], dim=1)
    return Questions(prompts, table[marks])


def pretrain(seed: int, table: Tensor, steps: int) -> Model:
    """Return a model that obeys hints of any shift, and without one knows the shifts of some marks."""
    torch.manual_seed(seed)
    model, draw = Model(VOCABULARY, TEXT_TOKENS), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), PRETRAINING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        questions = draw_questions(draw, PRETRAINING_ROWS, table)
        is_blind = torch.rand(PRETRAINING_ROWS, generator=draw) < 0.5
        any_shift = torch.randint(BASE, (PRETRAINING_ROWS,), generator=draw)
        questions = Questions(questions.prompts, torch.where(is_blind, questions.shifts, any_shift))
        is_known = questions.prompts[:, 1] < FIRST_MARK + KNOWN_MARKS
        share = torch.where(is_known, NOISE["known"], NOISE["unknown"])
        noise = (
            torch.rand(PRETRAINING_ROWS, DIGITS, generator=draw) < torch.where(is_blind, share, NOISE["hint"])[:, None]
        )
        random = torch.randint(BASE, (PRETRAINING_ROWS, DIGITS), generator=draw)
        usual = torch.rand(PRETRAINING_ROWS, generator=draw) < torch.where(is_blind, USUAL["blind"], USUAL["hint"])
        answers = torch.where(noise, random, questions.answers) + torch.where(usual, 0, OTHER_WAY)[:, None]
        prompts = torch.where(is_blind[:, None], questions.prompts, questions.hinted)
        logits = model(text_of(prompts, answers))[:, 2::2]
        loss = nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), answers.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def pass_rates(model: Model, questions: Questions, prompts: Tensor, tries: int, draw: torch.Generator) -> Tensor:
    """Return each prompt's share of right completions, [rows]."""
    repeated = questions.repeat(tries)
    rewards = repeated.rewards(write(model, prompts.repeat_interleave(tries, 0), draw))
    return rewards.reshape(-1, tries).mean(1)


def find_sets(model: Model, seed: int, table: Tensor) -> tuple[dict[str, dict[str, Questions]], dict[str, float]]:
    """Return the sets' training and held-out prompts, and their pass rates by completions drawn anew."""
    draw = torch.Generator().manual_seed(500 + seed)
    questions = draw_questions(draw, DRAWN, table)
    blind = pass_rates(model, questions, questions.prompts, TRIES, draw)
    hinted = pass_rates(model, questions, questions.hinted, TRIES, draw)
    chosen = {"hard": (blind == 0) & (hinted > 0), "dense": (blind >= 0.2) & (blind <= 0.6)}
    sets, rates = {}, {"hint_on_hard": float(hinted[chosen["hard"]].mean())}
    for name, is_chosen in chosen.items():
        rows = is_chosen.nonzero()[:, 0]
        if len(rows) < PROMPTS + HELD_OUT:
            raise SystemExit(f"seed {seed}: {len(rows)} of {DRAWN} prompts are {name}; {PROMPTS + HELD_OUT} are needed")
        sets[name] = {"train": questions[rows[:PROMPTS]], "held_out": questions[rows[PROMPTS : PROMPTS + HELD_OUT]]}
        both = questions[rows[: PROMPTS + HELD_OUT]]
        rates[f"measured_anew_{name}"] = float(pass_rates(model, both, both.prompts, TRIES, draw).mean())
    return sets, rates


def completion_tokens(
    answers: Tensor, logprobs: Tensor, rewards: Tensor, advantages: Tensor, privileged: bool
) -> CompletionTokens:
    """Describe texts, [rows, DIGITS], to the learner's objective; rewards and advantages are [rows]."""
    count, nothing = answers.numel(), torch.zeros(answers.numel())
    return CompletionTokens(
        target_ids=answers.reshape(-1),
        rollout_logprobs=logprobs.reshape(-1),
        candidate_ids=torch.zeros(count, 0, dtype=torch.long),
        candidate_rollout_logprobs=torch.zeros(count, 0),
        scores={"teacher": {"logprobs": nothing}},
        trajectory=torch.arange(count) // DIGITS,
        position=torch.arange(count) % DIGITS,
        length=torch.full((count,), DIGITS),
        uniform=nothing,
        task_advantage=advantages.repeat_interleave(DIGITS),
        reward=rewards.repeat_interleave(DIGITS),
        weight=torch.ones(count),
        privileged=torch.full((count,), privileged),
    )


class Student:
    """Trains a copy of the model, and counts what it samples."""

    def __init__(self, base: Model, questions: Questions, seed: int) -> None:
        self.model, self.questions, self.sampled_tokens = copy.deepcopy(base), questions, 0
        self.draw = torch.Generator().manual_seed(1000 + seed)

    def sample(self, questions: Questions, prompts: Tensor) -> Tensor:
        self.sampled_tokens += len(questions) * DIGITS
        return write(self.model, prompts, self.draw)

    def logprobs(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """Return log-probabilities of all tokens, [rows, DIGITS, VOCABULARY], with a graph."""
        return self.model(text_of(prompts, answers))[:, 2::2].log_softmax(-1)

    def step(
        self, optimizer: torch.optim.Optimizer, objective: Objective, prompts: Tensor, tokens: CompletionTokens
    ) -> None:
        logits = self.model(text_of(prompts, tokens.target_ids.reshape(-1, DIGITS)))[:, 2::2].reshape(-1, VOCABULARY)
        plan = objective.plan(tokens, None)
        result = objective.evaluate(logits.detach().clone(), tokens, plan, {}, with_gradient=True)
        assert result.logits_gradient is not None
        optimizer.zero_grad()
        logits.backward(result.logits_gradient / len(tokens))
        optimizer.step()

    def hinted_texts(self, config: PrivilegedConfig) -> tuple[Questions, Tensor, dict[str, float]]:
        """Sample with hints and return the prompts that have a right text, the text selected for each, and rates."""
        questions, count = self.questions, config.samples_per_prompt
        self.sample(questions.repeat(config.hard_after), questions.prompts.repeat_interleave(config.hard_after, 0))
        repeated = questions.repeat(count)
        answers = self.sample(repeated, questions.hinted.repeat_interleave(count, 0))
        is_right = repeated.rewards(answers).bool().reshape(-1, count)
        with torch.no_grad():
            blind = self.logprobs(repeated.prompts, answers)
        own = blind.gather(-1, answers[..., None])[..., 0].reshape(-1, count, DIGITS).numpy()
        best = blind.amax(-1).reshape(-1, count, DIGITS).numpy()
        kept, texts, gentleness = [], [], []
        for prompt in range(len(questions)):
            right = is_right[prompt].nonzero()[:, 0].tolist()
            scores = [BlindScores(own[prompt, number], best[prompt, number]) for number in right]
            chosen = select(config, scores)
            if chosen is not None:
                kept.append(prompt)
                texts.append(answers[prompt * count + right[chosen]])
                gentleness.append(scores[chosen].gentleness(config))
        rates = {"hinted_solve_rate": float(is_right.float().mean()), "acceptance": len(kept) / len(questions)}
        return questions[torch.tensor(kept)], torch.stack(texts), rates | {"gentleness": mean(gentleness)}

    def imitate(self, questions: Questions, texts: Tensor) -> None:
        optimizer = torch.optim.Adam(self.model.parameters(), IMITATION_RATE)
        objective, nothing = Objective(msgspec.convert(IMITATION, ObjectiveConfig)), torch.zeros(len(texts))
        tokens = completion_tokens(texts, torch.zeros(texts.shape), nothing, nothing, privileged=True)
        for _ in range(IMITATION_STEPS):
            self.step(optimizer, objective, questions.prompts, tokens)

    def grpo_step(self, optimizer: torch.optim.Optimizer, objective: Objective) -> None:
        chosen = torch.randperm(len(self.questions), generator=self.draw)[:PROMPTS_PER_STEP]
        questions = self.questions[chosen].repeat(SAMPLES)
        answers = self.sample(questions, questions.prompts)
        with torch.no_grad():
            rollout = self.logprobs(questions.prompts, answers).gather(-1, answers[..., None])[..., 0]
        rewards = questions.rewards(answers)
        groups = rewards.reshape(-1, SAMPLES).tolist()
        advantages = torch.tensor(
            [one for group in groups for one in group_advantages(group, divide_by_deviation=True)]
        )
        tokens = completion_tokens(answers, rollout, rewards, advantages, privileged=False)
        self.step(optimizer, objective, questions.prompts, tokens)


def train(arm: str, base: Model, sets: Mapping[str, Mapping[str, Questions]], name: str, seed: int) -> dict[str, Any]:
    """Train one student on one set; return its pass rates on held-out prompts over the tokens that it sampled."""
    student, rates = Student(base, sets[name]["train"], seed), dict[str, float]()

    def held_out(of: str) -> float:
        questions, draw = sets[of]["held_out"], torch.Generator().manual_seed(0)
        return float(pass_rates(student.model, questions, questions.prompts, SAMPLES, draw).mean())

    curve = [[0, held_out(name)]]
    if arm in ("privileged", "unselected"):
        how = "likelihood" if arm == "privileged" else "first"
        config = PrivilegedConfig("{{ hint }}", samples_per_prompt=SAMPLES, hard_after=SAMPLES, select=how)
        questions, texts, rates = student.hinted_texts(config)
        student.imitate(questions, texts)
    elif arm == "reference":
        student.imitate(student.questions, student.questions.answers + OTHER_WAY)
    curve.append([student.sampled_tokens, held_out(name)])
    optimizer = torch.optim.Adam(student.model.parameters(), RATE)
    objective, step = Objective(msgspec.convert(GRPO, ObjectiveConfig)), 0
    while student.sampled_tokens + PROMPTS_PER_STEP * SAMPLES * DIGITS <= BUDGET:
        student.grpo_step(optimizer, objective)
        step += 1
        if step % EVALUATED_EVERY == 0:
            curve.append([student.sampled_tokens, held_out(name)])
    curve.append([student.sampled_tokens, held_out(name)])
    other = next(one for one in sets if one != name)
    written = write(student.model, sets[name]["held_out"].prompts, torch.Generator().manual_seed(1))
    of_style = {"other_way": float((written >= OTHER_WAY).float().mean()), f"held_out_{other}": held_out(other)}
    return {"seed": seed, "set": name, "arm": arm, "curve": curve, **rates, **of_style}


def study(seed: int, missing: Sequence[tuple[str, str]], pretraining_steps: int) -> Iterator[dict[str, Any]]:
    """Yield the outcome of every missing arm, as set and arm, with one seed; they share model and prompts."""
    table = torch.randperm(BASE, generator=torch.Generator().manual_seed(300 + seed))
    base = pretrain(seed, table, pretraining_steps).eval()
    sets, rates = find_sets(base, seed, table)
    for name, arm in missing:
        began = time.perf_counter()
        outcome = train(arm, base, sets, name, seed) | rates
        first, last = outcome["curve"][0][1], outcome["curve"][-1][1]
        print(
            f"seed {seed} {name:<5} {arm:<10} {first:.3f} -> {outcome['curve'][1][1]:.3f} -> {last:.3f} "
            f"{ {key: round(value, 3) for key, value in outcome.items() if isinstance(value, float)} }"
            f"  {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        yield outcome


def rows_of(outcomes: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return means over the seeds, and the contrasts with every paired difference."""
    by_arm = {
        (name, arm): sorted(
            (one for one in outcomes if (one["set"], one["arm"]) == (name, arm)), key=lambda o: o["seed"]
        )
        for name, arms in ARMS.items()
        for arm in arms
    }
    size = f"{len(by_arm['hard', 'blind'])} seeds"
    rows = []
    for key, label in (
        ("measured_anew_hard", "hard: pass rate without a hint, measured anew"),
        ("measured_anew_dense", "dense: pass rate without a hint, measured anew"),
        ("hint_on_hard", "hard: pass rate with a hint"),
    ):
        rows.append(row(label, size, mean(one[key] for one in by_arm["hard", "blind"]), "share"))
    for (name, arm), of_arm in by_arm.items():
        rows.append(row(f"{name}, {arm}: pass rate at the end", size, mean(_last(one) for one in of_arm), "share"))
        rows.append(
            row(f"{name}, {arm}: other way of writing", size, mean(one["other_way"] for one in of_arm), "share")
        )
    for key in ("hinted_solve_rate", "acceptance", "gentleness"):
        rows.append(
            row(f"hard, privileged: {key}", size, mean(one[key] for one in by_arm["hard", "privileged"]), "share")
        )

    def difference(name: str, arm: str, other: str) -> list[float]:
        pairs = zip(by_arm[name, arm], by_arm[name, other], strict=True)
        return [_gain(one) - _gain(beside) for one, beside in pairs]

    on_hard, on_dense = (difference(name, "privileged", "blind") for name in ("hard", "dense"))
    interaction = [hard - dense for hard, dense in zip(on_hard, on_dense, strict=True)]
    for label, differences in (("privileged - blind, hard", on_hard), ("the same, hard - dense", interaction)):
        smallest = row(f"{label}, smallest", size, min(differences), "share")
        rows.append({**at_least(smallest, 0), "differences": _list(differences)})
        rows.append(at_most(row(f"{label}, sign-flip p", size, sign_flip_p(differences), "p"), 0.05))
    for label, differences in (
        ("privileged - blind, dense", on_dense),
        ("privileged - unselected, hard", difference("hard", "privileged", "unselected")),
        ("privileged - reference, hard", difference("hard", "privileged", "reference")),
    ):
        rows.append({**row(f"{label}, mean", size, mean(differences), "share"), "differences": _list(differences)})
    return rows


def _last(outcome: Mapping[str, Any]) -> float:
    return float(outcome["curve"][-1][1])


def _gain(outcome: Mapping[str, Any]) -> float:
    return _last(outcome) - float(outcome["curve"][0][1])


def _list(differences: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in differences)


def main() -> int:
    """Train what is missing, write the rows and draw the figure."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--pretraining-steps", type=int, default=PRETRAINING_STEPS)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-privileged-sampling.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    log = options.output.with_suffix(".jsonl")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    everything = [(name, arm) for name, arms in ARMS.items() for arm in arms]
    for seed in seeds:
        done = {(one["set"], one["arm"]) for one in read_outcomes(log) if one["seed"] == seed}
        if missing := [one for one in everything if one not in done]:
            for outcome in study(seed, missing, options.pretraining_steps):
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(outcome) + "\n")
    outcomes = [one for one in read_outcomes(log) if one["seed"] in seeds]
    rows = rows_of(outcomes)
    print_rows(rows)
    document = {"machine": {"command": COMMAND, **describe_machine()}, "rows": rows, "outcomes": outcomes}
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw_privileged_sampling(document, options.output.with_name("privileged_sampling.png"))
    return 0 if all(one.get("met", True) for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
