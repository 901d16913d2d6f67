# Everything runs from a fresh clone: targets install what they need into .venv.
PYTHON ?= python3
BIN := .venv/bin
# Python compiles a module when it is first imported; pip would compile all, most of which nothing imports.
PIP_INSTALL := python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: install demo demo-image demo-audio demo-text demo-multimodal report test test-cuda test-slow test-latest style check bench \
	tensorboard app

# What every machine installs from wheels.
WHEELS := requirements.txt requirements-demo.txt requirements-eval.txt requirements-trackers.txt requirements-app.txt \
	requirements-dev.txt

# What depends on the internals of other packages.
LATEST_TESTS := tests/model tests/inference/test_generate_text.py tests/test_training.py tests/stages/test_diffusion_training.py \
	tests/stages/test_multimodal_stage.py tests/utils/test_training_utils.py tests/utils/test_transformers_seam.py

install: .venv/installed

# What some targets need. A file in .venv says that it is installed, and that of `make install` says so of everything.
needs = $(if $(wildcard .venv/installed),.venv/installed,.venv/$(1))
.venv/stages: requirements.txt
.venv/demo: requirements.txt requirements-demo.txt requirements-eval.txt requirements-pesq.txt
.venv/app: requirements.txt requirements-demo.txt requirements-app.txt
.venv/stages .venv/demo .venv/app:
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP_INSTALL) $(patsubst %,-r %,$(filter-out requirements-pesq.txt,$^))
	$(if $(filter requirements-pesq.txt,$^),$(INSTALL_PESQ))
	touch $@

# Two packages are built from source and left out where that fails: pesq (it needs a C compiler; metric tables and tests say
# so) and deepspeed (it needs none on Linux; its tests are skipped).
INSTALL_PESQ = command -v cc >/dev/null && $(BIN)/$(PIP_INSTALL) -r requirements-pesq.txt || \
	echo "PESQ will not be measured: the package pesq could not be built (it needs a C compiler and Python's headers)"
.venv/installed: $(WHEELS) requirements-no-deps.txt requirements-deepspeed.txt requirements-pesq.txt
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP_INSTALL) $(WHEELS:%=-r %)
	$(BIN)/$(PIP_INSTALL) --no-deps -r requirements-no-deps.txt
	$(BIN)/$(PIP_INSTALL) -r requirements-deepspeed.txt || echo "--use_deepspeed will not work: the package deepspeed could not be built"
	$(INSTALL_PESQ)
	touch $@

demo: $(call needs,demo)  ## every kind of model from scratch, on a CPU, and runs/demo/report.html; again: goes on, or the report alone
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/demo.sh

demo-image demo-audio demo-text demo-multimodal: $(call needs,demo)  ## one part; multimodal runs image and audio first
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/demo.sh $(@:demo-%=%)

report: $(call needs,stages)  ## runs/demo/report.html anew, of what is there
	$(BIN)/python inference/report.py

test: install  ## everything but the slow chains
	# Without a restart, since a worker that replaces a crashed one waits forever under `--dist loadfile`.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not launch and not cuda" -n auto --maxprocesses 8 --dist loadfile \
		--max-worker-restart 0
	$(BIN)/python -m pytest -m "launch and not slow"

test-cuda: install  ## on a machine with an NVIDIA GPU: every stage and what is generated, against the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cuda -n 8 --dist loadgroup -rP

test-slow: install  ## whole chains and long comparisons
	$(BIN)/python -m pytest -m slow

test-latest:  ## models and training with the newest release of every ranged dependency, whatever its upper bound
	$(PYTHON) -m venv .venv-latest
	for file in requirements*.txt; do sed 's/,<[0-9.]*//' $$file > .venv-latest/$$file; done
	.venv-latest/bin/$(PIP_INSTALL) --upgrade $(WHEELS:%=-r .venv-latest/%) -r .venv-latest/requirements-deepspeed.txt
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest -m "not slow and not launch and not cuda" -n auto --maxprocesses 8 \
		--dist loadfile --max-worker-restart 0 $(LATEST_TESTS)

style: install  ## format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: install  ## lint and types, changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/hadolint Dockerfile

bench: install  ## side by side with peers; see benchmarks/README.md
	$(BIN)/$(PIP_INSTALL) -r requirements-bench.txt
	# litgpt asks for an older huggingface_hub than transformers; what is compared here runs with the newer one.
	$(BIN)/$(PIP_INSTALL) --no-deps "litgpt>=0.5.13,<0.6"
	$(BIN)/python benchmarks/image_vae.py
	$(BIN)/python benchmarks/diffusion.py
	$(BIN)/python benchmarks/vocoder.py
	$(BIN)/python benchmarks/audio_vae.py
	$(BIN)/python benchmarks/alignment.py
	$(BIN)/python benchmarks/speech.py
	$(BIN)/python benchmarks/transformer.py
	$(BIN)/python benchmarks/multimodal.py

tensorboard: $(call needs,stages)  ## images, losses and metrics of all runs
	$(BIN)/tensorboard --logdir runs

app: $(call needs,app)  ## a page over the checkpoints in runs/, on this machine: http://127.0.0.1:7860
	$(BIN)/python inference/app.py --runs runs
