"""README.md of a quantized folder: the card of the model it was made of, where there is one of ours, and what few bits changed.

In: the folder of the whole model and the report. Out: files by name. Figures of an evaluation are not put into the metadata,
because they are of the whole model; in the text they stay, behind a line that says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import metadata_load

from tools.checkpoints.card import HUB_ID, LANGUAGE, LICENCE_FILE, licence_of, percent, speak_lines, table
from tools.checkpoints.model_folder import VOICE_FILE

if TYPE_CHECKING:
    from tools.checkpoints.quantize import Report

CARD, CURVES = "README.md", "curves.svg"


def quantized_card(folder: Path, name: str, report: Report) -> dict[str, str]:
    """`name`: MODEL as the user wrote it; only an id of the hub is named."""
    hub_id = name if is_hub_id(name) else ""
    metadata, body = own_card(folder)
    if not body:
        metadata = {"license": "other", "language": [LANGUAGE]}
        if hub_id in LICENCE_FILE:
            metadata |= {"license_name": f"{hub_id.split('/')[1]}-licence", "license_link": LICENCE_FILE[hub_id]}
        if hub_id:
            metadata["base_model"] = hub_id
        body = f"## Speak\n\n{speak_lines('THIS_FOLDER', '')}\n## Licence\n\n{licence_of(hub_id)}"
    else:
        body = f"What follows was written for the model before it was quantized.\n\n{body}"
    bits = f"{report.bits}-bit"
    tags = [tag for tag in metadata.get("tags", []) if isinstance(tag, str)] or ["text-to-speech", "higgs-audio-v2"]
    metadata |= {"pipeline_tag": "text-to-speech", "tags": [*tags, bits, "torchao"]}
    if "base_model" in metadata:
        metadata["base_model_relation"] = "quantized"
    for key in ("library_name", "model-index"):  # transformers refuses the folder; figures are of the whole model
        metadata.pop(key, None)
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items()]
    title = f"# Higgs Audio v2 for Arabic voice cloning, decoder in {report.bits} bits\n"
    text = "\n".join(["---", *lines, "---", "", title, "## Quantization\n", quantization(report), body])
    curves = folder / CURVES
    return {CARD: text, **({CURVES: curves.read_text(encoding="utf-8")} if CURVES in body and curves.is_file() else {})}


def is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def own_card(folder: Path) -> tuple[dict[str, Any], str]:
    """(metadata, what stands below its title) of a folder that `merge` wrote; nothing of any other."""
    path = folder / CARD
    if not (folder / VOICE_FILE).is_file() or not path.is_file():
        return {}, ""
    try:
        text = path.read_text(encoding="utf-8")
        metadata = metadata_load(path)
    except Exception:  # a person has edited it; YAML has errors of its own
        return {}, ""
    _, _, rest = text.partition("\n# ")
    _, _, body = rest.partition("\n")
    return (metadata, body.strip() + "\n") if isinstance(metadata, dict) and body.strip() else ({}, "")


def quantization(report: Report) -> str:
    effect = report.effect
    rows = [
        ("bits of the decoder's linear layers", f"{report.bits}, a scale per {report.group_size or 'row'}"),
        ("size", f"{report.bytes_after / 1e6:.1f} MB, {report.factor:.2f} times smaller"),
        ("lowest signal to noise of a layer", f"{min(report.snr_db.values()):.1f} dB"),
        ("logits of a seeded input change by", percent(report.probe_logits_change)),
        ("numbers chosen by", f"torchao {report.torchao}"),
    ]
    if effect:
        rows += [
            ("audio loss, whole and quantized", f"{effect.whole.audio_loss:.4f}, {effect.quantized.audio_loss:.4f}"),
            ("KL of the logits", f"{effect.logits_kl:.4f}"),
            ("frames that both say greedily", percent(effect.same_greedy_frames)),
            (
                f"sampled speech that did not end, of {effect.samples}",
                f"{effect.whole.sampled_not_ended} whole, {effect.quantized.sampled_not_ended} quantized "
                f"({percent(effect.quantized.not_ended_rate)})",
            ),
        ]
    else:
        rows.append(("loss, agreement, ends of speech", "not measured"))
    about = (
        "Heads, embeddings, norms and codec are as they were. `speak`, `serve` and `evaluate` of higgs-voice-pipeline "
        "load it."
    )
    return f"{about}\n\n{table(('what', 'value'), rows)}"
