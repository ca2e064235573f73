"""Work that the device need not wait for, such as encoding pictures: done in a thread of its own, in order."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    """Does one job after the other, in the order in which they were submitted, while its caller goes on.

    Where a job fails, those that were submitted after it are dropped, and the next `submit` or `wait` raises its error.
    A process that ends by itself, an error included, does what was submitted first; one that is killed does not.

    Args:
        at_most: how many jobs may be pending; their pictures take memory.
    """

    def __init__(self, at_most: int = 32):
        self.at_most = at_most
        self._thread = ThreadPoolExecutor(1, "background")  # starts with the first job
        self._pending: deque[Future] = deque()
        self._error: BaseException | None = None

    def submit(self, function: Callable[..., Any], *args) -> None:
        """Has `function(*args)` done later, and waits where too many jobs are pending.

        Args:
            args: must not change until then. Tensors on the CPU, so that the thread has no part in the device's work.
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
        """Waits until at most so many jobs are pending; raises what one of them raised."""
        while len(self._pending) > (pending if self._error is None else 0):
            self._pending[0].result()
            self._pending.popleft()
        if self._error is not None and not self._pending:
            error, self._error = self._error, None
            raise error
