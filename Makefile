# One virtual environment, .venv, two sizes of it:
#   make env    the whole CPU product: runtime and face tracker, without PyTorch
#   make dev    adds PyTorch, ONNX and the test tools
# Each leaves .venv/bin/diffusionact working, and does nothing when it is up to date.

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -qq
INSTALL := $(PIP) install --no-warn-conflicts -c constraints.txt
WANTED := pyproject.toml constraints.txt CMakeLists.txt $(wildcard runtime/kernels/*.cu) \
  runtime/web/CMakeLists.txt runtime/web/package-lock.json
# The networks of the tests are tiny: a second thread would mostly wait for the first.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest
# A file's tests share what is costly to make, so that a file stays together. Each process takes
# about 2 GB. WORKERS=0 runs all in one.
WORKERS := auto
BESIDE := -n $(WORKERS) --maxprocesses 4 --dist loadfile

.PHONY: help env dev demo test test-slow gpu-check gpu-bench links lint clean .FORCE
help:
	@sed -n 's/^## //p' Makefile

## make demo       install what the demo needs, then write out/demo.mp4 and out/demo.png
demo: env
	$(VENV)/bin/diffusionact demo

## make test       install all tools, then ruff, mypy and the tests (make test-slow: the long ones)
test: dev
	@status=0; \
	$(MAKE) --no-print-directory lint || status=$$?; \
	$(PYTEST) $(BESIDE) -m "not slow and not gpu" || status=$$?; \
	exit $$status

test-slow: dev
	$(PYTEST) -m "slow and not gpu"

lint: dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

## make gpu-check  on a GPU machine: the tests that need one, then times; within 8 minutes
## make gpu-bench  the times alone. Both install nothing: PyTorch is that of GPU_PYTHON (python3)
GPU_PYTHON := python3
# What the caller has put on the path, such as pytest or TensorRT, stays on it.
ON_GPU = PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON)
gpu-check: links
	$(ON_GPU) -m benchmarks.gpu --check

gpu-bench: links
	$(ON_GPU) -m benchmarks.gpu

# A copy of the tree may have lost them.
links:
	@for name in engines export runtime training; do \
	  test -e diffusionact/$$name || ln -s ../$$name diffusionact/$$name; done

## make env        the environment of `make demo`      make dev     that of `make test`
env: $(VENV)/.env
dev: $(VENV)/.dev

# Python 3.11 or 3.12: what constraints.txt is for, and the last that mediapipe 0.10.21 has.
$(VENV)/bin/pip:
	@for python in $(PYTHON) python3 python3.11 python3.12 /usr/bin/python3; do \
	  if $$python -c 'import sys, ensurepip; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' \
	      2>/dev/null; \
	  then echo "creating $(VENV) with $$($$python --version)"; exec $$python -m venv $(VENV); fi; \
	done; \
	echo "no Python 3.11 or 3.12 with venv found; apt-get install python3-venv, or make PYTHON=..." >&2; \
	exit 2

# An editable installation knows modules by name: after a pull that added or moved some, once more.
$(VENV)/.modules: .FORCE | $(VENV)/bin/pip
	@find -H diffusionact/ engines export runtime training -name '*.py' | sort > $@.new; \
	if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi
.FORCE:

# Of what mediapipe depends on, its face graph needs protobuf alone.
# Of what OpenVINO depends on, numpy is there; the other part reports to its makers.
$(VENV)/.env: $(WANTED) $(VENV)/.modules | $(VENV)/bin/pip
	@echo "installing diffusionact and the face tracker into $(VENV)"
	@$(INSTALL) -e '.[live,serve]' protobuf
	@$(INSTALL) --no-deps openvino || \
	  echo "no OpenVINO for this platform: ONNX Runtime runs the networks, more slowly" >&2
	@$(INSTALL) --no-deps mediapipe || \
	  echo "no face tracker for this platform: drivers are landmark tracks (.npz) only" >&2
	@touch $@

$(VENV)/.dev: $(VENV)/.env
	@echo "installing PyTorch, ONNX and the test tools into $(VENV)"
	@$(INSTALL) -e '.[dev]'
	@touch $@

## make clean      remove all that was made, .venv included
clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
