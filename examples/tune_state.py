"""Learns an initial state for a model from one text, with only the public functions of infctx.

    python examples/tune_state.py book.txt --model runs/finch-tiny/model.pth --output state.pth --steps 20

RWKV reads a document with a state of fixed size, which starts as zeros. Here the weights are frozen, and the state that
documents start from is learned: a small file that makes the model write more like the text. `infctx generate --state`,
RWKV-Runner and ChatRWKV load it.

This is just the heart of `infctx tune`. The command also reads many documents, in many lanes and on many GPUs;
it reports a held-out loss; and it writes checkpoints, from which it resumes bit for bit.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import infctx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", type=Path, help="a UTF-8 text file")
parser.add_argument("--model", required=True, help="a .pth, a .safetensors, or the folder of a run")
parser.add_argument("--output", default="state.pth", help="the state file to write (default %(default)s)")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--learning-rate", type=float, default=0.1, help="in units of the model's own states: see 5.")
parser.add_argument("--window-tokens", type=int, default=256, help="tokens of each piece of the text")
parser.add_argument("--prompt-tokens", type=int, default=8, help="at the beginning of each piece, without loss")
options = parser.parse_args()

# 1. The model. Its weights are frozen; only the initial state learns, zeros so far: (layers, heads, N, N).
try:
    model = infctx.load_model(options.model).requires_grad_(False)
    text = options.text.read_text(encoding="utf-8")
except (infctx.InputError, OSError, UnicodeDecodeError) as error:
    parser.error(str(error))
learned = [part.requires_grad_() for part in model.add_initial_state() if part is not None]  # .wkv alone

# 2. The text as token ids. A vocabulary of 257 is bytes; the published models have the World vocabulary.
tokenizer = infctx.tokenizer("bytes" if model.sizes.vocab_size == 257 else "world")
ids = torch.from_numpy(tokenizer.encode(text).astype("int64"))

# 3. Windows: pieces of the text, (pieces, T). Each is a separate document: it starts from the initial state.
length = min(options.window_tokens, len(ids) - 1)
pieces = torch.stack([ids[begin : begin + length + 1] for begin in range(0, len(ids) - length, length)])
tokens, targets = pieces[:, :-1], pieces[:, 1:].clone()  # the target is the next token

# 4. A loss mask. A token with target -100 is read, but has no loss. In pairs of a prompt and an answer, mask the
#    prompt: then the state learns to answer, not to ask. In plain text, the first tokens of a piece are guesswork.
targets[:, : options.prompt_tokens] = -100


@torch.no_grad()
def mean_loss() -> float:
    """Returns the loss of the first pieces, in nats per token. The state learns from them; other texts gain less."""
    hidden, _ = model(tokens[:8])  # (B, T, D), each row from the initial state
    return float(cross_entropy(model.logits(hidden).flatten(0, 1), targets[:8].flatten()))  # leaves -100 out


# 5. The unit. A number in a state is around 10 in one layer and 1,000 in the next, and Adam moves all of them by about
#    the learning rate. So let the parameters count in the size of the states that the model itself makes of the text.
with torch.no_grad():
    _, made = model(tokens[:8])
    size = made.wkv.square().mean((1, 4)).sqrt()[..., None]  # (layers, heads, N, 1)
model.set_initial_units(infctx.State(size, torch.ones(1), torch.ones(1)))

# 6. The steps, of four pieces each. window_backward adds the exact gradient of the mean loss to `.grad`. It holds the
#    activations of one segment at a time, so a window of 100,000 tokens takes time, but hardly more memory.
print(f"loss before: {mean_loss():.4f}")
optimizer = torch.optim.AdamW(learned, lr=options.learning_rate, weight_decay=0.0)
random = torch.Generator().manual_seed(0)
for step in range(1, options.steps + 1):
    chosen = torch.randint(len(tokens), (4,), generator=random)
    loss, _ = infctx.window_backward(model, tokens[chosen], targets[chosen], segment_tokens=256)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss:.4f}")
print(f"loss after:  {mean_loss():.4f}")

# 7. The file. Its suffix chooses the form: .pth for RWKV-Runner and ChatRWKV, .st for Ai00. infctx.load_state reads it.
infctx.save_state(model.initial_state(1), options.output)
print(f"wrote {options.output}; try: infctx generate {options.model} --state {options.output} --prompt '...'")
