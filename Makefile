# Every target makes .venv itself, from requirements.lock, on a machine that has Python 3.11 or 3.12, make and git.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
STORE ?= store

.PHONY: demo test test-all test-fast lint bench peers lock clean help
help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

# torch and torchvision come as a pair only through uv's resolution of the lock, hence uv.
$(STAMP): requirements.lock pyproject.toml
	@set -e; \
	python=; \
	for candidate in python3.12 python3.11 python3; do \
	  if $$candidate -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then \
	    python=$$candidate; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "unclip needs Python 3.11 or 3.12 with venv, and found neither. Install one, for instance:" >&2; \
	  echo "  Debian/Ubuntu: apt-get install python3 python3-venv     macOS: brew install python@3.12" >&2; \
	  exit 1; \
	fi; \
	[ -x $(BIN)/python ] || $$python -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv; \
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock; \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .; \
	touch $(STAMP)

demo: $(STAMP)  ## the whole chain on this machine: web server, data, training, a promoted release
	$(BIN)/unclip run demo --store $(STORE)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q --dist loadfile --no-loadscope-reorder
test: $(STAMP)  ## every test; of grids of kinds and features a choice in which each kind and each feature is
	$(PYTEST) -n 3 -m "not full" --durations=25

test-all: $(STAMP)  ## the same and the grids in full; before a release and each night
	$(PYTEST) -n 3 --hypothesis-profile=all --durations=25

test-fast: $(STAMP)  ## tests without Ray and long training
	$(PYTEST) -n 2 -m "not slow and not ray"

lint: $(STAMP)  ## ruff, import floors, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy unclip training pipelines infra

bench: $(STAMP)  ## speed and memory, as ratios in one run
	$(BIN)/python -m pytest tests/benchmarks -q -s --override-ini python_files=bench_*.py

PEERS := $(patsubst tests/benchmarks/peers/%.txt,.venv-peers/%/.stamp,$(wildcard tests/benchmarks/peers/*.txt))
peers: $(PEERS)  ## what benchmarks compare with, each in an environment of its own under .venv-peers

.venv-peers/%/.stamp: tests/benchmarks/peers/%.txt $(STAMP)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(@D)
	$(BIN)/uv pip install --quiet --python $(@D)/bin/python -r $<
	touch $@

proof-kill: $(STAMP)  ## kill -9 of the driver at ten random moments; the result is byte-identical
	$(BIN)/python -m tests.proofs.kill --store $(STORE)-proof-kill

proof-parallel: $(STAMP)  ## trainers in parallel against one after another, three repeats
	$(BIN)/python -m tests.proofs.parallel --store $(STORE)-proof-parallel

proof-faults: $(STAMP)  ## kill -9 in every stage of the data, failing S3, full disks; byte-identical; under an hour
	$(BIN)/python -m tests.proofs.faults --store $(STORE)-proof-faults --docs docs

proof-interrupt: $(STAMP)  ## fits killed, terminated and resized at bad moments end as undisturbed ones; under an hour
	$(BIN)/python -m tests.proofs.interrupt --out $(STORE)-proof-interrupt

proof-elastic: $(STAMP)  ## fits on Ray that lose a node and get another end as undisturbed ones; ten minutes
	$(BIN)/python -m tests.proofs.elastic --out $(STORE)-proof-elastic

proof-algebra: $(STAMP)  ## a thousand histories of a list: what is touched is done again, and nothing else; an hour
	$(BIN)/python -m pytest tests/pipelines/versions/test_algebra.py --hypothesis-profile=proof --timeout=0 -q

proof-million: $(STAMP)  ## peak memory at a million rows against a hundred thousand; under an hour, goes on where it was stopped
	$(BIN)/python -m tests.proofs.million --out $(STORE)-proof-million

proof-samplers: $(STAMP)  ## sampler × steps × quality on the demo's release (make demo first); under an hour
	$(BIN)/python -m tests.proofs.samplers --store $(STORE) --out $(STORE)-proof-samplers --docs docs

proof-findings: $(STAMP)  ## the paper's findings on the demo's world (make demo first); under an hour
	$(BIN)/python -m tests.proofs.findings --store $(STORE) --out $(STORE)-proof-findings --docs docs

lock: $(STAMP)  ## compile requirements.lock anew: exact versions, for every platform, no addresses
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-emit-index-url \
	  --no-emit-find-links --group dev pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) .venv-peers
