"""The plan of a run: a configuration in; what it is going to be on this machine out, or all that it lacks.

It is made once, before anything is opened, and is an argument from then on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infctx.config import Config
from infctx.errors import InputError
from infctx.formats.checkpoint_folder import checkpoints
from infctx.formats.model_files import ModelFiles, find_model
from infctx.formats.weights import read_sizes
from infctx.machine import device_memory, pick_device
from infctx.model.sizes import Sizes, describe, make_sizes, published_sizes
from infctx.plan.lacking import lacking_device, lacking_files
from infctx.plan.strategy import resolve_strategy

REHEARSE = "or add --rehearse, to try the same settings here on a small model"


@dataclass(frozen=True)
class Plan:
    """What a run is going to be.

    config:    as it was asked for
    device:    kind of device, "cuda" or "cpu"
    weights:   the files that model.weights stands for; None where it names none, or none that are there
    sizes:     of the model, None where nothing tells them: then a checkpoint holds it
    strategy:  ddp, zero1, zero2 or zero3
    reduction: when gradients are reduced, "step" or "segment"
    """

    config: Config
    device: torch.device
    weights: ModelFiles | None
    sizes: Sizes | None
    strategy: str
    reduction: str


def make_plan(config: Config, refuse: bool = True) -> Plan:
    """Raises InputError with everything that this machine lacks for the run, a line each.

    Files are found and not read: whether a checkpoint that model.weights names is whole is for `whole_weights` to see.
    refuse: False where that has been done, by the process that started this one
    """
    lacking = lacking_files(config) if refuse else []
    weights, sizes = find_weights(config)
    if refuse:
        lacking += lacking_device(config, sizes)
        if lacking:
            raise InputError("this machine lacks what the run needs", *lacking, REHEARSE)
    device = pick_device(config.run.device)
    resolved = resolve_strategy(config, sizes, device.type, device_memory(device.type, config.distributed.devices))
    reduction = resolved.distributed.gradient_reduction
    return Plan(
        config,
        device,
        weights,
        sizes,
        resolved.distributed.strategy,
        "step" if reduction == "auto" else reduction,
    )


def find_weights(config: Config) -> tuple[ModelFiles | None, Sizes | None]:
    """The files that model.weights names, if they are there, and the sizes of the model, if anything tells them.

    Raises InputError where these contradict the configuration.
    """
    settings = config.model
    named = published_sizes(settings.size) if settings.size else None
    if settings.weights is None or not settings.weights.exists():
        return None, named or (make_sizes(**settings.sizes) if settings.sizes else None)
    files = find_model(settings.weights, hashes=False)
    found = read_sizes(files.weights)
    if named not in (None, found):
        raise InputError(
            f"{settings.weights}: holds {describe(found)}, and model.size {settings.size} is {describe(named)}; "
            "name the right one, or leave model.size out (model.size=null)"
        )
    return files, found


def whole_weights(plan: Plan) -> ModelFiles | None:
    """The weights of a plan; of a run's folder those of its newest checkpoint that is whole, which is read for it.

    One rank does so for all, once a start.  Raises InputError where no checkpoint is whole.
    """
    settings = plan.config.model
    # A run that goes on has its weights in its own checkpoint, unless it tunes a state.
    are_read = settings.freezes_weights or not checkpoints(plan.config.run.checkpoints)
    if plan.weights is None or settings.weights is None or not are_read:
        return plan.weights
    return find_model(settings.weights)
