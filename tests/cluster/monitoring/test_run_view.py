from io import StringIO

from rich.console import Console

from cluster.contracts.files import Record
from cluster.monitoring.run_view import MAX_POINTS, Curve, RunView, sparkline

STEP: Record = {
    "step/tokens_per_second": 1234.0,
    "pool/rollout/busy_share": 0.75,
    "pool/rollout/serving": 1,
    "pool/rollout/wanted": 2,
    "pool/rollout/restarts": 3,
    "pool/rollout/tokens_per_second": 500.0,
    "pool/learner/busy_share": 0.25,
    "pool/learner/serving": 1,
    "pool/learner/wanted": 1,
    "pool/learner/restarts": 0,
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def drawn(view: RunView, width: int = 120) -> list[str]:
    console = Console(file=StringIO(), width=width)
    console.print(view)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_a_run_is_one_line_for_its_step_one_for_each_pool_and_one_for_each_curve() -> None:
    clock = Clock()
    view = RunView("demo", 20, clock=clock)
    view.alarm = "alarm long at step 4: completions grow"
    for step, kl in enumerate((2.0, 1.5, 1.0, 0.5), start=1):
        view.add({**STEP, "step": step, "train/kl": kl, **({"held_out/accuracy": 0.2 * step} if step % 2 == 0 else {})})
        clock.now += 3.0
    assert drawn(view) == [
        "demo  ████░░░░░░░░░░░░░░░░  step 4 of 20, 1,234 completion tokens/s, 45 s left, 3 s since the last step",
        "rollout  ███████████████░░░░░  75% busy  1/2 serve, 500 tokens/s, 3 restarted",
        "learner  █████░░░░░░░░░░░░░░░  25% busy  1/1 serve",
        "KL per token       █▆▃▁  2.0000 -> 0.5000",
        "held-out accuracy  ▁█    0.400 -> 0.800",
        "last alarm long at step 4: completions grow",
    ]


def test_nothing_is_drawn_before_the_first_step() -> None:
    assert drawn(RunView("demo", 20)) == []


def test_a_terminal_without_block_characters_gets_others() -> None:
    view = RunView("demo", 20, ascii_only=True)
    for step, kl in enumerate((2.0, 1.0), start=1):
        view.add({**STEP, "step": step, "train/kl": kl})
    text = "\n".join(drawn(view))
    assert text.isascii()
    assert "###############....." in text


def test_a_narrow_terminal_gets_as_many_lines() -> None:
    view = RunView("demo", 20)
    view.alarm = "alarm long: " + "x" * 200
    view.add({**STEP, "step": 1, "train/kl": 1.0})
    assert len(drawn(view, width=50)) == len(drawn(view, width=200))


def test_a_signal_handler_may_say_a_line_while_a_step_is_taken_in() -> None:
    """What is said draws the view again, in the thread that it interrupts."""
    seen: list[list[str]] = []

    def clock() -> float:
        if len(seen) == 1:
            seen.append([])  # drawing asks for the time, too
            seen.append(drawn(view))
        return 0.0

    view = RunView("demo", 20, clock=clock)
    view.add({**STEP, "step": 1})
    seen.append([])
    view.add({**STEP, "step": 2})
    assert seen[-1][0].startswith("demo ")


def test_steps_that_are_done_again_replace_the_first_ones() -> None:
    view = RunView("demo", 20)
    for step in (1, 2, 3, 2):
        view.add({**STEP, "step": step, "train/kl": step * 1.0})
    assert "1.0000 -> 2.0000" in "\n".join(drawn(view))


def test_the_time_left_of_steps_that_were_done_before_is_what_their_records_say() -> None:
    view = RunView("demo", 10)
    for step in (1, 2):
        view.add({"step": step, "step/seconds": 2.0 * step}, is_new=False)
    assert view.seconds_left() == 8 * 3.0


def test_a_long_curve_keeps_its_ends_and_a_bounded_number_of_values() -> None:
    curve = Curve()
    last = 10 * MAX_POINTS + 1
    for step in range(1, last + 1):
        curve.add(step, float(step))
    assert MAX_POINTS / 2 <= len(curve.values) <= MAX_POINTS
    assert (curve.values[0], curve.values[-1]) == (1.0, last)
    assert sparkline(curve, 8) == "▁▂▃▄▅▆▇█"
