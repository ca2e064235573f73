"""main.py in a process of its own that need not import torch again: forked off one that has it.

    python -m tests.helpers.warm_main        reads a line of JSON for each run, and answers with its exit status

The forked process runs main.py itself as `__main__`, with the run's arguments and environment, into the run's files.
"""

import json
import os
import runpy
import sys


def run(arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """In the forked process: main.py, to its end."""
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(environment)
    sys.path.insert(0, environment["PYTHONPATH"])
    sys.argv = ["main.py", *arguments]
    try:
        runpy.run_path("main.py", run_name="__main__")
        status = 0
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    import alignprop.command  # noqa: I001 (first, for what it sets for its libraries)
    import diffusers  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import alignprop.tasks
    import alignprop.trainer  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if not (child := os.fork()):
            run(**request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
