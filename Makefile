# demo, test and lint make their own virtual environment in .venv and install the pinned versions into it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-slow lint clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

# Draw faces, train a small ViT on some people, evaluate it on others.
demo: $(STAMP)
	test -d data/demo || $(BIN)/fer data prepare synthetic --subjects 400 --train 12000 --out data/demo
	$(BIN)/accelerate launch --quiet --config_file configs/accelerate/one_process.yaml train.py --config configs/demo.yaml --resume auto
	$(BIN)/fer eval --model runs/demo/model --data data/demo --split test --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --cov=modeling_fer --cov=train --cov-report=term:skip-covered

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build *.egg-info
