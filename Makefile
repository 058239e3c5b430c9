# demo, test and lint make their own virtual environment in .venv and install the pinned versions into it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo app test coverage test-slow test-browser lint clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

# Draw faces, most of them without labels; train on the few with; let that model label the others; train on both. Then
# videos: a temporal model on that one's features, its post-processing fitted on training videos, a rehearsed submission.
LAUNCH := $(BIN)/accelerate launch --quiet --config_file configs/accelerate/one_process.yaml
demo: $(STAMP)
	test -d data/demo || $(BIN)/fer data prepare synthetic --subjects 400 --train 1000 --unlabeled 10000 --out data/demo
	$(LAUNCH) train.py --config configs/demo.yaml --resume auto
	$(BIN)/python pseudo_label.py rounds --rounds 1 --model runs/demo/first/model --images data/demo --out runs/demo \
		--threshold 0.6 --agreement 0.7 --labelled data/demo --config configs/demo.yaml --launch "$(LAUNCH)"
	$(BIN)/fer eval --model runs/demo/round-1/run/model --against runs/demo/first/model --data data/demo --split test --out runs/demo
	test -d data/demo_videos || $(BIN)/fer data prepare synthetic --seed 1 --subjects 100 --videos 100 --frame_noise 0.3 \
		--out data/demo_videos
	$(LAUNCH) train.py --config configs/demo_video.yaml --resume auto
	$(LAUNCH) cross_validate.py --config configs/demo_video.yaml --k 3 --out runs/demo/video/folds --model runs/demo/video/model
	$(BIN)/fer eval --model runs/demo/video/model --against runs/demo/round-1/run/model --data data/demo_videos --split test \
		--out runs/demo/video_test
	$(BIN)/fer submission template --data data/demo_videos --out runs/demo/template.txt
	$(BIN)/fer submission make --model runs/demo/video/model --data data/demo_videos --template runs/demo/template.txt \
		--out runs/demo/prediction.txt
	$(BIN)/fer submission check runs/demo/prediction.txt --template runs/demo/template.txt

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

# The same, traced, which takes longer.
coverage: $(STAMP)
	$(BIN)/python -m pytest -n 2 --cov=modeling_fer --cov=train --cov=pseudo_label --cov=cross_validate --cov=release --cov-report=term:skip-covered

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Gradio wants an older pillow than the other tests run with, and so an environment of its own.
APP := demo/.venv
$(APP)/.installed: pyproject.toml constraints.txt
	test -x $(APP)/bin/python || $(PYTHON) -m venv $(APP)
	sed 's/^pillow==.*/pillow==12.3.0/' constraints.txt > $(APP)/constraints.txt
	$(APP)/bin/python -m pip install --quiet --constraint $(APP)/constraints.txt --editable ".[browser]"
	touch $@

# The Space on this machine; FER_MODEL and FER_DETECTOR name its model and its face detector.
app: $(APP)/.installed
	$(APP)/bin/python demo/app.py

# With Debian's chromium; npm fetches the static page's libraries, once.
test-browser: $(APP)/.installed
	@command -v chromium > /dev/null || { echo "no chromium: sudo apt-get install chromium" >&2; exit 1; }
	sh demo/web/vendor.sh
	$(APP)/bin/python -m pytest -m browser -rs tests/demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv demo/.venv demo/web/vendor .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build *.egg-info
