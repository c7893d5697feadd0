# Everything runs from a fresh clone: each target makes what it needs first.
# `make demo` and `make test` leave the same .venv; `make install` only prepares it.

PYTHON ?= python3
BIN := .venv/bin
# Stands for a .venv that matches the pinned requirements.
READY := .venv/ready
# Without bytecode each process would compile torch, Ray and timm anew: 36 s for 13.
unexport PYTHONDONTWRITEBYTECODE
NAME ?= demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo sweep check test test-slow install pins gpu-pack clean help

help:
	@echo "make demo     train a So-ViT on 12,000 photographs for a few minutes"
	@echo "make sweep    search its pooling: 12 trials in less than 10 minutes, most stopped early"
	@echo "make check    format, lint, types, import rules and the fast tests"
	@echo "make test     format, lint, types, import rules and all tests but slow ones"
	@echo "make test-slow  what takes minutes: rehearsals, sweeps over all of timm"
	@echo "make install  prepare .venv alone"
	@echo "make pins     resolve the pinned requirements again"
	@echo "make gpu-pack pack what a GPU machine without registries lacks: build/gpu-pack"

install: $(READY)

$(READY): requirements-dev.txt pyproject.toml
	@echo "preparing .venv: Python packages of about 7 GB unpacked, once"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  "sovit needs Python 3.11 or newer, this is %d.%d: set PYTHON=" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python \
	  -r requirements-dev.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --quiet --editable .
	@touch $(READY)

demo: $(READY)
	$(BIN)/sovit-train demo --name $(NAME)

sweep: $(READY)
	$(BIN)/sovit-tune demo pooling --name $(NAME:demo-%=sweep-%) --num-trials 12 \
	  --scale.num-workers 0 --optim.num-epochs 3 --optim.warmup-epochs 0.5 \
	  --optim.ema-decay 0

# What is fast tests/conftest.py sees from a file's text; no process is started.
check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@log=$$(mktemp); $(BIN)/pyright > $$log 2>&1 & types=$$!; \
	  $(BIN)/python -m pytest -m "fast and not slow"; tests=$$?; \
	  wait $$types; typed=$$?; cat $$log; rm $$log; \
	  test $$tests -eq 0 && test $$typed -eq 0

test: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# Side by side, since there are two cores and what needs Ray waits a lot. Whichever
	@# side is ready first takes the hosts.
	@dir=$$(mktemp -d); \
	  hosts() { ! mkdir $$dir/hosts 2> /dev/null || { echo "tests on several hosts:"; \
	    $(BIN)/python -m pytest -m "cluster and not slow"; }; }; \
	  (echo "types:"; $(BIN)/pyright; types=$$?; echo "tests without Ray:"; \
	    $(BIN)/python -m pytest -m "not ray and not cluster and not slow"; plain=$$?; \
	    hosts && test $$types -eq 0 && test $$plain -eq 0) > $$dir/log 2>&1 & side=$$!; \
	  echo "tests with Ray:"; \
	  $(BIN)/python -m pytest -m "ray and not slow"; with_ray=$$?; \
	  hosts; hosts=$$?; wait $$side; others=$$?; cat $$dir/log; rm -r $$dir; \
	  test $$with_ray -eq 0 && test $$hosts -eq 0 && test $$others -eq 0

# Whole sweeps and rehearsals, minutes each: before a release, or what they are about.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

pins:
	$(BIN)/uv pip compile -q --universal --python-version 3.11 pyproject.toml \
	  --extra train --no-header --no-annotate -o requirements.txt
	$(BIN)/uv pip compile -q --universal --python-version 3.11 pyproject.toml \
	  --extra dev --no-header --no-annotate -o requirements-dev.txt

gpu-pack: $(READY)
	$(BIN)/python -m benchmarks.gpu_pack

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build *.egg-info
