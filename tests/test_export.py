"""Export: from whatever holds a model to a file under the official names."""

import pytest
import torch
from runs import write_config
from tiny_models import random_model

import infctx
from infctx.config import load_config
from infctx.errors import InputError
from infctx.model.tensor_file import read_tensors
from infctx.model.weights import stored_tensors
from infctx.train.checkpoint import Progress, save_checkpoint
from infctx.train.export import EXPORT_DTYPES, export_weights
from infctx.train.optimizer import make_optimizer


@pytest.fixture
def run_folder(tmp_path):
    """A run with two checkpoints, of which the newer one has the model of `newest_model`."""
    config = load_config(write_config(tmp_path))
    for step, model in ((3, random_model(6, seed=3)), (6, newest_model())):
        optimizer = make_optimizer(model, config.optimizer)
        progress = Progress(step, None, step * config.step_tokens)
        save_checkpoint(tmp_path / "run" / "checkpoints", model, optimizer, model.initial_state(2), progress, config)
    return tmp_path / "run"


def newest_model():
    return random_model(6, seed=6, with_state=True)


def assert_is(path, model, dtype):
    found = read_tensors(path)
    wanted = stored_tensors(model)
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name


@pytest.mark.parametrize("dtype", EXPORT_DTYPES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_run_gives_its_newest_checkpoint(tmp_path, run_folder, suffix, dtype):
    output = tmp_path / f"out{suffix}"
    said = export_weights(run_folder, output, dtype)
    assert_is(output, newest_model(), EXPORT_DTYPES[dtype])
    count = len(stored_tensors(newest_model()))
    assert said.startswith(f"{output}: Finch, ")
    assert said.endswith(f"{count} tensors in {dtype}, from {run_folder}/checkpoints/step-000006")


@pytest.mark.parametrize(
    ("source", "seed"), [("run/checkpoints", 6), ("run/checkpoints/step-000003", 3), ("run/checkpoints/step-000006", 6)]
)
def test_folders_of_checkpoints(tmp_path, run_folder, source, seed):
    export_weights(tmp_path / source, tmp_path / "out.pth", "fp32")
    assert_is(tmp_path / "out.pth", random_model(6, seed=seed, with_state=seed == 6), torch.float32)


def test_a_torn_checkpoint_is_passed_over(tmp_path, run_folder, caplog):
    torn = run_folder / "checkpoints" / "step-000006" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    export_weights(run_folder, tmp_path / "out.pth", "fp32")
    assert_is(tmp_path / "out.pth", random_model(6, seed=3), torch.float32)
    assert "step-000006 is torn" in caplog.text


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("version", [5, 6])
def test_a_weights_file(tmp_path, version, suffix):
    model = random_model(version)
    infctx.save_weights(model, tmp_path / f"in{suffix}")
    said = export_weights(tmp_path / f"in{suffix}", tmp_path / "out.pth", "bf16")
    assert_is(tmp_path / "out.pth", model, torch.bfloat16)
    assert {5: "Eagle", 6: "Finch"}[version] in said


def test_nothing_is_overwritten_unless_asked(tmp_path):
    infctx.save_weights(random_model(5), tmp_path / "in.pth")
    (tmp_path / "out.pth").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"out.pth: exists; choose another name, or --overwrite"):
        export_weights(tmp_path / "in.pth", tmp_path / "out.pth", "bf16")
    assert (tmp_path / "out.pth").read_bytes() == b"precious"
    export_weights(tmp_path / "in.pth", tmp_path / "out.pth", "bf16", overwrite=True)
    assert_is(tmp_path / "out.pth", random_model(5), torch.bfloat16)


def test_what_can_not_be_exported(tmp_path):
    infctx.save_weights(random_model(5), tmp_path / "in.pth")
    for source, output, match in [
        (tmp_path / "none.pth", tmp_path / "out.pth", "none.pth: no such file"),
        (tmp_path, tmp_path / "out.pth", "holds no checkpoint"),
        (tmp_path / "in.pth", tmp_path / "out.bin", "written as .pth or .safetensors"),
    ]:
        with pytest.raises(InputError, match=match) as refused:
            export_weights(source, output, "bf16")
        assert "\n" not in str(refused.value)
        assert not output.exists()
    model = random_model(5)
    with torch.no_grad():
        model.head.weight[0, 0] = 1e6
    infctx.save_weights(model, tmp_path / "large.pth")
    with pytest.raises(InputError, match=r"head.weight has values beyond the range of torch.float16"):
        export_weights(tmp_path / "large.pth", tmp_path / "out.pth", "fp16")
