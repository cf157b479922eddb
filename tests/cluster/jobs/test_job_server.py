from cluster.jobs.job_server import _Output


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
