"""An evaluation of the held-out loss as the loggers and the log show it."""

from __future__ import annotations

from collections.abc import Sequence

from infctx.evaluate.loss_by_position import format_value, total, unit_of
from infctx.evaluate.record import Evaluation, held_out_loss, of_same_documents
from infctx.settings.config import Config


def held_out_scalars(evaluation: Evaluation, config: Config) -> dict[str, float]:
    """Returns the numbers of an evaluation by name: of all documents, by position, and by source."""
    without = "_without_state" if config.model.tunes_state and not evaluation.with_state else ""
    scalars = {}
    for source, buckets in {"": evaluation.buckets, **evaluation.sources}.items():
        for bucket in [total(buckets), *buckets]:
            place = f"_{bucket.begin}-{bucket.end - 1}" if bucket.end else ""
            name = f"held_out{without}{f'_of_{source}' if source else ''}{'_by_position' if place else ''}"
            scalars[f"{name}/nats_per_token{place}"] = bucket.nats_per_token
            if bucket.bits_per_byte is not None:
                scalars[f"{name}/bits_per_byte{place}"] = bucket.bits_per_byte
    return scalars


def line_of(evaluation: Evaluation, earlier: Sequence[Evaluation]) -> str:
    """Returns a line about an evaluation, compared with the earlier ones."""
    whole = total(evaluation.buckets)
    line = f"held-out loss {format_value(whole)} {unit_of(whole)}"
    for source, buckets in evaluation.sources.items():
        line += f", {source} {format_value(total(buckets))}"
    others = [other for other in earlier if of_same_documents(other, evaluation)]
    if not others:
        return line
    best = min(others, key=held_out_loss)
    if held_out_loss(evaluation) < held_out_loss(best):
        return f"{line} (best so far)"
    when = f"at step {best.step}" if best.step else "before training"
    return f"{line} (best: {format_value(total(best.buckets))} {when})"
