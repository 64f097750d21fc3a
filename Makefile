# Everything that is done to Tollgate, by name. `make` alone lists it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The first of these that is Python 3.11 or later; override with `make PYTHON=…`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
PROTOS := $(sort $(shell cd protos && find tollgate -name '*.proto'))
# What the wire must stay compatible with: the last release, else the commit before.
AGAINST ?= $(shell git describe --tags --abbrev=0 --match 'v*' 2>/dev/null || git rev-parse --verify -q HEAD~1)

.PHONY: help
help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- the environment -------------------------------------------------------------------------

define install
	@if [ -z "$(PYTHON)" ]; then \
	  echo "Tollgate needs Python 3.11 or later, and none was found. Install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@[ -x $(BIN)/python ] || { echo "Making the environment in .venv with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "$(PYTHON) cannot make an environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; }
	@total=$$(grep -c '^[a-z].*==' $(1)); \
	$(BIN)/python -m pip install --disable-pip-version-check --no-input --require-hashes --no-deps -r $(1) \
	  | awk -v total=$$total -v step=$$([ -t 2 ] && echo 1 || echo 25) -v end=$$([ -t 2 ] && echo '\r' || echo '\n') \
	    '/^(Collecting|Requirement already)/ && ++n % step == 0 { printf "  packages: %d of about %d" end, n, total; fflush() } \
	     /^Installing/ { print "  unpacking them          "; fflush() }' \
	  || { echo "The packages could not be installed. Check the network and the free disk (1 GB is needed), then run this again." >&2; exit 1; }
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@
endef

# The daemons and the command.
.venv/.runtime: requirements.txt pyproject.toml
	$(call install,requirements.txt)

# The same and what tests, checks and generates.
.venv/.dev: requirements-dev.txt pyproject.toml
	$(call install,requirements-dev.txt)
	@touch .venv/.runtime

.PHONY: setup
setup: .venv/.dev ## Make the environment for development

# --- using it --------------------------------------------------------------------------------

.PHONY: demo up
demo: .venv/.runtime ## Add real documents, search them, show what it cost: make demo [DOCS=path/…]
	@# One path may have spaces in it; several are several.
	@if [ -e "$(DOCS)" ]; then $(BIN)/tollgate demo "$(DOCS)"; else $(BIN)/tollgate demo $(DOCS); fi

up: .venv/.runtime ## Start every daemon, and leave them running until Ctrl-C
	@$(BIN)/tollgate up

# --- working on it ---------------------------------------------------------------------------

.PHONY: test torture bench fmt lint types rooms protos breaking gen fresh lock ci clean
test: .venv/.dev ## Run the tests, on a real PostgreSQL: make test [T=tests/cost]
	@$(BIN)/pytest $(or $(T),tests)

bench: .venv/.dev ## Measure: the gate, the ledger and the pipeline, as ratios within one run
	@$(BIN)/python -m bench

fmt: .venv/.dev ## Format the code and the protos
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix . && $(BIN)/buf format -w

lint: .venv/.dev ## Check style and formatting
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: .venv/.dev ## Check types
	@$(BIN)/mypy

rooms: .venv/.dev ## Check that the rooms keep to themselves
	@$(BIN)/lint-imports

protos: .venv/.dev ## Check the protos: lint, format and compatibility
	@$(BIN)/buf lint && $(BIN)/buf format --diff --exit-code
	@if git cat-file -e '$(AGAINST):buf.yaml' 2>/dev/null; then \
	  echo "compatible with $(AGAINST)?"; $(BIN)/buf breaking --against '.git#ref=$(AGAINST)'; \
	else echo "nothing to be compatible with yet"; fi

define generate
	cd protos && ../$(BIN)/python -m grpc_tools.protoc -I . --python_out=$(1) --grpc_python_out=$(1) \
	  --plugin=protoc-gen-mypy=../$(BIN)/protoc-gen-mypy --mypy_out=quiet:$(1) \
	  --plugin=protoc-gen-mypy_grpc=../$(BIN)/protoc-gen-mypy_grpc --mypy_grpc_out=quiet,only_async:$(1) \
	  $(PROTOS)
endef

gen: .venv/.dev ## Generate the stubs from the protos into gen/
	@rm -rf gen/tollgate && mkdir -p gen && $(call generate,../gen)

fresh: .venv/.dev ## Check that the generated stubs are up to date
	@out=$$(mktemp -d) && trap 'rm -rf $$out' EXIT && ($(call generate,$$out)) \
	  && diff -r -x __pycache__ $$out/tollgate gen/tollgate \
	  || { echo "gen/ is not what the protos say: run make gen and commit it" >&2; exit 1; }

lock: .venv/.dev ## Pin every dependency anew, with hashes
	@pin="$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -q pyproject.toml"; \
	$$pin -o requirements.txt && $$pin --extra dev -c requirements.txt -o requirements-dev.txt

ci: ## Everything that must hold: the static checks, then the tests
	@bash .ci/run

clean: ## Remove the environment, so that it is made anew; what the mesh keeps stays
	@rm -rf .venv
