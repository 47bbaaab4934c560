"""The shard format: the contract between stage one, which writes it, and everything that reads it.

    OUT/job.json                       first: configuration, fingerprints, input digest, rows per shard
    OUT/shards/000/shard-000123.tar    1024 samples; plain tar, fixed member order, mtime 0
    OUT/shards/000/shard-000123.idx.npy         one row per sample (`shards.index.INDEX_DTYPE`)
    OUT/shards/000/shard-000123.columns.npy     one row per sample for reports (`shards.columns.COLUMNS_DTYPE`)
    OUT/shards/000/shard-000123.rejects.jsonl   rejected rows, with reasons; absent if none
    OUT/shards/000/shard-000123.done.json       last: counts and sha256; only this makes a shard count
    OUT/index.npy, columns.npy, rejects.jsonl   those of all shards, concatenated
    OUT/dataset.json                   the finished data set: totals, fingerprints, sha256 of every shard, digest

Members of a sample, keyed by twelve digits:

    ids.npy           int32 [n]       token ids of all text items, concatenated
    json              UTF-8           `shards.sample.SampleFacts`: texts, turns, speaker, audio facts, warnings
    ref.codes.npy     uint16 [8, Tr]  raw codec codes 0..1023 of the reference, 25 frames/s; no delay, no markers
    ref.mel.npy.zst   float16 [128, Tm]  Whisper log-mel of the reference (optional), Tm = ceil(n/160) + 2 frames
    ref.whisper.npy.zst  float16 [W, d]    Whisper hidden states at 25 Hz instead of the mel (optional)
    tgt.codes.npy     uint16 [8, Tt]  raw codec codes of the target

Shards hold facts. Prompt layout, delay pattern, labels and packing are policy, applied when reading (`shards.sequence`);
changing them never means encoding again. Any WebDataset user reads the tars with
`WebDataset(urls).decode(shards.reader.decode_zst)`.
"""
