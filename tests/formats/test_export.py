"""Export: from anything that holds a model to a file or folder for another program."""

import json
import os

import pytest
import torch
import yaml
from safetensors.torch import save_file

import infctx
from infctx.errors import InputError
from infctx.formats.export import EXPORT_DTYPES, export
from infctx.formats.other_names import from_official, naming_of
from infctx.formats.tensor_file import narrow, read_metadata, read_tensors, write_tensors
from infctx.formats.weights import fingerprint, is_state_name, stored_tensors
from infctx.settings.load import load_config
from infctx.train.checkpoint import save_checkpoint
from infctx.train.learn import freeze_weights
from infctx.train.optimizer import make_optimizer
from infctx.train.run import Progress

from runs import run_of, write_config
from tiny_models import random_model, random_tokens


@pytest.fixture
def run_folder(tmp_path):
    """Makes a run with two checkpoints; the newer one has the model of `newest_model`."""
    config = load_config(write_config(tmp_path))
    for step, model in ((3, random_model(6, seed=3)), (6, newest_model())):
        optimizer = make_optimizer(model, config.optimizer)
        progress = Progress(step, None, step * config.step_tokens)
        save_checkpoint(run_of(model, optimizer, config, model.initial_state(2), progress))
    return tmp_path / "run"


def newest_model():
    return random_model(6, seed=6, with_state=True)


def save_shards(tensors, folder):
    """Saves tensors in two files with an index."""
    folder.mkdir()
    names = list(tensors)
    for number, chosen in enumerate((names[:9], names[9:])):
        save_file({name: tensors[name] for name in chosen}, folder / f"{number}.safetensors")
    index = {name: f"{int(place >= 9)}.safetensors" for place, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def assert_is(path, model, dtype):
    found = read_tensors(path)
    wanted = stored_tensors(model)
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        kept = torch.float32 if name.endswith(".time_state") else dtype
        assert found[name].dtype == kept
        assert torch.equal(found[name], tensor.to(kept)), name


@pytest.mark.parametrize("dtype", EXPORT_DTYPES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_run_exports_its_newest_checkpoint(tmp_path, run_folder, suffix, dtype):
    output = tmp_path / f"out{suffix}"
    line = export(run_folder, output, dtype=dtype)
    assert_is(output, newest_model(), EXPORT_DTYPES[dtype])
    count = len(stored_tensors(newest_model()))
    assert line.startswith(f"{output}: Finch, ")
    assert line.endswith(f"{count} tensors in {dtype} under official names, from {run_folder}/checkpoints/step-000006")


@pytest.mark.parametrize(
    ("source", "seed"), [("run/checkpoints", 6), ("run/checkpoints/step-000003", 3), ("run/checkpoints/step-000006", 6)]
)
def test_folders_of_checkpoints(tmp_path, run_folder, source, seed):
    export(tmp_path / source, tmp_path / "out.pth", dtype="fp32")
    assert_is(tmp_path / "out.pth", random_model(6, seed=seed, with_state=seed == 6), torch.float32)


def test_a_torn_checkpoint_is_skipped(tmp_path, run_folder, caplog):
    torn = run_folder / "checkpoints" / "step-000006" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    export(run_folder, tmp_path / "out.pth", dtype="fp32")
    assert_is(tmp_path / "out.pth", random_model(6, seed=3), torch.float32)
    assert "step-000006 is torn" in caplog.text


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_a_weights_file(tmp_path, version, suffix):
    model = random_model(version)
    infctx.save_weights(model, tmp_path / f"in{suffix}")
    line = export(tmp_path / f"in{suffix}", tmp_path / "out.pth", dtype="bf16")
    assert_is(tmp_path / "out.pth", model, torch.bfloat16)
    assert {5: "Eagle", 6: "Finch", 7: "Goose"}[version] in line


def test_nothing_is_overwritten_without_the_option(tmp_path):
    infctx.save_weights(random_model(5), tmp_path / "in.pth")
    (tmp_path / "out.pth").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"out.pth: exists; choose another name, or give --overwrite"):
        export(tmp_path / "in.pth", tmp_path / "out.pth", dtype="bf16")
    assert (tmp_path / "out.pth").read_bytes() == b"precious"
    export(tmp_path / "in.pth", tmp_path / "out.pth", dtype="bf16", overwrite=True)
    assert_is(tmp_path / "out.pth", random_model(5), torch.bfloat16)


def test_bad_sources_and_outputs_are_refused(tmp_path):
    infctx.save_weights(random_model(5), tmp_path / "in.pth")
    for source, output, match in [
        (tmp_path / "none.pth", tmp_path / "out.pth", "none.pth: no such file"),
        (tmp_path, tmp_path / "out.pth", "holds no checkpoint"),
        (tmp_path / "in.pth", tmp_path / "out.bin", "written as .pth or .safetensors"),
    ]:
        with pytest.raises(InputError, match=match) as refused:
            export(source, output, dtype="bf16")
        assert "\n" not in str(refused.value)
        assert not output.exists()
    model = random_model(5)
    with torch.no_grad():
        model.head.weight[0, 0] = 1e6
    infctx.save_weights(model, tmp_path / "large.pth")
    with pytest.raises(
        InputError, match=r"head.weight\[0, 0\] is 1e\+06, beyond the 65504 of float16; choose another dtype"
    ):
        export(tmp_path / "large.pth", tmp_path / "out.pth", dtype="fp16")


def tuned_run(folder, shifts=False):
    """Makes a run that tuned a state over the weights in base.pth; returns the model and the state."""
    base = random_model(6, seed=6)
    infctx.save_weights(base, folder / "base.pth")
    changes = {"model__weights": str(folder / "base.pth"), "model__learn": "initial_state"}
    path = write_config(folder, **changes)
    content = yaml.safe_load(path.read_text())
    content["model"] = {name: content["model"][name] for name in ("weights", "learn")}
    path.write_text(yaml.safe_dump(content))
    config = load_config(path)
    freeze_weights(base, shifts)
    for number, part in enumerate(base.initial_parts()):
        if part is not None:
            part.data.normal_(generator=torch.Generator().manual_seed(number))
    optimizer = make_optimizer(base, config.optimizer)
    save_checkpoint(run_of(base, optimizer, config, base.initial_state(2), Progress(3, None, 0)))
    return base, base.initial_state(1).detach()


def test_a_tuned_run_exports_its_state_in_every_form(tmp_path):
    model, state = tuned_run(tmp_path)
    run = tmp_path / "run"
    for name in ("state.pth", "state.st", "state.safetensors"):
        line = export(run, tmp_path / name)
        assert line.startswith(
            f"{tmp_path / name}: a state of 2 layers with 3 heads of 8, from {run}/checkpoints/step-"
        )
        found = infctx.load_state(tmp_path / name, model)
        assert torch.equal(found.wkv, state.wkv.half().float() if name.endswith(".st") else state.wkv)
    assert read_tensors(tmp_path / "state.pth").keys() == {f"blocks.{n}.att.time_state" for n in range(2)}
    export(run, tmp_path / "low.pth", dtype="bf16")
    assert read_tensors(tmp_path / "low.pth")["blocks.0.att.time_state"].dtype == torch.bfloat16
    for source, options in ((run, {"form": "merged"}), (tmp_path / "base.pth", {"state": tmp_path / "state.pth"})):
        export(source, tmp_path / "merged.pth", dtype="fp32", overwrite=True, **options)
        merged = infctx.load_model(tmp_path / "merged.pth")
        assert torch.equal(merged.initial_wkv, state.wkv[:, 0])
        assert all(torch.equal(merged.get_parameter(n), p) for n, p in model.named_parameters())
    export(run, tmp_path / "weights.pth", form="weights", dtype="fp32")
    assert_is(tmp_path / "weights.pth", random_model(6, seed=6), torch.float32)
    # States convert between forms, also from a merged file.
    export(tmp_path / "state.pth", tmp_path / "again.st")
    assert (tmp_path / "again.st").read_bytes() == (tmp_path / "state.st").read_bytes()
    export(tmp_path / "merged.pth", tmp_path / "out.pth", form="pth")
    assert (tmp_path / "out.pth").read_bytes() == (tmp_path / "state.pth").read_bytes()
    export(tmp_path / "merged.pth", tmp_path / "out.st")
    assert (tmp_path / "out.st").read_bytes() == (tmp_path / "state.st").read_bytes()


@pytest.mark.parametrize(("version", "names"), [(5, "huggingface"), (6, "huggingface"), (6, "fla")])
@pytest.mark.parametrize("dtype", EXPORT_DTYPES)
def test_other_names_and_back(tmp_path, version, names, dtype):
    infctx.save_weights(random_model(version), tmp_path / "in.pth", EXPORT_DTYPES[dtype])
    line = export(tmp_path / "in.pth", tmp_path / "theirs.safetensors", names=names, dtype=dtype)
    assert f"under {names} names" in line
    assert ("eps" in line) == (names == "fla")
    assert naming_of(read_tensors(tmp_path / "theirs.safetensors")) == names
    export(tmp_path / "theirs.safetensors", tmp_path / "back.pth", dtype=dtype)
    assert (tmp_path / "back.pth").read_bytes() == (tmp_path / "in.pth").read_bytes()


def test_options_that_do_not_go_together_are_refused(tmp_path):
    _, state = tuned_run(tmp_path, shifts=True)
    run, base, out = tmp_path / "run", tmp_path / "base.pth", tmp_path / "out.pth"
    infctx.save_state(state._replace(time_shift=0 * state[1], channel_shift=0 * state[1]), tmp_path / "state.pth")
    infctx.save_weights(random_model(5), tmp_path / "eagle.pth")
    for source, options, match in [
        (run, {}, "out.pth: the state has shift vectors, and a file of form pth has no place for them"),
        (run, {"form": "merged"}, "shift vectors, and a file of form merged"),
        (base, {"form": "pth"}, "base.pth: is a model without an initial state"),
        (base, {"form": "merged"}, "base.pth: is a model without an initial state"),
        (base, {"state": base}, "base.pth: is a model without an initial state"),
        (base, {"form": "ggml"}, "there is no form 'ggml'"),
        (base, {"form": "weights", "state": tmp_path / "state.pth"}, "state.pth is for --form merged, not weights"),
        (tmp_path / "state.pth", {"form": "pth", "state": base}, "base.pth is for --form merged, not pth"),
        (run, {"form": "st", "dtype": "bf16"}, "a state of form st is always fp16; leave --dtype out"),
        (run, {"form": "infctx", "dtype": "bf16"}, "a state of form infctx is always fp32; leave --dtype out"),
        (base, {"names": "llama"}, "there are no 'llama' names"),
        (base, {"form": "st"}, "is a model without an initial state"),
        (run, {"form": "pth", "names": "fla"}, "fla names have no place for a state"),
        (tmp_path / "state.pth", {"form": "weights"}, "state.pth: is a state without weights"),
        (tmp_path / "state.pth", {"form": "merged"}, "state.pth: is a state without weights"),
        (tmp_path / "eagle.pth", {"names": "fla"}, "RWKV-5 has no fla names"),
        (tmp_path / "eagle.pth", {"state": tmp_path / "other.pth"}, "other.pth: no such file"),
    ]:
        with pytest.raises(InputError, match=match) as refused:
            export(source, out, **options)
        assert "\n" not in str(refused.value)
        assert not out.exists()
    infctx.save_state(random_model(6, with_state=True, num_layers=3).initial_state(1), tmp_path / "other.pth")
    with pytest.raises(InputError, match="the state has 3 layers with 3 heads of 8, the model 2 layers"):
        export(base, out, state=tmp_path / "other.pth")


@pytest.mark.parametrize("layout", ["run", "shards", "merged.pth"])
def test_a_state_among_the_weights(tmp_path, run_folder, layout):
    model = newest_model()
    source = {"run": run_folder, "shards": tmp_path / "shards", "merged.pth": tmp_path / "merged.pth"}[layout]
    if layout == "merged.pth":
        infctx.save_weights(model, source)
    if layout == "shards":
        save_shards(stored_tensors(model), source)
    export(source, tmp_path / "out.st")
    export(source, tmp_path / "out.pth", form="pth")
    export(source, tmp_path / "all.pth", form="merged", dtype="fp32")
    assert torch.equal(infctx.load_state(tmp_path / "out.pth", model).wkv[:, 0], model.initial_wkv)
    assert torch.equal(infctx.load_state(tmp_path / "out.st", model).wkv[:, 0], model.initial_wkv.half().float())
    assert_is(tmp_path / "all.pth", model, torch.float32)
    line = export(source, tmp_path / "theirs.safetensors", names="huggingface")
    assert "\n  without the initial state of " in line
    infctx.save_weights(random_model(6), tmp_path / "plain.pth")
    with pytest.raises(InputError, match="plain.pth: is a model without an initial state"):
        export(tmp_path / "plain.pth", tmp_path / "no.st")


def test_a_state_is_exported_without_its_weights_and_keeps_their_fingerprint(tmp_path, caplog):
    model, state = tuned_run(tmp_path)
    base = (tmp_path / "base.pth").rename(tmp_path / "moved.pth")
    for name in ("out.pth", "out.st", "out.safetensors"):
        export(tmp_path / "run", tmp_path / name)
    assert read_metadata(tmp_path / "out.safetensors") == {"weights": fingerprint(model)}
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    assert (tmp_path / "out.safetensors").read_bytes() == (checkpoint / "state.safetensors").read_bytes()
    export(base, tmp_path / "merged.pth", state=tmp_path / "out.safetensors")
    assert not caplog.records
    infctx.save_weights(random_model(6, seed=9), tmp_path / "base.pth")  # in place of the run's weights
    export(tmp_path / "run", tmp_path / "wrong.pth", form="merged")
    assert "was tuned over other weights than" in caplog.text


def test_files_are_readable_by_everyone(tmp_path):
    tuned_run(tmp_path)
    before = os.umask(0o022)
    try:
        for name in ("out.pth", "out.st", "out.safetensors"):
            export(tmp_path / "run", tmp_path / name)
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("version", "names", "source_names"),
    [
        (5, "official", "official"),
        (6, "official", "official"),
        (5, "huggingface", "official"),
        (6, "fla", "official"),
        (6, "fla", "huggingface"),
        (6, "official", "fla"),
    ],
)
@pytest.mark.parametrize("layout", ["shards", "in.safetensors", "in.pth", "old.pth"])
def test_the_bytes_match_a_file_written_in_one_go(tmp_path, version, suffix, names, source_names, layout):
    model = random_model(version, num_layers=3, with_state=source_names == "official")
    official = stored_tensors(model)
    weights = {name: tensor for name, tensor in official.items() if not is_state_name(name)}
    stored = official if source_names == "official" else from_official(weights, source_names, "in")
    source = tmp_path / layout
    if layout == "shards":
        save_shards(stored, source)
    elif layout == "old.pth":
        torch.save(stored, source, _use_new_zipfile_serialization=False)
    else:
        write_tensors(stored, source)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        narrowed = narrow(weights, dtype, "in")
        states = {name: tensor for name, tensor in official.items() if is_state_name(name)}
        expected = narrowed | states if names == "official" else from_official(narrowed, names, "in")
        write_tensors(expected, tmp_path / f"expected{suffix}")
        short = next(short for short, its in EXPORT_DTYPES.items() if its == dtype)
        export(source, tmp_path / f"out{suffix}", form="weights", names=names, dtype=short, overwrite=True)
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"expected{suffix}").read_bytes()


@pytest.mark.parametrize(("version", "names"), [(5, "official"), (6, "official"), (6, "fla")])
def test_values_beyond_the_dtype_are_named_and_nothing_is_left(tmp_path, version, names):
    model = random_model(version)
    with torch.no_grad():
        model.blocks[1].channel_mix.value.weight[3, 2] = -7e4
        model.blocks[0].channel_mix.value.weight[0, 1] = float("-inf")  # stored as it is
        model.blocks[0].channel_mix.value.weight[0, 0] = float("nan")
    save_shards(stored_tensors(model), tmp_path / "in")
    for suffix in (".pth", ".safetensors"):
        output = tmp_path / f"out{suffix}"
        with pytest.raises(InputError) as refused:
            export(tmp_path / "in", output, dtype="fp16", names=names)
        assert str(refused.value) == (
            f"{output}: blocks.1.ffn.value.weight[3, 2] is -70000, beyond the 65504 of float16; choose another dtype"
        )
        assert list(tmp_path.iterdir()) == [tmp_path / "in"]
    export(tmp_path / "in", tmp_path / "out.pth", dtype="bf16")
    found = read_tensors(tmp_path / "out.pth")["blocks.0.ffn.value.weight"]
    assert found[0, 1] == float("-inf") and found[0, 0].isnan()


@pytest.mark.parametrize("form", ["weights", "merged"])
@pytest.mark.parametrize("version", [5, 6])
@torch.no_grad()
def test_the_rwkv_package_reads_an_export_of_shards(tmp_path, rwkv_package, version, form):
    model = random_model(version, with_state=True, noise=0.1, width=128, head_size=64)
    save_shards(stored_tensors(model), tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out.pth", dtype="fp32", form=form)
    judge = rwkv_package(str(tmp_path / "out"), "cpu fp32", verbose=False)
    tokens = random_tokens(1, 20)
    expected = model.logits(model(tokens)[0])[0]
    assert expected.std() > 0.1
    assert (judge.forward(tokens[0].tolist(), None, full_output=True)[0] - expected).abs().max() <= 5e-5
    again = infctx.load_model(tmp_path / "out.pth")
    assert torch.equal(again.logits(again(tokens)[0])[0], expected)
