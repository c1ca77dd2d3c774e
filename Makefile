# lafq: `make reproduce` and `make test` do all their set-up; `make help` lists the verbs.
# Kernels work in notebooks/, and draw into the page whatever window system is named.
unexport MPLBACKEND
ifneq ($(LAFQ_OUTPUT),)
export LAFQ_OUTPUT := $(abspath $(LAFQ_OUTPUT))
endif
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
PROFILE ?=
NOTEBOOK ?=
TRAIN ?= 0
SCHEDULER ?=
PUBLISHED ?=
IMAGES ?=
RUN = $(BIN)/python -m tools.run
# A file on one of two processes: some fixtures, and the cells of a notebook, belong together. Idle worker threads sleep, as spinning
# ones would slow the other processes; alone, a process is faster with the default.
PYTEST = OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --dist loadfile
$(if $(filter-out 0 1 true false,$(TRAIN)),$(error TRAIN is '$(TRAIN)': give 1 to retrain, or 0))
$(foreach name,profile notebook train scheduler published images,$(if $(filter command%,$(origin $(name))),$(error $(name) is lower case: write it in capitals, as in PROFILE=small)))
$(if $(filter-out fresh,$(IMAGES)),$(error IMAGES is '$(IMAGES)': give fresh, or leave it out))
CHOICE = $(if $(PROFILE),--profile $(PROFILE)) $(if $(NOTEBOOK),--only $(NOTEBOOK)) $(if $(filter 1 true,$(TRAIN)),--set TRAIN=true) \
	$(if $(SCHEDULER),--set "SCHEDULER=$(SCHEDULER)") $(if $(filter fresh,$(IMAGES)),--set KEEP=false)

.PHONY: help setup reproduce resume publish classifier evidence benchmark sampling peers growth terrain packed verify test test-unit test-smoke test-fast test-kill test-browser site lint clean

##@ for everyone

help:  ## this list
	@awk -F ':.*## ' '/^##@/ {print substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  options: PROFILE=smoke|small|paper  TRAIN=1 (retrain)  NOTEBOOK=03 (only that one)  IMAGES=fresh (draw all images anew)  SCHEDULER=tcp://host:8786 (sample on a Dask cluster)"

reproduce: $(READY)  ## compute the poster's tables and figures anew at its size (PROFILE=small: all studies, on a model that takes minutes)
	@$(RUN) reproduce $(CHOICE)

resume: $(READY)  ## go on with an interrupted `make reproduce`, without repeating a finished configuration
	@$(RUN) resume $(CHOICE)

test: lint  ## ruff, unit tests, all notebooks with smoke (two of them twice), nbval of the committed ones (about 10 minutes on two cores)
	@LAFQ_OUTPUT="$$($(RUN) published)" TQDM_DISABLE=1 $(MAKE) --no-print-directory -j 2 test-unit test-smoke
	@echo "all passed: ruff, unit tests, the notebooks with smoke (01 and 04 twice, equal bytes), the committed notebooks"
	@echo "not run: the sliders of the notebook explore in a browser (make test-browser)"

test-unit:
	@$(PYTEST) --nbval --nbval-current-env

test-smoke: SMOKE = $(RUN) reproduce --profile smoke
test-smoke: TABLES = $${LAFQ_OUTPUT:-.}/results/smoke
test-smoke:
	@$(SMOKE) && rm -rf build/once && cp -R "$(TABLES)" build/once
	@$(SMOKE) --only 01 && $(SMOKE) --only 04 && diff -r build/once "$(TABLES)"

verify: $(READY)  ## check the committed results in minutes: hashes, scores, masks, bytes, and some images drawn again
	@$(BIN)/python -m tools.verify $(if $(PROFILE),--profile $(PROFILE))

clean:  ## remove .venv and build (results/ stays)
	@rm -rf .venv build
	@echo "removed: .venv, build"

##@ for whoever repeats the long experiments

evidence: $(READY)  ## experiments that take hours: noise floor, 1,000 images per row, four more training runs (four hours on fast cores, ten on slow ones); PUBLISHED=path: the authors' images
	@$(BIN)/python -m lafq.study.long_runs $(if $(PROFILE),--profile $(PROFILE)) $(if $(PUBLISHED),--published "$(PUBLISHED)")

benchmark: $(READY)  ## what quantized models cost to run, groups of weights, Fisher beside BackPACK, notebooks in 2 GiB, damage by passes (about 50 minutes)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-benchmark.txt
	@set -e; for table in running fisher allocation binder peak_memory; do $(BIN)/python benchmarks/cost.py $$table; done
	@set -e; for table in groups passes; do $(BIN)/python benchmarks/damage_by.py $$table; done
	@$(BIN)/python benchmarks/files.py

sampling: $(READY)  ## plans from sensitivities that know the sampler, judged by their images (about two hours)
	@set -e; for table in timesteps chosen fresh transfer; do $(BIN)/python benchmarks/sampling.py $$table; done

peers: $(READY)  ## the allocator beside six other libraries at equal bytes, and a ladder from one of them to it (installs each beside .venv; about an hour)
	@$(BIN)/python benchmarks/peers.py

growth: $(READY)  ## time and memory of every step by the size of the model, and of a cheaper curvature (about half an hour; Linux)
	@$(BIN)/python benchmarks/cost.py growth
	@$(BIN)/python benchmarks/damage_by.py blocks

terrain: $(READY)  ## lafq on a public diffusion model of others: results/terrain (installs it beside .venv; about half an hour)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/terrain-packages -r requirements-terrain.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-benchmark.txt
	@PYTHONPATH=build/terrain-packages $(BIN)/python benchmarks/terrain.py

packed: $(READY)  ## pack the paper profile's weights into an entropy-coded file, to be committed (about half an hour on two cores)
	@$(BIN)/python -m lafq.study.long_runs --profile paper --only packed --anew

classifier: $(READY)  ## train the MNIST feature extractor anew (about 4 minutes)
	@$(BIN)/python -m lafq.study.images.features

##@ for whoever changes lafq

setup: $(READY)  ## virtual environment .venv with the pinned packages
	@echo "ready: .venv"

$(READY): requirements.txt requirements-inception.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 is needed, and '$(PYTHON)' is not it: name yours with 'make PYTHON=/path/to/python3.11'" >&2; exit 1; }
	@echo "setting up .venv with the pinned packages (some minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-inception.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

publish: $(READY)  ## refresh notebooks/ from results/, without computing anything
	@$(RUN) publish $(if $(NOTEBOOK),--only $(NOTEBOOK))

lint: $(READY)  ## ruff over code and notebooks; imports go one way
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

test-fast: lint  ## lint and the unit tests that take no longer than seconds, without the notebooks
	@TQDM_DISABLE=1 $(PYTEST) -m "not slow"

test-kill: $(READY)  ## kill -9 `make reproduce PROFILE=smoke` at 20 moments, resume, compare every byte; 2,000 random networks (about 40 minutes)
	@$(BIN)/python -m pytest -q -n 2 tests/kills
	@LAFQ_SEEDS=40 $(PYTEST) tests/quantization/test_random_networks.py

test-browser: site  ## three pages of the site, and a slider of the notebook explore, in headless Chromium (a minute; installs Playwright)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-browser.txt
	@$(BIN)/python -m pytest -q tests/browser
	@echo "passed: pages of the site at two widths; the slider of the notebook explore, moved in a browser, changed the picture and the bytes"

site: $(READY)  ## the documentation as a web site in build/site: README, docs/ and the committed notebooks (installs Sphinx)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-site.txt
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs . build/site
	@echo "build/site/docs/index.html"
