# Each target makes its own virtual environment on a fresh machine; a second call installs nothing.
.PHONY: demo test quality style benchmark bench-real-photos clean

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# The newest torch with a CPU build on PyPI-like indexes; override with TORCH=torch on a CUDA machine.
TORCH ?= torch==2.13.0
# No test or demo reaches for the network: everything is in the repository.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

demo: $(VENV)/.installed
	$(BIN)/python demo/run_demo.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Speed and memory on the Stable Diffusion 1.5 architecture with random weights: a reduced matrix that refreshes the
# tables of README.md and docs/results.md (a quarter of an hour on 2 cores, 24 GB of memory, 8 GB of disk).
benchmark: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/bench_step.py --reduced
	$(BIN)/python benchmarks/bench_memory.py --reduced
	$(BIN)/python benchmarks/make_tables.py
	$(BIN)/python benchmarks/plot_scaling.py

# Real photos on the Stable Diffusion 1.5 architecture with random weights (6 GB of disk and memory, minutes on a CPU).
PHOTOS ?= ../shared/data/dreambooth/dog6
bench-real-photos: $(VENV)/.installed
	$(BIN)/python benchmarks/bench_real_photos.py --photos $(PHOTOS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) demo/output .pytest_cache .ruff_cache
