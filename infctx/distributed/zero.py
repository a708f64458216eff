"""DeepSpeed's ZeRO behind Fabric: its configuration, its engine on GPUs and (for tests) CPUs, whole tensors of it."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.strategies import DeepSpeedStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from infctx.config import Config
from infctx.plan.memory import ZERO_BUFFERS

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def sharded_strategy(
    strategy: str, config: Config, width: int | None, process_group_backend: str, timeout: timedelta
) -> DeepSpeedStrategy:
    """Fabric's strategy for zero1, zero2 or zero3; width: of the model, if it is known.

    Everything is fp32, as in all strategies: weights, gradients and moments; what is bf16 is cast in the model.  AdamW
    is torch's, also where the optimizer is offloaded: DeepSpeed's own for CPUs has to be compiled, for minutes, and
    gives other results (1.2e-6 after 5 steps).
    """
    on_cpu = process_group_backend == "gloo"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    _import_deepspeed(on_cpu)
    settings = config.distributed
    zero: dict[str, Any] = {"stage": STAGES[strategy], "contiguous_gradients": True, "overlap_comm": not on_cpu}
    zero |= ZERO_BUFFERS
    if width:  # vectors stay whole everywhere, as in Hugging Face's integration; matrices do not, however small
        zero["stage3_param_persistence_threshold"] = 10 * width
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": not on_cpu}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": not on_cpu}
    content = {
        "train_micro_batch_size_per_gpu": 1,  # has no meaning here, and has to be given
        "gradient_accumulation_steps": 1,  # more would divide what one segment asks of another, at every seam
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    kind = _DeepSpeedOnCPU if on_cpu else DeepSpeedStrategy
    return kind(
        config=content, process_group_backend=process_group_backend, timeout=timeout, logging_level=logging.ERROR
    )


class Sharded:
    """A DeepSpeed engine, and the tensors that it has cut up made whole.

    reduction: "step" or "segment", see `DistributedSettings.gradient_reduction`.
    """

    def __init__(self, engine: Any, reduction: str) -> None:
        self.engine, self.reduction = engine, reduction
        self.optimizer = engine.optimizer
        self._one_reduction = ExitStack()

    @property
    def cuts_weights(self) -> bool:
        return self.engine.zero_optimization_stage() == 3

    def begin_step(self) -> None:
        if self.reduction == "step":
            self._one_reduction.enter_context(self.engine.coalesce_grad_reduction())

    def expect_backward(self, ends_step: bool) -> None:
        """Before each run of a segment with gradients."""
        if self.reduction == "segment":
            self.engine.set_gradient_accumulation_boundary(ends_step)

    def step(self) -> Tensor:
        """Clips and steps; returns the global norm before clipping, inf where nothing was done for it."""
        self._one_reduction.close()  # which is where gradients are reduced
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm()).float().cpu()

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """The values of a parameter, put together from all ranks if they are spread over them."""
        with self.gathered([parameter]):
            return parameter.detach().clone() if hasattr(parameter, "ds_id") else parameter.detach()

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside, the parameters are whole on every rank."""
        if not any(hasattr(parameter, "ds_id") for parameter in parameters):
            return nullcontext()
        from deepspeed import zero

        return zero.GatheredParameters(parameters)

    def whole_moments(self, parameter: nn.Parameter, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The named tensors of the optimizer's state and "step"; nothing where no step was done or nothing learns."""
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = self._flat_parameters()
        state = self.optimizer.optimizer.state.get(flat[0], {})
        if not state or not parameter.requires_grad:
            return {}
        self._link_moments()
        whole = {name: safe_get_full_optimizer_state(parameter, name) for name in names}
        return whole | {"step": state["step"].clone()}

    def begin_moments(self, steps: float, names: tuple[str, ...]) -> None:
        """Zeros for the named tensors, as behind so many steps."""
        for flat in self._flat_parameters():
            # Where AdamW's fused form looks for it; the other forms take it from anywhere.
            step = torch.tensor(float(steps), dtype=torch.float32, device=flat.device)
            zeros = {name: torch.zeros_like(flat, requires_grad=False) for name in names}
            self.optimizer.optimizer.state[flat] = {"step": step} | zeros

    def set_moments(self, parameter: nn.Parameter, moments: dict[str, Tensor]) -> None:
        """Fills in this rank's part of what `whole_moments` gave."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self._link_moments()
        for name, values in moments.items():
            safe_set_full_optimizer_state(parameter, values.to(parameter.device), name)

    def _flat_parameters(self) -> list[Tensor]:
        """What torch's optimizer steps: this rank's part of each group of parameters, end to end."""
        flat = getattr(self.optimizer, "fp32_partitioned_groups_flat", None)  # stage 3
        return flat if flat is not None else self.optimizer.single_partition_of_fp32_groups

    def _link_moments(self) -> None:
        """Stages 1 and 2: lets DeepSpeed find each parameter's part of the optimizer's state.

        DeepSpeed 0.19.8 does so by itself once, behind the step of the first group (`_optimizer_step`), when the other
        groups have no state yet, and then can not find theirs; tests/distributed/test_zero.py tells when that is gone.
        """
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()


def _import_deepspeed(on_cpu: bool) -> None:
    import deepspeed.ops  # not at the top: it takes seconds, and one device needs none of it

    if on_cpu:  # or torch's process group waits for a compilation, up to minutes, that fails without a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class _DeepSpeedOnCPU(DeepSpeedStrategy):
    """Lightning's strategy without its three checks for CUDA; of Lightning 2.6, which refuses everything else."""

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
