"""
FSDP2 on the CPU, for tests: accelerate shards a model on accelerators alone, though torch does it on the CPU too.

On the path of a run's processes (PYTHONPATH) it has accelerate take several CPU processes for several GPUs, where FSDP
is configured, and leaves a note of what the parameters became. What shards, gathers and reduces is torch's own.
"""

import os
from pathlib import Path

if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and "LOCAL_RANK" in os.environ:
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from torch.nn import Module

    _init = AcceleratorState.__init__

    def _init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = _init_with_fsdp

    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig

    _build_device_mesh = ParallelismConfig.build_device_mesh

    def _build_on_cpu(self, device_type):  # Axolotl says "cuda" whatever there is
        return _build_device_mesh(self, "cpu")

    ParallelismConfig.build_device_mesh = _build_on_cpu
    _prepare = Accelerator._prepare_fsdp2

    def _prepare_and_say(self, *args):
        prepared = _prepare(self, *args)
        models = [item for item in prepared if isinstance(item, Module)]
        kinds = {type(parameter).__name__ for model in models for parameter in model.parameters()}
        path = Path(os.environ["DERTA_TEST_SHARDED"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(sorted(kinds)), encoding="utf-8")
        return prepared

    Accelerator._prepare_fsdp2 = _prepare_and_say
