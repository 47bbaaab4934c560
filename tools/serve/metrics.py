"""Counters and sums in Prometheus' text form. In: what happens. Out: `/metrics`.

Written here because the text form is a dozen lines and a client library would be one more dependency. Names of labels and their
values are the server's own words, never a request's.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
HELP = {
    "requests_total": ("counter", "Answered requests by route and status."),
    "speech_total": ("counter", "Utterances by how they ended: end, max_seconds, text_ceiling, left, refused, failed."),
    "audio_seconds_total": ("counter", "Seconds of speech made."),
    "first_sound_seconds": ("histogram", "From acceptance to the first sound of a stream."),
    "speech_seconds": ("histogram", "From acceptance to the end of the speech."),
    "slots": ("gauge", "Slots of the engine."),
    "slots_busy": ("gauge", "Utterances being spoken."),
    "waiting": ("gauge", "Utterances in the queue."),
    "ready": ("gauge", "1 when the model is warm."),
    "voices": ("gauge", "Stored voices."),
    "resident_memory_bytes": ("gauge", "Resident memory of the process."),
}


class Metrics:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], float] = defaultdict(float)
        self._buckets: dict[str, list[int]] = {
            name: [0] * len(BUCKETS_S) for name, (kind, _) in HELP.items() if kind == "histogram"
        }
        self._gauges: dict[str, Callable[[], float]] = {"resident_memory_bytes": resident_bytes}

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
        with self._lock:
            self._counts[name, shown] += by

    def observe(self, name: str, seconds: float) -> None:
        with self._lock:
            for number, edge in enumerate(BUCKETS_S):
                self._buckets[name][number] += seconds <= edge
            self._counts[f"{name}_sum", ""] += seconds
            self._counts[f"{name}_count", ""] += 1

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        self._gauges[name] = read

    def value(self, name: str, **labels: str) -> float:
        shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
        return self._gauges[name]() if name in self._gauges else self._counts[name, shown]

    def text(self) -> str:
        with self._lock:
            counts, buckets = dict(self._counts), {name: list(row) for name, row in self._buckets.items()}
        lines: list[str] = []
        for name, (kind, text) in HELP.items():
            lines += [f"# HELP speech_server_{name} {text}", f"# TYPE speech_server_{name} {kind}"]
            if kind == "gauge" and name in self._gauges:
                lines.append(f"speech_server_{name} {self._gauges[name]():g}")
            elif kind == "counter":
                rows = [(labels, value) for (key, labels), value in sorted(counts.items()) if key == name]
                lines += [
                    f"speech_server_{name}{{{labels}}} {value:g}" if labels else f"speech_server_{name} {value:g}"
                    for labels, value in rows or [("", 0)]
                ]
            elif kind == "histogram":
                lines += [
                    f'speech_server_{name}_bucket{{le="{edge:g}"}} {value}'
                    for edge, value in zip(BUCKETS_S, buckets[name], strict=True)
                ]
                total = counts.get((f"{name}_count", ""), 0)
                lines.append(f'speech_server_{name}_bucket{{le="+Inf"}} {total:g}')
                lines.append(f"speech_server_{name}_sum {counts.get((f'{name}_sum', ''), 0):g}")
                lines.append(f"speech_server_{name}_count {total:g}")
        return "\n".join(lines) + "\n"


def resident_bytes() -> float:
    """Of this process; 0 where the system does not say."""
    try:
        text = Path("/proc/self/statm").read_text(encoding="ascii")
    except OSError:
        return 0.0
    import resource

    return int(text.split()[1]) * resource.getpagesize()
