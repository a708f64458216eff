"""Runs with an optimizer in little memory: resumed bit for bit, changed on the way, and as large as planned."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import infctx
from infctx.formats.checkpoint_folder import checkpoints
from infctx.model import loss
from infctx.model.rwkv import Compute
from infctx.plan.memory import held_memory
from infctx.settings.load import load_config
from infctx.settings.optimizer import OptimizerSettings
from infctx.train.loop import train, train_steps
from infctx.train.optimizer import make_optimizer

from runs import infctx_here, losses_of, open_run, write_config
from tiny_models import random_model

BF16 = {"run__precision": "bf16"}
FORMS = {
    "states": {"optimizer__states": "int8"},
    "everything": {f"optimizer__{name}": "bf16_stochastic" for name in ("weights", "gradients")}
    | {"optimizer__states": "int8"}
    | BF16,
    "host": {"distributed__offload_optimizer": True, "optimizer__gradients": "bf16_stochastic"} | BF16,
}
"""Settings by name; gradients add up over the four segments of a window."""
SHORT = {"optimizer__steps": 8, "run__evaluate_tokens": 0, "run__save_every_steps": 3}


@pytest.mark.parametrize("form", FORMS)
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, form):
    folders = {name: tmp_path / name for name in ("whole", "cut")}
    for folder in folders.values():
        folder.mkdir()
        train(load_config(write_config(folder, **SHORT | FORMS[form])))
    kept = checkpoints(folders["cut"] / "run" / "checkpoints")
    shutil.rmtree(kept[-1])
    (folders["cut"] / "run" / "model.pth").unlink()
    train(load_config(folders["cut"] / "config.yaml"))  # again from step 6
    assert losses_of(folders["cut"] / "run") == losses_of(folders["whole"] / "run")
    newest = [checkpoints(folder / "run" / "checkpoints")[-1] for folder in folders.values()]
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole, cut = (load_file(path / name) for path in newest)
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_host_steps_as_the_device_does(tmp_path, precision):
    """Bit for bit, also where the device has the weights in bf16 only."""
    for name in ("device", "host"):
        (tmp_path / name).mkdir()
        changes = SHORT | {"run__precision": precision, "distributed__offload_optimizer": name == "host"}
        train(load_config(write_config(tmp_path / name, **changes)))
    assert losses_of(tmp_path / "host" / "run") == losses_of(tmp_path / "device" / "run")
    newest = [checkpoints(tmp_path / name / "run" / "checkpoints")[-1] for name in ("device", "host")]
    weights = [load_file(path / "model.safetensors") for path in newest]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("version", [5, 6, 7])
def test_gradients_of_bf16_weights_are_those_of_fp32_weights(version, monkeypatch):
    """Bit for bit, over several segments and several slices of the head, with many tokens of the same id."""
    monkeypatch.setattr(loss, "SLICE_LOGITS", 61 * 50)
    tokens = torch.randint(0, 5, (2, 161), generator=torch.Generator().manual_seed(1))
    gradients = []
    for form in ("fp32", "bf16_stochastic"):
        model = random_model(version, vocab_size=61)
        model.compute = Compute(torch.bfloat16)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        make_optimizer(model, OptimizerSettings(steps=20, peak_lr=1e-3, weights=form))
        infctx.window_backward(model, tokens[:, :-1], tokens[:, 1:], 48)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert model.head.weight.dtype == torch.bfloat16
    for name, gradient in gradients[0].items():
        if gradient is not None:
            assert torch.equal(gradients[1][name], gradient), name


def test_another_form_takes_over_the_moments(tmp_path):
    path = write_config(tmp_path, **SHORT | BF16)
    train(load_config(path, ["optimizer.steps=3"]))
    code, output, errors = infctx_here("train", path, "optimizer.steps=6", "optimizer.states=int8")
    assert code == 0, errors
    assert "changed since: optimizer.steps 3 -> 6, optimizer.states fp32 -> int8" in output + errors
    small = load_file(checkpoints(tmp_path / "run" / "checkpoints")[-1] / "optimizer.safetensors")
    assert {small[name].dtype for name in small if name.endswith("/exp_avg")} == {torch.uint8}
    train(load_config(path, ["optimizer.steps=7", "distributed.offload_optimizer=true"]))
    full = load_file(checkpoints(tmp_path / "run" / "checkpoints")[-1] / "optimizer.safetensors")
    for name in full:
        if name.endswith("/exp_avg"):
            assert full[name].dtype == torch.float32 and full[name].any()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_held_is_what_the_plan_counts(tmp_path, form):
    changes = {"model__width": 96, "optimizer__steps": 4, "distributed__strategy": "ddp"} | FORMS[form]
    run = open_run(load_config(write_config(tmp_path, **changes)))
    gradients, step = {}, run.engine.step

    def watched_step():
        gradients.update({name: parameter.grad for name, parameter in run.model.named_parameters()})
        return step()

    run.engine.step = watched_step
    assert train_steps(run)
    planned = held_memory(run.plan.config, run.model.sizes)
    for held, count in zip(_held(run, gradients), planned, strict=True):
        assert sum(tensor.nbytes for tensor in held) == pytest.approx(count, rel=0.01)


def _held(run, gradients):
    """Returns the tensors on the device and on the host."""
    parameters, state = list(run.model.parameters()), run.engine.optimizer.state
    moments = [part for each in parameters for name, part in state[each].items() if name != "step"]
    masters = getattr(run.engine.optimizer, "masters", None)
    if masters is None:
        return [*parameters, *gradients.values(), *moments], []
    return [*parameters, *gradients.values()], [*masters.values(), *moments]
