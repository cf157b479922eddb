"""A rank that is killed in a broadcast of NCCL's holds no GPU: what `test_deaths_in_the_group.py` tests over gloo."""

import time
from contextlib import ExitStack
from typing import Any

import pytest
from torch import Tensor

from learner.weight_sync.gpu_links import NcclLink
from tests.learner.weight_sync.engine_processes import SECONDS, Engine, Processes, free_port
from tests.learner.weight_sync.fake_gpus import BUCKET_BYTES, Publication, assert_all_arrived
from tests.learner.weight_sync.gloo_group import HOST

pytestmark = [pytest.mark.gpu(gpus=2), pytest.mark.slow, pytest.mark.timeout(300)]


def make_link(buffer: Tensor) -> NcclLink:
    return NcclLink(True, lambda: (HOST, free_port()), 1, max(BUCKET_BYTES, buffer.numel()))


@pytest.mark.parametrize("num_living", [0, pytest.param(1, marks=pytest.mark.gpu(gpus=3))])
def test_the_gpus_of_those_that_live_are_free_after_a_death_in_a_broadcast(num_living: int) -> None:
    with ExitStack() as stack:
        engines = [Engine("never" if gpu <= num_living else "bucket", gpu) for gpu in range(1, num_living + 2)]
        for engine in engines:
            stack.callback(engine.close)
        assert [engine.answer() for engine in engines] == [{}] * len(engines)
        publication = Publication(make_link, recipients=Processes)  # type: ignore[arg-type]
        sender: Any = publication.sender
        began = time.monotonic()
        sender.publish(engines, 1)
        assert time.monotonic() - began < SECONDS
        assert publication.ends == []
        for engine in engines[:-1]:
            assert_all_arrived(engine.weights)
