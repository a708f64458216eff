"""Checkpoints with one wrong file, and a manifest that matches it."""

import json

from safetensors.torch import load_file, save_file

from infctx.formats.checkpoint_folder import size_and_hash, write_manifest


def rewritten(path, name, content):
    """Replaces a file of a checkpoint, and updates the manifest to match."""
    content(path / name) if callable(content) else (path / name).write_text(content)
    entries = json.loads((path / "manifest.json").read_text())
    entries[name] = size_and_hash(path / name)
    write_manifest(path, entries)


def changed(**tensors):
    """Replaces or removes a tensor in a safetensors file."""

    def change(file):
        content = load_file(file) | {name.replace("__", "/"): tensor for name, tensor in tensors.items()}
        save_file({name: tensor for name, tensor in content.items() if tensor is not None}, file)

    return change
