"""The plan of a run: a configuration in; a `Plan` for this machine out, or one error with everything missing.

The plan is made once, before anything is opened, and passed as an argument from then on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infctx.adapters.targets import refuse_targets
from infctx.errors import InputError
from infctx.formats.checkpoint_folder import checkpoints
from infctx.formats.model_files import ModelFiles, find_model
from infctx.formats.weights import read_sizes
from infctx.hub.models import cached_model, fetch_model
from infctx.machine import device_memory, pick_device
from infctx.model.sizes import Sizes, describe, make_sizes, published_sizes
from infctx.plan.missing import files_to_download, missing_devices, missing_files, missing_loggers, refuse_folder
from infctx.plan.strategy import resolve_strategy
from infctx.settings.config import Config

REHEARSE = "or add --rehearse to try the same settings here on a small model"


@dataclass(frozen=True)
class Plan:
    """Everything decided about a run before it starts.

    config:    the configuration, unchanged
    device:    kind of device, "cuda" or "cpu"
    weights:   the files of model.weights; None if it is not set or they do not exist
    sizes:     of the model; None if only a checkpoint knows them
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
    """Makes the plan of a run; raises InputError with a line for everything that this machine does not have.

    Files are found but not read: `whole_weights` checks a checkpoint that model.weights names.
    What the run needs from the hub is downloaded once nothing else is missing.
    refuse: False if the process that started this one has already checked the machine, and downloaded
    """
    if refuse:
        refuse_folder(config.run.folder)
    missing = [*missing_files(config), *missing_loggers(config)] if refuse else []
    weights, sizes = find_weights(config)
    if refuse:
        missing += missing_devices(config, sizes)
        if missing:
            raise InputError("this machine does not have everything the run needs", *missing, REHEARSE)
        if downloads := files_to_download(config):
            for path in downloads:
                fetch_model(path)
            weights, sizes = find_weights(config)
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
    """Returns the files that model.weights names, if they exist, and the sizes of the model, if they are known.

    Nothing is downloaded: what is on the hub, and not in the cache, does not exist yet.
    Raises InputError if these contradict the configuration.
    """
    settings = config.model
    named = published_sizes(settings.size, "model.size: ") if settings.size else None
    path = settings.weights and cached_model(settings.weights)
    if path is None or not path.exists():
        if named and settings.learned_adapter:
            refuse_targets(settings.learned_adapter, named)
        return None, named or (_own_sizes(settings.sizes) if settings.sizes else None)
    files = find_model(path, hashes=False)
    found = read_sizes(files.weights)
    if settings.learned_adapter:
        refuse_targets(settings.learned_adapter, found)
    if named not in (None, found):
        raise InputError(
            f"model.size: {settings.size} is not the size of {settings.weights}; name the right one, or leave it out "
            "(model.size=null)",
            f"{settings.size}: {describe(named)}",
            f"{settings.weights}: {describe(found)}",
        )
    return files, found


def _own_sizes(given: dict[str, int]) -> Sizes:
    try:
        return make_sizes(**given)
    except InputError as error:
        raise InputError(f"model.{error}") from None


def whole_weights(plan: Plan) -> ModelFiles | None:
    """Returns the weights of a plan; for a run's folder, those of its newest complete checkpoint.

    This reads the checkpoint, so one rank does it for all, once per start.  Raises InputError if none is complete.
    """
    settings = plan.config.model
    # A resumed run has its weights in its own checkpoint, unless it tunes a state.
    are_read = settings.freezes_weights or not checkpoints(plan.config.run.checkpoints)
    if plan.weights is None or settings.weights is None or not are_read:
        return plan.weights
    return find_model(cached_model(settings.weights))
