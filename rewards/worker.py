"""How a user's reward is found and its errors are told, and the program of a reward's own process (process.py).

The program is started by the path of this file, in any environment that has torch. The project need not be installed
there, so this file imports only the standard library, and torch where it is used. Python 3.8 can read it.

The two processes exchange lines of JSON through a socket. Each question names a method of `Scorer` and its arguments,
and the answer is what the method returns, or the text of an error. Pictures and gradients lie in a `Memory`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import math
import mmap
import os
import random
import signal
import socket
import sys
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))


class Unusable(Exception):
    """A user's reward cannot be used. The text is one line that says why."""


def find_callable(spec: str):
    """Returns the reward `package.module:callable`: a function, a module, or a class that is built without arguments.

    The current directory is searched after the installed packages.

    Raises:
        Unusable: The reward cannot be imported, built or called. The cause is the error that says so, if there is one.
    """
    module_name, _, attribute = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # The module's own code may raise anything, and a script may even exit. That error is the reason to show.
        raise Unusable(f"cannot import {module_name!r}: {describe(error)}") from error
    if not hasattr(module, attribute):
        nearest = difflib.get_close_matches(attribute, [name for name in vars(module) if not name.startswith("_")], n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise Unusable(f"{module_name!r} has no {attribute!r}{hint}")
    function = getattr(module, attribute)
    if inspect.isclass(function):
        try:
            function = function()
        except Exception as error:
            raise Unusable(f"{attribute}() without arguments failed: {describe(error, function)}") from error
    if not callable(function):
        raise Unusable(f"{attribute!r} is a {type(function).__name__}, which cannot be called")
    return function


def describe(error: BaseException, function=None) -> str:
    """Returns the type, text and place of an error that the calling function has caught, in one line.

    Most errors are raised deep inside torch. The place is therefore the innermost one in the file that defines
    `function`, the user's reward. If there is none, it is the innermost one outside of Python's own import.
    """
    module = sys.modules.get(getattr(function, "__module__", "") or "")
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is where the caller has caught it
    frames = [f for f in frames if f.filename not in (__file__, importlib.__file__) and f.filename[0] != "<"]
    own = [f for f in frames if f.filename == getattr(module, "__file__", None)] or frames
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {_first_line(error)}{place}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Memory:
    """Float32 numbers that two processes see. It grows when it is too small.

    Args:
        file: A file that both processes have opened. It has no name, so that nothing is left of it after a crash.
    """

    def __init__(self, file):
        self.file, self.map = file, b""

    def tensor(self, shape):
        """Returns a tensor [*shape] of the first numbers. It is not a copy."""
        import torch

        count = math.prod(shape)
        if len(self.map) < 4 * count:
            self.file.truncate(max(4 * count, os.fstat(self.file.fileno()).st_size))
            self.map = mmap.mmap(self.file.fileno(), 0)
        return torch.frombuffer(self.map, dtype=torch.float32, count=count).view(shape)


class Scorer:
    """Scores pictures with a reward, and computes the gradient of the last scores.

    Args:
        memory: Holds the pictures when `score` is called, and the gradient when `backward` returns.
    """

    def __init__(self, memory: Memory):
        self.memory, self.function, self.seed = memory, None, None
        self.images = self.scores = None

    def start(self, reward: str, options: dict, device: str | None, threads: int, tf32: list[bool]) -> dict:
        """Loads the reward. All other methods need it.

        Args:
            reward: `package.module:callable`, or the name of a built-in reward.
            options: The keywords of a built-in reward's class.
            device: Where to compute. None: on the device of the pictures, or on the CPU if torch has no CUDA here.
            threads: The number of threads, which decides how torch rounds a sum.
            tf32: Whether matrix products and convolutions on a GPU may use TF32.
        """
        try:
            import torch
        except Exception as error:
            raise Unusable(f"{sys.executable} has no usable torch: {describe(error)}") from error
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        if device:
            torch.empty(0, device=device)  # raises if there is no such device
        self.device = device
        self.function = find_callable(reward) if ":" in reward else _built_in(reward, options)
        if isinstance(self.function, torch.nn.Module):
            self.function.requires_grad_(False).eval()
        return {"differentiable": bool(getattr(self.function, "differentiable", True))}

    def score(
        self, shape: list, stride: list, device: str, prompts: list, metadata: list | None, gradient: bool, seed: int
    ) -> dict:
        """Scores the pictures in the memory.

        Args:
            shape, stride: Those of the pictures in the run. The layout in memory may decide how torch rounds a sum.
            device: Where the run has the pictures.
            gradient: Whether `backward` may be called next.
            seed: The seed of the run's global generators. The generators here are seeded when it changes.
        """
        import torch

        self.images = self.scores = None  # this frees what an earlier batch kept for its gradient
        device = self.device or (device if torch.cuda.is_available() else "cpu")
        self._seed(seed)
        if isinstance(self.function, torch.nn.Module):
            self.function.to(device)
        images = torch.empty_strided(shape, stride, device=device).copy_(self.memory.tensor(shape))
        with torch.set_grad_enabled(gradient):
            scores = self.function(images.requires_grad_(gradient), prompts, metadata)
        scores = scores[0] if isinstance(scores, tuple) and len(scores) == 2 else scores
        if not isinstance(scores, torch.Tensor):
            raise Unusable(f"returned {type(scores).__name__}, expected a torch.Tensor [B]")
        if scores.requires_grad:
            self.images, self.scores = images, scores
        return {"scores": scores.tolist(), "has_gradient": scores.requires_grad}

    def backward(self, weights: list[float]) -> dict:
        """Puts ∂(weights · the last scores)/∂pixels into the memory."""
        import torch

        images, scores = self.images, self.scores
        self.images = self.scores = None
        weights = torch.tensor(weights, dtype=scores.dtype, device=scores.device)
        (gradient,) = torch.autograd.grad(scores, images, weights)
        self.memory.tensor(images.shape).copy_(gradient)
        return {}

    def _seed(self, seed: int) -> None:
        import torch

        if seed == self.seed:
            return
        self.seed = seed
        random.seed(seed)
        torch.manual_seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)


class Project:
    """Finds this project's package `rewards`, and nothing else of the environment where the project is installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "rewards":
            file = os.path.join(HERE, "__init__.py")
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[HERE])
        return None


def _built_in(name: str, options: dict):
    from rewards.registry import reward_class

    return reward_class(name)(**options)


def _error(error: Exception, function) -> dict:
    plain = type(error).__name__ in ("Unusable", "RewardError")  # whose text says all
    return {"error": str(error) if plain else describe(error, function), "kind": type(error).__name__}


def main(channel: socket.socket, memory: Memory) -> None:
    """Answers questions until the run has ended, for whatever reason, which closes the socket."""
    for number in (signal.SIGINT, signal.SIGTERM):  # often sent to all processes; the run still needs scores then
        signal.signal(number, signal.SIG_IGN)
    # Python puts the folder of this file first, where `clip` and others would hide packages of the same name.
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != HERE]
    sys.meta_path.insert(0, Project)
    scorer = Scorer(memory)
    for line in channel.makefile(encoding="utf-8"):
        question = json.loads(line)
        try:
            answer = getattr(scorer, question.pop("method"))(**question)
        except Exception as error:
            answer = _error(error, scorer.function)
        channel.sendall((json.dumps(answer) + "\n").encode())


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), Memory(os.fdopen(int(sys.argv[2]), "r+b", buffering=0)))
