"""Files of tensors from others: whatever they hold, a refusal is one line and no code runs."""

import io
import json
import pickle
import resource
import signal
import time
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch

import infctx
from infctx.errors import InputError
from infctx.formats.tensor_file import read_shapes, read_tensors, write_tensors
from infctx.formats.weights import copy_weights, open_weights, stored_tensors
from infctx.pth_check import refuse_odd_pth

from tiny_models import random_model

SUFFIXES = (".pth", ".safetensors")


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    """Returns suffix -> the bytes of a complete file of a small model."""
    folder, model = tmp_path_factory.mktemp("whole"), random_model(6)
    for suffix in SUFFIXES:
        infctx.save_weights(model, folder / f"model{suffix}")
    return {suffix: (folder / f"model{suffix}").read_bytes() for suffix in SUFFIXES}


def refusal(path):
    with pytest.raises(InputError) as refused:
        infctx.load_model(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path, suffix):
    tensors = {
        f"{dtype}".removeprefix("torch."): torch.randn(3, 5, dtype=torch.float64).to(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    }
    write_tensors(tensors, tmp_path / f"a{suffix}")
    found = read_tensors(tmp_path / f"a{suffix}")
    assert read_shapes(tmp_path / f"a{suffix}") == dict.fromkeys(tensors, (3, 5))
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_content_decides_the_format(tmp_path, whole_files, suffix):
    other = SUFFIXES[suffix == SUFFIXES[0]]
    (tmp_path / f"model{other}").write_bytes(whole_files[suffix])
    assert infctx.load_model(tmp_path / f"model{other}").sizes.version == 6


def test_other_ways_of_saving_are_read(tmp_path):
    tensors = stored_tensors(random_model(5))
    parameters = OrderedDict((name, torch.nn.Parameter(tensor)) for name, tensor in tensors.items())
    for name, content, options in [
        ("ordered", OrderedDict(tensors), {}),
        ("parameters", parameters, {}),
        ("before torch 1.6", tensors, {"_use_new_zipfile_serialization": False}),
        ("transposed", {n: t.mT.contiguous().mT if t.ndim > 1 else t for n, t in tensors.items()}, {}),
    ]:
        torch.save(content, tmp_path / "model.pth", **options)
        found = stored_tensors(infctx.load_model(tmp_path / "model.pth"))
        assert all(torch.equal(found[key], tensors[key]) for key in tensors), name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_short_is_refused(tmp_path, whole_files, suffix):
    path, content = tmp_path / f"model{suffix}", whole_files[suffix]
    for length in (1, 2, 5, 8, 9, 10, 100, 1000, len(content) // 2, len(content) - 1000, len(content) - 1):
        path.write_bytes(content[:length])
        message = refusal(path)
        assert "not a whole" in message or "not a plain dict" in message, length


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_gives_an_input_error_or_other_numbers(tmp_path, whole_files, suffix):
    random = np.random.default_rng(0)
    path, content = tmp_path / f"model{suffix}", np.frombuffer(whole_files[suffix], np.uint8)
    for trial in range(60):
        damaged = content.copy()
        # in the header or in the directory at the end, where the structure is
        near = random.integers(0, 3000, 8)
        places = near if trial % 2 else len(content) - 1 - near
        damaged[places] = random.integers(0, 256, 8)
        path.write_bytes(damaged.tobytes())
        try:
            infctx.load_model(path)
        except InputError as error:
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    assert "the file is empty" in refusal(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "model.pth")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder: holds no checkpoint; give a .pth, a .safetensors, a checkpoint or"):
        infctx.load_model(tmp_path / "folder")


@pytest.mark.parametrize(
    "content",
    [b"text\n" * 100, b"\0" * 64, b"PK\x03\x04" + b"x" * 50, b"\xff" * 7 + b"\x7f{", b"\x02\0\0\0\0\0\0\0{}", b"\x80"],
)
def test_files_that_hold_something_else_are_refused(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    refusal(tmp_path / "model.pth")


class Planted:
    """Makes a folder when its pickle is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("way", ["value", "whole", "plain pickle", "old torch"])
def test_no_code_in_a_pickle_runs(tmp_path, way):
    path, planted = tmp_path / "model.pth", tmp_path / "planted"
    tensors = stored_tensors(random_model(5))
    if way == "plain pickle":
        path.write_bytes(pickle.dumps({"emb.weight": Planted(planted)}))
    else:
        content = Planted(planted) if way == "whole" else tensors | {"blocks.0.ln1.bias": Planted(planted)}
        torch.save(content, path, _use_new_zipfile_serialization=way != "old torch")
    message = refusal(path)
    assert "no code in it was run" in message
    assert not planted.exists()
    if way != "plain pickle":  # the file is a working trap
        torch.load(path, weights_only=False)
        assert planted.exists()


@pytest.mark.parametrize("value", [3, "text", None, [1.0], {"a": torch.ones(2)}, 1.5])
def test_entries_that_are_not_tensors_are_named(tmp_path, value):
    torch.save(stored_tensors(random_model(5)) | {"blocks.0.ln1.bias": value}, tmp_path / "model.pth")
    assert f"entry 'blocks.0.ln1.bias' is a {type(value).__name__}" in refusal(tmp_path / "model.pth")


def test_names_that_are_not_text_are_named(tmp_path):
    torch.save(stored_tensors(random_model(5)) | {7: torch.ones(2)}, tmp_path / "model.pth")
    assert "entry 7" in refusal(tmp_path / "model.pth")


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), 3, (torch.ones(2),)])
def test_a_file_that_is_not_a_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    assert f"holds a {type(content).__name__}, not a dict" in refusal(tmp_path / "model.pth")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_other_dtypes_are_named(tmp_path, suffix, dtype):
    write_tensors({"emb.weight": torch.ones(3, 2), "head.weight": torch.ones(3, 2).to(dtype)}, tmp_path / f"a{suffix}")
    with pytest.raises(InputError, match=f"tensor head.weight is {dtype}"):
        read_tensors(tmp_path / f"a{suffix}")
    refusal(tmp_path / f"a{suffix}")


def test_sparse_tensors_are_named(tmp_path):
    torch.save({"emb.weight": torch.eye(3).to_sparse()}, tmp_path / "model.pth")
    assert "tensor emb.weight" in refusal(tmp_path / "model.pth")


def test_a_small_file_cannot_claim_much_memory(tmp_path):
    tensors = stored_tensors(random_model(5))
    for name in ("emb.weight", "head.weight"):
        tensors[name] = torch.ones(1, 1).expand(1 << 40, 24)  # 100 TB from a file of a few KB
    torch.save(tensors, tmp_path / "model.pth")
    assert "tensor emb.weight" in refusal(tmp_path / "model.pth")


def test_a_header_whose_length_reads_like_a_zip(tmp_path):
    tensors = stored_tensors(random_model(6))
    bare = safetensors.torch.save(tensors, metadata={"padding": ""})
    missing = 0x4B50 - int.from_bytes(bare[:8], "little")  # "PK" in the two lowest bytes
    content = safetensors.torch.save(tensors, metadata={"padding": "x" * missing})
    (tmp_path / "model.safetensors").write_bytes(content)
    assert content[:2] == b"PK"
    assert infctx.load_model(tmp_path / "model.safetensors").sizes.version == 6


@pytest.mark.parametrize("name", ["emb.weight", "rwkv.embeddings.weight", "blocks.0.att.time_maa_w"])
@pytest.mark.parametrize("shape", [[0, 2**63], [2**64 - 1, 0], [0, 2**62, 2**62], [0, 5], []])
def test_a_shape_out_of_all_bounds_is_refused(tmp_path, name, shape):
    values = bytes(0 if shape else 4)
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, len(values)]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values)
    assert "tensor " in refusal(path)


def pickle_of_shared_tuples(times, as_value=False):
    """Pickles {t: None} or {"t": t}, with t = (1,) and then `times` times t = (t, t): a hash takes 2 ** times steps."""
    tuples = b"K\x01\x85q\x01" + b"h\x01\x86q\x01" * times
    return b"\x80\x02}" + (b"X\x01\0\0\0t" + tuples if as_value else tuples + b"N") + b"s."


def zip_of(path, compression=zipfile.ZIP_STORED, **records):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(f"model/{name.replace('__', '.')}", content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (pickle_of_shared_tuples(40), "its pickle holds tuples of tuples, which no file of weights needs"),
        (pickle_of_shared_tuples(40, as_value=True), "its pickle holds tuples of tuples"),
        (pickle_of_shared_tuples(3), "entry is named by a tuple"),
        (b"\x80\x02cbuiltins\nset\n]" + pickle_of_shared_tuples(9)[3:-3] + b"a\x85R.", "holds tuples of tuples"),
        (b"\x80\x02}\x8a\x20" + b"\x01" * 32 + b"Ns.", "its pickle holds a huge number"),
        (b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x40\x85R.", "its pickle holds a bytearray"),
        (b"\x80\x02}X\x05\0\0\0a\x1b[31Ns.", r"tensor a\x1b[31 has an odd name"),
        (b"\x80\x02}X\x2c\x01\0\0" + b"a" * 300 + b"Ns.", "aaa... has an odd name"),
        (b"\x80\x02}" + b" " * (9 << 20), "list of its tensors is cut short or damaged"),
        (b"\x80\x02}" + (b"X\0\1\0\0" + b"a" * 256 + b"0") * (1 << 15), "more than 8,388,608 bytes"),
        (b"\x80\x02}u", "list of its tensors is cut short or damaged"),
        (b"\x80\x02tttt.", "list of its tensors is cut short or damaged"),
    ],
)
@pytest.mark.parametrize("container", ["zip", "before torch 1.6"])
def test_a_pickle_that_needs_too_much_is_refused_at_once(tmp_path, content, expected, container):
    path, start = tmp_path / "model.pth", time.perf_counter()
    if container == "zip":
        zip_of(path, version="3", data__pkl=content, byteorder="little")
        expected = "bytes, which no file of weights needs" if len(content) > 8 << 20 else expected
    else:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().partition(b"}q\x00.")[0][:-2] + content + b"\x80\x02]q\x00.")
    assert expected in refusal(path)
    assert time.perf_counter() - start < 5  # forever without the check


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("README.md", b"# infctx\nTrains", 'not a .pth of weights: it begins with the text "# infctx"; name a weights'),
        ("a.pth", b"\xff\xfe" * 40, "not a whole .pth or .safetensors file; copy it again, or name a weights file"),
        ("a.pth", b"PK\x03\x04" + b"x" * 50, "its end or its list of parts is damaged"),
    ],
)
def test_the_refusal_of_another_kind_of_file_is_one_short_line(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert expected in message and len(message) < 120 + len(str(tmp_path))


def test_a_compressed_pickle_is_not_unpacked(tmp_path):
    zip_of(tmp_path / "model.pth", zipfile.ZIP_DEFLATED, data__pkl=b"\x80\x02}." + bytes(64 << 20))
    assert (tmp_path / "model.pth").stat().st_size < 1 << 17
    tracemalloc.start()
    assert "model/data.pkl in it is compressed" in refusal(tmp_path / "model.pth")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_zip_of_two_pickles_is_refused(tmp_path):
    """Readers choose differently: the one checked and the one opened might not be the same."""
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        for name in ("model/data.pkl", "model/DATA.PKL", "other/data.pkl"):
            archive.writestr(name, b"\x80\x02}.")
    assert "3 data.pkl in it" in refusal(tmp_path / "model.pth")


def test_values_that_a_file_does_not_hold_are_refused(tmp_path):
    """In the format from before torch 1.6: a storage of 2 GB that is missing from the list of storages."""
    path = tmp_path / "model.pth"
    torch.save({"emb.weight": torch.ones(4, 5)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    content = content[: content.index(b"\x80\x02]", 100)] + b"\x80\x02]."
    content = content.replace(b"K\x14Nt", b"J\0\0\0\x20Nt")
    path.write_bytes(content)
    assert "tensor emb.weight claims more values than the file has" in refusal(path)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_everything_in_a_state_dict_passes_the_check_of_its_pickle(tmp_path, options):
    layer = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    values = torch.ones(4, 5)
    tensors = {"a": values, "tied": values, "part": values[1:], "low": torch.nn.Parameter(values.bfloat16())}
    others = {"n": 12345678901, "s": "text", "none": None, "size": torch.Size([3]), "list": [1, (2, (3, True))]}
    many = {"sparse": torch.eye(3).to_sparse(), "deep": torch.ones([1] * 20), "empty": torch.ones(0)}
    for content in (tensors, OrderedDict(tensors | others | many), layer.state_dict(), optimizer.state_dict(), {}):
        torch.save(content, tmp_path / "model.pth", **options)
        refuse_odd_pth(tmp_path / "model.pth")
    torch.save(tensors, tmp_path / "model.pth", **options)
    found = read_tensors(tmp_path / "model.pth")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_zip_that_torch_did_not_write_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("notes.txt", "nothing here")
    assert "not a whole .pth" in refusal(tmp_path / "model.pth")


@pytest.mark.parametrize("name", ["model.bin", "model", "model.pt", "model.pth.gz"])
def test_other_suffixes_are_not_written(tmp_path, name):
    with pytest.raises(InputError, match=r"written as .pth or .safetensors"):
        infctx.save_weights(random_model(5), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def write_half_and_fail(*arguments, **_):
    target = arguments[1]
    if isinstance(target, io.IOBase):
        target.write(b"half")
    else:
        target.write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"model{suffix}"
    infctx.save_weights(random_model(5), path)
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", write_half_and_fail)
    monkeypatch.setattr(safetensors.torch, "save_file", write_half_and_fail)
    with pytest.raises(KeyboardInterrupt):
        infctx.save_weights(random_model(5, seed=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def limit_file_size():
    """Limits the size of files that this process writes: the closest we get to a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[0][1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
    signal.signal(signal.SIGXFSZ, before[1])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("room", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("streams", [False, True])
def test_the_error_for_a_full_disk_names_the_file(tmp_path, whole_files, limit_file_size, suffix, room, streams):
    source, path = tmp_path / "source.pth", tmp_path / f"model{suffix}"
    infctx.save_weights(random_model(6), source)
    limit_file_size(int(room * len(whole_files[suffix])))
    with pytest.raises((OSError, InputError)) as error:
        if streams:
            copy_weights(open_weights(source), path, torch.float32)
        else:
            infctx.save_weights(random_model(6), path)
    limit_file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert str(path) in str(error.value)
    assert list(tmp_path.iterdir()) == [source]
