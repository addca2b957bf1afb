import signal

import pytest

from lmscale.stop_signals import collect_stop_signals, exit_on_stop_signals, ignore_stop_signals

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers():
    """Puts the handlers of this process back."""
    before = {number: signal.getsignal(number) for number in (*NUMBERS, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_run_collects_them_and_a_second_ctrl_c_interrupts():
    exit_on_stop_signals()
    with collect_stop_signals() as received:
        for number in (*NUMBERS, signal.SIGTERM):
            signal.raise_signal(number)
        assert received == ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGTERM"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with collect_stop_signals() as received:
        signal.raise_signal(signal.SIGINT)
        assert received == ["SIGINT"]
    for number in NUMBERS:
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(number)
        assert caught.value.code == 128 + number


def test_an_ignored_hangup_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup does.
    exit_on_stop_signals()
    with collect_stop_signals() as received:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGUSR1)
    assert received == ["SIGUSR1"]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_one_that_is_ending_is_not_asked_again():
    exit_on_stop_signals()
    ignore_stop_signals()
    for number in NUMBERS:
        signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
