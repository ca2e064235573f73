"""A background thread for work that the device need not wait for, such as encoding pictures."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    """Does jobs one after the other, in the order in which they were submitted, while the caller goes on.

    If a job fails, the jobs after it are dropped, and the next `submit` or `wait` raises its error. A process that ends
    by itself, even with an error, first does all submitted jobs. A process that is killed does not.

    Args:
        at_most: the largest number of pending jobs. It is limited because their pictures take memory.
    """

    def __init__(self, at_most: int = 32):
        self.at_most = at_most
        self._thread = ThreadPoolExecutor(1, "background")  # starts with the first job
        self._pending: deque[Future] = deque()
        self._error: BaseException | None = None

    def submit(self, function: Callable[..., Any], *args) -> None:
        """Has `function(*args)` called later. Waits first if too many jobs are pending.

        Args:
            function: the job.
            args: its arguments, which must not change until then. Tensors must be on the CPU, so that the thread does
                not interfere with the device.
        """
        self._settle(self.at_most - 1)
        self._pending.append(self._thread.submit(self._do, function, args))

    def wait(self) -> None:
        """Returns when every job has been done."""
        self._settle(0)

    def _do(self, function, args) -> None:
        if self._error is not None:
            return
        try:
            function(*args)
        except BaseException as error:
            self._error = error

    def _settle(self, pending: int) -> None:
        """Waits until at most `pending` jobs are pending. Raises the error of a job that failed."""
        while len(self._pending) > (pending if self._error is None else 0):
            self._pending[0].result()
            self._pending.popleft()
        if self._error is not None and not self._pending:
            error, self._error = self._error, None
            raise error
