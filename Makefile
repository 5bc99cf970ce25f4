# Everything a person types. Each target installs what it needs first.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-dev
RUNTIME_STAMP := $(VENV)/.installed
# Programs of the distribution that the node and its tests start.
RUN_PACKAGES := bubblewrap libgomp1 libstdc++6 python3 python3-venv
TEST_PACKAGES := $(RUN_PACKAGES) git procps strace iproute2 util-linux gcc libc6-dev pandoc man-db tshark nmap
# What builds the package, and what boots machines to install it on, some with a kernel of their own.
TEST_PACKAGES += dpkg-dev debhelper dh-python systemd-container mmdebstrap debian-archive-keyring tcpdump
TEST_PACKAGES += qemu-system-x86 e2fsprogs
PARALLEL ?= 2

.PHONY: help demo test lint appliance bench man deb clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

demo: $(RUNTIME_STAMP)  ## run the main job for real: node, policy, model, caged task, receipts
	@packaging/demo

test: $(STAMP)  ## run linters, types, import contracts and all tests
	@$(BIN)/pytest -n $(PARALLEL) --dist loadgroup $(ARGS)

appliance: $(STAMP)  ## install the package on booted machines and try everything there (root)
	@$(BIN)/pytest -rs --durations 10 tests/appliance $(ARGS)

bench: $(STAMP)  ## measure beside peers and print a table
	@tests/bench/run

man:  ## build the manual pages into build/man
	@packaging/install-packages pandoc
	@mkdir -p build/man
	@for page in docs/man/*.md; do pandoc -s -t man "$$page" -o "build/man/$$(basename "$$page" .md)"; done

deb:  ## build the Debian package into build/deb
	@packaging/build-deb build/deb

# What builds the package and looks at it.
TEST_PACKAGES += dpkg-dev debhelper dh-python lintian

$(RUNTIME_STAMP): pyproject.toml packaging/lock.txt packaging/install-packages
	@packaging/install-packages $(RUN_PACKAGES)
	@echo "installing the node into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --require-hashes --requirement packaging/lock.txt
	@$(BIN)/pip install --quiet --progress-bar on --editable .
	@touch $@

$(STAMP): pyproject.toml packaging/lock.txt packaging/lock-dev.txt packaging/install-packages
	@packaging/install-packages $(TEST_PACKAGES)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/pip install --quiet --require-hashes --requirement packaging/lock.txt --requirement packaging/lock-dev.txt
	@$(BIN)/pip install --quiet --editable .
	@touch $@ $(RUNTIME_STAMP)

clean:  ## remove what the targets made
	rm -rf $(VENV) build .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis

completions:  ## write the completion scripts for bash, zsh and fish into build/completions
	@packaging/install-packages python3-typer
	@/usr/bin/python3 packaging/completions build/completions

.PHONY: completions
# Shells and firewalls, whose own word the tests ask for.
TEST_PACKAGES += zsh fish python3-typer nftables iptables

sbom: $(RUNTIME_STAMP)  ## write what the product is made of (CycloneDX) into build/sbom.json
	@$(BIN)/python packaging/sbom build/sbom.json

.PHONY: sbom

UV_COMPILE = build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --upgrade --generate-hashes \
	--no-header --no-annotate

lock:  ## write the newest libraries that fit, with their hashes, into packaging/lock.txt and lock-dev.txt
	@$(PYTHON) -m venv build/lock
	@build/lock/bin/pip install --quiet uv
	@$(UV_COMPILE) --output-file packaging/lock.txt pyproject.toml
	@$(UV_COMPILE) --output-file packaging/lock-dev.txt --constraint packaging/lock.txt --group dev

.PHONY: lock
