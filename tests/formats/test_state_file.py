"""Initial states on disk: every form there and back, read by the programs they are for; one line for anything else."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import infctx
from infctx.errors import InputError
from infctx.formats.state_file import SUFFIXES, is_state_file, read_state
from infctx.model.state import State

from pages import files
from places import GOLDEN
from tiny_models import random_model, random_tokens

SIZES = {"num_layers": 3, "width": 40, "head_size": 20}
FORMS = [(form, suffix) for form, suffixes in SUFFIXES.items() for suffix in suffixes]


def model_and_state(version=6, shifts=False, **options):
    model = random_model(version, with_state=True, **(SIZES | options))
    state = model.initial_state(1).detach()
    if shifts:
        random = torch.Generator().manual_seed(9)
        state = state._replace(
            time_shift=torch.randn(state.time_shift.shape, generator=random),
            channel_shift=torch.randn(state.channel_shift.shape, generator=random),
        )
    return model, state


def refused(action, *arguments, **options):
    with pytest.raises(InputError) as error:
        action(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("form", "suffix"), FORMS)
@pytest.mark.parametrize("version", [5, 6, 7])
def test_every_form_comes_back_and_is_recognized_by_its_content(tmp_path, version, form, suffix):
    model, state = model_and_state(version)
    path = tmp_path / f"state{suffix}"
    infctx.save_state(state, path, form, model=model if form == "merged" else None)
    wanted = state._replace(wkv=state.wkv.half().float()) if form == "st" else state
    for name in (path.name, "anything.bin"):
        path = path.rename(tmp_path / name)
        found = infctx.load_state(path, model)
        assert isinstance(found, State)
        assert all(torch.equal(*pair) and pair[0].dtype == torch.float32 for pair in zip(found, wanted, strict=True))
        assert is_state_file(path) == (form != "merged")


def test_the_suffix_decides_the_form(tmp_path):
    _, state = model_and_state()
    for suffix, form in ((".pth", "pth"), (".st", "st"), (".state", "st"), (".safetensors", "infctx")):
        infctx.save_state(state, tmp_path / f"by_suffix{suffix}")
        infctx.save_state(state, tmp_path / f"by_form{suffix}", form)
        assert (tmp_path / f"by_suffix{suffix}").read_bytes() == (tmp_path / f"by_form{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_pth_is_the_form_that_rwkv_runner_needs(tmp_path, version, dtype):
    model, state = model_and_state(version)
    infctx.save_state(state, tmp_path / "state.pth", "pth", dtype=dtype)
    tensors = torch.load(tmp_path / "state.pth", weights_only=True)
    assert type(tensors) is dict
    assert list(tensors) == [f"blocks.{layer}.att.time_state" for layer in range(3)]
    first = tensors["blocks.0.att.time_state"]
    assert first.shape[0] * first.shape[1] == model.sizes.width
    for layer, tensor in enumerate(tensors.values()):
        assert torch.equal(tensor, state.wkv[layer, 0].mT.to(dtype or torch.float32))  # value by key
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()  # nothing else is stored


def test_st_is_the_form_that_web_rwkv_needs(tmp_path):
    _, state = model_and_state()
    infctx.save_state(state, tmp_path / "state.pth")
    infctx.save_state(state, tmp_path / "state.st")
    value_major = torch.load(tmp_path / "state.pth", weights_only=True)
    with safe_open(tmp_path / "state.st", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(value_major)
        for name, tensor in value_major.items():
            found = file.get_tensor(name)
            assert found.dtype == torch.float16
            assert torch.equal(found, tensor.transpose(1, 2).half())  # bit for bit


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_merged_is_the_model_with_the_state(tmp_path, suffix, dtype):
    model, state = model_and_state()
    plain = random_model(6, seed=8, **SIZES)
    infctx.save_state(state, tmp_path / f"merged{suffix}", "merged", model=plain, dtype=dtype)
    found = infctx.load_model(tmp_path / f"merged{suffix}")
    assert torch.equal(found.initial_wkv, state.wkv[:, 0])  # fp32, whatever the weights are
    for name, parameter in plain.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter.to(dtype or torch.float32).float()), name
    # A state that the model already has is replaced.
    infctx.save_state(state, tmp_path / "again.pth", "merged", model=random_model(6, seed=8, with_state=True, **SIZES))
    assert torch.equal(infctx.load_state(tmp_path / "again.pth", model).wkv, state.wkv)


@pytest.mark.parametrize("version", [5, 6])  # 7 takes a state by hand: below
@pytest.mark.parametrize("form", ["pth", "merged"])
@torch.no_grad()
def test_the_rwkv_package_starts_from_a_state(tmp_path, rwkv_package, version, form):
    """Merged into the weights, and as a separate file, transposed into the package's state as ChatRWKV does."""
    sizes = {"num_layers": 3, "width": 128, "vocab_size": 50, "head_size": 64}
    model = random_model(version, with_state=True, noise=0.1, **sizes)
    state = model.initial_state(1)
    plain = random_model(version, noise=0.1, **sizes)
    model.load_state_dict(plain.state_dict(), strict=False)
    infctx.save_weights(plain, tmp_path / "plain.pth")
    infctx.save_state(state, tmp_path / f"{form}.pth", form, model=plain)
    tokens = random_tokens(1, 37, vocab_size=50)
    ours = model.logits(model(tokens)[0])[0]
    without = plain.logits(plain(tokens)[0])[0]
    assert (ours - without).abs().max() > 0.01  # the state matters
    if form == "merged":
        judge = rwkv_package(str(tmp_path / "merged"), "cpu fp32", verbose=False)
        found, _ = judge.forward(tokens[0].tolist(), None, full_output=True)
    else:
        judge = rwkv_package(str(tmp_path / "plain"), "cpu fp32", verbose=False)
        _, its_state = judge.forward([1], None)
        tensors = torch.load(tmp_path / "pth.pth", weights_only=True)
        for layer in range(3):
            its_state[3 * layer].zero_()
            its_state[3 * layer + 1] = tensors[f"blocks.{layer}.att.time_state"].transpose(1, 2).float().contiguous()
            its_state[3 * layer + 2].zero_()
        found, _ = judge.forward(tokens[0].tolist(), its_state, full_output=True)
    assert (ours - found).abs().max() <= 5e-5


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the class for RWKV-7 uses it
def test_the_rwkv_package_starts_goose_from_a_state_as_on_the_page(tmp_path, monkeypatch, rwkv_7_package):
    """Runs the block of docs/state-tuning.md."""
    ((name, block),) = files("docs/state-tuning.md")
    model = random_model(7, with_state=True, noise=0.1, num_layers=3, width=128, vocab_size=50, head_size=64)
    infctx.save_state(model.initial_state(1), tmp_path / "state.pth")
    tokens = torch.tensor([[33, 7, 12]])
    wanted = model.logits(model(tokens)[0])[0, -1]
    model.initial_wkv = None
    assert (wanted - model.logits(model(tokens)[0])[0, -1]).abs().max() > 0.01  # the state matters
    infctx.save_weights(model, tmp_path / "model.pth")
    monkeypatch.chdir(tmp_path)
    page = {}
    exec(compile(block, name, "exec"), page)
    assert page["prompt"] == tokens[0].tolist()
    assert (page["logits"] - wanted).abs().max() <= 5e-5
    again, _ = page["model"].forward(page["prompt"], page["first_state"]())
    assert torch.equal(again, page["logits"])


@pytest.mark.parametrize("name", ["eagle", "finch", "goose"])
@torch.no_grad()
def test_the_golden_states_load(name):
    import numpy as np

    model = infctx.load_model(GOLDEN / f"{name}-tiny.pth")
    golden = np.load(GOLDEN / f"{name}-tiny.npz")
    state = infctx.load_state(GOLDEN / f"{name}-tiny-state.pth", model)
    tokens = torch.from_numpy(golden["tokens"]).long()[None]
    hidden, _ = model(tokens, state)
    wanted = torch.from_numpy(golden["init_logits_ref64"])
    assert (model.logits(hidden)[0] - wanted).abs().max() <= 5e-5
    model.set_initial_state(state)
    assert torch.equal(model(tokens)[0], hidden)


def test_only_our_form_has_a_place_for_shift_vectors(tmp_path):
    model, state = model_and_state(shifts=True)
    infctx.save_state(state, tmp_path / "state.safetensors")
    found = infctx.load_state(tmp_path / "state.safetensors", model)
    assert all(torch.equal(*pair) for pair in zip(found, state, strict=True))
    for form, suffix in FORMS[:-1]:
        path = tmp_path / f"{form}{suffix}"
        message = refused(infctx.save_state, state, path, form, model=model)
        assert message.startswith(f"{path}: the state has shift vectors, and a file of form {form} has no place")
        assert "model.learn: initial_state" in message
        assert not path.exists()
    model.set_initial_state(state)
    assert "learned shift vectors" in refused(infctx.save_weights, model, tmp_path / "weights.pth")
    hidden, _ = model(random_tokens(2, 20))
    assert torch.equal(hidden, model(random_tokens(2, 20), State.join_lanes([state, state]))[0])


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"num_layers": 2}, "the state has 2 layers with 2 heads of 20, the model 3 layers with 2 heads of 20"),
        ({"width": 60}, "the state has 3 layers with 3 heads of 20, the model 3 layers with 2 heads of 20"),
        ({"head_size": 10}, "the state has 3 layers with 4 heads of 10, the model 3 layers with 2 heads of 20"),
    ],
)
@pytest.mark.parametrize(("form", "suffix"), FORMS)
def test_a_state_of_another_size_is_refused(tmp_path, form, suffix, other, expected):
    model, _ = model_and_state()
    another, state = model_and_state(**other)
    path = tmp_path / f"state{suffix}"
    infctx.save_state(state, path, form, model=another)
    message = refused(infctx.load_state, path, model)
    assert message.startswith(f"{path}: {expected}")
    assert expected.split(",")[0] in refused(infctx.save_state, state, tmp_path / "merged.pth", "merged", model=model)
    assert "set_initial_state" in refused(model.set_initial_state, state)


def stored(**changes):
    """Returns form pth of a state of three layers with changed tensors; None removes one."""
    tensors = {f"blocks.{layer}.att.time_state": torch.ones(2, 20, 20) for layer in range(3)}
    for name, tensor in changes.items():
        tensors[name] = tensor
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


STATE = "blocks.{}.att.time_state".format


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({}, "is no state (the file has no tensors)"),
        ({"a": torch.ones(2)}, "is no state (found a)"),
        ({"emb.weight": torch.ones(2, 2)}, "is a model without an initial state"),
        ({"rwkv.embeddings.weight": torch.ones(2, 2)}, "is a model without an initial state"),
        (stored(**{STATE(1): None}), f"tensor {STATE(1)} is missing"),
        (stored(**{STATE(0): None}), f"tensor {STATE(0)} is missing"),
        (stored(**{STATE(9): torch.ones(2, 20, 20)}), f"tensor {STATE(3)} is missing"),
        (stored(**{STATE(1): torch.ones(2, 20, 21)}), f"tensor {STATE(1)} has shape (2, 20, 21)"),
        (stored(**{STATE(1): torch.ones(800)}), f"tensor {STATE(1)} has shape (800,)"),
        ({STATE(0): torch.ones(2, 20, 21)}, "layers, heads, N, N are expected"),
        ({STATE(0): torch.ones(0, 20, 20)}, "layers, heads, N, N are expected"),
        (stored(more=torch.ones(2)), "tensor more belongs neither to a state nor to a model"),
        (stored(**{STATE(2): torch.full((2, 20, 20), float("nan"))}), "not finite; the file is damaged"),
        ({"wkv": torch.ones(3, 2, 20, 20), "time_shift": torch.ones(3, 41)}, "tensor time_shift has shape (3, 41)"),
        ({"wkv": torch.ones(3, 2, 20)}, "layers, heads, N, N are expected"),
        ({"wkv": torch.ones(3, 2, 20, 20), "other": torch.ones(2)}, "is no state (found other, wkv)"),
    ],
)
def test_files_that_are_not_a_state_are_refused(tmp_path, tensors, expected):
    model, _ = model_and_state()
    for path in (tmp_path / "state.pth", tmp_path / "state.safetensors"):
        torch.save(tensors, path) if path.suffix == ".pth" else save_file(tensors, path)
        message = refused(infctx.load_state, path, model)
        assert message.startswith(f"{path}: ")
        assert expected in message


def test_other_files_are_refused_as_a_state(tmp_path):
    model, _ = model_and_state()
    assert "no such file" in refused(infctx.load_state, tmp_path / "gone.pth", model)
    (tmp_path / "text.pth").write_text("hello")
    assert "text.pth: not a" in refused(infctx.load_state, tmp_path / "text.pth", model)
    infctx.save_weights(model := random_model(6, **SIZES), tmp_path / "model.pth")
    assert "model.pth: is a model without an initial state" in refused(infctx.load_state, tmp_path / "model.pth", model)


def test_values_beyond_fp16_are_named(tmp_path):
    _, state = model_and_state()
    state.wkv[1, 0, 1, 3, 7] = -70000.0
    message = refused(infctx.save_state, state, tmp_path / "state.st")
    assert message == (
        f"{tmp_path / 'state.st'}: blocks.1.att.time_state[1, 3, 7] is -70000, beyond the 65504 of float16; write form "
        "pth, which can be fp32"
    )
    assert not (tmp_path / "state.st").exists()
    assert "[1, 7, 3] is -70000" in refused(infctx.save_state, state, tmp_path / "state.pth", dtype=torch.float16)
    infctx.save_state(state, tmp_path / "state.pth")
    assert read_state(tmp_path / "state.pth").wkv[1, 0, 1, 3, 7] == -70000


def test_bad_arguments_of_save_state_are_refused(tmp_path):
    model, state = model_and_state()
    assert "no form 'ggml'" in refused(infctx.save_state, state, tmp_path / "a.pth", "ggml")
    assert "form st is written as .st or .state" in refused(infctx.save_state, state, tmp_path / "a.pth", "st")
    assert "a state is written as" in refused(infctx.save_state, state, tmp_path / "a.bin")
    assert "give the model" in refused(infctx.save_state, state, tmp_path / "a.pth", "merged")
    assert "the state has 2 documents" in refused(infctx.save_state, model.initial_state(2), tmp_path / "a.pth")
    state.wkv[0, 0, 0, 0, 0] = float("inf")
    assert "not finite; not written" in refused(infctx.save_state, state, tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


def test_a_loaded_state_gets_the_precision_of_the_model(tmp_path):
    model, state = model_and_state()
    infctx.save_state(state, tmp_path / "state.pth")
    precise = random_model(6, dtype=torch.float64, **SIZES)
    assert infctx.load_state(tmp_path / "state.pth", precise).wkv.dtype == torch.float64
    low = random_model(6, dtype=torch.bfloat16, **SIZES)
    assert infctx.load_state(tmp_path / "state.pth", low).wkv.dtype == torch.float32
