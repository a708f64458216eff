"""RWKV's official names of weights and ours; no other module has both."""

from __future__ import annotations

from infctx.model.sizes import Sizes


def stored_names(sizes: Sizes) -> dict[str, str]:
    """Returns our name -> official name of every weight, in the official order, without the initial state."""
    names = {"embedding.weight": "emb.weight"}
    for layer in range(sizes.num_layers):
        for ours, stored in block_names(sizes.version, layer == 0, sizes.keeps_first_blend).items():
            ours = ours if ours.startswith("embedding_norm") else f"blocks.{layer}.{ours}"
            names[ours] = f"blocks.{layer}.{stored}"
    return names | {
        "output_norm.weight": "ln_out.weight",
        "output_norm.bias": "ln_out.bias",
        "head.weight": "head.weight",
    }


def block_names(version: int, first: bool, keeps_first_blend: bool = False) -> dict[str, str]:
    """Returns the same for one block, without `blocks.N.`; the first block also has the norm of the embedding."""
    norms = {"time_norm": "ln1", "channel_norm": "ln2"} | ({"embedding_norm": "ln0"} if first else {})
    names = {f"{ours}.{part}": f"{stored}.{part}" for ours, stored in norms.items() for part in ("weight", "bias")}
    if version == 7:
        return names | _goose_names(blends=keeps_first_blend or not first)
    kind = "time_mix" if version == 5 else "time_maa"
    letters = {"key": "k", "value": "v", "receptance": "r", "gate": "g"}
    if version == 6:
        letters = {"inner": "x", "decay": "w"} | letters
    mixing = {f"mix_{word}": f"{kind}_{letter}" for word, letter in letters.items()}
    if version == 6:
        mixing |= {"mix_down": "time_maa_w1", "mix_up": "time_maa_w2"}
    mixing["decay"] = "time_decay"
    if version == 6:
        mixing |= {"decay_down": "time_decay_w1", "decay_up": "time_decay_w2"}
    matrices = ("receptance", "key", "value", "output", "gate")
    return (
        names
        | {f"time_mix.mixing.{ours}": f"att.{stored}" for ours, stored in mixing.items()}
        | {"time_mix.bonus": "att.time_faaaa"}
        | {f"time_mix.{matrix}.weight": f"att.{matrix}.weight" for matrix in matrices}
        | {f"time_mix.head_norm.{part}": f"att.ln_x.{part}" for part in ("weight", "bias")}
        | {"channel_mix.mix_key": f"ffn.{kind}_k", "channel_mix.mix_receptance": f"ffn.{kind}_r"}
        | {f"channel_mix.{matrix}.weight": f"ffn.{matrix}.weight" for matrix in ("key", "receptance", "value")}
    )


def _goose_names(blends: bool) -> dict[str, str]:
    """blends: whether the block has the weights that blend its values with those of the first block."""
    letters = {"receptance": "r", "decay": "w", "key": "k", "value": "v", "rate": "a", "gate": "g"}
    names = {f"mix_{word}": f"x_{letter}" for word, letter in letters.items()}
    for word, letter in {"decay": "w", "rate": "a", "first_value": "v", "gate": "g"}.items():
        if letter != "g" and (letter != "v" or blends):
            names[word] = f"{letter}0"
        if letter != "v" or blends:
            names |= {f"{word}_down": f"{letter}1", f"{word}_up": f"{letter}2"}
    names |= {"removal_scale": "k_k", "key_rate": "k_a", "bonus": "r_k"}
    names |= {f"{matrix}.weight": f"{matrix}.weight" for matrix in ("receptance", "key", "value", "output")}
    names |= {f"head_norm.{part}": f"ln_x.{part}" for part in ("weight", "bias")}
    return {f"time_mix.{ours}": f"att.{stored}" for ours, stored in names.items()} | {
        "channel_mix.mix_key": "ffn.x_k",
        "channel_mix.key.weight": "ffn.key.weight",
        "channel_mix.value.weight": "ffn.value.weight",
    }
