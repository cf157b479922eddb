"""Multiplies rewards by how gentle the texts are to a teacher, for a student that learns to write for it.

In Pedagogical RL the student of such a run is the later sampler, which reads what the task's student does not; the
teacher is that student. A reward R * G then says: right, and near to what it would write by itself.
"""

import numpy as np
import pyarrow as pa

from cluster.config.context import GentlenessConfig
from cluster.config.terms import TEACHER
from cluster.contracts.metrics import Mean, Metrics
from cluster.contracts.signals import SIGNALS
from cluster.contracts.trajectory import ragged


def with_gentle_rewards(scored: pa.RecordBatch, config: GentlenessConfig) -> tuple[pa.RecordBatch, Metrics]:
    """Return a scored batch whose rewards are R * G, and the mean of G; rows without a reward stay as they are.

    All rows of an episode are one text. The teacher has chosen the candidates, so its favourite is the best of them or
    the sampled token.
    """
    columns = (SIGNALS[name].column(TEACHER) for name in ("logprobs", "candidate_logprobs"))
    own, candidates = (ragged(scored, name) for name in columns)
    episodes, rewards = scored["episode_id"].to_pylist(), scored["reward"].to_pylist()
    of_episode: dict[int, list[int]] = {}
    for row, episode in enumerate(episodes):
        of_episode.setdefault(episode, []).append(row)
    gentleness = {
        episode: config.of(
            np.concatenate([own[row] for row in rows]), np.concatenate([candidates[row].max(1) for row in rows])
        )
        for episode, rows in of_episode.items()
    }
    rated = [gentleness[episodes[rows[-1]]] for rows in of_episode.values() if rewards[rows[-1]] is not None]
    gentle = [
        None if reward is None else reward * gentleness[episode]
        for episode, reward in zip(episodes, rewards, strict=True)
    ]
    position = scored.schema.get_field_index("reward")
    field = scored.schema.field(position)
    metrics = {"teacher/gentleness": Mean(sum(rated), float(len(rated)))} if rated else {}
    return scored.set_column(position, field, pa.array(gentle, field.type)), metrics
