# One virtual environment, made on first use and again whenever what it holds has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUNDLE := out/emoji
PROMPT ?= a red apple
# How the embedded model is exported: its weights are fp16, so storing them as fp16 loses nothing.
EXPORT_FLAGS := --fp16-weights --batch 1..8 --height 64..128 --width 64..128

# `make gpu`: the Python that has PyTorch with CUDA, and a folder of wheels for what it lacks.
GPU_PYTHON ?= python3
WHEELS ?=
GPU_FLAGS ?=
GPU_SITE := $(CURDIR)/out/gpu-site

.PHONY: help run test check format bench gallery bundle golden schema gpu clean

help:
	@echo "make run     draw a picture with the embedded model, from its checkpoint"
	@echo "make test    everything that CI checks: format, lint, types, tests"
	@echo "make check   format, lint and types alone"
	@echo "make format  rewrite the code as 'make check' wants it"
	@echo "make bench   sdrt beside diffusers, measured here in a few minutes: one page with figures and plots"
	@echo "make gallery  one page of pictures: what each option does, with the command for each"
	@echo "make schema  write the JSON Schema of a bundle's manifest, after one of its dataclasses was changed"
	@echo "make gpu     test, measure and report on a machine with an NVIDIA GPU (GPU_PYTHON=…, WHEELS=folder)"
	@echo "make bundle  export the bundle that the wheel ships, after the embedded model was trained anew"
	@echo "make golden  write docs/golden anew, after what a sampler, the noise or the tokenizer gives was changed"
	@echo "make clean   remove what the above made, the virtual environment too"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("sdrt needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(STAMP)
	@mkdir -p out
	@start=$$(date +%s); \
	$(BIN)/sd-export models/emoji $(BUNDLE) $(EXPORT_FLAGS) --force && \
	exported=$$(date +%s); \
	$(BIN)/sd-run "$(PROMPT)" --bundle $(BUNDLE) --seed 1 --output out/picture.png && \
	drawn=$$(date +%s); \
	echo "export $$((exported - start)) s, drawing $$((drawn - exported)) s: look at $(CURDIR)/out/picture.png"

test: check
	$(BIN)/pytest -m "not gpu and not slow and not peers"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/sd-bench peers install diffusers
	$(BIN)/sd-bench emoji --peers diffusers --report out/bench

gallery: $(STAMP)
	$(BIN)/python -m sdrt.benchmarks.gallery.drawing

bundle: $(STAMP)
	$(BIN)/sd-export models/emoji models/emoji/bundle $(EXPORT_FLAGS) --force

golden: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m support.references.golden

schema: $(STAMP)
	$(BIN)/python -m sdrt.export.schema

# Without a virtual environment: PyTorch with CUDA is taken from where it is, and nothing is downloaded.
gpu:
	@mkdir -p $(GPU_SITE)
	@if [ -n "$(WHEELS)" ]; then \
	  $(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade \
	    --target $(GPU_SITE) $(WHEELS)/*.whl; fi
	PYTHONPATH="$(CURDIR)/src:$(GPU_SITE)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) -m sdrt.benchmarks.make_gpu $(GPU_FLAGS)

clean:
	rm -rf $(VENV) out build dist *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
