"""`python -m benchmarks.cases.privileged_sampling`: where a sampler that reads a hint helps, and where it does not.

One process, a transformer of 0.1M parameters, the learner's own objective and the rollout workers' own selection. A
text is a slot for a hint, a mark, and six digits modulo 7, each followed by an answer: the digit plus a shift that
belongs to the mark. Only a text whose six answers are right has reward 1. Beforehand the model learns to obey a hint,
which names the shift, up to noise; without one it mostly knows the shifts of three marks and guesses those of four
evenly. An answer can be written in two ways, and the model prefers one of them without a hint, none with it.

Sets, by 32 completions without a hint: HARD, none right, and some of 8 with a hint; DENSE, 20 to 60 % right; both are
measured anew on 32 others. Each has training and held-out prompts. An arm trains one student on one set:

- blind: GRPO on its own samples (8 a prompt)
- privileged: 8 samples a prompt without a hint, then 8 with; of the right ones, the most likely under the student
  without a hint; 50 steps of gated cross-entropy on these; then GRPO
- unselected: the same with the first right text in the place of the most likely
- teacher: as privileged, but a teacher writes, a model that mostly knows the shifts of all marks, without hints
- gentle: the hinted sampler is a copy that has learned before, by GRPO on reward times gentleness to the student, and
  of its right texts the gentlest is taken (Pedagogical RL); all tokens count
- reference: 50 steps of the same cross-entropy on reference solutions, in the other way of writing; then GRPO

On BOTH, the two sets together, privileged is what a run does: a probe finds the prompts whose last 8 samples failed,
and each step of GRPO has rows of the hinted sampler for up to 12 of these beside its own.

All arms on a set sample equally many tokens, those of the hinted sampler included. Fixed before running: the gain of
privileged over blind in the pass rate of held-out prompts is larger on HARD than on DENSE, by an exact sign-flip test
over five seeds, and positive on HARD; so is that of teacher. Nothing is claimed of DENSE, of BOTH, and of the other
arms. Rates, and on
BOTH the quota, the weight of the cross-entropy and the budget, were chosen with seed 0, which is not among the five.

Outcomes are appended to a JSON-lines file as they come, and a second call does only what is missing there.
"""

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from benchmarks.cases.figures import draw_privileged_sampling
from benchmarks.harness.paired_arms import rows_of
from benchmarks.harness.report import RESULTS, describe_machine, print_rows
from benchmarks.harness.shifted_digits import (
    BASE,
    FIRST_MARK,
    NUM_TOKENS,
    Model,
    Questions,
    draw_questions,
    read_outcomes,
    text_of,
    write,
)
from cluster.config.context import PrivilegedConfig
from cluster.config.objective import ObjectiveConfig
from cluster.contracts.batches import BatchHandle
from cluster.run.probe import Probe
from learner.batching.arrivals import group_advantages
from learner.loss.objective import Objective
from learner.loss.tokens import CompletionTokens
from rollout_workers.privileged import BlindScores, PrivilegedPlan, select

COMMAND = "python -m benchmarks.cases.privileged_sampling"
DIGITS = 6
OTHER_WAY = NUM_TOKENS  # the first of the answers in the other way of writing; those of the usual way are 0 to 6
VOCABULARY, TEXT_TOKENS = OTHER_WAY + BASE, 2 + 2 * DIGITS
KNOWN_MARKS = 3  # of 7, whose shifts the model mostly knows without a hint
NOISE = {"hint": 0.1, "known": 0.13, "unknown": 1.0}  # share of answers that are random in what the model learns from
USUAL = {"hint": 0.5, "blind": 0.9}  # share of texts in the usual way of writing
PRETRAINING_STEPS, PRETRAINING_ROWS, PRETRAINING_RATE = 300, 128, 3e-3
DRAWN, PROMPTS, HELD_OUT = 384, 48, 48
TRIES, HINTED_TRIES = 32, 8  # completions of a prompt by which it is hard or dense
MEASURED = 4  # completions of each held-out prompt in a measurement
SAMPLES, PROMPTS_PER_STEP, RATE = 8, 12, 1e-3
IMITATION_STEPS, IMITATION_RATE = 50, 1e-3
SAMPLER_STEPS = 10  # of GRPO, by which a sampler learns to be gentle
STEP_TOKENS = PROMPTS_PER_STEP * SAMPLES * DIGITS  # of a step of GRPO
BUDGETS = {"hard": 40 * STEP_TOKENS, "dense": 40 * STEP_TOKENS, "both": 110 * STEP_TOKENS}  # sampled by each arm
EVALUATED_EVERY = 10  # steps of GRPO
QUOTA, IMITATION_WEIGHT = 12, 8.0  # on both sets together
ARMS = {
    "hard": ("blind", "privileged", "teacher", "gentle", "unselected", "reference"),
    "dense": ("blind", "privileged"),
    "both": ("blind", "privileged"),
}

REWARD = {"loss": "task_reward", "rows": "student"}
IMITATE = {"loss": "cross_entropy", "gate": {}, "rows": "privileged"}
GRPO = {"support": "sampled", "terms": {"reward": REWARD}}
IMITATION = {"support": "sampled", "terms": {"imitated": IMITATE}}
TOGETHER = {"support": "sampled", "terms": {"reward": REWARD, "imitated": IMITATE | {"weight": IMITATION_WEIGHT}}}


def rewards_of(questions: Questions, answers: Tensor) -> Tensor:
    """Return 1 for texts of six right answers, in either way of writing, [rows]."""
    values = torch.where(answers >= OTHER_WAY, answers - OTHER_WAY, answers)
    return (values == questions.answers).all(1).float()


def with_hints(questions: Questions) -> Tensor:
    """Return the prompts with hints that name the right shifts."""
    return questions.with_contexts(questions.shifts)


def pretrain(seed: int, table: Tensor, steps: int, known_marks: int = KNOWN_MARKS) -> Model:
    """Return a model that obeys hints of any shift, and without one knows the shifts of some marks, or of all."""
    torch.manual_seed(seed)
    model, draw = Model(VOCABULARY, TEXT_TOKENS), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), PRETRAINING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        questions = draw_questions(draw, PRETRAINING_ROWS, DIGITS, table)
        is_blind = torch.rand(PRETRAINING_ROWS, generator=draw) < 0.5
        any_shift = torch.randint(BASE, (PRETRAINING_ROWS,), generator=draw)
        questions = Questions(questions.prompts, torch.where(is_blind, questions.shifts, any_shift))
        is_known = questions.prompts[:, 1] < FIRST_MARK + known_marks
        share = torch.where(is_known, NOISE["known"], NOISE["unknown"])
        noise = (
            torch.rand(PRETRAINING_ROWS, DIGITS, generator=draw) < torch.where(is_blind, share, NOISE["hint"])[:, None]
        )
        random = torch.randint(BASE, (PRETRAINING_ROWS, DIGITS), generator=draw)
        usual = torch.rand(PRETRAINING_ROWS, generator=draw) < torch.where(is_blind, USUAL["blind"], USUAL["hint"])
        answers = torch.where(noise, random, questions.answers) + torch.where(usual, 0, OTHER_WAY)[:, None]
        prompts = torch.where(is_blind[:, None], questions.prompts, with_hints(questions))
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
    rewards = rewards_of(repeated, write(model, prompts.repeat_interleave(tries, 0), draw))
    return rewards.reshape(-1, tries).mean(1)


def find_sets(model: Model, seed: int, table: Tensor) -> tuple[dict[str, dict[str, Questions]], dict[str, float]]:
    """Return the sets' training and held-out prompts, and their pass rates by completions drawn anew."""
    draw = torch.Generator().manual_seed(500 + seed)
    questions = draw_questions(draw, DRAWN, DIGITS, table)
    blind = pass_rates(model, questions, questions.prompts, TRIES, draw)
    hinted = pass_rates(model, questions, with_hints(questions), HINTED_TRIES, draw)
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


Sets = Mapping[str, Mapping[str, Questions]]  # set -> train or held_out -> its prompts


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

    def __init__(self, base: Model, questions: Questions, seed: int, select_by: str = "likelihood") -> None:
        self.writer: tuple[Model, bool] | None = None  # another model that writes, and whether it reads hints
        self.model, self.questions, self.sampled_tokens = copy.deepcopy(base), questions, 0
        self.draw, self.rates = torch.Generator().manual_seed(1000 + seed), dict[str, float]()
        self.config = PrivilegedConfig(
            "{{ hint }}",
            prompts_per_step=QUOTA,
            samples_per_prompt=SAMPLES,
            hard_after=SAMPLES,
            select=select_by,  # type: ignore[arg-type]
        )

    def sample(self, questions: Questions, prompts: Tensor, model: Model | None = None) -> Tensor:
        self.sampled_tokens += len(questions) * DIGITS
        return write(model or self.model, prompts, self.draw)

    def logprobs(self, prompts: Tensor, answers: Tensor, model: Model | None = None) -> Tensor:
        """Return log-probabilities of all tokens, [rows, DIGITS, VOCABULARY]."""
        with torch.no_grad():
            logprobs: Tensor = (model or self.model)(text_of(prompts, answers))[:, 2::2].log_softmax(-1)
        return logprobs

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

    def hinted_texts(self, questions: Questions) -> tuple[Questions, Tensor]:
        """Let the sampler write; return the prompts that have a right text, and the text selected for each."""
        count = self.config.samples_per_prompt
        model, reads_hints = self.writer or (self.model, True)
        repeated = questions.repeat(count)
        prompts = with_hints(questions) if reads_hints else questions.prompts
        answers = self.sample(repeated, prompts.repeat_interleave(count, 0), model)
        is_right = rewards_of(repeated, answers).bool().reshape(-1, count)
        blind = self.logprobs(repeated.prompts, answers)
        own = blind.gather(-1, answers[..., None])[..., 0].reshape(-1, count, DIGITS).numpy()
        best = blind.amax(-1).reshape(-1, count, DIGITS).numpy()
        kept, texts, gentleness = list[int](), [answers[:0]], list[float]()
        for prompt in range(len(questions)):
            right = is_right[prompt].nonzero()[:, 0].tolist()
            scores = [BlindScores(own[prompt, number], best[prompt, number]) for number in right]
            chosen = select(self.config, scores)
            if chosen is not None:
                kept.append(prompt)
                texts.append(answers[None, prompt * count + right[chosen]])
                gentleness.append(scores[chosen].gentleness(self.config))
        self.rates = {"hinted_solve_rate": float(is_right.float().mean()), "acceptance": len(kept) / len(questions)}
        self.rates |= {"gentleness": mean(gentleness)} if gentleness else {}
        return questions[torch.tensor(kept, dtype=torch.long)], torch.cat(texts)

    def imitate(self, questions: Questions, texts: Tensor) -> None:
        optimizer = torch.optim.Adam(self.model.parameters(), IMITATION_RATE)
        objective, tokens = Objective(msgspec.convert(IMITATION, ObjectiveConfig)), imitated_tokens(texts)
        for _ in range(IMITATION_STEPS):
            self.step(optimizer, objective, questions.prompts, tokens)

    def own_samples(self) -> tuple[Tensor, Questions, Tensor]:
        """Sample a step's prompts; return their numbers, the questions of each text, and the texts."""
        chosen = torch.randperm(len(self.questions), generator=self.draw)[:PROMPTS_PER_STEP]
        questions = self.questions[chosen].repeat(SAMPLES)
        return chosen, questions, self.sample(questions, questions.prompts)

    def own_tokens(
        self, questions: Questions, answers: Tensor, rewards: Tensor | None = None, prompts: Tensor | None = None
    ) -> CompletionTokens:
        """Describe own texts, with other rewards than the task's, or after other prompts, where these are given."""
        prompts = questions.prompts if prompts is None else prompts
        rollout = self.logprobs(prompts, answers).gather(-1, answers[..., None])[..., 0]
        rewards = rewards_of(questions, answers) if rewards is None else rewards
        groups = (group_advantages(group, divide_by_deviation=True) for group in rewards.reshape(-1, SAMPLES).tolist())
        advantages = torch.tensor([one for group in groups for one in group])
        return completion_tokens(answers, rollout, rewards, advantages, privileged=False)

    def train_sampler(self) -> dict[str, float]:
        """Train a copy that reads hints on reward times gentleness to the student; return its first and last rates."""
        sampler, rates = Student(self.model, self.questions, 0), dict[str, float]()
        sampler.draw = self.draw
        optimizer = torch.optim.Adam(sampler.model.parameters(), RATE)
        objective = Objective(msgspec.convert(GRPO, ObjectiveConfig))
        for step in range(SAMPLER_STEPS):
            chosen = torch.randperm(len(self.questions), generator=self.draw)[:PROMPTS_PER_STEP]
            questions = self.questions[chosen].repeat(SAMPLES)
            prompts = with_hints(questions)
            answers = sampler.sample(questions, prompts)
            blind = self.logprobs(questions.prompts, answers)
            own, best = blind.gather(-1, answers[..., None])[..., 0].numpy(), blind.amax(-1).numpy()
            gentle = torch.tensor([self.config.gentleness.of(*one) for one in zip(own, best, strict=True)])
            rewards = rewards_of(questions, answers)
            sampler.step(
                optimizer, objective, prompts, sampler.own_tokens(questions, answers, rewards * gentle, prompts)
            )
            name = "first" if step == 0 else "last"
            rates |= {f"{name}_reward": float(rewards.mean()), f"{name}_gentleness": float(gentle.mean())}
        self.sampled_tokens += sampler.sampled_tokens
        self.writer = sampler.model, True
        return rates


def imitated_tokens(texts: Tensor) -> CompletionTokens:
    nothing = torch.zeros(len(texts))
    return completion_tokens(texts, torch.zeros(texts.shape), nothing, nothing, privileged=True)


def joined(first: CompletionTokens, second: CompletionTokens) -> CompletionTokens:
    """Return the tokens of both, one after the other."""
    columns = {
        field: torch.cat([getattr(first, field), getattr(second, field)])
        for field in vars(first)
        if field not in ("scores", "trajectory")
    }
    trajectory = torch.cat([first.trajectory, second.trajectory + len(first) // DIGITS])
    scores = {"teacher": {"logprobs": torch.zeros(len(trajectory))}}
    return CompletionTokens(**columns, scores=scores, trajectory=trajectory)


SELECT = {"unselected": "first", "gentle": "gentleness"}  # by arm


def train(arm: str, base: Model, teacher: Model, sets: Sets, name: str, seed: int) -> dict[str, Any]:
    """Train one student; return its pass rates on held-out prompts over the tokens that were sampled for it."""
    questions = sets[name]["train"] if name in sets else both(*(one["train"] for one in sets.values()))
    student = Student(base, questions, seed, SELECT.get(arm, "likelihood"))
    if arm == "teacher":
        student.writer = teacher, False
    of_sampler = student.train_sampler() if arm == "gentle" else {}
    curves: dict[str, list[list[float]]] = {one: [] for one in sets}

    def evaluate() -> None:
        for one, curve in curves.items():
            held_out, draw = sets[one]["held_out"], torch.Generator().manual_seed(0)
            rates = pass_rates(student.model, held_out, held_out.prompts, MEASURED, draw)
            curve.append([student.sampled_tokens, float(rates.mean())])

    evaluate()
    if name != "both" and arm in ("privileged", "teacher", "gentle", "unselected"):
        student.sample(questions.repeat(SAMPLES), questions.prompts.repeat_interleave(SAMPLES, 0))  # finds hard ones
        student.imitate(*student.hinted_texts(questions))
    elif arm == "reference":
        student.imitate(questions, questions.answers + OTHER_WAY)
    evaluate()
    for step in reinforce(student, BUDGETS[name], with_hints=name == "both" and arm == "privileged"):
        if step % EVALUATED_EVERY == 0:
            evaluate()
    evaluate()
    held_out = sets["hard" if name == "both" else name]["held_out"]
    written = write(student.model, held_out.prompts, torch.Generator().manual_seed(1))
    other_way = float((written >= OTHER_WAY).float().mean())
    rates = {**student.rates, **of_sampler, "other_way": other_way}
    return {"seed": seed, "set": name, "arm": arm, "curves": curves, **rates}


def reinforce(student: Student, budget: int, with_hints: bool) -> Iterator[int]:
    """Take steps of GRPO until the tokens are used up, and yield their numbers, from 1."""
    optimizer = torch.optim.Adam(student.model.parameters(), RATE)
    objective = Objective(msgspec.convert(TOGETHER if with_hints else GRPO, ObjectiveConfig))
    probe = Probe(student.config, PrivilegedPlan(prompt_ids=frozenset(range(len(student.questions)))))
    for step in itertools.count():
        if student.sampled_tokens + STEP_TOKENS > budget:
            return
        hard = torch.tensor(probe.choose(step) if with_hints else (), dtype=torch.long)
        numbers, questions, answers = student.own_samples()
        prompts, tokens = questions.prompts, student.own_tokens(questions, answers)
        if len(hard):
            hinted, texts = student.hinted_texts(student.questions[hard])
            prompts, tokens = torch.cat([prompts, hinted.prompts]), joined(tokens, imitated_tokens(texts))
        student.step(optimizer, objective, prompts, tokens)
        asked, rewards = numbers.repeat_interleave(SAMPLES).tolist(), rewards_of(questions, answers).tolist()
        ids, ones = tuple(range(step * len(asked), (step + 1) * len(asked))), (1,) * len(asked)
        probe.observe(step, [BatchHandle(None, "", ids, ones, ones, tuple(asked), tuple(rewards))])
        yield step + 1


def both(first: Questions, second: Questions) -> Questions:
    return Questions(torch.cat([first.prompts, second.prompts]), torch.cat([first.shifts, second.shifts]))


def study(seed: int, missing: Sequence[tuple[str, str]], pretraining_steps: int) -> Iterator[dict[str, Any]]:
    """Yield the outcome of every missing arm, as set and arm, with one seed; they share model and prompts."""
    table = torch.randperm(BASE, generator=torch.Generator().manual_seed(300 + seed))
    base = pretrain(seed, table, pretraining_steps).eval()
    needs_teacher = any(arm == "teacher" for _, arm in missing)
    teacher = pretrain(100 + seed, table, pretraining_steps, known_marks=BASE).eval() if needs_teacher else base
    sets, rates = find_sets(base, seed, table)
    for name, arm in missing:
        began = time.perf_counter()
        outcome = train(arm, base, teacher, sets, name, seed) | rates
        rises = {
            on: [round(point[1], 3) for point in (*curve[:2], curve[-1])] for on, curve in outcome["curves"].items()
        }
        print(f"seed {seed} {name:<5} {arm:<10} {rises}  {time.perf_counter() - began:.0f} s", flush=True)
        yield outcome


def main() -> int:
    """Train what is missing, write the rows and draw the figure."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--pretraining-steps", type=int, default=PRETRAINING_STEPS)
    parser.add_argument("--arms", nargs="+", help="only these arms, of all sets")
    parser.add_argument("--report", action="store_true", help="only the rows and the figure of what is there")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-privileged-sampling.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    log = options.output.with_suffix(".jsonl")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    everything = [(name, arm) for name, arms in ARMS.items() for arm in options.arms or arms if arm in arms]
    for seed in () if options.report else seeds:
        done = {(one["set"], one["arm"]) for one in read_outcomes(log) if one["seed"] == seed}
        if missing := [one for one in everything if one not in done]:
            for outcome in study(seed, missing, options.pretraining_steps):
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(outcome) + "\n")
    outcomes = [one for one in read_outcomes(log) if one["seed"] in seeds]
    rows = rows_of(outcomes, ARMS)
    print_rows(rows)
    document = {"machine": {"command": COMMAND, **describe_machine()}, "rows": rows, "outcomes": outcomes}
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw_privileged_sampling(document, options.output.with_name("privileged_sampling.png"))
    return 0 if all(one.get("met", True) for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
