"""The showcase: one tiny model, trained three ways to recall a fact eight segments later.

    make showcase                                              a small Finch, three seeds: about eight CPU minutes
    make showcase ARGS="--versions 7 --steps 600"              another model: 5 is Eagle, 7 is Goose, which needs longer
    make showcase ARGS="--seeds 1 --steps 20"                  a quick look: nothing is learned yet
    .venv/bin/python tools/showcase.py --publish               and puts it into the README and docs/

Every run is an `infctx train configs/recall-tiny.yaml` with other settings: the exact gradient; the gradient truncated
at every segment, the state carried on; and no carry, every segment as a document.  After each run the model is
asked for the facts of new documents, from their beginning to their end; the right answers are in the run's
evaluation.json.  Runs that are finished are not repeated: remove --folder to begin again.  tools/showcase_picture.py
draws the results.  docs/evidence.md says how to read them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import infctx
from infctx.data.synthetic_tasks import VALUES, Task
from infctx.model.rwkv import RWKV
from infctx.model.sizes import NAMES
from infctx.report.step_log import read_step_log
from infctx.settings.load import load_config

from real_runs import ROOT, commit, run_infctx, side_by_side, write_json
from showcase_picture import describe, publish, table
from synthetic_documents import write_stores

CONFIG = ROOT / "configs" / "recall-tiny.yaml"
TASK = Task("recall", gap_tokens=128)
ARMS = {
    "exact": [],
    "truncated": ["window.gradient_segments=1"],
    # Segments without an answer are passed over, so that a step has as many answers as the others: one in each lane.
    "no carry": ["data.document_tokens=16", "window.window_tokens=16"],
}
"""Ways to train, and their settings."""
DOCUMENTS, QUESTIONS, AT_ONCE = 10000, 512, 128
RESULT = "showcase.json"
NEW_DOCUMENTS = 1000  # a seed that is no run's
CURVE_POINTS = 50  # of a run's losses: means of as many steps as it takes


class Wanted(NamedTuple):
    """A run to do, and where."""

    version: int
    arm: str
    seed: int
    steps: int
    folder: Path

    @property
    def run_folder(self) -> Path:
        name = f"{NAMES[self.version].lower()}-{self.arm.replace(' ', '-')}-seed{self.seed}"
        return self.folder / f"steps-{self.steps}" / name


def main() -> None:
    """Does the runs that are not done yet, and shows what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, nargs="+", choices=NAMES, default=[6], help="default: 6")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default %(default)s)")
    parser.add_argument("--steps", type=int, help="of a run (default: the configuration's)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "showcase", help="default: runs/showcase")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, a core each (default 2)")
    parser.add_argument("--publish", action="store_true", help="put picture and table into README.md and docs/")
    options = parser.parse_args()
    steps = options.steps or load_config(CONFIG, []).optimizer.steps
    store = options.folder / "documents"
    if not store.exists():
        print(f"writing {DOCUMENTS:,} documents to {store}", flush=True)
        write_stores(TASK, store, (DOCUMENTS, 1), seed=0)
    kinds = product(range(options.seeds), options.versions, ARMS)  # a whole picture of one seed first
    wanted = [Wanted(version, arm, seed, steps, options.folder) for seed, version, arm in kinds]
    done: dict[int, dict[str, Any]] = {}
    for place, result in side_by_side(train, wanted, options.workers):
        done[place] = result
        right = f"{result['right']:,} of {result['asked']:,} answers right"
        print(f"[{len(done)}/{len(wanted)}] {wanted[place].run_folder}: {right}", flush=True)
    results = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "steps": steps,
        "runs": [done[place] for place in range(len(wanted))],
    }
    write_json(options.folder / "results.json", results)
    print(f"\n{table(results)}\n\n{describe(results)}")
    folders = [one.run_folder for one in wanted]
    page = options.folder / "report.html"
    page.unlink(missing_ok=True)  # of fewer runs, perhaps
    joined = ["--join-seeds"] if options.seeds > 1 else []
    run_infctx(["report", *folders, *joined, "--output", page], options.folder / "report.log", page)
    print(f"the report of all runs is {page}")
    if options.publish:
        publish(results)


def train(one: Wanted) -> dict[str, Any]:
    """Does a run, unless it is done, and asks its model; returns what the picture needs of it."""
    kept = one.run_folder / RESULT
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    began = time.process_time()
    _infctx_train(one)
    right = right_answers(infctx.load_model(one.run_folder), one.seed)
    seconds = time.process_time() - began
    _write_evaluation(one, right)
    losses = [entry["loss"] for entry in read_step_log(one.run_folder)]
    every = math.ceil(len(losses) / CURVE_POINTS)
    result = {
        "version": one.version,
        "arm": one.arm,
        "seed": one.seed,
        "right": right,
        "asked": QUESTIONS,
        "steps_of_a_point": every,
        "losses": [round(float(np.mean(losses[i : i + every])), 4) for i in range(0, len(losses), every)],
        "cpu_seconds": round(seconds, 1),
    }
    write_json(kept, result)
    return result


@torch.no_grad()
def right_answers(model: RWKV, seed: int) -> int:
    """Returns how many of QUESTIONS about new documents, read from their beginning, get the right answer."""
    random, right = np.random.default_rng([NEW_DOCUMENTS, seed]), 0
    for _ in range(QUESTIONS // AT_ONCE):
        tokens, targets = map(torch.from_numpy, TASK.batch(random, AT_ONCE))
        answers = model.logits(model(tokens)[0][:, TASK.questions]).argmax(-1)
        right += int((answers == targets[:, TASK.questions]).sum())
    return right


def _infctx_train(one: Wanted) -> None:
    """Does `infctx train` in this process; what it prints goes into a file beside the run's folder."""
    store = one.folder / "documents" / "train"
    settings = [
        f"model.version={one.version}",
        f"data.store={store}",
        "data.held_out=null",
        f"optimizer.steps={one.steps}",
        f"run.folder={one.run_folder}",
        f"run.seed={one.seed}",
        f"run.save_every_steps={one.steps}",
        "run.loggers=[]",
        "run.device=cpu",
        *ARMS[one.arm],
    ]
    run_infctx(["train", CONFIG, *settings], one.run_folder.with_suffix(".log"), one.run_folder / "model.pth")


def _write_evaluation(one: Wanted, right: int) -> None:
    """Writes the right answers as `infctx evaluate --what recall` would, for `infctx report`."""
    row = {"gap_tokens": TASK.gap_tokens, "keys": TASK.keys, "overwritten": False, "right": right, "asked": QUESTIONS}
    model = {"name": str(one.run_folder), "recall": [row | {"chance": 1 / VALUES}]}
    tokens = QUESTIONS * TASK.num_tokens
    content = {"store": "new documents", "tokens": tokens, "segment_tokens": TASK.num_tokens, "models": [model]}
    write_json(one.run_folder / "evaluation.json", content)


if __name__ == "__main__":
    main()
