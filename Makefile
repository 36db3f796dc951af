# Two commands set up everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test checks integration processes bench lint format types lock clean

demo: $(STAMP)  ## the whole pipeline on a synthetic cohort: scores, the output tree, how to browse it
	$(BIN)/pistoseg demo --workspace demo

# Integration tests wait for Ray's processes a third of the time, so that more than two of these keep two cores busy.
test: $(STAMP)  ## lint, format check, type check, tests
	$(MAKE) --no-print-directory --jobs=3 checks integration processes

checks: lint types  ## what needs no Ray; beside the others more than a thread only takes longer
	OMP_NUM_THREADS=1 $(BIN)/pytest --quiet tests/unit

integration: $(STAMP)  ## stages on a Ray of the tests' own
	$(BIN)/pytest tests/integration -m "not processes"

processes: $(STAMP)  ## commands, clusters, servers, and what kills them
	$(BIN)/pytest tests/integration -m processes

bench: $(STAMP)  ## speed beside what one would use instead: ONLY=mosaics,slides DATA=folder MODEL=bundle OUT=folder
	$(BIN)/python -m benchmarks $(if $(ONLY),--only $(ONLY)) $(if $(DATA),--data $(DATA)) $(if $(MODEL),--model $(MODEL)) $(if $(OUT),--out $(OUT))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(STAMP)

lock: $(STAMP)  ## resolve the versions anew, after pyproject.toml changed
	$(BIN)/pip-compile --quiet --upgrade --extra demo --extra dev --strip-extras --no-emit-index-url \
		--no-emit-find-links --no-annotate --allow-unsafe --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
