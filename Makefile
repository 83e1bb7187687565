# Every target works on its own on a fresh machine: it first creates .venv and installs what it needs.
# Choose the interpreter with `make PYTHON=python3.12 TARGET`.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# Stamps live inside .venv, so that removing .venv is a clean start.
VENV := .venv/.made
EXAMPLES := .venv/.examples
DEV := .venv/.dev
OLDEST := .venv-oldest/.made
NEWEST := .venv-newest/.made
BENCH_TORCH := .venv-bench-torch/.made
BENCH_KFAC_JAX := .venv-bench-kfac-jax/.made

# Questions of the benchmark, in the order of the documentation's page: `make bench ONLY=factors`.
ONLY ?= factors ekfac eigen evidence predictive samples cold growth breakdown

# Random networks, and the number of the first: `make fuzz N=2000 SEED=7`.
N ?= 200
SEED ?= 0

# Tests for other versions than those of .venv: all but the slow ones, without tools and examples.
FAST := LAPLAX_KFAC_UNCHECKED=1
FAST_OPTIONS := -q -n 2 --dist loadfile -m "not slow" --ignore tests/fuzz

.DEFAULT_GOAL := help
.PHONY: help quickstart test shapes oldest newest devices fuzz recognised lint types docs wheel bench study clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(EXAMPLES) ## run examples/quickstart.py
	@$(BIN)/python examples/quickstart.py
	@echo "figure: docs/assets/quickstart.png"

# Tests of a file share what they fit. Files of few tests (the examples) take long, so not last.
test: $(DEV) ## run every test, the slow ones too; random networks are those of `make fuzz`
	@echo ">> running the tests"
	@LAPLAX_KFAC_UNCHECKED=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		--ignore tests/fuzz

# The same with the types and shapes in annotations checked at every call, which takes half as long again.
shapes: $(DEV) ## run every test with annotations checked by jaxtyping and beartype
	@echo ">> running the tests with annotations checked"
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

oldest: $(OLDEST) ## run the fast tests with the oldest versions that pyproject.toml allows
	@echo ">> running the fast tests on $$(.venv-oldest/bin/python --version), with the oldest versions"
	@$(FAST) .venv-oldest/bin/python -m pytest $(FAST_OPTIONS)

newest: $(NEWEST) ## run the fast tests with the newest versions there are
	@echo ">> running the fast tests on $$(.venv-newest/bin/python --version), with the newest versions"
	@$(FAST) .venv-newest/bin/python -m pytest $(FAST_OPTIONS)

devices: $(DEV) ## compare every computation on eight virtual devices with one, in every layout
	@echo ">> every layout of arrays on eight devices (an hour)"
	@LAPLAX_KFAC_DEVICES=1 LAPLAX_KFAC_UNCHECKED=1 $(BIN)/python -m pytest -q tests/devices

fuzz: $(DEV) ## check N random networks, from number SEED on: make fuzz N=2000 SEED=0
	@echo ">> $(N) random networks, from number $(SEED) on"
	@LAPLAX_KFAC_FUZZ=$(N) LAPLAX_KFAC_FUZZ_SEED=$(SEED) \
		$(BIN)/python -m pytest -n 2 -q tests/fuzz

recognised: $(DEV) ## rewrite the documentation's page of what is recognised
	@PYTHONPATH=tests:. $(BIN)/python -m support.recognised

lint: $(DEV) ## check style and formatting
	@echo ">> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(DEV) ## check types
	@echo ">> mypy"
	@$(BIN)/mypy

docs: $(DEV) ## build the documentation into site/, warnings being errors
	@echo ">> mkdocs"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "built site/"

wheel: $(DEV) ## build the wheel into dist/ and import it from a clean environment
	@echo ">> building the wheel, installing it in a clean environment"
	@set -eu; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(BIN)/python -m build --wheel --outdir "$$tmp" . > "$$tmp/build.log" 2>&1 \
		|| { cat "$$tmp/build.log"; exit 1; }; \
	$(BIN)/python -m venv "$$tmp/venv"; \
	"$$tmp/venv/bin/python" -m pip -qq --disable-pip-version-check install "$$tmp"/*.whl; \
	(cd "$$tmp" && venv/bin/python -W error::SyntaxWarning -c "$$CHECK_WHEEL"); \
	mkdir -p dist; mv "$$tmp"/*.whl dist/

bench: $(DEV) $(BENCH_TORCH) $(BENCH_KFAC_JAX) ## measure against the peers; ONLY="factors ekfac" for a part
	@for question in $(ONLY); do \
		echo ">> $$question"; $(BIN)/python benchmarks/$$question.py || exit 1; done
	@$(BIN)/python benchmarks/table.py
	@$(BIN)/python benchmarks/chart.py

study: $(DEV) ## run what is missing of the study of predictions, then write its page; at most an hour
	@cd benchmarks && PYTHONPATH=.:.. ../$(BIN)/python -m study

clean: ## remove environments, build outputs and caches
	rm -rf .venv .venv-oldest .venv-newest .venv-bench-torch .venv-bench-kfac-jax build dist site .mypy_cache .pytest_cache .ruff_cache

define CHECK_WHEEL
import importlib.resources, sys, zipfile, pathlib
import laplax_kfac
assert importlib.resources.files(laplax_kfac).joinpath("py.typed").is_file(), "no py.typed"
assert pathlib.Path(laplax_kfac.__file__).is_relative_to(sys.prefix), laplax_kfac.__file__
wheel, = pathlib.Path().glob("*.whl")
tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
assert {t for t in tops if not t.endswith(".dist-info")} == {"laplax_kfac"}, tops
print(f"{wheel.name}: imports as laplax_kfac {laplax_kfac.__version__}, py.typed included")
endef
export CHECK_WHEEL

define CHECK_PYTHON
import sys
if not (3, 11) <= sys.version_info[:2] < (3, 14):
    sys.exit(f"laplax needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is {sys.version.split()[0]}: "
             "try `make PYTHON=python3.13 ...`")
endef
export CHECK_PYTHON

$(VENV):
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@echo ">> creating .venv"
	@$(PYTHON) -m venv --clear .venv
	@touch $@

$(EXAMPLES): $(VENV) pyproject.toml
	@echo ">> installing laplax-kfac[examples] (minutes the first time)"
	@$(PIP) install --editable '.[examples]'
	@touch $@

$(DEV): $(VENV) pyproject.toml
	@echo ">> installing laplax-kfac[dev] (minutes the first time)"
	@$(PIP) install --editable '.[dev]'
	@touch $@

$(OLDEST): pyproject.toml .ci/oldest.py
	@echo ">> creating .venv-oldest (minutes the first time)"
	@"$$(.ci/interpreter 3.11 || command -v $(PYTHON))" -m venv --clear .venv-oldest
	@.venv-oldest/bin/python .ci/oldest.py test examples > .venv-oldest/requirements.txt
	@.venv-oldest/bin/python -m pip -qq --disable-pip-version-check install \
		-r .venv-oldest/requirements.txt --editable .
	@touch $@

$(NEWEST): pyproject.toml
	@echo ">> creating .venv-newest (minutes the first time)"
	@"$$(.ci/interpreter 3.13 || command -v $(PYTHON))" -m venv --clear .venv-newest
	@.venv-newest/bin/python -m pip -qq --disable-pip-version-check install \
		--upgrade --upgrade-strategy eager --editable '.[test,examples]'
	@touch $@

# The peers' newest releases are installed as their authors' requirements ask, but for torchvision,
# which they need for examples only and which would pull another torch.
$(BENCH_TORCH): $(VENV) benchmarks/requirements-torch.txt benchmarks/requirements-torch-peers.txt
	@echo ">> creating .venv-bench-torch (minutes the first time)"
	@$(PYTHON) -m venv --clear .venv-bench-torch
	@.venv-bench-torch/bin/python -m pip -qq --disable-pip-version-check install \
		-r benchmarks/requirements-torch.txt
	@.venv-bench-torch/bin/python -m pip -qq --disable-pip-version-check install \
		--no-deps -r benchmarks/requirements-torch-peers.txt
	@touch $@

$(BENCH_KFAC_JAX): $(VENV) benchmarks/requirements-kfac-jax.txt
	@echo ">> creating .venv-bench-kfac-jax (minutes the first time)"
	@$(PYTHON) -m venv --clear .venv-bench-kfac-jax
	@.venv-bench-kfac-jax/bin/python -m pip -qq --disable-pip-version-check install \
		-r benchmarks/requirements-kfac-jax.txt
	@touch $@
