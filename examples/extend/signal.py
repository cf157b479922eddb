"""Adds a signal: by how many nats a teacher prefers its most likely token to the second.

[teachers.pairs]
backend = "examples.extend.signal:BigramsWithMargin"
signals = ["examples.extend.signal:MARGIN"]

The column `teacher_margin` travels with the batch; a loss reads it as `tokens.scores["teacher"]["margin"]`.
"""

import numpy as np
import pyarrow as pa

from cluster.contracts.metrics import Metrics
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.signals import Scores, Signal
from examples.extend.teacher_backend import Bigrams, predictions

MARGIN = Signal("margin")  # float32, one value per sampled token
PATH = "examples.extend.signal:MARGIN"


class BigramsWithMargin(Bigrams):
    """Sends the margin where a request names it."""

    signals = Bigrams.signals | {PATH}

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> tuple[Scores, Metrics]:
        """Score as Bigrams does, and compare the two most likely tokens of each place."""
        scores, metrics = await super().score(batch, request)
        if PATH in request.signals:
            known, _ = predictions(self.logprobs, batch)
            second, best = np.sort(known, axis=1)[:, -2:].T
            scores = {**scores, PATH: best - second}
        return scores, metrics
