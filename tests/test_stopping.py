import os
import signal
import threading

import pytest

from alignprop.stopping import stop_requests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_does_not_interrupt(number, capfd):
    before = signal.getsignal(number)
    with stop_requests() as requests:
        assert not requests
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # launchers repeat it
        assert requests == [number.name] * 2
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.count("asked to stop") == 1


def test_ctrl_c_some_seconds_later_ends_at_once(monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("alignprop.stopping.time.monotonic", lambda: next(clock))
    with stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_another_thread_has_no_signals():
    seen = []

    def inside():
        with stop_requests() as requests:
            seen.append(requests)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [[]]
