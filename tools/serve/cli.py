"""`serve MODEL`: the voice model behind OpenAI's speech API, with a page at /.

MODEL is a merged folder, a quantized one, or a base model with `--adapter`. What can be wrong in the command is found before the
model is loaded; while it loads, /health says 503. Everything is off that opens the machine to others: the address is 127.0.0.1,
no page of another site may ask, no address in a request is fetched.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.errors import ConfigError, DataError
from shards.terminal import LineFormatter, explained, print_line

if TYPE_CHECKING:
    from tools.serve.guard import Rules
    from tools.serve.limits import Limits
    from tools.serve.voice_store import VoiceStore
    from tools.speaker import SpeakConfig, Speaker

KEY_VARIABLE = "SERVE_API_KEY"
MIN_KEY_CHARS = 8


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", help="Address to listen at; 0.0.0.0 is every one of this machine.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--voices", default="out/voices", type=click.Path(path_type=Path), help="Folder of the stored voices.")
@click.option("--default-voice", default="", help="Speaks for names of OpenAI's voices.  [default: the oldest stored]")
@click.option(
    "--unknown-voice",
    default="default",
    type=click.Choice(["default", "error"]),
    help="What OpenAI's voice names get: the default voice and a header, or a 404. Other unknown names are a 404.",
)
@click.option("--adapter", type=click.Path(path_type=Path), help="A checkpoint's adapter folder, when MODEL is a base.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="Default: ./pipeline.toml if it exists.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the configuration.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--slots", default=4, type=click.IntRange(1, 256), help="Texts spoken at once.")
@click.option("--queue", "max_waiting", default=32, type=click.IntRange(0, 100_000), help="May wait; more get a 429.")
@click.option("--model-name", help="In /v1/models.  [default: MODEL's folder]")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help=f"Holds the key; or give it in ${KEY_VARIABLE}.  [default: none]",
)
@click.option("--cors-origin", "cors_origins", multiple=True, help="A site whose pages may ask; may be repeated.")
@click.option("--allowed-host", "allowed_hosts", multiple=True, help="Another name of this server; may be repeated.")
@click.option("--allow-ref-urls", multiple=True, metavar="HOST", help="ref_audio may name addresses there.")
@click.option("--max-text-chars", default=10_000, type=click.IntRange(1, 1_000_000), help="Of one input.")
@click.option("--max-upload-mb", default=10.0, type=click.FloatRange(0.01, 1000), help="Of one recording.")
@click.option("--max-reference-s", default=30.0, type=click.FloatRange(0.5, 30), help="Of one recording.")
@click.option("--max-speech-s", default=600.0, type=click.FloatRange(1, 86400), help="Of one answer; it is cut there.")
@click.option("--max-voices", default=1000, type=click.IntRange(0), help="Stored at most.")
@click.option("--grace-s", default=60.0, type=click.FloatRange(0, 3600), help="For what is being spoken at SIGTERM.")
def main(model: Path, config_path: Path | None, overrides: tuple[str, ...], **given: Any) -> None:
    """Serve MODEL over HTTP."""
    with explained():
        try:
            from shards.config import read_config
            from tools.speaker import SpeakConfig

            config = read_config(SpeakConfig, config_path, overrides)
            limits, rules = make_limits(given), make_rules(given)
            voices = open_voices(given)
        except ConfigError as error:  # of the command's own values
            print_line(f"error: {error}")
            sys.exit(2)
        begin_logs()
        serve(model, config, limits, rules, voices, given)


def serve(
    model: Path, config: SpeakConfig, limits: Limits, rules: Rules, voices: VoiceStore, given: dict[str, Any]
) -> None:
    """Until a signal comes."""
    from tools.serve.app import make_app
    from tools.serve.server import address_of, is_loopback, listen, run_server
    from tools.serve.service import Service
    from tools.serve.speech_queue import SpeechQueue

    def load() -> Speaker:
        from tools.inference import known_device
        from tools.speaker import load_speaker

        return load_speaker(model, given["adapter"], config, known_device(given["device"]))

    queue = SpeechQueue(load, given["slots"], limits.max_waiting)
    service = Service(
        queue,
        voices,
        limits,
        given["model_name"] or model.resolve().name,
        int(time.time()),
        given["default_voice"],
        given["unknown_voice"],
        frozenset(host.lower() for host in given["allow_ref_urls"]),
        rules.api_key,
    )
    app = make_app(service, rules)
    listener = listen(given["host"], given["port"])
    if not rules.api_key and not is_loopback(given["host"]):
        print_line(f"warning: {given['host']} without a key: whoever reaches this address may speak and upload voices")
    print_line(f"loading {model}; {address_of(listener)}/health says when it is ready")
    run_server(app, queue, listener, given["grace_s"])


def make_limits(given: dict[str, Any]) -> Limits:
    from tools.serve.limits import Limits

    return Limits(
        given["max_text_chars"],
        int(given["max_upload_mb"] * (1 << 20)),
        given["max_reference_s"],
        given["max_speech_s"],
        given["max_waiting"],
        given["max_voices"],
    )


def make_rules(given: dict[str, Any]) -> Rules:
    """Raises ConfigError."""
    from tools.serve.guard import LOOPBACK, Rules
    from tools.serve.server import is_loopback

    for origin in given["cors_origins"]:
        if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
            raise ConfigError(f"--cors-origin {origin!r}: expected scheme://host[:port], without a path and without *")
    key = read_key(given["api_key_file"])
    is_guarded = is_loopback(given["host"]) and not key
    hosts = LOOPBACK | {given["host"].lower(), *(host.lower() for host in given["allowed_hosts"])}
    return Rules(key, frozenset(given["cors_origins"]), hosts if is_guarded else None, make_limits(given))


def read_key(path: Path | None) -> str:
    """From the file, else the environment; "" is none. Raises ConfigError, and DataError for the file."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if path is not None:
        try:
            key = path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            raise DataError(f"--api-key-file {path}: not a text") from None
        if not key:
            raise ConfigError(f"--api-key-file {path}: is empty")
    if key and not (key.isascii() and key.isprintable() and " " not in key and len(key) >= MIN_KEY_CHARS):
        raise ConfigError(f"the API key: expected {MIN_KEY_CHARS} or more printable ASCII characters without blanks")
    return key


def open_voices(given: dict[str, Any]) -> VoiceStore:
    """Raises ConfigError."""
    from tools.serve.voice_store import VoiceStore

    voices = VoiceStore(given["voices"], given["max_voices"])
    if given["default_voice"] and voices.find(given["default_voice"]) is None:
        known = ", ".join(one.name for one in voices.all()[:10]) or "none yet"
        raise ConfigError(
            f"--default-voice {given['default_voice']!r}: not stored in {given['voices']}; there are: {known}"
        )
    return voices


def begin_logs() -> None:
    """Ids and numbers on stderr. What the tools log about texts stays out: a server's log is kept and read by others."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("speak").setLevel(logging.CRITICAL)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    main()
