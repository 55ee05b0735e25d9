"""Signals while a run goes on."""

import os
import signal
import threading

import pytest

from finetune.core.errors import StoppedBySignal
from finetune.training.signals import StopRequest, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks(number):
    with stop_on_signals(StopRequest()) as request:
        os.kill(os.getpid(), number)

    assert request.signal is number


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_stops_at_once_with_its_exit_code(number, code):
    with stop_on_signals(StopRequest()):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(StoppedBySignal) as caught:
            os.kill(os.getpid(), number)

    assert caught.value.exit_code == code


def test_the_former_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signals(StopRequest()):
        assert signal.getsignal(signal.SIGINT) is not before[0]

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_thread_keeps_the_programs_own_handlers():
    seen = []

    def work():
        with stop_on_signals(StopRequest()) as request:
            seen.append(signal.getsignal(signal.SIGINT))
            request.ask()
            seen.append(request.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert seen == [signal.getsignal(signal.SIGINT), True]
