"""What signals do to a run; sent to this very process."""

import os
import signal
import threading

import pytest

from cluster.nodes.interruption import SIGNALS, interrupt_on_sigterm, stop_on_signals


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_says_so_and_the_second_interrupts(number: signal.Signals) -> None:
    said: list[str] = []
    with stop_on_signals(said.append) as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set()
        assert len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_signals_do_afterwards_what_they_did_before() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError), stop_on_signals(print):
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_another_thread_than_the_main_one_changes_no_handlers() -> None:
    found = []

    def run() -> None:
        before = signal.getsignal(signal.SIGINT)
        with stop_on_signals(print) as stop:
            found.append((signal.getsignal(signal.SIGINT) is before, stop.is_set()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(True, False)]


def test_sigterm_interrupts_until_a_run_asks_to_be_stopped_in_order() -> None:
    with interrupt_on_sigterm():
        with stop_on_signals(lambda _: None) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_does_afterwards_what_it_did_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interrupt_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
