# `make demo` and `make test` require Python 3.11 or newer, make and git; everything else is installed into $(VENV).
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
# for two cores: run one process with two threads, or two test workers with one thread each
export TOKENIZERS_PARALLELISM := false

.PHONY: benchmark demo reproduce scorecard test test-all test-oracles test-peer test-legacy-datasets test-lowest test-wheel test-browser mutation quality lint format clean

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(RUN)/python train_reftr.py recipes/demo.yaml --output_dir runs/demo

# convert a published checkpoint, evaluate it as published on its dataset, and compare the metrics. Only a TOKENIZER
# given as a Hub id is downloaded; without TOKENIZER the published tokenizer must be on this machine.
SET ?= refcoco_unc
reproduce: $(VENV)/.installed
	$(if $(and $(DATA),$(CHECKPOINT)),,$(error make reproduce requires DATA=folder CHECKPOINT=file.pth, and accepts SET=$(SET) TOKENIZER=folder or Hub id OUTPUT=folder))
	$(RUN)/python -m reftr_cli reproduce --data_dir "$(DATA)" --checkpoint "$(CHECKPOINT)" --dataset "$(SET)" \
		$(if $(TOKENIZER),--tokenizer "$(TOKENIZER)") $(if $(OUTPUT),--output_dir "$(OUTPUT)")

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 -m "not slow" tests modeling_reftr data_scripts training_reftr reftr_cli

test-all: $(VENV)/.installed
	$(RUN)/python -m pytest tests modeling_reftr data_scripts training_reftr reftr_cli

# count the robustness tests by kind: kills, full disks, damaged files, hostile input
scorecard: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --scorecard runs/scorecard.json tests

# mutation testing: apply one-line faults to a copy of the checkout, in which the affected tests must fail. Continues an
# interrupted run
mutation: $(VENV)/.installed
	$(RUN)/python tests/mutation/run.py

# compare the speed with the published pattern: minutes on an idle machine; the published preprocessing requires OpenCV
benchmark: $(VENV)/.installed
	$(RUN)/python benchmarks/speed.py --output runs/speed.json

# run transformers' own tests of models and processors; downloads its source distribution
test-peer: $(VENV)/.installed
	$(RUN)/python tests/peer/fetch.py .peer
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN)/python -m pytest -n 2 -c tests/peer/pytest.ini -rs tests/peer

# compare the files that are written for other tools with the tools' own libraries
test-oracles: $(VENV)/.oracles
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -rs tests/cli/test_save.py

$(VENV)/.oracles: $(VENV)/.installed
	$(RUN)/python -m pip install --quiet --editable ".[oracles]"
	touch $@

# test the builders as loading scripts of datasets 3.6, the last version that supports them, in a separate environment
test-legacy-datasets: .legacy/.installed $(VENV)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PROJECT_PYTHON=$(abspath $(RUN))/python .legacy/bin/python -m pytest -c tests/legacy/pytest.ini -rs tests/legacy

.legacy/.installed:
	$(PYTHON) -m venv .legacy
	.legacy/bin/python -m pip install --quiet "datasets==3.6.*" "numpy>=2.0" pillow pycocotools pytest pyyaml tqdm
	touch $@

# test the commands with the lowest versions allowed by setup.cfg, and with those of its extras, in separate
# environments; uv resolves the versions, and downloads Python 3.11 if it is not installed
EXTRAS := export demo openmoji quantization
UV := .lowest/uv/bin/uv
LOWEST = $(UV) pip install --quiet --python .lowest/$(1)/bin/python

test-lowest: .lowest/required/.installed .lowest/extras/.installed .lowest/before/.installed
	rm -rf build
	$(call LOWEST,required) --no-deps --reinstall .
	$(call LOWEST,extras) --no-deps --reinstall .
	OMP_NUM_THREADS=1 LOWEST_BEFORE=$(abspath .lowest/before) .lowest/required/bin/python -m pytest -c tests/lowest/pytest.ini tests/lowest/test_commands.py
	OMP_NUM_THREADS=1 LOWEST_EXTRAS="$(EXTRAS)" .lowest/extras/bin/python -m pytest -c tests/lowest/pytest.ini tests/lowest -k "extras or versions"

$(UV):
	$(PYTHON) -m venv .lowest/uv
	.lowest/uv/bin/python -m pip install --quiet uv

.lowest/required/.installed: setup.cfg $(UV)
	$(UV) venv --quiet --clear --python 3.11 .lowest/required
	$(call LOWEST,required) --resolution lowest-direct --requirements setup.cfg "pytest>=8.0"
	touch $@

.lowest/extras/.installed: setup.cfg $(UV)
	$(UV) venv --quiet --clear --python 3.11 .lowest/extras
	$(call LOWEST,extras) --resolution lowest-direct --requirements setup.cfg $(EXTRAS:%=--extra %) "pytest>=8.0"
	touch $@

# install the last unsupported transformers into a separate folder, without dependencies
.lowest/before/.installed: setup.cfg $(UV) .lowest/required/.installed
	rm -rf .lowest/before
	$(call LOWEST,required) --no-deps --target .lowest/before "transformers<$$(sed -n 's/^    transformers>=\([0-9.]*\).*/\1/p' setup.cfg)"
	touch $@

# test the commands of a wheel in an empty environment, with the latest versions of all dependencies
test-wheel:
	rm -rf .wheel build
	$(PYTHON) -m venv .wheel
	.wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir .wheel/dist .
	.wheel/bin/python -m pip install --quiet .wheel/dist/*.whl "pytest>=8.0"
	OMP_NUM_THREADS=1 .wheel/bin/python -m pytest -c tests/lowest/pytest.ini tests/lowest/test_commands.py -k "not versions and not release"

# compare code metrics with DETR in transformers: length of functions, types, docstrings, comments, mlinter
quality: $(VENV)/.installed
	$(RUN)/python benchmarks/code_quality.py --output benchmarks/results/code_quality.json

# test the app of the Space in the system's browser: Debian's packages chromium and chromium-driver
test-browser: $(VENV)/.browser
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -o addopts=--strict-markers tests/browser

$(VENV)/.browser: $(VENV)/.installed
	$(RUN)/python -m pip install --quiet --editable ".[browser]"
	touch $@

lint: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

format: $(VENV)/.installed
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf $(VENV) .legacy .lowest .wheel runs

$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is required, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet --editable ".[test,dev]"
	touch $@
