"""FSDP2 on CPU processes, for the tests: accelerate ignores its FSDP settings there, though torch's FSDP2 runs.

    python -m torch.distributed.run --nproc_per_node 2 tests/helpers/fsdp2_on_cpu.py main.py --config=…

runs a script with the one branch of accelerate that depends on it changed: what it does with an FSDP plugin on GPUs, it
does on CPUs too. All else, the plugin and what it reads from the environment included, is accelerate's own.
"""

import os
import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu():
    initialise = AcceleratorState.__init__

    def with_fsdp(self, *arguments, fsdp_plugin=None, **options):
        initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    os.environ["ACCELERATE_USE_CPU"] = "1"
    runpy.run_path(sys.argv[0], run_name="__main__")
