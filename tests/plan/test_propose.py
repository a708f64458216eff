"""What one GPU can do: the proposal fits, is a configuration that infctx reads, and is the best of the table."""

import pytest

import infctx
from infctx.model.sizes import published_sizes
from infctx.plan.memory import rank_memory
from infctx.plan.propose import GPUS, WAYS, propose
from infctx.plan.strategy import FILLED, resolve_strategy
from infctx.settings.load import load_config

from runs import infctx_here
from tiny_models import random_model


@pytest.mark.parametrize("gpu", [8, 10.5, 24, 48])
@pytest.mark.parametrize("size", ["finch-1.6b", "goose-2.9b", "eagle-7b"])
def test_the_proposal_fits_and_can_be_read(tmp_path, size, gpu):
    proposal = propose(size, gpu)
    table = {line[:40].strip(): line[40:].split() for line in proposal.text.splitlines()}
    gpus = sorted({*GPUS, gpu})
    assert table["what learns"] == " ".join(f"{each:g} GB" for each in gpus).split()
    cells = {way.title: table[way.title] for way in WAYS}
    place = gpus.index(gpu)
    best = [way for way in WAYS if cells[way.title][place] != "-"]
    if not best:
        assert proposal.configuration is None
        assert f"does not fit a GPU of {gpu:g} GB; choose a smaller one" in proposal.text
        return
    (tmp_path / "config.yaml").write_text(proposal.configuration)
    config = load_config(tmp_path / "config.yaml")
    assert config.model.learn == best[0].learn
    assert f"{config.window.segment_tokens:,}" == cells[best[0].title][place]
    resolved = resolve_strategy(config, published_sizes(size), "cuda", round(gpu * 1e9))
    assert rank_memory(resolved, published_sizes(size), "cuda").device <= FILLED * gpu * 1e9
    for way in WAYS:  # more memory, no shorter segment
        tokens = [0 if cell == "-" else int(cell.replace(",", "")) for cell in cells[way.title]]
        assert tokens == sorted(tokens)


def test_a_model_of_ones_own_and_what_should_learn(tmp_path):
    infctx.save_weights(random_model(7), tmp_path / "own.pth")
    file = tmp_path / "new.yaml"
    command = ("plan", tmp_path / "own.pth", "--gpu", "8", "--learn", "initial_state", "--write", file)
    code, output, errors = infctx_here(*command)
    assert code == 0, errors
    assert f"written to {file}" in output
    config = load_config(file)
    assert (config.model.learn, config.model.weights) == ("initial_state", tmp_path / "own.pth")
    code, _, errors = infctx_here(*command)
    assert code == 2 and errors == f"infctx: {file}: exists already; name a new file\n"
