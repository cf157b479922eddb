import tomllib

from cluster.config.draft import Draft


def test_any_text_stands_in_a_comment_or_a_value() -> None:
    draft = Draft()
    draft.set("student.model", 'a "b" \\ \N{GRINNING FACE}\n', "two\nlines")
    draft.set("prompts.columns", {"prompt": "question"})
    draft.set("prompts.too_long", "skip", "because")
    written = draft.render(["a head\nof two lines"])
    assert tomllib.loads(written) == {
        "student": {"model": 'a "b" \\ \N{GRINNING FACE}\n'},
        "prompts": {"columns": {"prompt": "question"}, "too_long": "skip"},
    }
    assert 'too_long = "skip"  # because' in written
    assert draft.reasons()[-1] == 'prompts.too_long = "skip": because'
