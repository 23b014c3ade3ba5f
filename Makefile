# Two commands need nothing but Python >= 3.11, make and a package registry: `make run` and `make test`.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
PY ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
V := .venv
BIN := $(V)/bin

.PHONY: help run test test-faults test-attacks install format lint types unit upgrade revision schema-diff squash freeze lock bench docs build clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(V)/.run: requirements/run.txt pyproject.toml
	@test -n "$(PY)" || { echo "Python 3.11 or newer is needed"; exit 1; }
	$(PY) -m venv $(V)
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/run.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

$(V)/.test: $(V)/.run requirements/test.txt requirements/clients.txt tests/clients/js/package-lock.json tests/install-parts
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/test.txt
	tests/install-parts
	@touch $@

install: $(V)/.run ## everything the server needs, in .venv

run: $(V)/.run ## start everything: PostgreSQL, migrations, server
	@exec $(BIN)/realtime-server run

# Four at once, also on two cores: they mostly wait.
test: $(V)/.test lint types ## every check and every test
	$(BIN)/python -m pytest -n 4 --dist loadfile

test-faults: $(V)/.test ## every fault at length, some twenty-five minutes; the result goes to docs/faults.md
	REALTIME_FAULTS_REPORT=docs/faults.md $(BIN)/python -m pytest tests/faults -m faults

test-attacks: $(V)/.test ## a million damaged frames and a hundred thousand damaged requests, some minutes
	REALTIME_TEST_FRAMES=1000000 $(BIN)/python -m pytest --timeout 1800 tests/attacks/test_mutated_requests.py tests/wire/test_fuzz.py

unit: $(V)/.test ## the tests without I/O
	$(BIN)/python -m pytest tests/unit

format: $(V)/.test ## rewrite code in the project's form
	$(BIN)/ruff format .
	$(BIN)/ruff check -q --fix .

lint: $(V)/.test ## ruff, import contract, SQL checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python tests/lint_sql.py

types: $(V)/.test ## mypy, strict
	$(BIN)/mypy

upgrade: $(V)/.run ## migrate the database of REALTIME_DATABASE_URL, samples too
	$(BIN)/realtime-server migrate --all

revision: $(V)/.run ## new migration: make revision branch=core name=add_something
	@id=$$(printf '%s_%04d' $(branch) $$(($$(ls alembic/versions/$(branch)/*.py | wc -l) + 1))) && \
	$(BIN)/alembic revision --head $(branch)@head --rev-id $$id -m "$(name)" && \
	mv alembic/versions/$${id}_*.py alembic/versions/$(branch)/ && \
	for file in alembic/versions/$(branch)/$${id}_*.py; do \
		touch "$${file%.py}.sql"; echo "moved to $$file; fill in the .sql beside it"; done

schema-diff: $(V)/.test ## difference between sql/ and the migrations: nothing when they agree
	$(BIN)/python -m pytest -q tests/database/test_schema.py -k equals

squash: ## until the first release: make the first revision of each branch from sql/ again
	@test ! -e alembic/frozen.sha256 || { echo "The first revision is released: write a new one"; exit 1; }
	cat sql/structure/*.sql > alembic/versions/core/core_0001_first.sql
	cat sql/samples/chat/structure.sql > alembic/versions/chat/chat_0001_first.sql

freeze: ## record the digests of released migrations
	@cd alembic && touch frozen.sha256 && find versions -name '*.py' -o -name '*.sql' | sort | while read -r file; do \
		grep -q "  $$file$$" frozen.sha256 || sha256sum "$$file" >> frozen.sha256; done

lock: ## resolve requirements/*.txt again (needs uv)
	uv pip compile pyproject.toml -q --universal --python-version 3.11 --generate-hashes --extra embedded -o requirements/run.txt
	uv pip compile pyproject.toml -q --universal --python-version 3.11 --generate-hashes --all-extras --group test -c requirements/run.txt --no-emit-package realtime-server -o requirements/test.txt
	uv pip compile requirements/clients.in -q --universal --python-version 3.11 --generate-hashes -o requirements/clients.txt

bench: $(V)/.test ## measure; some minutes
	$(BIN)/python benchmarks/resume.py
	$(BIN)/python benchmarks/revalidate.py
	$(BIN)/python benchmarks/read_cost.py
	$(BIN)/python benchmarks/writers.py
	$(BIN)/python benchmarks/changes.py
	$(BIN)/python benchmarks/overload.py

docs: $(V)/.run ## write the generated pages of docs/ again
	$(BIN)/python docs/generate.py

build: $(V)/.test ## wheel and sdist in dist/
	$(BIN)/pip wheel -q --disable-pip-version-check --no-deps -w dist .

clean: ## remove what make made; keeps .realtime/ (data)
	rm -rf $(V) .venv-clients dist tests/clients/js/node_modules .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
