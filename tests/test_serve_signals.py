"""`serve` as a process that is ended while it speaks: speech goes on for the grace that was given, or until a second signal."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from speech_server import CLIP, CLIP_TEXT, WITHIN_S, asked

LONG = asked(max_new_tokens=15_000, input="نص طويل جدا. " * 700, response_format="pcm")


@pytest.mark.slow
@pytest.mark.parametrize(("grace_s", "num_signals"), [(0.5, 1), (3600, 2)])
def test_speech_ends_with_the_grace_or_a_second_signal(tiny_dir, repository, tmp_path, grace_s, num_signals):
    """Ten minutes of speech are begun; the end does not wait for them, and its status is 0."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = "import sys; sys.argv[0] = 'serve'; from tools.serve.cli import main; main()"
    options = ["--config", tiny_dir / "pipeline.toml", "--voices", tmp_path / "voices", "--port", port, "--slots", 1]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            *map(str, [tiny_dir / "model", *options, "--device", "cpu", "--grace-s", grace_s]),
        ],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WITHIN_S, trust_env=False) as client:
            end = time.monotonic() + 2 * WITHIN_S
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        break
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < end
                time.sleep(0.1)
            form = {"name": "salma", "consent": "yes", "ref_text": CLIP_TEXT}
            client.post("/v1/audio/voices", data=form, files={"audio_sample": CLIP.read_bytes()}).raise_for_status()
            with client.stream("POST", "/v1/audio/speech", json=LONG | {"stream": True}) as answer:
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
    finally:
        process.kill()
        process.wait()
