"""Checkpoints with one file that no run has written so, and a manifest that agrees with it."""

import json

from safetensors.torch import load_file, save_file

from infctx.formats.checkpoint_folder import size_and_hash, write_manifest


def rewritten(path, name, content):
    """A file of a checkpoint with another content, and the manifest that goes with it."""
    content(path / name) if callable(content) else (path / name).write_text(content)
    entries = json.loads((path / "manifest.json").read_text())
    entries[name] = size_and_hash(path / name)
    write_manifest(path, entries)


def changed(**tensors):
    """Another tensor, or none, in a safetensors file."""

    def change(file):
        content = load_file(file) | {name.replace("__", "/"): tensor for name, tensor in tensors.items()}
        save_file({name: tensor for name, tensor in content.items() if tensor is not None}, file)

    return change
