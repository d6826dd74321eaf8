# make run: a relay in the foreground.  make test: everything.  Needs python3 (3.11 or later, with venv) and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUNS   := $(VENV)/.runs
READY  := $(VENV)/.ready
# How many run tests: most tests wait for other programs. At most four (tests/rigs/ports.py).
PROCESSES ?= 3
# The tests of a file stay together (tests/conftest.py).
SHARED := -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help run test retest test-pythons check lint demo man docs dist lock packages packages-test sbom image-test torture mutation fuzz bench clean

help:
	@echo "make run       a relay to try out on 127.0.0.1:2525, with its page; no network is needed"
	@echo "make demo      four settings against nine kinds of MX host, in a closed sandbox"
	@echo "make test      all tests; those that need a server from the system say so"
	@echo "make test-pythons  the unit tests and the types on every python3.x that is found, 3.11 or later"
	@echo "make retest    what failed in the last run, alone"
	@echo "make check     ruff, mypy and the tests"
	@echo "make man       the manual pages, build/relay.1 and build/relay.yaml.5"
	@echo "make docs      the documentation as a site, build/site/index.html"
	@echo "make dist      the wheel and the source archive of a release, dist/"
	@echo "make packages  .deb and .rpm, build/packages/ (ARCH=arm64: for another processor)"
	@echo "make packages-test  install, upgrade, break and purge them in bare Debians (debootstrap, root, network)"
	@echo "make sbom      what is shipped, for auditors: build/sbom.json (CycloneDX)"
	@echo "make lock      requirements.lock anew: the newest release of every library, with hashes"
	@echo "make image-test  build the container image and deliver a message through it (buildah, root, network)"
	@echo "make torture   the long sweeps: kill -9 at every storage call, every network call, power cuts;"
	@echo "               nodes and their server killed 200 times"
	@echo "make fuzz      a minute for each reader of octets that strangers send"
	@echo "make bench     a Postfix beside it and the same mail through both, as root;"
	@echo "               about ten minutes (ARGS=quick: four; ARGS=nodes: several on a PostgreSQL;"
	@echo "               ARGS=million: a queue of a million;"
	@echo "               ARGS=against=COMMIT: that commit of the relay beside this one;"
	@echo "               ARGS=peers: Exim, OpenSMTPD and Haraka; ARGS=soak: an hour at half load)"
	@echo "make mutation  break each cell of the TLS decision and see the tests fail"

# What running needs, and nothing of development.
$(RUNS): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "relay needs Python 3.11 or later, with venv (Debian, Ubuntu: python3-venv)."; \
		echo "If it has another name than $(PYTHON): make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	PIP_USE_PEP517=1 $(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(READY): $(RUNS)
	PIP_USE_PEP517=1 $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

run: $(RUNS)
	@mkdir -p var
	@exec $(BIN)/relay demo --run -c conf/relay.yaml

demo: $(RUNS)
	@$(BIN)/relay demo

test: $(READY)
	$(BIN)/pytest $(SHARED) $(ARGS)

test-pythons: $(READY)
	tests/pythons $(ARGS)

check: lint test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What failed last, alone: a test that passes then has met something of its neighbours or of the machine.
retest: $(READY)
	$(BIN)/pytest --last-failed --last-failed-no-failures none $(ARGS)

man: $(RUNS)
	@mkdir -p build
	$(BIN)/python -m relay.cli.manual relay > build/relay.1
	$(BIN)/python -m relay.cli.manual relay.yaml conf/relay.yaml > build/relay.yaml.5

docs: $(READY)
	$(BIN)/python docs/site/build.py

dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

packages: $(READY)
	$(BIN)/python packages/build.py

sbom: $(READY)
	@mkdir -p build
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-file build/sbom.json requirements.lock

# RELAY_DEBIAN_ROOTS=DIR keeps the bare Debians for the next time.
packages-test: packages
	RELAY_PACKAGES="$${RELAY_PACKAGES:-bookworm trixie}" $(BIN)/pytest -s tests/packages $(ARGS)

# For every Python from 3.11 and every processor. The package and the image install from it.
lock: $(READY)
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate --upgrade --quiet --extra postgres --output-file requirements.lock pyproject.toml

image-test: $(READY)
	RELAY_IMAGE=1 $(BIN)/pytest -s tests/image $(ARGS)

torture: $(READY)
	RELAY_LONG=1 $(BIN)/pytest -m torture --timeout=3600 $(ARGS)

fuzz: $(READY)
	-$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz $(ARGS)

bench: $(READY)
	benchmarks/prepare $(ARGS)
	-$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	PATH="$$PATH:/usr/sbin" $(BIN)/python -m benchmarks --save $(ARGS)

mutation: $(READY)
	$(BIN)/python tests/mutation/mutate.py $(ARGS)

clean:
	rm -rf $(VENV) .venv-3.* build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
