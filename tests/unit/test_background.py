import os
import signal
import threading
import time

import pytest

from alignprop.engine.background import Background


def fail(error):
    raise error


def test_jobs_are_done_in_the_order_in_which_they_were_submitted():
    background, done = Background(), []
    for n in range(10):
        background.submit(time.sleep, 0.01 / (n + 1))
        background.submit(done.append, n)
    background.wait()
    assert done == list(range(10))


def test_the_caller_goes_on_meanwhile():
    background, done, go = Background(), [], threading.Event()
    background.submit(go.wait, 60)
    background.submit(done.append, threading.get_ident())
    background.submit(lambda: done.append(threading.get_ident()))
    assert done == []
    go.set()
    background.wait()
    assert done[0] != done[1]


def test_no_more_than_so_many_jobs_are_pending():
    background, submitted, ahead = Background(at_most=3), [], []

    def job(n):
        time.sleep(0.002)
        ahead.append(len(submitted) - n)  # the caller may have counted one that it still holds

    for n in range(30):
        submitted.append(n)
        background.submit(job, n)
    background.wait()
    assert max(ahead) <= 4


@pytest.mark.parametrize("call", [lambda b: b.wait(), lambda b: b.submit(print)], ids=["wait", "submit"])
def test_an_error_is_raised_as_itself_and_once(call):
    background, done, error = Background(at_most=1), [], OSError(28, "No space left on device", "curves.png")
    background.submit(fail, error)
    with pytest.raises(OSError, match=r"curves\.png") as raised:
        call(background)
    assert raised.value is error
    background.wait()
    background.submit(done.append, "afterwards")
    background.wait()
    assert done == ["afterwards"]


def test_what_was_submitted_after_a_failed_job_is_dropped():
    background, done, go = Background(), [], threading.Event()
    background.submit(go.wait, 60)
    background.submit(done.append, "before")
    background.submit(fail, ValueError("first"))
    background.submit(done.append, "after")
    background.submit(fail, ValueError("second"))
    go.set()
    with pytest.raises(ValueError, match="first"):
        background.wait()
    background.wait()
    assert done == ["before"]


def test_an_interrupted_wait_can_be_taken_up_again(ctrl_c):
    background, done, waiting, interrupted = Background(), [], threading.Event(), threading.Event()

    def interrupt():
        waiting.wait(60)
        time.sleep(0.3)  # a signal just before the main thread falls asleep would not wake it
        os.kill(os.getpid(), signal.SIGINT)
        interrupted.wait(60)
        done.append("all")

    background.submit(interrupt)
    with pytest.raises(KeyboardInterrupt):
        waiting.set()
        background.wait()
    assert done == []
    interrupted.set()
    background.wait()
    assert done == ["all"]
