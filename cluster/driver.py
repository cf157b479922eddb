"""The loop, in data-flow order: prompts, rollout, score, learn, weights back.

The driver sees object references, row counts and token counts; trajectories and weights go from worker to worker.
"""

from cluster.pipeline import train_requests, train_sampling
from cluster.step_record import step_record
from cluster.stopwatch import Stopwatch
from cluster.training_run import TrainingRun


def train(run: TrainingRun) -> None:
    """Do the remaining steps of the run, strictly on-policy: every step learns from what its own weights wrote.

    The pools work at the same time within a step: a batch is scored as soon as its completions are finished, while
    the others are still being written. `generate` and `score` are lazy: asking for scored batches drives both.
    """
    rollouts, teachers, learner = run.pipeline.rollouts, run.pipeline.teachers, run.pipeline.learner
    sampling, verifier = train_sampling(run.config), run.config.evaluation.verifier
    learner.publish_weights(rollouts.actors, policy_version=run.first_step)
    run.begin()

    for step in range(run.first_step, run.config.run.steps):
        watch = Stopwatch()
        with watch.measure("score"):
            requests = train_requests(run.config, run.inputs, step)
            generated = watch.watch("generate", rollouts.generate(requests, sampling, verifier))
            scored = list(teachers.score(generated, run.config.scorers))
        with watch.measure("learn"):
            learned = learner.step(scored, step)
        with watch.measure("sync"):
            synced = learner.publish_weights(rollouts.actors, policy_version=step + 1)
        run.finish_step(step + 1, step_record(step + 1, scored, learned, synced, watch))

    run.end()
