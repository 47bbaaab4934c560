"""`serve` as a process that is ended while it speaks: speech goes on for the grace that was given, or until a second signal."""

from __future__ import annotations

import signal
import time

import httpx
import pytest
from speech_server import WITHIN_S, asked, serve_process

LONG = asked(max_new_tokens=15_000, input="نص طويل جدا. " * 700, response_format="pcm")


@pytest.mark.slow
@pytest.mark.parametrize(("grace_s", "num_signals"), [(0.5, 1), (3600, 2)])
def test_speech_ends_with_the_grace_or_a_second_signal(tiny_dir, repository, tmp_path, grace_s, num_signals):
    """Ten minutes of speech are begun; the end does not wait for them, and its status is 0."""
    options = ("--slots", 1, "--grace-s", grace_s)
    with serve_process(tiny_dir, repository, tmp_path / "voices", *options) as (process, url):
        with (
            httpx.Client(base_url=url, timeout=WITHIN_S, trust_env=False) as client,
            client.stream("POST", "/v1/audio/speech", json=LONG | {"stream": True}) as answer,
        ):
            pieces = answer.iter_raw()
            next(pieces)
            for _ in range(num_signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(1.0)  # two that are pending together are one
            with pytest.raises(httpx.RemoteProtocolError):  # cut, not ended as if that were all
                list(pieces)
        assert process.wait(WITHIN_S) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
