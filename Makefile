# `make run` runs the whole pipeline on the shipped human ratings; `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: run test test-slow bench lint clean

run: .venv/installed
	rlhf run

test: .venv/installed lint
	python -m pytest -n 2 --dist worksteal --durations 15

test-slow: .venv/installed
	python -m pytest -n 2 --dist worksteal --durations 15 -m slow

# A race against TRL, whose virtual environment it makes itself: half an hour on two cores.
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
bench: .venv/installed
	for workload in smollm2-ragged smollm2-dense tiny-widevocab; do \
		python -m benchmarks.ppo --workload benchmarks/workloads/$$workload.json --model $(MODEL) --peer \
			--json benchmarks/numbers/$$workload.json || exit 1; \
	done
	python -m benchmarks.ppo --workload benchmarks/workloads/smollm2-ragged.json --model $(MODEL) --peer \
		--trainable-layers 6 --json benchmarks/numbers/smollm2-ragged-top6.json
	python -m benchmarks.charts

lint: .venv/installed
	ruff check .
	ruff format --check .
	mypy

dvc.yaml: .venv/installed
	python -m rlhf_tasks.versioning
.PHONY: dvc.yaml

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .rlhf build *.egg-info
