# `make help` shows what there is. The work is done by the scripts that are named here.
SHELL := /bin/bash
PREFIX ?= /opt/kata
DESTDIR ?=
FUZZ_SECONDS ?= 600
VERSION := $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' Cargo.toml | head -n 1)

.DEFAULT_GOAL := help
.PHONY: demo test build install uninstall dist deb bench soak lint unit clean help

demo: build ## run real containers in virtual machines and show it
	tests/run demo

test: ## check and test everything; e2e tests run in the test machine where this host's KVM does not do
	tests/all

build: ## build programs, guest kernel and image, laid out below target/katana/
	scripts/build

install: ## install what was built to $(DESTDIR)$(PREFIX)
	scripts/install "$(DESTDIR)" "$(PREFIX)"

uninstall: ## remove what `make install` has installed there, and take the runtime out of containerd, Docker and CRI-O
	scripts/uninstall "$(DESTDIR)" "$(PREFIX)"

dist: export KATANA_FULL_KERNEL = 1
dist: build ## pack target/kata-static-VERSION-x86_64.tar.xz
	scripts/dist $(VERSION)

deb: build ## pack target/katana_VERSION_amd64.deb
	scripts/deb $(VERSION)
	! command -v lintian >/dev/null || lintian --fail-on error,warning target/katana_$(VERSION)_amd64.deb

bench: build ## measure starts, memory, network and file systems: target/bench/*.json
	tests/run bench
	# Many of these hang in QEMU (tests/machine/README.md), so each gets eight chances.
	for part in start timeline; do \
	    for chance in 1 2 3 4 5 6 7 8; do tests/run counted $$part && continue 2; done; exit 1; \
	done

soak: build ## long end-to-end tests, all on three Intel models, and FUZZ_SECONDS=600 of each fuzz target
	tests/soak $(FUZZ_SECONDS)

lint: ## formatting, clippy, licences of dependencies, documents, Helm chart
	scripts/install-build-deps
	cargo fmt --all --check
	scripts/check-licences
	scripts/check-docs
	scripts/check-charts
	scripts/check-messages
	cargo clippy --locked --workspace --all-targets -- -D warnings

unit: ## unit tests
	scripts/install-build-deps
	scripts/unpack-busybox target/busybox
	# The shim's tests run the tool as well.
	cargo build --locked -p kata-runtime
	cargo test --locked --no-fail-fast --workspace --exclude katana-tests
	cargo test --locked -p katana-tests --lib

clean: ## remove target/; what is cached in ~/.cache/katana stays
	rm -rf target

help: ## show this
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16
