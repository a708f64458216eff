"""What is logged while the hub does not answer, by huggingface_hub's own way of trying again."""

import logging

import pytest
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import http_backoff

from infctx.hub.retries import say_retries_once


def test_one_line_for_each_time(hub, caplog, capfd):
    say_retries_once()
    with caplog.at_level(logging.WARNING), pytest.raises(HTTPError):
        http_backoff("GET", "http://127.0.0.1:9/", max_retries=2, base_wait_time=0.01)
    assert [record.getMessage() for record in caplog.records] == [
        "the hub does not answer; trying again in 0.01 s (1 of 2)",
        "the hub does not answer; trying again in 0.02 s (2 of 2)",
    ]
    assert capfd.readouterr().err == ""  # where its own handler writes
