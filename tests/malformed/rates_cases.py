"""Rates files that are wrong, each with words that its error must contain."""

GOOD = (
    '{"rollout": {"seconds_per_token": [[1, 0.01]], "prompt_tokens": [10], "completion_tokens": [20]}, '
    '"teachers": {"main": {"tokens_per_second": 1000}}, "learner": {"tokens_per_second": 1000}}'
)


def _with(old: str, new: str) -> bytes:
    assert old in GOOD
    return GOOD.replace(old, new).encode()


RATES_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a rates file: Input data was truncated"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "utf-16": (GOOD.encode("utf-16"), "byte order mark"),
    "TOML": (b"[rollout]\n", "not a rates file"),
    "a list": (b"[1]", "Expected `object`, got `array`"),
    "deep lists": (b"[" * 100_000, "not a rates file"),
    "cut off": (GOOD[:-1].encode(), "not a rates file"),
    "NaN": (_with("0.01", "NaN"), "not a rates file"),
    "no learner": (_with(', "learner": {"tokens_per_second": 1000}}', "}"), "missing required field `learner`"),
    "unknown field": (_with('"learner": {', '"learner": {"ranks": 1, '), "unknown field `ranks`"),
    "pace of zero": (_with("0.01", "0"), "Expected `float` > 0.0 - at `$.rollout.seconds_per_token[0][1]`"),
    "pace without end": (_with("0.01", "1e999"), "not a rates file"),
    "pace of no sequence": (_with("[1, 0.01]", "[0, 0.01]"), "Expected `int` >= 1"),
    "no pace": (_with("[[1, 0.01]]", "[]"), "Expected `array` of length >= 1"),
    "pace that goes back": (_with("[1, 0.01]", "[4, 0.1], [2, 0.1]"), "numbers of sequences must rise, found [4, 2]"),
    "lengths that fall": (_with("[20]", "[20, 10]"), "completion_tokens: quantiles must not fall"),
    "no lengths": (_with("[20]", "[]"), "completion_tokens"),
    "lengths as a text": (_with("[20]", '"20"'), "completion_tokens"),
    "log-normal without sigma": (_with("[20]", '{"median": 3, "longest": 9}'), "missing required field `sigma`"),
    "no teachers": (_with('{"main": {"tokens_per_second": 1000}}', "{}"), "Expected `object` of length >= 1"),
    "another teacher": (_with('"main"', '"other"'), "teachers has no rates of 'main', which the run names"),
    "nobody's share": (_with('{"main": {', '{"main": {"share": 0, '), "share is 0 for all of ['main']"),
    "share above 1": (_with('{"main": {', '{"main": {"share": 1.5, '), "Expected `float` <= 1.0"),
    "negative sync": (_with("}}", '}, "sync_seconds": -1}').replace(b'}, "sync_seconds": -1}, "l', b'}}, "l'), "sync"),
}
