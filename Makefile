# Each target makes its own virtual environment on a fresh machine; a second call installs nothing.
.PHONY: demo app docs test attack mutants test-cuda pretend-cuda quality style evaluate ablations benchmark bench-real-photos clean

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# The newest torch with a CPU build on PyPI-like indexes; override with TORCH=torch on a CUDA machine.
TORCH ?= torch==2.13.0
# No test or demo reaches for the network: everything is in the repository.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false
# pip compiles what it installs on one core, a third of its time; `compile` does it on all (a few files of other Pythons
# in these packages fail, which is no matter).
export PIP_NO_COMPILE = 1
compile = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

demo: $(VENV)/.installed
	$(BIN)/python demo/run_demo.py

# The web page, on http://127.0.0.1:7860; APP="--port 8000 --workspace ~/concepts" says more. Base models on the Hub may
# be named there, so it is not kept offline.
APP ?=
app: export HF_HUB_OFFLINE = 0
app: $(VENV)/.installed-app
	$(BIN)/python app.py --open $(APP)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

# An hour of random inputs for the rooms that take any (tests/attack.py), not part of CI. It can be stopped and goes on
# where it was; what it found is printed at the end, and by ATTACK=--report. ATTACK="--minutes 600" is longer.
ATTACK ?=
attack: $(VENV)/.installed-dev
	$(BIN)/python tests/attack.py $(ATTACK)

# Wrong lines that the tests should notice (tests/mutants.toml), half an hour, not part of CI; it goes on where it was.
# MUTANTS=windows tries some of them, MUTANTS=--report says what is known.
MUTANTS ?=
mutants: $(VENV)/.installed-dev
	$(BIN)/python tests/mutants.py $(MUTANTS)

# On a machine with a GPU (`make test-cuda TORCH=torch`); elsewhere it says so in one line. PYTHON_CUDA=python3 takes that
# Python as it is: it needs a CUDA build of torch and the packages of requirements-dev.txt.
PYTHON_CUDA ?=
test-cuda: $(if $(PYTHON_CUDA),,$(VENV)/.installed-dev)
	@python=$(or $(PYTHON_CUDA),$(BIN)/python); \
	if $$python -W ignore -c "import torch; raise SystemExit(0 if torch.cuda.is_available() else 3)"; then \
		$$python -m pytest -o addopts=-q -m cuda tests/gpu tests/test_speed_and_memory.py; \
	elif [ $$? -eq 3 ]; then echo "test-cuda: there is no CUDA GPU here, nothing to test"; else exit 1; fi

# The CUDA code path on a machine without a GPU, not part of CI: 3 minutes, once PyTorch's CUDA build (4.7 GB) is in an
# environment of its own. All other packages there are the project's.
VENV_CUDA ?= .venv-cuda
TORCH_CUDA ?= torch==2.12.0
pretend-cuda: $(VENV_CUDA)/.installed
	$(VENV_CUDA)/bin/python tests/gpu/run_matrix.py

# docs/usage.md and personalization/flags.json, which the page and --help read, from the scripts' flags.
docs: $(VENV)/.installed-dev
	$(BIN)/python -m docs.generate

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Speed and memory on the Stable Diffusion 1.5 architecture with random weights: a reduced matrix that refreshes the
# tables of README.md and docs/ (a quarter of an hour on 2 cores, 24 GB of memory, 8 GB of disk).
benchmark: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/bench_step.py --reduced
	$(BIN)/python benchmarks/bench_memory.py --reduced
	$(BIN)/python benchmarks/make_tables.py
	$(BIN)/python benchmarks/plot_scaling.py

# Every way to learn a token at equal cost, on three of the demo's subjects and with one seed (less than half an hour on
# 2 cores, goes on where it was): table and figures in benchmarks/.cache/evaluate. The whole, which the committed results
# are of, on either base: benchmarks/compare_methods.py --base base_eps --subjects all --seeds 0 1 2
evaluate: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/compare_methods.py --subjects striped_star striped_cross twotone_moon --seeds 0 \
		--output_dir benchmarks/.cache/evaluate

# The paper's ablations on the demo base, one table after the other (projected: 3 hours on 2 free cores). It goes on where
# it was and says at each table how many runs are missing and how long they take.
ABLATIONS := sg_puts n mu rge_spsa tau_nu sampling precision timesteps gauss_newton ideas
ABLATION_FLAGS ?= --processes 2
ablations: $(VENV)/.installed-dev
	for grid in $(ABLATIONS); do $(BIN)/python benchmarks/compare_methods.py --grid $$grid $(ABLATION_FLAGS) || exit 1; done
	$(BIN)/python benchmarks/make_tables.py

# Real photos on the Stable Diffusion 1.5 architecture with random weights (6 GB of disk and memory, minutes on a CPU).
PHOTOS ?= ../shared/data/dreambooth/dog6
bench-real-photos: $(VENV)/.installed
	$(BIN)/python benchmarks/bench_real_photos.py --photos $(PHOTOS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The project itself comes last, as it is (-e): without a build of its own, which would fetch setuptools once more.
$(VENV)/.installed: requirements.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(compile)
	touch $@

$(VENV)/.installed-app: requirements-app.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-app.txt
	$(compile)
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-app.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(compile)
	touch $@

$(VENV_CUDA)/.installed: | $(VENV)/.installed
	$(BIN)/python -m venv --clear $(VENV_CUDA)
	$(VENV_CUDA)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH_CUDA)"
	site="import sysconfig; print(sysconfig.get_path('purelib'))"; \
	$(BIN)/python -c "$$site" > "$$($(VENV_CUDA)/bin/python -c "$$site")/project.pth"
	touch $@

clean:
	rm -rf $(VENV) $(VENV_CUDA) demo/output .pytest_cache .ruff_cache
