"""Python programs in processes of their own that need not import torch again: forked off one that has it.

Their curves are blank pictures (see drawing.py).

    call("main.py", "--config=…")                          like `python main.py --config=…`
    call("-m", "alignprop", "train", processes=2)          like torchrun with two processes

`python -m tests.helpers.warm FOLDER` is the process that has imported the libraries. It reads a line of JSON for each
program and answers with its exit status. Of this project it keeps only bytecode, in the folder, so that a program may
bring another copy.
"""

import atexit
import gc
import json
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 5  # at most for a program
# Libraries read these when they are imported, so a program cannot have others. No hub answers at that address.
SURROUNDINGS = {
    "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "0",
    "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(ROOT / "work" / "no_hub"),
}  # fmt: skip


# ---- where it is called


def call(*words, processes=1, cwd=ROOT, environment=()) -> subprocess.CompletedProcess:
    """What `python *words` prints and returns, on one process or on several that know of each other.

    As with torchrun, the first process that fails ends the others, and its exit status is the result.
    """
    own = {name: str(value) for name, value in dict(environment).items()}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **own, **SURROUNDINGS}
    with tempfile.TemporaryDirectory() as folder:
        streams = {name: Path(folder) / name for name in ("out", "err")}
        request = {
            "words": [*map(str, words)], "processes": processes, "cwd": str(cwd), "environment": environment,
            **{name: str(path) for name, path in streams.items()},
        }  # fmt: skip
        server = warm_process()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = server.stdout.readline()
        assert status, f"the warm process has ended with {server.wait()}, while it ran {words}"
        return subprocess.CompletedProcess(words, int(status), *(path.read_text() for path in streams.values()))


@cache
def warm_process() -> subprocess.Popen:
    """Started by the first call; it ends with this process."""
    bytecode = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, bytecode, ignore_errors=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.warm", bytecode], cwd=ROOT, env={**os.environ, **SURROUNDINGS}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(server.stdin.close)
    return server


# ---- the warm process


def main() -> None:
    import_libraries(sys.argv[1])
    gc.freeze()  # the forked processes need not look through all of it
    for line in sys.stdin:
        request = json.loads(line)
        count, port = request.pop("processes"), free_port()
        children = set()
        for rank in range(count):
            together = {} if count == 1 else addresses(rank, count, port)
            if not (child := os.fork()):
                run(**request, together=together)
            children.add(child)
        print(wait_for(children), flush=True)


def import_libraries(bytecode: str) -> None:
    """What every run imports. Only alignprop.command imports them in this order and with its settings.

    Args:
        bytecode: the folder for the compiled files of what is imported after the libraries.
    """
    import alignprop.command  # noqa: I001
    import accelerate  # noqa: F401
    import matplotlib.figure
    import diffusers.loaders.single_file_utils  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    from tests.helpers.drawing import BlankFigure

    matplotlib.figure.Figure = BlankFigure
    # From here on, what Python compiles is kept. That is the project, which no program has to compile again.
    sys.dont_write_bytecode, sys.pycache_prefix = False, bytecode
    import alignprop.tasks
    import alignprop.trainer  # noqa: F401

    for name in list(sys.modules):
        if name.split(".")[0] in ("alignprop", "rewards", "config"):
            del sys.modules[name]


def addresses(rank: int, count: int, port: int) -> dict[str, str]:
    """What a launcher tells a process of the others."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(number) for name, number in numbers.items()}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(children: set[int]) -> int:
    """0, or the exit status of the first process that fails or takes too long; the others are ended then."""
    first, deadline = 0, time.monotonic() + MINUTES * 60
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        children.discard(child)
        failed = os.waitstatus_to_exitcode(status) if child else 0
        if failed or time.monotonic() > deadline:
            first = first or failed or signal.SIGKILL
            for other in children:
                os.kill(other, signal.SIGKILL)
            deadline = time.monotonic() + 60
        if not child:
            time.sleep(0.01)
    return first


def run(words: list[str], cwd: str, environment: dict[str, str], out: str, err: str, together: dict[str, str]) -> None:
    """In the forked process: the program, to its end, which is the end of this process too."""
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    random.seed()  # or all processes would go on with the same numbers
    os.environ.clear()
    os.environ.update(environment | together)
    os.chdir(cwd)
    execute(words)
    sys.exit()


def execute(words: list[str]) -> None:
    """`python *words`, where the first of them is a file, -m MODULE or -c CODE."""
    path = os.environ["PYTHONPATH"].split(os.pathsep)
    if words[0] in ("-m", "-c"):
        sys.argv, first = words[1:], os.getcwd()
    else:
        sys.argv, first = words, str(Path(words[0]).resolve().parent)
    sys.path[:] = [first, *path, *sys.path[1:]]
    if words[0] == "-c":
        sys.argv[0] = "-c"
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
