# trustlog: every target creates .venv from the hashed lock first; nothing else is needed before it.
.DEFAULT_GOAL := help
.SHELLFLAGS := -eu -o pipefail -c
SHELL := bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# .venv is rebuilt when the lock or the project description changes.
STAMP := $(VENV)/.installed
# What benchmarks compare with, and the profiler, have an environment of their own: tests do not need them.
BENCH_VENV := .venv-bench
BENCH_STAMP := $(BENCH_VENV)/.installed

.PHONY: help install check format test test-long test-chart test-compose test-net test-systemd test-rolling cover kill demo bench bench-peers bench-gateway bench-trust bench-flood bench-members bench-gap bench-keys bench-chain bench-state profile soak sim man lock clean

help: ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1	\2/p' Makefile | expand -t 22

install: $(STAMP) ## Create .venv and install the locked dependencies

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "trustlog needs Python 3.11 or newer; say which with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(BENCH_STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check wheel==0.45.1  # PySyncObj's setup.py asks for it
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[bench]'
	@touch $@

# Programs are started as `python -m`, so that a directory with a space in its name does no harm.
check: $(STAMP) ## Formatting, lint, types and the import layers
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python tests/check_layers.py

format: $(STAMP) ## Format the code and apply safe lint fixes
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

# Most tests wait for processes, so more of them than there are processors go on at a time, file by file.
test: $(STAMP) ## Run the tests (TESTS="tests/trustlog -k seal" for some of them, JOBS=0 one after the other)
	$(BIN)/python -m pytest -n $(or $(JOBS),3) --dist loadscope $(TESTS)

test-long: $(STAMP) ## Run the tests that `make test` leaves out: more seeds, more members, more kills
	$(BIN)/python -m pytest -n $(or $(JOBS),3) --dist loadscope -m long $(TESTS)

# Large, so not in .venv.
DEPLOY_TOOLS := build/deploy-tools
$(DEPLOY_TOOLS)/.installed: tests/deploy/tools.lock $(STAMP)
	rm -rf $(DEPLOY_TOOLS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --target $(DEPLOY_TOOLS) -r $<
	@touch $@

test-chart: $(DEPLOY_TOOLS)/.installed ## Render and check the Helm chart, lint the Dockerfile and the setup script
	PYTHONPATH=$(DEPLOY_TOOLS):$(PYTHONPATH) $(BIN)/python -m pytest tests/deploy/run_chart.py

test-compose: $(DEPLOY_TOOLS)/.installed ## Run the compose file in an engine of its own (root; Debian's docker.io, docker-compose, debootstrap)
	PYTHONPATH=$(DEPLOY_TOOLS):$(PYTHONPATH) $(BIN)/python -m pytest -v tests/deploy/run_compose.py tests/deploy/run_pods.py

test-net: $(STAMP) ## Five replicas with addresses of their own, and links that are cut (root; iproute2, nftables)
	$(BIN)/python -m pytest -v tests/deploy/run_net.py

test-systemd: $(STAMP) ## Start the units as their page says, under a real systemd in containers (root; as test-compose)
	$(BIN)/python -m pytest -v tests/deploy/run_systemd.py

test-rolling: $(STAMP) ## Restart each replica, and stop each for ten seconds, under load (STOPPED_S=10)
	STOPPED_S=$(or $(STOPPED_S),10) $(BIN)/python -m pytest -v -m "long or not long" tests/cluster/test_rolling.py

cover: $(STAMP) ## Run the tests with branch coverage
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered $(TESTS)

kill: $(STAMP) ## Kill -9 real replicas at 50 of their fsyncs (KILLS=50; needs strace)
	KILLS=$(or $(KILLS),50) REQUIRE_TOOLS=1 $(BIN)/python -m pytest tests/cluster/test_kill.py

demo: $(STAMP) ## Three real replicas order real requests (KEEP=1 leaves them running)
	$(BIN)/python deploy/demo/demo.py $(if $(KEEP),--keep)

bench: $(STAMP) ## Measure a durable three-replica cluster on this machine (BENCH=--help)
	$(BIN)/python -m client.bench $(BENCH)

bench-peers: $(BENCH_STAMP) ## Measure trustlog beside etcd, PySyncObj and Redis, as far as they are installed (PEERS=--help)
	$(BENCH_VENV)/bin/python -m tests.bench.peers $(PEERS)

bench-gateway: $(BENCH_STAMP) ## Measure the gateway with redis-benchmark, beside etcd and Redis itself (GATEWAY=--help)
	$(BENCH_VENV)/bin/python -m tests.bench.gateway $(GATEWAY)

bench-trust: $(BENCH_STAMP) ## Measure what each guarantee costs: log backends, durability, phases (TRUST=--help)
	$(BENCH_VENV)/bin/python -m tests.bench.trust $(TRUST)

bench-chain: $(BENCH_STAMP) ## Measure one operation at a time through the bare steps, without a protocol (CHAIN=--help)
	$(BENCH_VENV)/bin/python -m tests.bench.chain $(CHAIN)

profile: $(BENCH_STAMP) ## Where a loaded replica's CPU time goes, by stage (PROFILE=--help; as root, or with ptrace rights)
	$(BENCH_VENV)/bin/python -m tests.bench.profiling $(PROFILE)

bench-flood: $(STAMP) ## Measure one client's latency beside another client's flood (FLOOD=--help)
	$(BIN)/python -m tests.bench.flood $(FLOOD)

bench-members: $(STAMP) ## Measure what an operation costs with 3, 5, 7 and 9 replicas (MEMBERS=--help)
	$(BIN)/python -m tests.bench.members $(MEMBERS)

bench-gap: $(STAMP) ## Measure how long nothing is answered when the primary is killed at full load (GAP=--help)
	$(BIN)/python -m tests.bench.gap $(GAP)

bench-keys: $(STAMP) ## Measure a cluster with 10 thousand and 1 million keys: load, memory, start, a late replica (KEYS=--help)
	$(BIN)/python -m tests.bench.keys $(KEYS)

bench-state: $(STAMP) ## Measure checkpoints and transfers with 10 thousand and 1 million keys stored
	$(BIN)/python -m tests.replica.core.state_bench

soak: $(STAMP) ## A long run with one replica stopped, and its return: memory, disk, pauses (OPERATIONS=200000 KEYS=20000)
	$(BIN)/python -m client.soak --operations $(or $(OPERATIONS),200000) --keys $(or $(KEYS),20000) $(SOAK)

sim: $(STAMP) ## Try to break the protocol in a simulated world (SEEDS=1000 FIRST=0)
	$(BIN)/python -m replica.cli.main sim --seeds $(or $(SEEDS),200) --first $(or $(FIRST),0)

man: $(STAMP) ## Write a man page for every command into build/man
	$(BIN)/python deploy/man/pages.py build/man

PIP_COMPILE = pip-compile --quiet --generate-hashes --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
  --no-header --no-strip-extras --allow-unsafe --no-annotate
# The image's: what runs in it, and what builds the wheel; in the same versions.
lock: ## Renew requirements.lock and those of the container image (needs pip-tools)
	$(PIP_COMPILE) --extra dev --extra tracing -o requirements.lock pyproject.toml
	$(PIP_COMPILE) -c requirements.lock -o deploy/docker/runtime.lock pyproject.toml
	$(PIP_COMPILE) -c requirements.lock --extra tracing -o deploy/docker/tracing.lock pyproject.toml
	$(PIP_COMPILE) -c requirements.lock --only-build-deps --build-deps-for wheel -o deploy/docker/build.lock pyproject.toml
	$(PIP_COMPILE) -o tests/deploy/tools.lock tests/deploy/tools.in

clean: ## Remove what the targets above made
	rm -rf $(VENV) $(BENCH_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
