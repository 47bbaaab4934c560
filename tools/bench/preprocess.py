"""What `bench preprocess` measures; every comparison is made in the same run, each side in a process of its own.

Intake: a generated list through stage one's reader, against json.load. Codec: audio seconds per core second of one thread
at several lengths, against the encoder without its changes for a CPU. Jobs: the real `preprocess` code with 1..N workers over
real clips, with and without shared clips, against a plain loop (decode, resample, mel and encode every use, one process).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.terminal import print_line, print_table
from tools.bench.codec import LENGTHS_S, bench_codec, flop_per_audio_s

BUSY_CORES = 0.1  # of other work: more of it is said beside the efficiency, which it lowers
# Each times itself, so that imports and loading models do not count.
CODE_OF_INTAKE = """
import json, sys, time
from pathlib import Path
from preprocess.plan import Request, ingest
started = time.monotonic()
ingest(Request(Path(sys.argv[1]), Path(sys.argv[2])), 0)
print("RESULT", json.dumps({"seconds": time.monotonic() - started}), flush=True)
"""
CODE_OF_JSON_LOAD = """
import json, sys, time
started = time.monotonic()
rows = json.load(open(sys.argv[1], encoding="utf-8"))
print("RESULT", json.dumps({"seconds": time.monotonic() - started}), flush=True)
"""
CODE_OF_JOB = """
import json, sys, time
from pathlib import Path
import preprocess.run as job
from preprocess.config import PreprocessConfig
from preprocess.plan import Request
from shards.config import read_config
finished = []
class Watched(job.Progress):
    def add(self, result):
        finished.append((time.monotonic(), result.num_encoded))
        super().add(result)
job.Progress = Watched
config = read_config(PreprocessConfig, Path(sys.argv[1]), [f"preprocess.workers={sys.argv[4]}"])
assert job.preprocess(Request(Path(sys.argv[2]), Path(sys.argv[3])), config)
files = sum(count for _, count in finished)
after_first = sum(count for _, count in finished[1:]) / (finished[-1][0] - finished[0][0])
print("RESULT", json.dumps({"files": files, "files_per_s": after_first}), flush=True)
"""
CODE_OF_PLAIN_LOOP = """
import json, sys, time
import numpy as np, soundfile, soxr
from transformers import WhisperFeatureExtractor
from pathlib import Path
from shards.encoders.codec import load_codec
from shards.artifacts import WHISPER_FEATURES
codec, mels = load_codec(Path(sys.argv[2])), WhisperFeatureExtractor(**WHISPER_FEATURES)
started = time.monotonic()
for row in json.load(open(sys.argv[1], encoding="utf-8")):
    for turn in (1, 2):
        wave, rate = soundfile.read(row["messages"][turn]["content"][1]["audio_url"], dtype="float32")
        codec.encode(soxr.resample(wave, rate, 24000, quality="HQ"))
        if turn == 1:
            mels(soxr.resample(wave, rate, 16000, quality="HQ"), sampling_rate=16000)
print("RESULT", json.dumps({"seconds": time.monotonic() - started}), flush=True)
"""


@dataclass(frozen=True)
class Settings:
    speech: Path
    num_clips: int
    list_mb: int
    workers: int | None
    codec: str
    rounds: int
    lengths_s: tuple[float, ...] = LENGTHS_S


def bench(settings: Settings, out: Path) -> dict[str, Any]:
    """Measure everything, print the table, write the JSON file."""
    from preprocess.workers import usable_cores
    from shards.writer import write_json

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        config, audio_s = prepare(settings, work)
        figures: dict[str, Any] = {
            "machine": f"{usable_cores()} usable cores, {platform.processor() or platform.machine()}"
        }
        figures["settings"] = {**settings.__dict__, "speech": str(settings.speech)}
        figures["intake"] = bench_intake(settings, work)
        figures["codec"] = bench_codec(work / "codec", settings.rounds, settings.lengths_s)
        figures["jobs"] = bench_jobs(settings.workers or usable_cores(), settings.rounds, work, config, audio_s)
    write_json(out, figures)
    print_figures(figures, out)
    return figures


# --- preparing ------------------------------------------------------------------------------------------------------


def prepare(settings: Settings, work: Path) -> tuple[Path, float]:
    """Models, clips and two lists: one that shares clips, one with a byte-different copy for every reference.

    Returns the configuration file and the seconds of distinct audio.
    """
    import soundfile

    from preprocess.audio_kinds import check_form
    from preprocess.reasons import AudioFault
    from tools.tiny.cli import write_tiny

    write_tiny(work)
    if settings.codec == "full":
        write_full_codec(work / "codec")
    files = sorted(settings.speech.glob("*.flac"))[: settings.num_clips]
    if len(files) < 2:
        raise SystemExit(f"error: {settings.speech}: at least two .flac clips are needed")
    (work / "clips").mkdir()
    audio_s = 0.0
    for number, file in enumerate(files):
        wave, rate = soundfile.read(file, dtype="float32")
        try:
            check_form(1, rate)
        except AudioFault as fault:
            raise SystemExit(f"error: {file}: {fault.detail}") from None
        audio_s += len(wave) / rate
        for kind in ("target", "copy"):
            path = work / "clips" / f"{kind}-{number}.wav"
            soundfile.write(path, wave, rate, subtype="PCM_16")
            if kind == "copy":
                with path.open("ab") as copy:
                    copy.write(b"LIST\4\0\0\0copy")  # the same sound, other bytes
    for name, kind in (("shared", "target"), ("copies", "copy")):
        rows = [row_of(work, kind, (n + 1) % len(files), n) for n in range(len(files))]
        (work / f"{name}.json").write_text(json.dumps(rows))
    config = work / "bench.toml"
    config.write_text(
        f'[model]\nbase = "{work}/model"\nrevision = ""\ncodec = "{work}/codec"\ncodec_revision = ""\n'
        "[preprocess]\nsamples_per_shard = 1\n"
    )
    return config, audio_s


def row_of(work: Path, kind: str, reference: int, target: int) -> dict[str, Any]:
    from preprocess.clip_list import Clip, chat_row

    clips = work / "clips"
    return chat_row(
        Clip(str(clips / f"{kind}-{reference}.wav"), "هذا هو النص الذي قيل في تسجيل المرجع القصير", "speaker"),
        Clip(str(clips / f"target-{target}.wav"), "وهذا هو النص الذي قيل في تسجيل الهدف القصير", "speaker"),
    )


def write_full_codec(folder: Path) -> None:
    """Random weights in the released sizes (200 M parameters), with codebooks whose codes follow the sound."""
    from shards.encoders.codec import native_config
    from shards.sequence import SAMPLE_RATE
    from tools.tiny.codec import RATIOS, calibrated_codec, save_codec

    config = native_config(
        {
            "D": 256,
            "ratios": RATIOS,
            "sample_rate": SAMPLE_RATE,
            "bins": 1024,
            "n_q": 8,
            "target_bandwidths": [0.5, 1, 1.5, 2],
        }
    )
    save_codec(folder, config, calibrated_codec(config, seed=0))


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    peak_mb: float  # of the process itself, not its workers
    result: dict[str, Any]


def run(code: str, *arguments: object) -> Finished:
    """Run Python code in a process of its own with one thread. VmHWM counts from the exec on, ru_maxrss would not."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    measured = f"exec({code!r})\nprint('PEAK', [x for x in open('/proc/self/status') if x.startswith('VmHWM')][0].split()[1])\n"
    result = subprocess.run(
        [sys.executable, "-c", measured, *map(str, arguments)], env=env, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"error: a benchmark process failed:\n{result.stderr[-2000:]}")
    values = {line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in result.stdout.splitlines() if " " in line}
    return Finished(int(values["PEAK"]) / 1024, json.loads(values.get("RESULT", "{}")))


def bench_intake(settings: Settings, work: Path) -> dict[str, float]:
    """MB/s and peak memory of reading a long list."""
    path = work / "long.json"
    row = json.dumps(row_of(work, "target", 0, 1), ensure_ascii=False)
    with path.open("w", encoding="utf-8") as file:
        for number in range(settings.list_mb * 1_000_000 // len(row.encode()) + 1):
            file.write(("[" if number == 0 else ",\n") + row)
        file.write("]")
    size_mb = path.stat().st_size / 1e6
    ours = run(CODE_OF_INTAKE, path, work / "intake")
    plain = run(CODE_OF_JSON_LOAD, path)
    return {
        "list_mb": size_mb,
        "mb_per_s": size_mb / ours.result["seconds"],
        "peak_mb": ours.peak_mb,
        "json_load_mb_per_s": size_mb / plain.result["seconds"],
        "json_load_peak_mb": plain.peak_mb,
    }


def bench_jobs(max_workers: int, rounds: int, work: Path, config: Path, audio_s: float) -> dict[str, Any]:
    """Whole jobs, one row a shard; rates are taken from the first finished shard to the last, so start-up does not count."""
    measured: dict[int, list[float]] = {workers: [] for workers in range(1, max_workers + 1)}
    others: dict[int, list[float]] = {workers: [] for workers in measured}
    num_files, copies = 0, []
    for number in range(rounds):  # in turn, so that a change of the machine's speed meets all of them
        for workers, rates in measured.items():
            before = core_seconds()
            result = run(CODE_OF_JOB, config, work / "shared.json", work / f"job-{workers}-{number}", workers).result
            others_s, wall_s = (now - then for now, then in zip(core_seconds(), before, strict=True))
            others[workers].append(others_s / wall_s)
            rates.append(result["files_per_s"])
            num_files = result["files"]
        result = run(CODE_OF_JOB, config, work / "copies.json", work / f"copies-{number}", max_workers).result
        copies.append(result["files"] / result["files_per_s"])
    rates = {workers: float(np.median(values)) for workers, values in measured.items()}
    loop_s = run(CODE_OF_PLAIN_LOOP, work / "shared.json", work / "codec").result["seconds"]
    seconds_per_file = audio_s / num_files
    steady_s = num_files / rates[max_workers]
    return {
        "distinct_audio_s": audio_s,
        "audio_s_per_s": {workers: rate * seconds_per_file for workers, rate in rates.items()},
        "busy_cores": {workers: float(np.median(values)) for workers, values in others.items()},
        "parallel_efficiency": {workers: rate / (workers * rates[1]) for workers, rate in rates.items()},
        "deduplication_gain": float(np.median(copies)) / steady_s,
        "files_per_s_of_all_rounds": measured,
        "plain_loop_audio_s_per_s": audio_s / loop_s,
        "gain_over_plain_loop": loop_s / steady_s,
    }


def core_seconds() -> tuple[float, float]:
    """(core seconds that other processes have used since the machine started, wall seconds): 0 where there is no /proc/stat."""
    wall_s = time.monotonic()
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0, wall_s
    user, nice, system, _, _, irq, softirq, steal = fields
    own = os.times()
    busy_s = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy_s - own.user - own.system - own.children_user - own.children_system, wall_s


def efficiency_row(jobs: dict[str, Any], workers: int) -> str:
    """Against one worker; with what else ran at the time, which lowers it."""
    busy = jobs["busy_cores"][workers]
    beside = f"; {busy:.1f} cores were busy with other work" if busy > BUSY_CORES else ""
    return f"efficiency {jobs['parallel_efficiency'][workers]:.0%}{beside}"


# --- printing --------------------------------------------------------------------------------------------------------


def print_figures(figures: dict[str, Any], out: Path) -> None:
    intake, codec, jobs = figures["intake"], figures["codec"], figures["jobs"]
    title = f"bench preprocess: {figures['machine']}, codec {figures['settings']['codec']}"
    rows: list[tuple[str, ...]] = []
    rows.append(
        (
            f"intake of a {intake['list_mb']:.0f} MB list",
            f"{intake['mb_per_s']:.0f} MB/s, peak {intake['peak_mb']:.0f} MB",
            f"json.load {intake['json_load_mb_per_s']:.0f} MB/s, peak {intake['json_load_peak_mb']:.0f} MB",
        )
    )
    for length_s, rate, gain in zip(
        codec["lengths_s"], codec["audio_s_per_core_s"]["ours"], codec["gain"], strict=True
    ):
        beside = f"{gain:.2f} x the encoder without changes"
        if figures["settings"]["codec"] == "full":
            share = rate * flop_per_audio_s(length_s) / 1e9 / codec["product_gflops"]
            beside += f"; {share:.0%} of this core's {codec['product_gflops']:.0f} GFLOP/s"
        rows.append((f"codec, one core, clips of {length_s:g} s", f"{rate:.2f} audio-s per core-s", beside))
    for part in codec["parts"]:
        share = f"; {part['gflops'] / codec['product_gflops']:.0%}" if figures["settings"]["codec"] == "full" else ""
        times = f"{part['ms']['ours']:.1f} ms per audio-s, {part['ms']['plain']:.1f} without changes"
        rows.append((f"- {part['part']}", times, f"{part['gflops']:.0f} GFLOP/s{share}"))
    different = f"{codec['num_codes_that_differ']} of {codec['num_codes']} codes"
    peaks = f"peak {codec['peak_mb']['ours']:.0f} MB, {codec['peak_mb']['plain']:.0f} MB without changes"
    rows.append(("codes that differ between the two", different, peaks))
    for workers, rate in jobs["audio_s_per_s"].items():
        rows.append(
            (f"job with {workers} workers", f"{rate:.2f} distinct audio-s per s", efficiency_row(jobs, workers))
        )
    rows.append(("every clip used twice", f"{jobs['deduplication_gain']:.2f} x", "against encoding every use"))
    plain = f"plain loop {jobs['plain_loop_audio_s_per_s']:.2f} audio-s per s"
    rows.append(("whole job against a plain loop", f"{jobs['gain_over_plain_loop']:.2f} x", plain))
    print_table(rows, headings=("what", "figure", "beside it"), title=title, to_stdout=True)
    print_line(f"written to {out}")
