# make demo   convert the small model in examples/ and ask it three questions
# make test   all tests          make lint   ruff and mypy
# make arm    an emulated Arm board (Debian only): `make test` then runs some tests there, too
# make bench  speed on this machine, as in the README: llama-bench's rows for models of TinyLlama's
#             shape with random weights (FILES, 6 GB in all, made once). With
#             PEER=python, an interpreter with llama-cpp-python, beside llama.cpp.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  := demo/tiny-home-Q4_K_M.gguf
PYTEST ?= -n 2
FILES  ?= Q4_K_M Q8_0 Q4_0 Q6_K Q3_K_M Q2_K F16
BENCH  := $(FILES:%=demo/tinyllama-%.gguf)

.DEFAULT_GOAL := demo
.PHONY: demo test arm lint bench clean
.DELETE_ON_ERROR:

$(VENV)/.made:
	@$(PYTHON) -c 'import struct, sys; sys.exit(sys.version_info < (3, 11) or struct.calcsize("P") < 8)' \
	  || { echo "edgeq needs a 64-bit Python 3.11 or newer; found: $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "no venv module: sudo apt install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(MODEL): $(VENV)/.installed $(wildcard examples/tiny-home/*)
	@mkdir -p $(@D)
	$(BIN)/edgeq convert examples/tiny-home -o $@ -t Q4_K_M --force

demo: $(MODEL)
	@$(BIN)/python examples/demo.py $(MODEL)
	@echo "To chat with it:  $(BIN)/edgeq run $(MODEL)"

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST)

arm: $(VENV)/.dev
	$(BIN)/python tests/arm/prepare.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo/tinyllama-%.gguf: tests/bench/tinyllama.py tests/bench/randomllama.py $(VENV)/.installed
	@mkdir -p $(@D)
	$(BIN)/python tests/bench/tinyllama.py $@ $*

bench: $(BENCH)
	$(BIN)/edgeq bench --limits
	$(BIN)/edgeq bench $(BENCH)
	$(if $(PEER),$(BIN)/python tests/bench/peers.py $(BENCH) --peer-python $(PEER))

clean:
	rm -rf $(VENV) demo
