"""The unit of work: one shard. A fixed slice of the shuffled rows in, a committed shard out.

Idempotent: whoever runs it, however often, the bytes are the same. Rows with a fault become rejects of the shard; the
shard is then shorter, and no other row moves.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from preprocess.audio import CODEC_RATE, WHISPER_RATE, decode, read_bytes
from preprocess.cache import Cache, EncodedCodes, EncodedWhisper, recipe_digest
from preprocess.codec_server import RemoteCodec, RemoteWhisper
from preprocess.config import PreprocessConfig
from preprocess.features import WhisperEncoder, stored_mel
from preprocess.plan import JobRows
from preprocess.reasons import AudioFault, RowFault, reject_of
from preprocess.row_checks import check_pair, check_row, speaker_of
from preprocess.segment import Segment
from preprocess.sound_edits import edited
from preprocess.sources import SourceRow
from preprocess.workers import Skip
from shards.artifacts import load_tokenizer
from shards.columns import columns_of, columns_row
from shards.config import SequenceSection
from shards.encoders.codec import Codec, load_codec
from shards.manifest import Job, read_record
from shards.sample import AudioFacts, MelFacts, Sample, SampleFacts, TextItem, Turn, compress, read_npy, write_npy
from shards.sample_checks import check_token_ids
from shards.sequence import SequenceBuilder, encode_text
from shards.writer import Reject, ShardDone, sample_key, write_shard

MAX_TEXT_TOKENS = 65535  # what a row of the index can count (`shards.index.INDEX_DTYPE`)


class TaskSetup(msgspec.Struct, frozen=True):
    """All a worker needs to make any shard of a job; travels to the worker process."""

    config: PreprocessConfig
    out: str
    model_dir: str
    codec_dir: str
    whisper_dir: str | None = None  # of the encoder, for features.whisper = "encoder"
    codec_addresses: list[str] = []  # codec processes on GPUs; empty: every worker has its own codec on its core
    codec_key: bytes = b""

    def with_servers(self, addresses: list[str], key: bytes) -> TaskSetup:
        return msgspec.structs.replace(self, codec_addresses=addresses, codec_key=key)


class TaskResult(msgspec.Struct, frozen=True):
    """What a finished shard adds to the progress line."""

    done: ShardDone
    num_encoded: int
    num_reused: int
    num_adopted: int = 0  # encodings that an earlier job on the same OUT had made
    notes: list[str] = []  # what the codec has to say about its speed here


class ShardTask:
    """A loaded codec and tokenizer, ready to make shards."""

    def __init__(self, setup: TaskSetup) -> None:
        self._config = setup.config
        self._limits = setup.config.preprocess.audio_limits()
        self._out = Path(setup.out)
        self._rows = JobRows(self._out, setup.config.preprocess.samples_per_shard)
        job_path = self._out / "job.json"
        recipe = recipe_digest(setup.config, read_record(job_path, Job).fingerprints)
        self._encoded, self._job_began_ns = self._out / "encoded" / recipe, job_path.stat().st_mtime_ns
        self._tokenizer = load_tokenizer(Path(setup.model_dir))
        self._builder = SequenceBuilder(self._tokenizer, SequenceSection(layout="as_written"))
        self._notes: list[str] = []
        self._codec: Codec | RemoteCodec
        self._whisper_encoder: WhisperEncoder | RemoteWhisper | None = None
        if setup.codec_addresses:
            self._codec = RemoteCodec(setup.codec_addresses, setup.codec_key)
            self._whisper_encoder = RemoteWhisper(self._codec) if setup.whisper_dir else None
        else:
            precision = setup.config.preprocess.codec_precision
            self._codec = load_codec(Path(setup.codec_dir), precision=precision, tell=self._notes.append)
            self._whisper_encoder = WhisperEncoder(Path(setup.whisper_dir), "cpu") if setup.whisper_dir else None

    def run(self, task: int, skip: Skip, begins: Callable[[int], None]) -> TaskResult:
        cache = Cache(self._encoded, self._job_began_ns)
        samples: list[Sample] = []
        columns: list[tuple] = []
        rejects: list[Reject] = []
        for position, row in enumerate(self._rows.of_shard(task)):
            try:
                if position in skip:
                    raise RowFault("worker", "worker_died", skip[position])
                begins(position)
                sample, row_columns = self._sample(sample_key(task, position), row, cache)
            except RowFault as fault:
                rejects.append(reject_of(fault, row.row, row.id))
                continue
            samples.append(sample)
            columns.append(row_columns)
        done = write_shard(self._out, task, samples, rejects, columns_of(columns))
        return TaskResult(done, cache.num_encoded, cache.num_reused, cache.num_adopted, self._notes)

    def _sample(self, key: str, row: SourceRow, cache: Cache) -> tuple[Sample, tuple]:
        """The sample and its row of `shards.columns`."""
        checked = check_row(row, self._config.text)
        row, pair = checked.row, checked.pair
        reference, reference_sha = self._codes(pair.reference_path, pair.reference_segment, cache)
        target, target_sha = self._codes(pair.target_path, pair.target_segment, cache)
        same_audio = reference_sha == target_sha and pair.reference_segment.shares_with(pair.target_segment)
        warnings = check_pair(checked, self._config.text, reference.measures, target.measures, same_audio)
        kind = self._config.features.whisper
        whisper = None
        if kind != "none":
            whisper = self._whisper(pair.reference_path, pair.reference_segment, reference_sha, cache)

        turns, texts = stored_turns(row)
        roles = [_index_of(texts, text) for text in (pair.reference_text, pair.target_text)]
        system = _index_of(texts, pair.system_text) if pair.system_text is not None else None
        ids = [encode_text(self._tokenizer, text) for text in texts]
        facts = SampleFacts(
            id=row.id,
            row=row.row,
            speaker=speaker_of(row, reference_sha),
            turns=turns,
            texts=texts,
            text_token_counts=[len(item) for item in ids],
            system_text=system,
            reference_text=roles[0],
            target_text=roles[1],
            num_as_written_tokens=0,
            reference=_audio_facts(pair.reference_path, pair.reference_segment, reference_sha, reference),
            target=_audio_facts(pair.target_path, pair.target_segment, target_sha, target),
            mel=MelFacts(whisper.num_samples, whisper.floor) if whisper else None,
            start_index=row.chat.start_index,
            misc=row.chat.misc,
            extra=row.extra,
            warnings=warnings,
        )
        sample = Sample(
            key=key,
            facts=facts,
            text_ids=np.concatenate(ids),
            reference_codes=read_npy(reference.codes_npy),
            target_codes=read_npy(target.codes_npy),
            reference_mel_zst=whisper.features_zst if whisper and kind == "mel" else None,
            reference_whisper_zst=whisper.features_zst if whisper and kind == "encoder" else None,
        )
        try:
            check_token_ids(sample)  # a tokenizer may make control tokens of spellings that `sources` does not know
        except ValueError as fault:
            raise RowFault("text", "text_control_token", f"{fault}; for this tokenizer") from None
        num_tokens = self._builder.num_as_written_tokens(sample)
        if num_tokens > MAX_TEXT_TOKENS:
            raise RowFault("text", "text_too_long", f"{num_tokens} tokens in all texts, at most {MAX_TEXT_TOKENS}")
        facts = msgspec.structs.replace(facts, num_as_written_tokens=num_tokens)
        row_columns = columns_row(facts, reference.measures.sound, target.measures.sound)
        return dataclasses.replace(sample, facts=facts), row_columns

    def _codes(self, path: str, segment: Segment, cache: Cache) -> tuple[EncodedCodes, str]:
        try:
            data = read_bytes(path)
            sha256 = hashlib.sha256(data).hexdigest()

            def encode() -> EncodedCodes:
                audio = edited(decode(data, self._limits, segment), self._config.audio, self._limits)
                codes = self._codec.encode(audio.at(CODEC_RATE))
                return EncodedCodes(write_npy(codes), codes.shape[1], audio.measures)

            return cache.get(EncodedCodes, segment.key(sha256), encode), sha256
        except AudioFault as fault:
            raise RowFault("audio", fault.reason, fault.detail, path) from None

    def _whisper(self, path: str, segment: Segment, sha256: str, cache: Cache) -> EncodedWhisper:
        def encode() -> EncodedWhisper:
            audio = edited(decode(read_bytes(path), self._limits, segment), self._config.audio, self._limits)
            wave = audio.at(WHISPER_RATE)
            features, floor = stored_mel(wave)
            if self._whisper_encoder:
                features = self._whisper_encoder.encode(features, floor, len(wave))
            return EncodedWhisper(compress(write_npy(features.astype("<f2"))), len(wave), floor)

        try:
            return cache.get(EncodedWhisper, segment.key(sha256), encode)
        except AudioFault as fault:
            raise RowFault("audio", fault.reason, fault.detail, path) from None


def stored_turns(row: SourceRow) -> tuple[list[Turn], list[str]]:
    """The row's turns with text items numbered, and the texts as written."""
    turns: list[Turn] = []
    texts: list[str] = []
    audios = iter(("reference", "target"))
    for message in row.chat.messages:
        content = [TextItem(message.content)] if isinstance(message.content, str) else message.content
        items: list = []
        for item in content:
            if isinstance(item, TextItem):
                items.append(len(texts))
                texts.append(item.text)
            else:
                items.append(next(audios))
        turns.append(Turn(message.role, items))
    return turns, texts


def _index_of(texts: list[str], text: str) -> int:
    """Where `text` stands among the texts; a stripped or shortened one is added behind them."""
    if text not in texts:
        texts.append(text)
    return texts.index(text)


def _audio_facts(path: str, segment: Segment, sha256: str, encoded: EncodedCodes) -> AudioFacts:
    measures = encoded.measures
    return AudioFacts(
        path=path,
        sha256=sha256,
        duration_s=measures.duration_s,
        sample_rate=measures.sample_rate,
        num_frames=encoded.num_frames,
        num_channels=measures.num_channels,
        clipped_share=measures.clipped_share,
        leading_silence_s=measures.leading_silence_s,
        trailing_silence_s=measures.trailing_silence_s,
        offset_s=msgspec.UNSET if segment.is_whole else segment.offset_s,
        cut_start_s=_unset_if_none(measures.cut_start_s),
        cut_end_s=_unset_if_none(measures.cut_end_s),
        gain_db=_unset_if_none(measures.gain_db),
    )


def _unset_if_none(value: float | None) -> float | msgspec.UnsetType:
    return msgspec.UNSET if value is None else value
