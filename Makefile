# Everything below works on a fresh clone with Python and make alone, but for `make e2e`, which installs
# Debian packages. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed

.PHONY: help run demo play test lint docs e2e fuzz soak hostile bench bench-growth bench-registries dist lock clean
help:
	@echo "make demo    pull a sample image through the proxy twice, from a stand-in for ECR"
	@echo "make play    the same, left running: a status page to look at, and addresses to pull from"
	@echo "make run     start the daemon with the variables of the environment"
	@echo "make test    run the tests that need no server"
	@echo "make lint    check style and types"
	@echo "make docs    build the site and the manuals in docs/_build"
	@echo "make e2e     run the tests with real clients and servers (Debian, root)"
	@echo "make fuzz    feed odd bytes to whatever reads bytes, FUZZ_SECONDS=60 for each of four targets"
	@echo "make soak    run the daemon over a stand-in that misbehaves, SOAK_SECONDS=600"
	@echo "make hostile let everything around the daemon fail, be slow and hang, attack it, and print what it keeps of its promises"
	@echo "make bench   measure side by side with nginx and distribution (Debian, root); make bench-growth: a large cache; bench-registries: fifty of them"
	@echo "make dist    build the sdist and the wheel, reproducibly, and the bill of materials"
	@echo "make lock    choose what the container is made of, by hash"

$(STAMP): setup.cfg pyproject.toml twisted/plugins/ecrproxy_plugin.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --config-settings editable_mode=compat --editable '.[test,lint,docs]'
	touch $@

# The daemon alone, without what tests and documents are made with.
RUN := $(VENV)-run
RUN_STAMP := $(RUN)/.installed
$(RUN_STAMP): setup.cfg pyproject.toml twisted/plugins/ecrproxy_plugin.py
	$(PYTHON) -m venv $(RUN)
	$(RUN)/bin/python -m pip install --quiet --config-settings editable_mode=compat --editable .
	touch $@

run: $(RUN_STAMP)
	exec $(RUN)/bin/ecr-proxy serve

demo: $(RUN_STAMP)
	$(RUN)/bin/python -m tests.demo

play: $(RUN_STAMP)
	exec $(RUN)/bin/python -m tests.play

# On a file system in memory that has 2 GiB left, if there is one: tests make, flush and remove many thousands of files.
IN_MEMORY = $(shell df -k --output=avail,target /dev/shm 2>/dev/null | awk 'NR > 1 && $$1 > 2097152 {print $$2}')
test: $(STAMP)
	TMPDIR=$${TMPDIR:-$(or $(IN_MEMORY),/tmp)} $(VENV)/bin/python -m pytest --quiet --numprocesses auto --dist worksteal

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# A warning is an error: a link that leads nowhere, a page that no other leads to.
docs: $(STAMP)
	rm -rf docs/_build
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs docs/_build/html
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet --builder man docs docs/_build/man

# What the container is made of, by hash. Made on the oldest Python, so that it serves them all.
lock: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet pip-tools
	CUSTOM_COMPILE_COMMAND="make lock" $(VENV)/bin/pip-compile --quiet --generate-hashes --strip-extras --upgrade \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file requirements.lock setup.cfg

dist: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --config-settings editable_mode=compat --editable '.[dist]'
	$(VENV)/bin/python -m release

# The daemon under test is the wheel's, installed outside the checkout; and into an empty environment of each of PYTHONS.
# E2E has options for pytest.
PYTHONS ?= $(PYTHON)
e2e: dist $(RUN_STAMP)
	tests/e2e/install-packages.sh
	$(VENV)/bin/python -m pip install --quiet --config-settings editable_mode=compat --editable '.[e2e]'
	rm -rf $(VENV)-e2e && $(PYTHON) -m venv $(VENV)-e2e
	$(VENV)-e2e/bin/python -m pip install --quiet dist/*.whl
	cd $(VENV)-e2e && ECRPROXY_E2E_TWISTD=$(abspath $(VENV)-e2e)/bin/twistd \
		ECRPROXY_E2E_WHEEL="$$(echo $(CURDIR)/dist/*.whl)" ECRPROXY_E2E_PYTHONS="$(PYTHONS)" \
		$(abspath $(VENV))/bin/python -m pytest --quiet --rootdir $(CURDIR) -c $(CURDIR)/pyproject.toml $(CURDIR)/tests/e2e $(E2E)

# Started from what was found before, if there is such a folder; what it finds new is kept there. FUZZ has options for libFuzzer.
FUZZ_SECONDS ?= 60
FUZZ_CORPUS ?= .fuzz
fuzz: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --config-settings editable_mode=compat --editable '.[fuzz]'
	for target in front back parsers ways; do \
		mkdir -p $(FUZZ_CORPUS)/$$target && \
		$(VENV)/bin/python -m fuzz $$target $(FUZZ_CORPUS)/$$target fuzz/corpus/$$target -dict=fuzz/words.dict \
			-max_total_time=$(FUZZ_SECONDS) -max_len=4096 -timeout=30 -artifact_prefix=$(FUZZ_CORPUS)/$$target- \
			-print_final_stats=1 -verbosity=0 $(FUZZ) || exit 1; \
	done

SOAK_SECONDS ?= 600
soak: $(STAMP)
	$(VENV)/bin/python -m soak --seconds $(SOAK_SECONDS) $(SOAK)

hostile: $(STAMP)
	$(VENV)/bin/python -m hostile

bench: $(STAMP)
	bench/install-packages.sh
	PATH=$(abspath $(VENV))/bin:$$PATH $(VENV)/bin/python -m bench $(BENCH)

bench-growth: $(STAMP)
	bench/install-packages.sh
	PATH=$(abspath $(VENV))/bin:$$PATH $(VENV)/bin/python -m bench.growth $(BENCH)

bench-registries: $(STAMP)
	bench/install-packages.sh
	PATH=$(abspath $(VENV))/bin:$$PATH $(VENV)/bin/python -m bench.registries $(BENCH)

clean:
	rm -rf $(VENV) $(VENV)-e2e build dist docs/_build *.egg-info
