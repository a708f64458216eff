"""What a user reads while the hub does not answer: one line for each time that huggingface_hub tries again.

Without this there are four: what went wrong, and that it is tried again, each from its own handler and from ours.
"""

import logging
import re

ITS_LOGGER = "huggingface_hub"
WHERE_IT_TRIES = "huggingface_hub.utils._http"
RETRY = re.compile(r"(Retrying in|Rate limited\. Waiting) ([\d.]+)s.*\[Retry (\d+)/(\d+)\]")


def say_retries_once() -> None:
    """Changes what huggingface_hub logs, for as long as this process lives."""
    logging.getLogger(ITS_LOGGER).handlers.clear()
    logger = logging.getLogger(WHERE_IT_TRIES)
    if _in_one_line not in logger.filters:
        logger.addFilter(_in_one_line)


def _in_one_line(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if match := RETRY.match(message):
        limited, seconds, number, most = match.groups()
        problem = "the hub asks to wait" if limited.startswith("Rate") else "the hub does not answer"
        record.msg = f"{problem}; trying again in {float(seconds):g} s ({number} of {most})"
        record.args = ()
    return "thrown while requesting" not in message
