"""`inspect-shards show KEY --sequence`: every line's label is what the next line holds."""

from __future__ import annotations

import re

import pytest


@pytest.mark.parametrize("layout", ["clone", "as_written"])
def test_every_label_is_what_the_next_line_holds(run_command, make_dataset, make_sample, tiny_dir, tmp_path, layout):
    sample = make_sample(1, 4, 9)
    dataset = make_dataset(tmp_path / "shards", [sample])
    result = run_command(
        *("inspect-shards", "show", dataset, "000000000000", "--sequence", "--config", tiny_dir / "pipeline.toml"),
        *("--set", f"sequence.layout={layout}", "--set", "loss.audio_loss_weight=0.8"),
    )
    assert result.returncode == 0, result.stderr
    first, *_, last = result.stdout.splitlines()
    assert first.startswith(f"layout {layout}, conditioning codes (the checkpoint has no Whisper tower)")
    lines = [line for line in result.stdout.splitlines() if re.match(r"\s+\d+  (text|audio)", line)]
    holds, must = [line[17:57].strip() for line in lines], [line[59:99].strip() for line in lines]
    assert f"{len(lines)} positions: " in last
    learned_codes = 0
    assert must[-1] == "-"
    for here, (label, following) in enumerate(zip(must[:-1], holds[1:], strict=True)):
        if lines[here][10:15].strip() == "text":
            assert label in ("-", following), lines[here]
            continue
        if set(label.split()) == {"-"}:  # nothing to learn, and what follows an audio's last column is a token
            continue
        for wanted, found in zip(label.split(), following.split(), strict=True):
            assert wanted in ("-", found), lines[here]
            learned_codes += wanted != "-"
    assert learned_codes == 8 * (9 + 1)
    assert f"{learned_codes} codes of 8 codebooks learned, 8 ends of speech" in last
    assert {line.split()[1] for line in lines} == {"text", "audio"}
    assert sum(line.endswith("reference") for line in lines) == 4 + 9
    assert sum("  target" in line for line in lines) == 9 + 9
    full = next(line for line in lines if line.endswith("target") and "-" not in line[59:99])
    assert " 0.8  target" in full
    last_column = [line for line in lines if "  target" in line][-1]
    assert last_column.endswith("target, and token 128012 '<|audio_eos|>'")
