# `make train` and `make test` need Python (3.10 or newer) and a package registry; they do all the set-up.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUTPUT ?= outputs/digits-layershuffle
# Neighbours stay on one process, which makes what a file's tests share once; who is done takes from the other
PARALLEL := --numprocesses 2 --dist worksteal

.PHONY: help install train model-cards encoders test test-slow bench lint format clean

help:
	@echo "make train        train LayerShuffle and a plain ViT on the digits, evaluate both, write a card (~3 minutes)"
	@echo "make test         run the tests (~15 minutes on 2 cores)"
	@echo "make test-slow    run the tests that take minutes each as well"
	@echo "make bench        measure speed against plain transformers, write benchmarks/README.md (twenty minutes)"
	@echo "make model-cards  renew code, pictures and cards of the models in model_cards/, with their weights (~2 minutes)"
	@echo "make encoders     run the checks of all families, write docs/encoders.md (~15 minutes)"
	@echo "make lint         check style; make format mends it"
	@echo "make clean        remove the environment and the outputs"

install: $(INSTALLED)

# torch first and pinned, so that no other package's looser range brings gigabytes of CUDA libraries
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@echo "Installing torch, transformers, datasets and the tools for tests into $(VENV): 2 GB on disk, 2 to 5 minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' $(CONSTRAINTS))"
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
# For the tests alone. timm asks for torchvision, of which there is none for the pinned torch; the tests stand in for it
	$(BIN)/python -m pip install --quiet --no-deps "$$(grep '^timm==' constraints.txt)"
	touch $@

train: $(INSTALLED)
	$(BIN)/hf-layershuffle train --baseline --output_dir $(OUTPUT)

model-cards: $(INSTALLED)
	$(BIN)/python experiments/build_model_cards.py

# ENCODERS="--resume" goes on after an interruption, ENCODERS="--only sweep" runs one part
encoders: $(INSTALLED)
	$(BIN)/python experiments/encoder_table.py $(ENCODERS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu"

# BENCH="--resume" goes on after an interruption, BENCH="--only startup" measures one thing
bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py $(BENCH)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_code.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs build dist src/*.egg-info
