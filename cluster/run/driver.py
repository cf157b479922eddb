"""The loop, in data-flow order: prompts, rollout, score, learn, weights back.

The driver sees object references, row counts and token counts; trajectories and weights go from worker to worker.
"""

from dataclasses import dataclass, field

from cluster.run.flow import Flow, StepBatches
from cluster.run.hooks import Hooks, RunContext
from cluster.run.inputs import replayed_batches, replayed_requests, train_requests, train_sampling
from cluster.run.self_teachers import SelfTeachers
from cluster.run.step_metrics import Stopwatch, step_record


@dataclass
class Permits:
    """Admits each step's requests once, at most `max_staleness` steps before the step is learned from.

    A step's completions begin under the weights of the step that was being learned from when it was admitted, so they
    are at most `max_staleness` updates old when they are learned from. Nothing is dropped and nothing waits for a later
    step, so no setting can deadlock.

    Example:
        >>> permits = Permits(first_step=0, num_steps=4, max_staleness=1)
        >>> [list(permits.admit(step)) for step in range(4)]
        [[0, 1], [2], [3], []]
    """

    first_step: int
    num_steps: int
    max_staleness: int
    _next: int = field(init=False)

    def __post_init__(self) -> None:
        self._next = self.first_step

    def admit(self, step: int) -> range:
        """Return the steps whose requests go out now that `step` is about to be learned from."""
        admitted = range(self._next, min(step + self.max_staleness + 1, self.num_steps))
        self._next = max(self._next, admitted.stop)
        return admitted


def train(run: RunContext, hooks: Hooks) -> None:
    """Do the remaining steps of the run.

    All stages work at the same time: a batch is scored as soon as its completions are finished, and learned from as
    soon as it is scored, while others are still being generated. The weights change when a step's last batch is in.
    With `max_staleness = 0` the next step is admitted only then: the weights that sampled a token learn from it.
    """
    config, ledger, learner = run.config, run.ledger, run.pipeline.learner
    rollouts, teachers = run.pipeline.rollouts, run.pipeline.teachers
    run.flow = flow = Flow(rollouts, teachers, config.ray.call_timeout_seconds, hooks.while_waiting)
    permits = Permits(run.first_step, config.run.steps, config.rollout.max_staleness)
    under_way: dict[int, StepBatches] = {}
    learner.publish_weights(rollouts.actors, policy_version=run.first_step)
    rollouts.bring_weights_with(learner.bring_weights)  # to workers that are started again
    self_teachers = SelfTeachers(run)
    self_teachers.begin()
    hooks.begin()

    for step in range(run.first_step, config.run.steps):
        watch = Stopwatch()
        for admitted in permits.admit(step):
            hooks.before_step(admitted)
            requests = train_requests(config, run.inputs, admitted) + run.probe.requests(config, admitted)
            sampling = train_sampling(config, run.length_cap.at(admitted))
            replayed = replayed_batches(run.inputs, admitted)
            under_way[admitted] = flow.admit(admitted, requests, sampling, config.scorers, replayed)
            ledger.admit(admitted + 1, [*requests, *replayed_requests(run.inputs, admitted)])
        batches = under_way.pop(step)
        with watch.measure("step"):
            learned = learner.step(ledger.watch(step + 1, batches), step)
            with watch.measure("sync"):
                synced = learner.publish_weights(rollouts.actors, policy_version=step + 1)
            refreshed = self_teachers.after(step + 1)
        record = step_record(step + 1, batches, learned, synced, watch)
        hooks.after_step(step + 1, {**record, **refreshed}, batches.finished)
