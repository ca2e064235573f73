"""The scripts for Slurm in docs/distributed.md, with stand-ins for Slurm's programs and for the run."""

import os
import re
import subprocess

import pytest

from tests.helpers.docs_commands import MAIN, ROOT, blocks
from tests.helpers.docs_stand_ins import write_programs

SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 exec "$@"
"""
SCONTROL = """#!/bin/sh
if [ "$1" = requeue ]; then echo "$2" >> requeued.txt; else echo localhost; fi
"""
PYTHON = """#!/bin/sh
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR" "$@" > asked.txt
exit $STATUS
"""


@pytest.mark.parametrize("status", [0, 1, 75])
def test_the_script_starts_the_command_and_requeues_what_was_stopped(status, tmp_path):
    script, _ = blocks(ROOT / "docs" / "distributed.md", "bash")
    write_programs(tmp_path, {"bin/srun": SRUN, "bin/scontrol": SCONTROL, ".venv/bin/python": PYTHON})
    surroundings = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STATUS": str(status)}
    surroundings |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    assert subprocess.run(["bash", "-c", script], env=surroundings, cwd=tmp_path).returncode == status
    assert (tmp_path / "requeued.txt").exists() == (status == 75)
    rank, local_rank, size, address, program, *arguments = (tmp_path / "asked.txt").read_text().split()
    assert (rank, local_rank, size, address, program) == ("0", "0", "1", "localhost", "main.py")
    # The command itself is one that tests/docs/test_docs.py runs.
    assert tuple(word for argument in arguments for word in re.split("(?<=--config)=", argument)) in MAIN


def test_the_lines_for_fsdp2_are_bash():
    _, fragment = blocks(ROOT / "docs" / "distributed.md", "bash")
    assert subprocess.run(["bash", "-n", "-c", fragment]).returncode == 0
