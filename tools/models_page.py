"""Writes docs/models.md, the page of published models, from infctx/hub/published.py and the shipped configurations.

python tools/models_page.py
"""

from __future__ import annotations

from pathlib import Path

from infctx.hub.published import EAGLE, FINCH, FLA_FOLDERS, GOOSE, PUBLISHED_FILES, PUBLISHED_FOLDERS
from infctx.model.sizes import NAMES, PUBLISHED_SIZES
from infctx.settings.load import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
OPENING = """\
# Published models
infctx continues training from published weights of Goose (RWKV-7), Finch (RWKV-6) and Eagle (RWKV-5.2). Name them as
they are on the Hugging Face Hub, `OWNER/REPOSITORY:FILE`, wherever infctx takes a model. They are downloaded once, at
first use. The files listed here are in bf16 and under the Apache-2.0 license.

```yaml
model:
  weights: {name}
  size: {size}
```

`size` can be left out. With it, `infctx plan` shows the memory of the run before anything is downloaded.

- Downloads go to the cache that all programs of the hub share, `~/.cache/huggingface/hub`, or below `HF_HOME` if you
  set that. What is there is used without asking the hub, so a run resumes without a network.
- If a download stops, run the same command again: it continues where it stopped. The finished file's SHA-256 is
  compared with the hub's.
- `OWNER/REPOSITORY@REVISION:FILE` takes the file of a commit, a branch or a tag.
- `OWNER/REPOSITORY` is enough where a repository holds one model. Otherwise infctx lists what it holds. If a name is
  not quite right, it lists names like it.
- For a private repository, or one with conditions of use, log in once with `hf auth login`, or set `HF_TOKEN`.
- To download from a mirror, set `HF_ENDPOINT` to its address. With `HF_HUB_OFFLINE=1` nothing is downloaded.
- A path that exists on your machine always comes first. A file that you downloaded otherwise is named by its path.

(Written by `python tools/models_page.py` from infctx/hub/published.py.)

## Three versions
All three keep a state of fixed size, change it with each token, and read from it. They differ in the change. In
**Eagle**, each key channel of the state fades at its own fixed rate, and a token adds its value under its key. In
**Finch**, the token sets the rates, so it can make the state keep or forget. In **Goose**, the token first takes away
what the state holds in the direction of its key, as much of each channel as it likes, and then adds (the delta rule):
so it can replace a value, not only let all of it fade. Its blocks also blend their values with those of the first
block, and its channel mix has no gate. The state has the same size in all three.

{sizes}

The state is that of one lane, in fp32.

## Files
Each repository has many more files than these, so copy the name exactly, after the repository and a colon. The last
column lists the files in [configs](../configs) that start from it.
"""
NEWER = """\
Newer files of Goose come to this repository with their date in the name, and older ones may go. For a file that is not
listed, copy its name from the repository's page on the hub, and give it in the same way, `BlinkDL/rwkv7-g1:FILE`.
`model.size` is in the table above.
"""
FOLDERS = """\
## Folders in Hugging Face's layout
These repositories have the weights as `model.safetensors` or `pytorch_model.bin`, whole or in parts, under Hugging
Face's own names. Name the repository alone, as in `weights: RWKV/v6-Finch-3B-HF`, or a folder on your machine that has
such a model. infctx never runs the Python code in it.

{folders}

infctx also reads folders and files with the tensor names of flash-linear-attention (Finch and Goose). These hold Goose;
the last column lists the files in [configs](../configs) that start from it:

{fla_folders}

## Not read
- RWKV-5.0 and 5.1, such as `RWKV-5-World-0.1B-v1-20230803-ctx4096.pth`, and RWKV-4: these are other architectures.
- RWKV-7a and 7b, which have DeepEmbed: these are other architectures too.

infctx refuses such a file by its name, before it is downloaded, or when it opens it, by its tensors.

## Back to other programs
`infctx export MODEL OUTPUT` writes files for other programs. MODEL is a run's folder, a checkpoint or a weights file.

| program | command |
|---|---|
| the `rwkv` package, ChatRWKV, RWKV-Runner | `infctx export runs/books books.pth` |
| Hugging Face's transformers | `infctx export runs/books books-hf/ --names huggingface` |
| flash-linear-attention, Finch and Goose | `infctx export runs/books books-fla/ --names fla` |
| tuned states: RWKV-Runner, ChatRWKV | `infctx export runs/chats state.pth` |
| tuned states: Ai00, web-rwkv | `infctx export runs/chats state.st` |
| tuned states: the `rwkv` package | `infctx export runs/chats merged.pth --form merged` |

[State tuning](state-tuning.md) has more about the last three.

A folder for transformers gets `model.safetensors` and `config.json`. It also needs the model's Python code and
tokenizer, which infctx does not include. Get the `.py`, `.txt` and tokenizer `.json` files from one of the repositories
above, of the same architecture, and load the folder with `trust_remote_code=True`. (Repeating `--include` needs `hf`
1.0 or later.)

```sh
hf download RWKV/v6-Finch-1B6-HF --include "*.py" --include "*.txt" --include "*token*.json" --local-dir books-hf
```

For Eagle, get them from `RWKV/rwkv-5-world-1b5`.
"""


def main() -> None:
    PAGE.write_text(models_page(), encoding="utf-8")
    print(f"wrote {PAGE}")


def models_page() -> str:
    """Returns the whole page as Markdown."""
    used = _configurations()
    shown = next(file for file in PUBLISHED_FILES if file.size == "goose-2.9b")
    parts = [OPENING.format(name=shown.hub_name, size=shown.size, sizes=_sizes())]
    architectures = {GOOSE: "Goose (RWKV-7)", FINCH: "Finch (RWKV-6)", EAGLE: "Eagle (RWKV-5.2)"}
    for repository, architecture in architectures.items():
        parts.append(f"{architecture}, in `{repository}`:\n")
        parts.append("| `model.size` | file | GB | configs |\n|---|---|---:|---|")
        for file in PUBLISHED_FILES:
            if file.repository == repository:
                users = ", ".join(used.get(file.name, []))
                parts.append(f"| {file.size} | `{file.name}` | {file.num_bytes / 1e9:.1f} | {users} |")
        parts.append("")
        if repository == GOOSE:
            parts.append(NEWER)
    folders = "\n".join(f"- `{folder}`" for folder in PUBLISHED_FOLDERS)
    return "\n".join(parts) + "\n" + FOLDERS.format(folders=folders, fla_folders=_fla_folders(used))


def _sizes() -> str:
    lines = ["| `model.size` | version | parameters | layers | width | state |", "|---|---|---:|---:|---:|---:|"]
    for name, sizes in PUBLISHED_SIZES.items():
        counts = f"{sizes.num_parameters:,} | {sizes.num_layers} | {sizes.width:,}"
        lines.append(f"| {name} | {NAMES[sizes.version]} | {counts} | {4 * sizes.state_elements / 1e6:.1f} MB |")
    return "\n".join(lines)


def _fla_folders(used: dict[str, list[str]]) -> str:
    lines = ["| `model.size` | folder | configs |", "|---|---|---|"]
    for repository, size in FLA_FOLDERS.items():
        lines.append(f"| {size} | `{repository}` | {', '.join(used.get(Path(repository).name, []))} |")
    return "\n".join(lines)


def _configurations() -> dict[str, list[str]]:
    """Returns, by the name of a weights file, the shipped configurations that start from it."""
    used: dict[str, list[str]] = {}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        weights = load_config(path).model.weights
        if weights is not None:
            used.setdefault(weights.name.rpartition(":")[2], []).append(path.stem)
    return used


if __name__ == "__main__":
    main()
