"""DeepSpeed's ZeRO under Fabric: its configuration, for GPUs and (for tests) CPUs."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

from lightning.fabric.strategies import DeepSpeedStrategy, ParallelStrategy
from torch import nn
from torch.optim import Optimizer

from infctx.plan.memory import ZERO_BUFFERS
from infctx.plan.plan import Plan

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def zero_strategy(plan: Plan, backend: str, timeout: timedelta) -> DeepSpeedStrategy:
    """Returns Fabric's strategy for zero1, zero2 or zero3.

    backend: of the process group, nccl or gloo
    Weights, gradients and moments are fp32, as in all strategies; the model casts to bf16.  AdamW is torch's even if
    the optimizer is offloaded: DeepSpeed's CPU version must be compiled, which takes minutes, and gives different
    results (1.2e-6 after 5 steps).
    """
    on_cpu = backend == "gloo"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    _import_deepspeed(on_cpu)
    settings = plan.config.distributed
    zero: dict[str, Any] = {"stage": STAGES[plan.strategy], "contiguous_gradients": True, "overlap_comm": not on_cpu}
    zero |= ZERO_BUFFERS
    if plan.sizes:  # vectors stay whole on every rank, as in Hugging Face's integration; matrices never do
        zero["stage3_param_persistence_threshold"] = 10 * plan.sizes.width
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": not on_cpu}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": not on_cpu}
    content = {
        "train_micro_batch_size_per_gpu": 1,  # required, but unused here
        "gradient_accumulation_steps": 1,  # more would divide the gradient of the state at every seam
        "gradient_clipping": plan.config.optimizer.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    kind = _DeepSpeedOnCPU if on_cpu else DeepSpeedStrategy
    return kind(config=content, process_group_backend=backend, timeout=timeout, logging_level=logging.ERROR)


def _import_deepspeed(on_cpu: bool) -> None:
    import deepspeed.ops  # not at the top: importing it takes seconds, and one device does not need it

    if on_cpu:  # else torch's process group waits minutes for a compilation that fails without a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class _DeepSpeedOnCPU(DeepSpeedStrategy):
    """Lightning's strategy without its three checks for CUDA, as of Lightning 2.6, which refuses other devices."""

    def setup_environment(self) -> None:
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()

    def _setup_distributed(self) -> None:
        self._set_world_ranks()
        self._init_deepspeed_distributed()
        self._format_config()
        self._config_initialized = True

    def _initialize_engine(
        self, model: nn.Module, optimizer: Optimizer | None = None, scheduler: Any = None
    ) -> tuple[Any, Any, Any]:
        import deepspeed

        engine, optimizer, _, scheduler = deepspeed.initialize(
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=scheduler,
            dist_init_required=False,
        )
        return engine, optimizer, scheduler
