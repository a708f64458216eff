"""Tensors one at a time: the bytes that the libraries write, the values that they read, in little memory."""

import json
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file, save_file

import infctx
from infctx.errors import InputError
from infctx.formats import tensor_stream
from infctx.formats.other_names import conversions_from_official, conversions_to_official, from_official, to_official
from infctx.formats.stored_names import stored_names
from infctx.formats.tensor_file import read_tensors, write_tensors
from infctx.formats.tensor_stream import LazyTensors, StoredTensors, stream_tensors
from infctx.formats.weights import fingerprint, open_weights, stored_tensors

from tiny_models import random_model

SUFFIXES = (".pth", ".safetensors")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def odd_tensors():
    """Returns tensors of every dtype and odd shapes and names; over 256, because a pickle then counts differently."""
    shapes = [(), (0,), (3, 0, 2), (1,), (7,), (5, 3), (1, 1, 24), (2, 3, 4, 5)]
    tensors = {
        f"blocks.{number}.{dtype}": torch.randn(shape).to(dtype)
        for number, shape in enumerate(shapes * 9)
        for dtype in DTYPES
    }
    assert len(tensors) > 256
    return tensors | {
        name: torch.ones(2) for name in ('a "quoted" name', "back\\slash", "\xe9\u4e2d\U0001f600", "", "\n")
    }


def planned(tensors):
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("tensors", [odd_tensors(), {}, {"one": torch.ones(3)}], ids=["many", "none", "one"])
def test_the_bytes_match_the_library(tmp_path, suffix, tensors):
    streamed, whole = tmp_path / f"streamed{suffix}", tmp_path / f"whole{suffix}"
    write_tensors(tensors, whole)
    stream_tensors(LazyTensors(planned(tensors), tensors.__getitem__), streamed)
    assert streamed.read_bytes() == whole.read_bytes()
    found = [load_file(streamed)] if suffix == ".safetensors" else []
    if suffix == ".pth":
        assert zipfile.ZipFile(streamed).testzip() is None  # the checksums
        found = [torch.load(streamed, weights_only=True, mmap=mapped) for mapped in (False, True)]
    for its in found:
        assert its.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (its[name].dtype, its[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(its[name], tensor), name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_only_the_values_of_a_view_are_written(tmp_path, suffix):
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"turned": whole.mT, "part": whole[1:3], "column": whole[:, 2], "wide": torch.ones(1).expand(5)}
    plan = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    stream_tensors(LazyTensors(plan, tensors.__getitem__), tmp_path / f"a{suffix}")
    write_tensors(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        tmp_path / f"b{suffix}",
    )
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_tensor_is_looked_up_once_and_released(tmp_path, suffix):
    tensors, made = odd_tensors(), {}

    def read(name):
        assert name not in made
        assert not any(reference() is not None for reference in made.values())
        tensor = tensors[name].clone()
        made[name] = weakref.ref(tensor)
        return tensor

    stream_tensors(LazyTensors(planned(tensors), read), tmp_path / f"a{suffix}")
    assert made.keys() == tensors.keys()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_stream_leaves_the_old_file_and_nothing_else(tmp_path, suffix):
    tensors = odd_tensors()
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"old")
    for error in (KeyboardInterrupt(), InputError("beyond"), OSError(5, "input or output")):

        def read(name, error=error):
            if name.startswith("blocks.30"):
                raise error
            return tensors[name]

        with pytest.raises(type(error)) as raised:
            stream_tensors(LazyTensors(planned(tensors), read), path)
        assert raised.value is error
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


def test_other_suffixes_are_not_written(tmp_path):
    with pytest.raises(InputError, match=r"model.bin: weights are written as .pth or .safetensors; choose one of"):
        stream_tensors(LazyTensors({}, dict().__getitem__), tmp_path / "model.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("most_mapped", [0, 200, 1 << 26])
def test_tensors_of_several_files_are_read_when_looked_up(tmp_path, monkeypatch, most_mapped):
    monkeypatch.setattr(tensor_stream, "MOST_MAPPED", most_mapped)
    parts = [{f"{part}.{n}": torch.randn(n, 3) for n in range(8)} | {"same": torch.ones(part + 1)} for part in range(5)]
    write_tensors(parts[0], tmp_path / "0.safetensors")
    write_tensors(parts[1], tmp_path / "1.pth")
    torch.save(parts[2], tmp_path / "2.pth", _use_new_zipfile_serialization=False)
    torch.save(parts[3], tmp_path / "3.pth")
    (tmp_path / "3.pth").rename(tmp_path / "3.safetensors")
    write_tensors(parts[4], tmp_path / "4.pth")
    files = sorted(tmp_path.iterdir())
    opened = []
    monkeypatch.setattr(
        tensor_stream, "read_tensors", lambda file, *rest: opened.append(file) or read_tensors(file, *rest)
    )
    found = StoredTensors(files)
    expected = {name: tensor for part in parts for name, tensor in part.items()}  # the last one of the same name wins
    assert list(found) == list(expected)
    assert len(found) == len(expected)
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert not opened
    for name in reversed(expected):
        assert torch.equal(found[name], expected[name]), name
    counts = [opened.count(file) for file in files]
    assert [counts[0], *counts[2:4]] == [8, 1, 1]  # each from safetensors, all at once from unmapped files
    for count in (counts[1], counts[4]):
        fewest, most = {1 << 26: (1, 1), 200: (2, 4), 0: (7, 9)}[most_mapped]
        assert fewest <= count <= most
    with pytest.raises(KeyError):
        found["other"]


class Recorded(Mapping):
    """The tensors, and the names that were looked up."""

    def __init__(self, tensors):
        self.tensors, self.names = tensors, []

    def __getitem__(self, name):
        self.names.append(name)
        return self.tensors[name]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


@pytest.mark.parametrize(("naming", "version"), [("huggingface", 5), ("fla", 6), ("official", 6), ("fla", 7)])
def test_a_conversion_looks_up_few_tensors_and_gives_the_shape_without_values(naming, version):
    official = stored_tensors(random_model(version))
    theirs = from_official(official, naming, "model.pth")
    for tensors, conversions, expected in [
        (official, conversions_from_official(official, naming, "model.pth"), theirs),
        (theirs, conversions_to_official(theirs, "model.pth"), to_official(theirs, "model.pth")),
    ]:
        assert list(conversions) == list(expected)
        for name, convert in conversions.items():
            recorded = Recorded(tensors)
            assert torch.equal(convert(recorded), expected[name]), name
            assert len(recorded.names) == (5 if name.endswith("attn.x_bias") else 1)
            empty = convert(planned(tensors))
            assert (empty.device.type, empty.shape) == ("meta", expected[name].shape)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("version", [5, 6, 7])
def test_weights_are_checked_when_opened_and_read_when_looked_up(tmp_path, version, suffix):
    path, model = tmp_path / f"model{suffix}", random_model(version, with_state=True)
    infctx.save_weights(model, path)
    stored = open_weights(path)
    assert (stored.path, stored.sizes, stored.has_state) == (path, model.sizes, True)
    assert torch.equal(stored.initial_wkv(), model.initial_wkv)
    assert fingerprint(stored) == fingerprint(model)
    for name, tensor in stored_tensors(model).items():
        assert torch.equal(stored.tensors[name], tensor), name
    write_tensors(stored_tensors(model) | {"head.weight": torch.ones(3, 3)}, path)
    with pytest.raises(InputError, match=r"tensor head.weight has shape \(3, 3\)"):
        open_weights(path)


# In a separate process: memory that the tests used earlier must not count.
EXPORTS = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from infctx.formats.export import export

def memory(kind):
    return int(next(line for line in open("/proc/self/status") if line.startswith(kind)).split()[1]) // 1024

folder, before = Path(sys.argv[1]), memory("VmRSS")
for source, output, options in [
    ("shards", "a.safetensors", {"dtype": "bf16"}),
    ("shards", "b.pth", {"dtype": "fp32"}),
    ("shards", "c.safetensors", {"dtype": "fp16", "names": "fla"}),
    ("shards", "d.pth", {"dtype": "bf16", "state": folder / "state.safetensors"}),
    ("c.safetensors", "e.pth", {"dtype": "bf16"}),
    ("b.pth", "f.safetensors", {"dtype": "bf16"}),
]:
    export(folder / source, folder / output, **options)
    print(source, output, memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_an_export_needs_memory_for_a_few_tensors_only(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    model = infctx.build_model(version=6, num_layers=20, width=512, vocab_size=500, device="meta")
    shapes = {name: model.get_parameter(ours).shape for ours, name in stored_names(model.sizes).items()}
    names, index = list(shapes), {}
    for number, chosen in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: torch.full(shapes[name], 0.01) for name in chosen}, folder / file)
        index |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    wkv, shift = torch.ones(20, 1, 8, 64, 64), torch.zeros(20, 1, 512)
    metadata = {"weights": "those of another model"}
    infctx.save_state(infctx.State(wkv, shift, shift), tmp_path / "state.safetensors", metadata=metadata)
    result = subprocess.run(
        [sys.executable, "-c", EXPORTS, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    assert "was tuned over other weights" in result.stderr
    megabytes = sum(shape.numel() for shape in shapes.values()) * 4 >> 20
    assert megabytes > 270
    lines = result.stdout.splitlines()
    assert len(lines) == 6
    for source, _, megabytes_more in map(str.split, lines):
        # The bf16 weights are 140, a tensor at most 4, the state 5; up to 64 of a .pth is mapped.
        assert int(megabytes_more) < (0.4 if source.endswith(".pth") else 0.2) * megabytes, result.stdout
    weights = infctx.load_model(tmp_path / "e.pth", torch.bfloat16)
    assert torch.equal(weights.head.weight, torch.full((500, 512), 0.01).half().bfloat16())
