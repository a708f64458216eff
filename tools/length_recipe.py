"""Longer documents after training: how much of a model's loss far beyond its training length 5% more steps repair.

    python tools/length_recipe.py                         three seeds; half an hour on two quiet cores
    python tools/length_recipe.py --seeds 1 --steps 24    a quick look

A small Finch is trained at 512 tokens (configs/length-tiny.yaml).  Then it gets 5% more steps of as many tokens in each
of several ways (configs/length-tiny-longer.yaml).  The table has the loss on held-out documents by position, up to 32
times the training length: the mean over the seeds, and its standard error.  Runs that are finished are not repeated:
remove --folder to begin again.  docs/length.md says what the ways are and how to read the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from infctx.settings.load import load_config

from real_runs import ROOT, commit, run_infctx, side_by_side, write_json

SHORT, LONGER = ROOT / "configs" / "length-tiny.yaml", ROOT / "configs" / "length-tiny-longer.yaml"
WAYS = {
    "none": [],
    "the same as before": ["data.document_tokens=512", "window.window_tokens=512", "window.lanes=32"],
    "state passing": [
        "data.document_tokens=512",
        "window.window_tokens=2048",
        "window.lanes=8",
        "window.gradient_segments=1",
        "window.carry=lane",
    ],
    "truncated": ["window.gradient_segments=1"],
    "exact": [],
    "exact, documents that grow": [
        "data.curriculum.from_tokens=512",
        "data.curriculum.to_tokens=16384",
        "data.curriculum.steps={curriculum}",
    ],
}
"""More steps, and their settings beside those of LONGER."""
SHARE = 20  # of the first run's steps: one in 20 more
Losses = dict[str, dict[int, float]]
"""Way -> first position of a bucket -> loss."""


class Wanted(NamedTuple):
    """A seed: one model, and everything that is done to it."""

    seed: int
    steps: int
    folder: Path
    settings: tuple[str, ...]


def main() -> None:
    """Does the runs that are not done yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="models (default %(default)s)")
    parser.add_argument("--steps", type=int, help="of the first training (default: the configuration's)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "length-recipe", help="runs/length-recipe")
    parser.add_argument("--workers", type=int, default=2, help="models at the same time, a core each (default 2)")
    parser.add_argument("settings", nargs="*", help="for every run, such as data.store=data/books/train")
    options = parser.parse_args()
    steps = options.steps or load_config(SHORT, []).optimizer.steps
    options.folder.mkdir(parents=True, exist_ok=True)
    wanted = [Wanted(seed, steps, options.folder, tuple(options.settings)) for seed in range(options.seeds)]
    done: dict[int, Losses] = {}
    for place, losses in side_by_side(do_seed, wanted, options.workers):
        done[place] = losses
        print(f"[{len(done)}/{len(wanted)}] seed {wanted[place].seed} done", flush=True)
    seeds = [done[place] for place in range(len(wanted))]
    write_json(options.folder / "results.json", {"commit": commit(), "steps": steps, "seeds": seeds})
    print(f"\n{table(seeds)}")


def do_seed(wanted: Wanted) -> Losses:
    """Trains a model and gives it more steps in every way; returns the losses by position."""
    base = wanted.folder / f"steps-{wanted.steps}" / f"seed{wanted.seed}"
    again = [f"run.seed={wanted.seed}", "run.loggers=[]", "run.device=cpu", *wanted.settings]
    steps = [f"optimizer.steps={wanted.steps}", f"run.save_every_steps={wanted.steps}"]
    weights = base / "model.pth"
    run_infctx(["train", SHORT, *again, *steps, f"run.folder={base}"], base.with_suffix(".log"), weights)
    more = max(1, wanted.steps // SHARE)
    found: Losses = {}
    for way, settings in WAYS.items():
        if way == "none":
            continue
        folder = base.parent / f"{base.name}-{way.replace(',', '').replace(' ', '-')}"
        filled = [setting.format(curriculum=max(1, 2 * more // 3)) for setting in settings]
        given = [f"model.weights={weights}", f"optimizer.steps={more}", f"run.folder={folder}"]
        words = ["train", LONGER, *again, *given, *filled]
        run_infctx(words, folder.with_suffix(".log"), folder / "model.pth")
        before, after = json.loads((folder / "held_out.json").read_text(encoding="utf-8"))["evaluations"]
        found.setdefault("none", _by_position(before))
        found[way] = _by_position(after)
    return found


def _by_position(evaluation: dict[str, Any]) -> dict[int, float]:
    """Returns the loss of each bucket, in bits per byte if the bytes are known."""
    return {bucket["begin"]: bucket["bits_per_byte"] or bucket["nats_per_token"] for bucket in evaluation["buckets"]}


def table(seeds: list[Losses]) -> str:
    """Returns Markdown: the mean loss over the seeds, and its standard error, by more steps and position."""
    begins = sorted(int(begin) for begin in seeds[0]["none"])
    lines = [f"| {1 / SHARE:.0%} more steps | {' | '.join(f'from {begin:,}' for begin in begins)} |"]
    lines.append("|---|" + "---:|" * len(begins))
    for way in seeds[0]:
        cells = []
        for begin in begins:
            losses = [losses[way][begin] for losses in seeds]
            error = f" ± {statistics.stdev(losses) / len(losses) ** 0.5:.3f}" if len(losses) > 1 else ""
            cells.append(f"{statistics.mean(losses):.3f}{error}")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
