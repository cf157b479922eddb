import pytest

from cluster.contracts.errors import JobError
from cluster.jobs.job_server import _Output, when_ready


def test_what_arrives_again_after_a_broken_connection_is_written_once() -> None:
    written: list[str] = []
    output = _Output(written.append)
    output.take("one\ntw", position=0)
    output.take("one\n", position=0)  # from the start, in other pieces
    output.take("two\nthr", position=4)
    output.take("ee\n\n", position=11)
    assert "".join(written) == "one\ntwo\nthree\n\n"
    assert output.last_line == "three"


def test_the_last_line_is_whole_though_it_came_in_pieces() -> None:
    output = _Output(lambda text: None)
    output.take("first\nla", position=0)
    output.take("st", position=8)
    assert output.last_line == "last"


def test_a_cluster_that_has_just_started_is_asked_again_until_it_takes_jobs() -> None:
    tries: list[str] = []

    def submit(error: str, until: int) -> None:
        tries.append(error)
        if len(tries) < until:
            raise JobError(error)

    early = "http://head:8265: Request failed: No available agent to submit job, please try again later."
    when_ready(lambda: submit(early, 3), pause_seconds=0)
    assert tries == [early] * 3
    with pytest.raises(JobError, match="No available agent"):
        when_ready(lambda: submit(early, 9), patience_seconds=0, pause_seconds=0)
    with pytest.raises(JobError, match="no room"):
        when_ready(lambda: submit("no room", 99))
    assert tries.count("no room") == 1
