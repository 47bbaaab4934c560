"""The training loop through the real command: what it leaves behind, resume, refusals, and stopping before harm."""

from __future__ import annotations

import errno
import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shards.config import SequenceSection, read_config
from shards.errors import CheckpointError, PipelineError
from shards.sequence import SequenceBuilder
from shards.writer import write_json
from train import loop
from train.config import LossSection, TrainConfig, WandbSection
from train.loop import RunOptions, train
from train.model.batch import pack
from train.model.lora import add_lora, load_adapter, lora_parameters
from train.model.loss import LossCounts
from train.model.weights import load_model
from train.optim import learning_rate_at, make_optimizer
from train.run_folder.checkpoint_folders import check_identity, read_identity
from train.run_folder.metrics import start_wandb
from train.step import heap_at_rest, train_step


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, make_dataset, make_sample) -> Path:
    samples = [make_sample(seed, 5 + seed, 8 + 2 * seed) for seed in range(6)]
    return make_dataset(tmp_path_factory.mktemp("dataset"), samples)


@pytest.fixture
def settings(tiny_dir: Path):
    def make(*overrides: str) -> TrainConfig:
        quick = ["train.batch_tokens=700", "train.packs_per_step=2", "train.max_steps=6", "train.save_every=2"]
        quick += ["train.log_every=1", "train.num_workers=0", "lora.rank=4", "train.keep_checkpoints=2"]
        quick += ["train.listening_samples=0"]
        return read_config(TrainConfig, tiny_dir / "pipeline.toml", [*quick, *overrides])

    return make


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss/total_loss"] for line in lines}


def test_run_directory_is_complete_and_loss_falls(dataset, settings, tmp_path):
    run = tmp_path / "run"
    last = train(settings("train.max_steps=12"), dataset, run, RunOptions())
    assert last is not None
    assert last == run / "checkpoints" / "checkpoint-12"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["checkpoint-10", "checkpoint-12"]
    inside = {"adapter", "state", "identity.json", "metrics.json", "config.toml", "COMPLETE"}
    assert {path.name for path in last.iterdir()} == inside
    assert {path.name for path in run.iterdir()} >= {"config.toml", "environment.json", "logs", "metrics.jsonl"}
    environment = json.loads((run / "environment.json").read_text())
    assert {"command", "device", "torch", "transformers", "peft"} <= set(environment)
    assert environment["ranks"] == 1
    values = json.loads((last / "metrics.json").read_text())
    names = ["loss/total_loss", "loss/text_loss", "loss/audio_loss", "loss/contrastive_loss"]
    names += [f"loss/codebook_{k}" for k in range(8)]
    names += ["metrics/learning_rate", "metrics/gpu_memory_gb", "metrics/samples_per_second"]
    names += ["metrics/tokens_per_second", "metrics/data_wait_fraction", "metrics/mfu"]
    assert set(names) <= set(values)
    history = losses(run)
    assert list(history) == list(range(1, 13))
    assert history[12] < history[1] - 1.0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_run_equals_the_uninterrupted_one(dataset, settings, tmp_path, num_workers):
    workers = f"train.num_workers={num_workers}"
    train(settings(workers), dataset, tmp_path / "whole", RunOptions())
    # Same schedule, stopped after the checkpoint of step 4: the later checkpoint vanishes as in a crash.
    train(settings(workers), dataset, tmp_path / "cut", RunOptions())
    (tmp_path / "cut/checkpoints/checkpoint-6/COMPLETE").unlink()
    train(settings(workers), dataset, tmp_path / "cut", RunOptions())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    adapters = [
        (tmp_path / name / "checkpoints/checkpoint-6/adapter/adapter_model.safetensors").read_bytes()
        for name in ("cut", "whole")
    ]
    assert adapters[0] == adapters[1]


def test_a_way_to_attend_can_be_asked_for_and_trains_the_same(dataset, settings, tmp_path, monkeypatch):
    from train.model import build

    chosen = []
    choose = build.choose_attention
    monkeypatch.setattr(
        build, "choose_attention", lambda *given, **named: chosen.append(choose(*given, **named)) or chosen[-1]
    )
    for way in ("auto", "padded"):
        train(settings(f"train.attention={way}"), dataset, tmp_path / way, RunOptions())
    assert chosen == ["separate"]
    one, other = losses(tmp_path / "auto"), losses(tmp_path / "padded")
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=0, atol=1e-5)


def test_a_checkpoint_of_another_run_is_refused_with_both_values(dataset, settings, tmp_path):
    train(settings("train.max_steps=2"), dataset, tmp_path / "run", RunOptions())
    with pytest.raises(PipelineError, match=r"seed was 0, is 7.*new RUN folder"):
        train(settings("train.seed=7"), dataset, tmp_path / "run", RunOptions())
    with pytest.raises(PipelineError, match="rank"):
        train(settings("lora.rank=8"), dataset, tmp_path / "run", RunOptions())
    with pytest.raises(PipelineError, match="holds checkpoints of another run"):
        train(settings(), dataset, tmp_path / "run", RunOptions(resume="never"))


def test_other_weights_under_the_same_path_are_refused(dataset, settings, tmp_path, tiny_dir):
    """A base that was merged or downloaded again between two starts; one written before weights were noted goes on."""
    base = shutil.copytree(tiny_dir / "model", tmp_path / "model")
    config, run = settings(f"model.base={base}", "train.max_steps=2"), tmp_path / "run"
    last = train(config, dataset, run, RunOptions())
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] += 0.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PipelineError, match=r"another run: model_weights was '[0-9a-f]{64}', is '[0-9a-f]{64}'"):
        train(config, dataset, run, RunOptions())

    assert last is not None
    identity = read_identity(last)
    check_identity(last, identity)
    write_json(last / "identity.json", {**msgspec.to_builtins(identity), "model_weights": ""})
    check_identity(last, identity)


def test_shards_of_another_codec_are_refused(dataset, settings, tmp_path, tiny_dir):
    other = shutil.copytree(tiny_dir / "codec", tmp_path / "codec")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(PipelineError, match=r"do not fit the model: codec: shards were made with"):
        train(settings(f"model.codec={other}"), dataset, tmp_path / "run", RunOptions())


@pytest.fixture
def ready(tiny_dir, tokenizer, make_sample, settings):
    """A model with LoRA, its optimizer and two packs."""
    config = settings()
    model = load_model(tiny_dir / "model", torch.float32)
    add_lora(model, config.lora, "base", seed=0)
    optimizer = make_optimizer([parameter for _, parameter in lora_parameters(model)], config.train)
    builder = SequenceBuilder(tokenizer, SequenceSection())
    sequences = [builder.training(make_sample(i, 6, 7 + i)) for i in range(4)]
    batches = [pack(sequences[:1], [1], ["a"]), pack(sequences[1:], [1, 2, 3], ["b", "c", "d"])]
    return model, optimizer, batches, sequences


def test_a_step_does_not_depend_on_how_it_is_cut_into_packs(ready, tiny_dir, settings):
    """Text and audio losses; the contrastive loss sees the pack by design, so its weight is 0 here."""
    model, optimizer, batches, sequences = ready
    section = LossSection(contrastive_loss_weight=0.0)
    two = train_step(model, optimizer, batches, section, 0, 0.0, 1.0)
    one = train_step(model, optimizer, [pack(sequences, [1, 1, 2, 3], list("abcd"))], section, 0, 0.0, 1.0)
    for name in ("total", "text", "codebooks", "grad_norm"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name), rtol=1e-5, atol=1e-6)


def test_the_collector_does_not_look_at_what_was_there_before_the_first_step():
    before = gc.get_freeze_count()
    inside = []

    def fail() -> None:
        with heap_at_rest():
            inside.append(gc.get_freeze_count())
            raise PipelineError("a step failed")

    with pytest.raises(PipelineError):
        fail()
    assert inside[0] > before + 10_000
    assert gc.get_freeze_count() == 0, "given back after a fault too"


def test_only_lora_moves(ready):
    model, optimizer, batches, _ = ready
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = {name for name, _ in lora_parameters(model)}
    assert trainable == {name for name in before if ".lora_" in name}
    in_optimizer = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert in_optimizer == {id(parameter) for _, parameter in lora_parameters(model)}
    for step in range(2):
        train_step(model, optimizer, batches, LossSection(), step, 1e-2, 1.0)
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (name in trainable), name
        if name in trainable:
            assert parameter.dtype == torch.float32


def test_a_weight_changes_exactly_its_term_and_contrastive_reaches_lora(ready):
    model, optimizer, batches, _ = ready
    results = {}
    for name, section in {
        "all": LossSection(),
        "contrastive": LossSection(text_loss_weight=0.0, audio_loss_weight=0.0, contrastive_loss_weight=0.5),
    }.items():
        results[name] = train_step(model, optimizer, batches, section, 0, 0.0, 1.0)
    both = results["all"]
    expected = both.text + both.codebooks.mean() + 0.1 * both.contrastive
    torch.testing.assert_close(both.total, expected)
    torch.testing.assert_close(results["contrastive"].total, 0.5 * both.contrastive)
    assert results["contrastive"].grad_norm > 0
    assert LossCounts.of(batches).contrastive == 3  # the sample alone in its pack has no negative


@pytest.mark.parametrize("changed", ["text", "audio", "contrastive"])
def test_changing_one_weight_changes_that_term_alone(ready, changed):
    model, optimizer, batches, _ = ready
    before = LossSection()
    name = f"{changed}_loss_weight"
    after = msgspec.structs.replace(before, **{name: getattr(before, name) + 2.0})
    one, other = (train_step(model, optimizer, batches, section, 0, 0.0, 1.0) for section in (before, after))
    assert one is not None
    assert other is not None
    for term in ("text", "codebooks", "contrastive"):
        torch.testing.assert_close(getattr(other, term), getattr(one, term))
    grown = {"text": one.text, "audio": one.codebooks.mean(), "contrastive": one.contrastive}[changed]
    assert grown > 0.1
    torch.testing.assert_close(
        other.total - one.total, 2.0 * grown, rtol=1e-4, atol=0
    )  # a difference of two sums in fp32
    assert other.grad_norm != one.grad_norm


def test_a_number_that_is_not_finite_stops_before_the_update(ready):
    model, optimizer, batches, _ = ready
    _, parameter = lora_parameters(model)[0]
    with torch.no_grad():
        parameter[0, 0] = float("nan")
    other = lora_parameters(model)[5][1]
    before = other.detach().clone()
    with pytest.raises(PipelineError, match=r"step 4: loss nan.*samples a, b, c, d"):
        train_step(model, optimizer, batches, LossSection(), 3, 1e-2, 1.0)
    assert torch.equal(other, before)


def test_learning_rate_is_a_pure_function_of_the_step(settings):
    section = settings("train.warmup_steps=10", "train.learning_rate=1e-3").train
    rates = [learning_rate_at(step, 110, section) for step in range(111)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(5e-4)
    assert rates[110] == pytest.approx(0.0, abs=1e-12)
    linear, constant = (
        settings("train.learning_rate=1e-3", "train.warmup_steps=10", f"train.schedule={name}").train
        for name in ("linear", "constant")
    )
    assert learning_rate_at(60, 110, linear) == pytest.approx(5e-4)
    assert learning_rate_at(35, 110, linear) == pytest.approx(7.5e-4)
    assert learning_rate_at(109, 110, constant) == pytest.approx(1e-3)
    assert learning_rate_at(4, 110, constant) == pytest.approx(5e-4)
    automatic = settings("train.learning_rate=1e-3").train
    assert learning_rate_at(2, 100, automatic) == pytest.approx(1e-3)  # 3 % of 100 steps


def test_adapter_loads_with_plain_peft_on_the_transformers_class(
    dataset, settings, tmp_path, tiny_dir, tokenizer, make_sample
):
    transformers = pytest.importorskip("transformers", minversion="5.3", reason="the native class came with 5.3")
    from peft import PeftModel

    last = train(settings(), dataset, tmp_path / "run", RunOptions())
    assert last
    sequence = SequenceBuilder(tokenizer, SequenceSection()).training(make_sample(9, 6, 10))
    native = transformers.HiggsAudioV2ForConditionalGeneration.from_pretrained(
        tiny_dir / "model", use_text_head=True, dtype=torch.float32
    )
    inputs = {
        "input_ids": torch.from_numpy(sequence.token_ids.astype(np.int64))[None],
        "audio_input_ids": torch.from_numpy(sequence.codes.T.astype(np.int64))[None],
        "audio_input_ids_mask": torch.ones((1, sequence.codes.shape[1]), dtype=torch.bool),
    }
    is_audio = torch.from_numpy(sequence.token_ids == 128016)
    with torch.no_grad():
        without = native(**inputs).logits[0, is_audio]
        adapted = PeftModel.from_pretrained(native, str(last / "adapter"))
        expected = adapted(**inputs).logits[0, is_audio]
        ours = load_model(tiny_dir / "model", torch.float32)
        config = load_adapter(ours, last / "adapter")
        hidden = ours.hidden(pack([sequence], [0], ["k"]))
        logits = ours.audio_lm_head(hidden[int((~is_audio).sum()) :])
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * scale)
    assert (expected - without).abs().max() > 1e-2, "an adapter without effect would prove nothing"
    assert config.r == 4


def test_dry_run_trains_nothing(dataset, settings, tmp_path):
    assert train(settings(), dataset, tmp_path / "run", RunOptions(dry_run=True)) is None
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere", "RUN"], 1, "error: nowhere: no such folder; give the OUT folder of `preprocess`"),
        (["CHATML", "RUN"], 1, "if it is a ChatML list, run first: preprocess"),
        (
            ["DATASET", "RUN", "--set", "train.learning_rat=1e-4"],
            1,
            "unknown key train.learning_rat; did you mean 'learning_rate'?",
        ),
        (["DATASET", "RUN", "--learning-rate", "fast"], 2, "'fast' is not a valid float"),
        (["DATASET", "RUN", "--config", "absent.toml"], 1, "absent.toml: no such file"),
        (["DATASET", "RUN", "--set", "model.base=nowhere"], 1, "model.base = 'nowhere': no such folder"),
        (["DATASET", "RUN", "--set", "train.batch_tokens=50"], 1, "no sample fits; the shortest of 6 has"),
        (
            ["DATASET", "RUN", "--set", "lora.mode=custom", "--set", 'lora.targets=["k_pro"]'],
            1,
            "'k_pro' matches no linear layer",
        ),
        (["DATASET", "RUN", "--resume", "nowhere"], 1, "not a complete checkpoint folder"),
    ],
)
def test_mistakes_give_one_clear_line(
    run_command, dataset, arabic_mini, tiny_dir, tmp_path, arguments, status, message
):
    names = {"DATASET": str(dataset), "RUN": str(tmp_path / "run"), "CHATML": str(arabic_mini)}
    given = [names.get(argument, argument) for argument in arguments]
    if "--config" not in given:
        given += ["--config", str(tiny_dir / "pipeline.toml")]
    result = run_command("train", *given)
    assert result.returncode == status, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    if status == 1:
        assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
            result.stderr.splitlines()[-1]
        ]


def test_curriculum_ramp_has_the_stated_values():
    from train.model.loss import curriculum_factor

    assert curriculum_factor(0, 100, True) == pytest.approx(0.1)
    assert curriculum_factor(50, 100, True) == pytest.approx(0.55)
    assert curriculum_factor(100, 100, True) == 1.0
    assert curriculum_factor(0, 100, False) == 1.0


def test_lora_start_does_not_change_the_model(tiny_dir, settings, ready):
    _, _, batches, _ = ready
    model = load_model(tiny_dir / "model", torch.float32)
    with torch.no_grad():
        before = model.hidden(batches[0])
        add_lora(model, settings().lora, "base", seed=0)
        after = model.hidden(batches[0])
    assert torch.equal(before, after)


def test_tensorboard_holds_the_metrics(dataset, settings, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(settings("train.tensorboard=true", "train.max_steps=3"), dataset, tmp_path / "run", RunOptions())
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    points = events.Scalars("loss/total_loss")
    assert [point.step for point in points] == [1, 2, 3]
    assert points[2].value == pytest.approx(losses(tmp_path / "run")[3])


def test_a_missing_wandb_key_is_told_before_the_model_loads(dataset, tiny_dir, run_command, tmp_path):
    result = run_command(
        *("train", dataset, tmp_path / "run", "--config", tiny_dir / "pipeline.toml", "--wandb"),
        env={"WANDB_API_KEY": "", "WANDB_MODE": "", "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"},
    )
    assert result.returncode == 1
    assert "error: wandb.mode = 'online': " in result.stderr
    assert "set WANDB_API_KEY, or use --no-wandb" in result.stderr
    assert "LoRA trains" not in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_that_goes_on_keeps_its_curves_at_wandb(tmp_path, monkeypatch):
    """No server here: what wandb.init is asked for. Offline every start is a run of its own."""
    import wandb

    asked = []

    def init(**options):
        asked.append(options)
        return SimpleNamespace(id=options.get("id", f"new{len(asked)}"))

    monkeypatch.setattr(wandb, "init", init)
    online = WandbSection(mode="online")
    for resumes in (False, True, True, False, True):
        start_wandb(tmp_path, online, {}, resumes=resumes)
    assert [(options.get("id"), options.get("resume")) for options in asked] == [
        *[(None, None), ("new1", "allow"), ("new1", "allow")],
        *[(None, None), ("new4", "allow")],
    ]
    start_wandb(tmp_path, WandbSection(mode="offline"), {}, resumes=True)
    assert "id" not in asked[-1]


def test_a_loader_process_that_dies_within_a_step_ends_the_run_with_a_line(dataset, settings, tmp_path, monkeypatch):
    """torch raises from the handler of SIGCHLD, here in the middle of the second step."""
    real = loop.train_step
    steps = []

    def deadly(*arguments):
        steps.append(arguments)
        if len(steps) == 2:
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", deadly)
    with pytest.raises(PipelineError, match=r"a loader process has ended .*lower train.num_workers"):
        train(settings("train.num_workers=2"), dataset, tmp_path / "run", RunOptions())


def test_what_a_person_would_warn_of_is_told_once(caplog):
    from train.evaluation.curve_monitor import CurveMonitor

    watch = CurveMonitor()
    sound = {"epoch": 0, "loss/audio_loss": 4.0, "metrics/data_wait_fraction": 0.01}
    with caplog.at_level("WARNING", "train"):
        watch.check(10, sound)
        watch.check(20, {**sound, "epoch": 1, "loss/audio_loss": 0.5})  # learned by heart, not copied
        assert not caplog.records
        for step in (30, 40):
            watch.check(step, {**sound, "loss/audio_loss": 0.5, "metrics/data_wait_fraction": 0.2})
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "step 30: audio loss 0.50 although no sample was seen twice" in messages[0]
    assert "20% of the time went into waiting for data; raise train.num_workers" in messages[1]


def test_best_points_at_the_lowest_held_out_loss_and_is_kept(tmp_path):
    from train.run_folder.checkpoint_folders import best_checkpoint, mark_best

    run = tmp_path / "run"
    for step, loss in ((2, 5.0), (4, 4.0), (6, 4.5)):
        folder = run / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"eval/audio_loss": loss}))
        mark_best(run, folder, {"eval/audio_loss": loss})
    assert best_checkpoint(run) == run / "checkpoints" / "checkpoint-4"
    assert (run / "best" / "metrics.json").is_file()
    mark_best(run, run / "checkpoints" / "checkpoint-6", {})
    assert best_checkpoint(run) == run / "checkpoints" / "checkpoint-4"


def test_weight_decay_can_be_changed_when_a_run_goes_on(dataset, settings, tmp_path, monkeypatch):
    from train import loop

    train(settings("train.max_steps=2"), dataset, tmp_path / "run", RunOptions())
    found = []

    def spy(model, optimizer, *given, **named):
        found.extend(group["weight_decay"] for group in optimizer.param_groups)
        return train_step(model, optimizer, *given, **named)

    monkeypatch.setattr(loop, "train_step", spy)
    train(settings("train.max_steps=3", "train.weight_decay=0.5"), dataset, tmp_path / "run", RunOptions())
    assert found == [0.5]


def test_a_folder_that_cannot_be_made_loses_one_checkpoint_and_not_the_run(dataset, settings, tmp_path, monkeypatch):
    make = Path.mkdir

    def full(path: Path, *given, **named) -> None:
        if path.name == ".checkpoint-2.tmp":
            raise OSError(errno.ENOSPC, "No space left on device")
        make(path, *given, **named)

    monkeypatch.setattr(Path, "mkdir", full)
    run = tmp_path / "run"
    train(settings(), dataset, run, RunOptions())
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert "checkpoint-2: not saved: [Errno 28] No space left" in (run / "logs" / "training.log").read_text()


def test_a_signal_at_a_checkpoint_writes_it_once_and_one_at_the_start_promises_none(
    dataset, settings, tmp_path, monkeypatch
):
    from train import loop
    from train.run_folder import checkpoint

    def stopping(model, optimizer, batches, section, step, *given, **named):
        result = train_step(model, optimizer, batches, section, step, *given, **named)
        if step + 1 == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return result

    written = []
    complete = checkpoint.Checkpoints._complete
    monkeypatch.setattr(
        checkpoint.Checkpoints,
        "_complete",
        lambda self, partial, folder, metrics: (written.append(folder.name), complete(self, partial, folder, metrics)),
    )
    monkeypatch.setattr(loop, "train_step", stopping)
    stop_at = 2
    with pytest.raises(PipelineError, match=r"after step 2; .*checkpoint-2 is saved, the same command goes on from it"):
        train(settings(), dataset, tmp_path / "run", RunOptions())
    assert written == ["checkpoint-2"]

    build_model = loop.build_model
    monkeypatch.setattr(
        loop, "build_model", lambda *given: (signal.raise_signal(signal.SIGTERM), build_model(*given))[1]
    )
    with pytest.raises(PipelineError, match="after step 0; the same command begins anew"):
        train(settings(), dataset, tmp_path / "other", RunOptions())


def test_a_second_ctrl_c_ends_at_once_and_loader_processes_do_not_listen(capfd):
    from train.signals import AT_ONCE, SAVING, StopSignal
    from train.world import ALONE

    with StopSignal() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.asked(ALONE)
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == f"{SAVING}{AT_ONCE}\n", "told once"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_between_two_packs_breaks_the_step_off_and_the_run_that_goes_on_takes_it_whole(
    dataset, settings, tmp_path, monkeypatch
):
    """Steps of many packs may take longer than the 30 seconds that launchers wait."""
    from train import loop
    from train.model.decoder import HiggsAudio

    train(settings(), dataset, tmp_path / "whole", RunOptions())
    forward, packs = HiggsAudio.forward, []

    def in_step_three(model, optimizer, batches, section, step, *given, **named):
        if step == 2:
            assert len(batches) == 2
            patch.setattr(HiggsAudio, "forward", stopping)
        return train_step(model, optimizer, batches, section, step, *given, **named)

    def stopping(self, batch, per_target=False):
        packs.append(batch.keys)
        signal.raise_signal(signal.SIGTERM)
        return forward(self, batch, per_target)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", in_step_three)
        with pytest.raises(PipelineError, match=r"after step 2; .*checkpoint-2 is saved"):
            train(settings(), dataset, tmp_path / "cut", RunOptions())
    assert len(packs) == 1
    train(settings(), dataset, tmp_path / "cut", RunOptions())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_fault_right_after_a_checkpoint_was_begun_does_not_cost_it(dataset, settings, tmp_path, monkeypatch):
    """The checkpoint of step 4 is still being written when step 5 is not finite: the run goes on from 4 all the same."""
    from train import loop
    from train.run_folder import checkpoint

    complete = checkpoint.Checkpoints._complete

    def slowly(self, *given):
        time.sleep(1.0)
        complete(self, *given)

    def poisoned(model, optimizer, batches, section, step, *given, **named):
        if step == 4:
            with torch.no_grad():
                lora_parameters(model)[0][1][0, 0] = float("nan")
        return train_step(model, optimizer, batches, section, step, *given, **named)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_complete", slowly)
        patch.setattr(loop, "train_step", poisoned)
        with pytest.raises(PipelineError, match=r"step 5: loss nan.*stopped before the update; samples 0000"):
            train(settings(), dataset, run, RunOptions())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert (run / "checkpoints" / "checkpoint-4" / "COMPLETE").is_file()
    train(settings(), dataset, run, RunOptions())
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert all(map(math.isfinite, losses(run).values()))


def test_an_adapter_is_spoken_with_the_layout_it_was_trained_with(dataset, settings, tiny_dir, tmp_path):
    from tools.speaker import SpeakConfig, load_speaker

    last = train(settings("train.max_steps=1", "sequence.layout=as_written"), dataset, tmp_path / "run", RunOptions())
    assert last
    asked = read_config(SpeakConfig, tiny_dir / "pipeline.toml")
    assert asked.sequence.layout == "clone"
    assert load_speaker(tiny_dir / "model", last / "adapter", asked, "cpu").builder.layout == "as_written"


def test_a_damaged_checkpoint_is_not_merged(dataset, settings, tmp_path):
    from tools.checkpoints.merge import merge_checkpoint

    last = train(settings("train.max_steps=2"), dataset, tmp_path / "run", RunOptions())
    assert last
    weights = last / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 0x40
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged: adapter/adapter_model\.safetensors is not what was written"):
        merge_checkpoint(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_later_checkpoints_than_the_start_are_set_aside(dataset, settings, tmp_path):
    """A run that goes back may not take what it left behind for its newest, and remove what it writes as old."""
    run = tmp_path / "run"
    evaluated = ["train.validation_fraction=0.3", "train.eval_every=2", "train.packs_per_step=1"]
    train(settings(*evaluated, "train.keep_checkpoints=9"), dataset, run, RunOptions())
    assert (run / "best").readlink() == Path("checkpoints/checkpoint-6")
    back = RunOptions(resume=str(run / "checkpoints" / "checkpoint-2"))
    last = train(settings(*evaluated, "train.max_steps=3", "train.keep_checkpoints=1"), dataset, run, back)
    assert last == run / "checkpoints" / "checkpoint-3"
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"checkpoint-3", "aside-checkpoint-4", "aside-checkpoint-6"}
    assert (run / "best").readlink() == Path("checkpoints/checkpoint-3")
    assert "later than step 2, from which this run goes on" in (run / "logs" / "training.log").read_text()
    assert train(settings(*evaluated, "train.max_steps=3"), dataset, run, RunOptions()) == last


def test_a_run_without_patience_left_stops_and_keeps_its_best(dataset, settings, tmp_path):
    """A learning rate that destroys the model: held-out losses rise from the first evaluation on."""
    run = tmp_path / "run"
    harmful = ["train.learning_rate=0.3", "train.max_steps=30", "train.validation_fraction=0.3", "train.patience=3"]
    harmful += ["train.eval_every=1", "train.save_every=1", "train.keep_checkpoints=1", "train.packs_per_step=1"]
    last = train(settings(*harmful, "train.warmup_steps=0"), dataset, run, RunOptions())
    assert last is not None
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval/audio_loss"] for line in history]
    best = held_out.index(min(held_out))
    assert len(held_out) == best + 1 + 3 < 30
    assert (run / "best").resolve().name == f"checkpoint-{best + 1}"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"checkpoint-{best + 1}", last.name}
    assert "stopped early" in (run / "logs" / "training.log").read_text()
    assert "the held-out audio loss has not fallen for 3 evaluations" in (run / "logs" / "training.log").read_text()
    again = train(settings(*harmful, "train.warmup_steps=0"), dataset, run, RunOptions())
    assert again == last, "a resumed run remembers that its patience is gone"
    assert json.loads((last / "metrics.json").read_text())["eval/audio_loss"] == held_out[-1], "and writes nothing anew"


def test_too_little_memory_is_told_with_what_to_change(dataset, settings, tmp_path, monkeypatch):
    from train import loop

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop, "train_step", full)
    with pytest.raises(PipelineError, match=r"packs of train\.batch_tokens = 700 \(CUDA out of memory.*halve it"):
        loop.train(settings(), dataset, tmp_path / "run", RunOptions())
