.PHONY: install up test test-clients test-phoenix k8s-schemas check format proto proto-release lock clean
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.tokenloom-installed
export VENV

install: $(STAMP)

$(STAMP): pyproject.toml locks/cpu-dev.lock locks/gpu-dev.lock scripts/install
	scripts/install $(PYTHON) $(VENV)
	@touch $@

up: install
	@exec $(BIN)/tokenloom up $(ARGS)

# Most tests wait for something, and may do so three at a time; the others start what needs the machine for itself.
test: install
	@scripts/system-packages
ifdef ARGS
	$(BIN)/pytest $(ARGS)
else
	$(BIN)/pytest -n 3 --dist loadfile -m "not alone"
	$(BIN)/pytest -m alone tests/contract tests/unit tests/integration tests/e2e
endif

# The clients that `make test` leaves out where they are not installed; they come from PyPI and npm.
test-clients: install
	@scripts/system-packages
	@scripts/client-venvs
	$(BIN)/pytest tests/e2e/test_clients.py $(ARGS)

# Traces in a backend that others wrote, which comes from PyPI.
test-phoenix: install
	@scripts/phoenix-venv
	$(BIN)/pytest -v tests/e2e/test_phoenix.py $(ARGS)

# Rendered manifests beside Kubernetes' own schemas, which come from PyPI.
k8s-schemas: install
	@scripts/k8s-schemas $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && scripts/protos "$$scratch" && \
		diff -r -x __pycache__ "$$scratch/tokenloom" protos/gen/tokenloom || \
		{ echo "protos/gen is not current: run make proto" >&2; exit 1; }
	scripts/protos --lint

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: install
	rm -rf protos/gen && mkdir -p protos/gen
	scripts/protos protos/gen

# What `make check` compares with for breaking changes: the protos of the last release.
proto-release: install
	scripts/protos --image protos/released.binpb

lock: install
	PATH="$(PWD)/$(BIN):$$PATH" scripts/lock $(ARGS)

clean:
	rm -rf $(VENV) .tokenloom .clients .phoenix tests/clients/node/node_modules build dist
