"""Runs that tune a state: only the state learns, and the resulting files work elsewhere."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

import infctx
from infctx.errors import InputError
from infctx.formats.checkpoint_folder import checkpoints
from infctx.formats.model_files import open_model
from infctx.formats.state_file import read_state
from infctx.formats.tensor_file import read_tensors
from infctx.settings.load import load_config
from infctx.train import finish
from infctx.train.failure import find_failure
from infctx.train.learn import freeze_weights
from infctx.train.loop import train, train_steps

from runs import infctx_command, infctx_here, losses_of, open_run, write_config, write_store
from tiny_models import random_model

LEARN = ("initial_state", "initial_state_and_shifts")
BYTES = {"num_layers": 2, "width": 32, "head_size": 16, "vocab_size": 257}


@pytest.fixture
def weights(tmp_path):
    """Writes the weights of a small Finch on bytes, in bf16 like published ones."""
    infctx.save_weights(random_model(6, noise=0.05, **BYTES), tmp_path / "base.pth", torch.bfloat16)
    return tmp_path / "base.pth"


def tune_config(folder, weights, learn="initial_state", **changes):
    settings = {"model__learn": learn, "optimizer__peak_lr": 0.05, "optimizer__weight_decay": 0.0} | changes
    path = write_config(folder, **settings)
    return load_config(_with_weights(path, weights))


def _with_weights(path, weights):
    """Replaces the sizes in a configuration of write_config with a weights file."""
    import yaml

    content = yaml.safe_load(path.read_text())
    model = {name: value for name, value in content["model"].items() if name not in ("version", *BYTES)}
    content["model"] = model | {"weights": str(weights)}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("learn", LEARN)
def test_frozen_means_frozen(tmp_path, weights, learn, precision):
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    write_store(tmp_path / "train", lengths=(33,) * 64)  # many starts
    config = tune_config(tmp_path, weights, learn, run__precision=precision, optimizer__peak_lr=0.5)
    run = open_run(config)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    at_first = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    assert train_steps(run)
    learned = {"initial_wkv"} | ({"initial_time_shift", "initial_channel_shift"} if learn != "initial_state" else set())
    for name, parameter in run.model.named_parameters():
        if name in learned:
            assert parameter.dtype == torch.float32
            assert not torch.equal(parameter, at_first[name])
        else:
            assert parameter.dtype == dtype
            assert torch.equal(parameter, at_first[name])
            assert parameter.grad is None
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before
    losses = losses_of(tmp_path / "run")
    assert sum(losses[-5:]) < sum(losses[:5])

    # A second process, which has only the files.
    code = (
        "import sys, json; from safetensors import safe_open; from pathlib import Path; "
        "files = Path(sys.argv[1]).glob('*.safetensors'); "
        "print(json.dumps({file.name: sorted(safe_open(file, 'pt').keys()) for file in files}))"
    )
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    printed = subprocess.run([sys.executable, "-c", code, str(newest)], check=True, capture_output=True).stdout
    files = json.loads(printed)
    assert files["optimizer.safetensors"] == sorted(
        f"{name}/{key}" for name in learned for key in ("exp_avg", "exp_avg_sq", "step")
    )
    assert files["state.safetensors"] == sorted(name.removeprefix("initial_") for name in learned)
    assert "model.safetensors" not in files
    size = sum(file.stat().st_size for file in newest.iterdir())
    assert size < 10 * 4 * sum(run.model.get_parameter(name).numel() for name in learned) + 20_000


@pytest.mark.parametrize("learn", LEARN)
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, weights, learn):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = tune_config(tmp_path / "whole", weights, learn, run__evaluate_tokens=0)
    train(whole)
    cut = tune_config(tmp_path / "cut", weights, learn, run__evaluate_tokens=0)
    run = open_run(cut)
    lanes = run.lanes

    class Enough(Exception):
        pass

    def some(lanes):
        for _ in range(17):
            yield next(lanes)
        raise Enough

    run.lanes = some(lanes)
    with pytest.raises(Enough):
        train_steps(run)
    train(cut)  # from step 15
    assert losses_of(tmp_path / "cut" / "run") == losses_of(tmp_path / "whole" / "run")
    states = [read_tensors(tmp_path / name / "run" / "state.safetensors") for name in ("whole", "cut")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_weights_that_changed_are_noticed(tmp_path, weights):
    config = tune_config(tmp_path, weights, run__evaluate_tokens=0)
    train(config)
    infctx.save_weights(random_model(6, noise=0.05, seed=5, **BYTES), weights)
    with pytest.raises(InputError, match=r"state.safetensors: was tuned over other weights than .*base.pth holds; "):
        open_run(config)
    weights.unlink()
    with pytest.raises(InputError, match="there is no .*base.pth"):
        train(config)
    with pytest.raises(InputError, match=r"holds a state tuned over .*base.pth, and that is not there"):
        open_model(tmp_path / "run")


def test_it_starts_from_a_state_file(tmp_path, weights):
    model = infctx.load_model(weights)
    freeze_weights(model)
    torch.nn.init.normal_(model.initial_wkv)
    infctx.save_state(model.initial_state(1), tmp_path / "begin.st")
    config = tune_config(tmp_path, weights, model__initial_state=str(tmp_path / "begin.st"))
    run = open_run(config)
    assert run.model.initial_units.wkv.min() < run.model.initial_units.wkv.max()
    assert torch.equal(run.model.initial_state(1).wkv[:, 0], model.initial_wkv.half().float())
    assert [name for name, p in run.model.named_parameters() if p.requires_grad] == ["initial_wkv"]


def test_the_command_from_the_configuration_to_the_files(tmp_path, weights):
    """Runs `infctx tune` like a user, then uses the files that it wrote."""
    config = _with_weights(write_config(tmp_path, optimizer__steps=12, optimizer__peak_lr=0.05), weights)
    code, output, errors = infctx_here("tune", config, "run.evaluate_tokens=2000")
    assert code == 0, errors
    assert "without state   with the state      change" in output
    assert "--- without the state\n" in output and "--- with the state\n" in output
    for name in ("state.safetensors", "state.st", "state.pth"):
        assert str(tmp_path / "run" / name) in output
    model = infctx.load_model(weights)
    state = infctx.load_state(tmp_path / "run" / "state.pth", model)
    assert state.wkv.any()
    tuned = open_model(tmp_path / "run")
    assert torch.equal(tuned.initial_wkv, state.wkv[:, 0])

    outputs = []
    for arguments in (
        (tmp_path / "run",),
        (weights, "--state", tmp_path / "run" / "state.pth"),
        (weights, "--state", tmp_path / "run" / "state.safetensors"),
        (weights,),
    ):
        code, output, errors = infctx_here("generate", *arguments, "--prompt", "ab", "--tokens", 40)
        assert code == 0, errors
        outputs.append(output)
    assert outputs[0] == outputs[1] == outputs[2] != outputs[3]
    for options, match in (((), "bits/byte"), (("--state", tmp_path / "run" / "state.st"), "bits/byte")):
        code, output, errors = infctx_here("evaluate", weights, tmp_path / "held_out", *options)
        assert code == 0, errors
        assert match in output
        outputs.append(output)
    assert outputs[-1] != outputs[-2]


def test_shifts_are_written_only_in_our_form_and_a_warning_says_why(tmp_path, weights):
    config = _with_weights(write_config(tmp_path, optimizer__steps=5, model__learn="initial_state_and_shifts"), weights)
    assert infctx_here("tune", config, "run.evaluate_tokens=0", "optimizer.steps=3")[0] == 0
    (tmp_path / "run" / "state.pth").write_bytes(b"of an earlier end")
    code, output, errors = infctx_here("tune", config, "run.evaluate_tokens=0")
    assert code == 0, errors
    assert "state.pth: the state has shift vectors, and a file of form pth has no place for them" in errors
    assert [path.name for path in (tmp_path / "run").glob("state.*")] == ["state.safetensors"]
    assert set(read_tensors(tmp_path / "run" / "state.safetensors")) == {"wkv", "time_shift", "channel_shift"}


def test_folders_of_runs_that_learn_something_else(tmp_path, weights):
    config = tune_config(tmp_path, weights, run__evaluate_tokens=0, optimizer__steps=3)
    train(config)
    for learn, error in (("weights", "is of a run with another model.learn"), ("initial_state", None)):
        again = load_config(tmp_path / "config.yaml", [f"model.learn={learn}"])
        if error:
            with pytest.raises(InputError, match=error):
                train(again)
        else:
            train(again)


def test_a_broken_gradient_names_the_initial_state(tmp_path, weights):
    run = open_run(tune_config(tmp_path, weights))
    window, _ = next(run.lanes)
    run.model.initial_wkv.grad = torch.full_like(run.model.initial_wkv, float("nan"))
    where = find_failure(run.engine, window, run.carry, run.plan.config)
    assert where.place == "the initial state"


def test_shifts_and_what_learns_must_agree(tmp_path, weights):
    """An error comes before the first step, not at the end."""
    model = infctx.load_model(weights)
    freeze_weights(model, shifts=True)
    for part in model.initial_parts():
        torch.nn.init.normal_(part)
    infctx.save_state(model.learned_state(), tmp_path / "begin.safetensors")
    begin = f"model.initial_state={tmp_path / 'begin.safetensors'}"
    tune_config(tmp_path, weights, LEARN[1], run__evaluate_tokens=0, optimizer__steps=3)
    path = tmp_path / "config.yaml"
    for learn in ("initial_state", "weights"):
        with pytest.raises(InputError, match=f"the state has shift vectors, and model.learn {learn} has no place"):
            open_run(load_config(path, [begin, f"model.learn={learn}"]))
    run = open_run(load_config(path, [begin]))
    assert all(torch.equal(*pair) for pair in zip(run.model.learned_state(), model.learned_state(), strict=True))
    train(load_config(path))
    with pytest.raises(InputError, match="step-000003: the state has shift vectors, and model.learn initial_state has"):
        open_run(load_config(path, ["model.learn=initial_state", "optimizer.steps=9"]))


def test_a_tuned_run_is_a_model_from_any_folder(tmp_path, weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tune_config(tmp_path, weights.name, run__evaluate_tokens=0, optimizer__steps=3, run__folder="run"))
    monkeypatch.chdir("/")
    tuned = open_model(tmp_path / "run")
    assert torch.equal(tuned.learned_state().wkv, read_state(tmp_path / "run").wkv)
    assert read_state(tmp_path / "run" / "checkpoints" / "step-000003").wkv.any()
    monkeypatch.chdir(tmp_path)
    run = open_run(load_config(tmp_path / "config.yaml", ["optimizer.steps=9"]))
    assert run.progress.step == 3


def test_the_state_is_written_and_announced_before_it_is_measured(tmp_path, weights, monkeypatch, capsys):
    config = tune_config(tmp_path, weights, optimizer__steps=3)

    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(finish, "measure_after", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    printed = capsys.readouterr().out
    assert all(f"  {tmp_path}/run/state.{form} " in printed for form in ("pth", "st", "safetensors"))
    assert {path.name for path in (tmp_path / "run").glob("state.*")} == {"state.pth", "state.st", "state.safetensors"}


@pytest.mark.slow
def test_a_terminal_without_unicode(tmp_path, weights):
    config = _with_weights(write_config(tmp_path, optimizer__steps=3), weights)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code, output, errors = infctx_command("tune", config, "run.evaluate_tokens=500", env=environment)
    assert code == 0, errors
    assert "--- with the state" in output


def test_held_out_documents_are_checked_before_the_first_step(tmp_path, weights):
    write_store(tmp_path / "held_out", vocab_size=400)
    config = tune_config(tmp_path, weights)
    with pytest.raises(
        InputError, match=r"held_out: document \d has token \d+, and the model has 257 ids; prepare the documents with"
    ):
        open_run(config)


def test_a_change_of_document_tokens_is_named(tmp_path, weights):
    train(tune_config(tmp_path, weights, run__evaluate_tokens=0, optimizer__steps=3))
    with pytest.raises(
        InputError, match="data.document_tokens: null when the checkpoint was saved, 64 now; set it back"
    ):
        open_run(load_config(tmp_path / "config.yaml", ["data.document_tokens=64"]))


def test_mistakes_are_one_line(tmp_path, weights):
    config = _with_weights(write_config(tmp_path), weights)
    plain = random_model(6, **(BYTES | {"num_layers": 3}))
    plain.add_initial_state()
    infctx.save_state(plain.initial_state(1), tmp_path / "other.pth")
    for override, error in (
        (
            "model.learn=weights",
            "command line: model.learn: weights is for `infctx train`; `infctx tune` takes",
        ),
        ("model.learn=shifts", "model.learn: 'shifts' does not fit"),
        (f"model.weights={tmp_path / 'gone.pth'}", "there is no"),
        (f"model.initial_state={tmp_path / 'gone.pth'}", "model.initial_state: there is no"),
        (
            f"model.initial_state={tmp_path / 'other.pth'}",
            "the state has 3 layers with 2 heads of 16, the model",
        ),
        (f"model.initial_state={weights}", "base.pth: is a model without an initial state"),
        (f"model.weights={tmp_path / 'other.pth'}", "other.pth: is a state, not a model"),
        (f"model.initial_state={tmp_path}", "state.safetensors: no such file; name a state"),
    ):
        code, output, errors = infctx_here("tune", config, override)
        assert (code, output) == (2, ""), override
        assert error in errors
        assert len([line for line in errors.splitlines() if line.startswith("infctx: ")]) == 1
        assert "Traceback" not in errors
    code, _, errors = infctx_here("tune", write_config(tmp_path))
    assert code == 2
    assert "model.learn: initial_state tunes a finished model; name it with model.weights" in errors


def test_tensorboard_shows_the_state_grow(tmp_path, weights):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tune_config(tmp_path, weights, optimizer__steps=4, run__evaluate_tokens=0)
    train(config)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for layer in range(2):
        sizes = [event.value for event in events.Scalars(f"initial_state_rms/layer_{layer}")]
        assert len(sizes) == 4 and 0 < sizes[0] < sizes[-1]
    tuned = open_model(tmp_path / "run").learned_state()
    assert sizes[-1] == pytest.approx(tuned.wkv[1].square().mean().sqrt().item())
