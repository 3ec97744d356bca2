# What there is to do, and what CI does. Everything it makes is under target/.

SHELL := /bin/bash
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/local/go/bin

CLUSTER := tests/kubernetes/cluster
SCRIPTS := $(shell git ls-files -c -o --exclude-standard '*.sh') $(CLUSTER) .ci/run

.DEFAULT_GOAL := help
.PHONY: help build images chart demo test unit fuzz e2e bench cluster cluster-down laptop fmt lint doc

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'

build: ## build the command line: target/release/tpd
	cargo build --release --package tpd --bin tpd

images: ## build the container images: target/images/tpd-*.tar
	deploy/images.sh

chart: ## check that the Helm chart installs what `tpd install` does
	tests/test.sh chart

demo: ## boot a local Kubernetes, install tpd into it and show it working (root)
	tests/demo.sh

test: ## run every test there is, unit to end to end (root)
	tests/test.sh

unit: ## run the tests that need neither root nor a cluster
	cargo test --workspace --exclude tpd-tests

fuzz: ## feed parsers with whatever breaks them, for a minute each
	tests/fuzz.sh 60

e2e: ## run the end-to-end tests on the local cluster (root)
	tests/test.sh build cluster e2e

bench: ## measure tpd beside its peers, as a table and as JSON (root)
	tests/bench.sh

cluster: ## boot the local Kubernetes: node, WAN and laptop (root)
	$(CLUSTER) up

cluster-down: ## take it down and leave nothing behind (root)
	$(CLUSTER) down

laptop: ## open a shell on the laptop (root)
	@$(CLUSTER) laptop

fmt: ## format all code
	cargo fmt --all
	gofmt -w tests/kubernetes/tools

lint: ## check format, lints and scripts; warnings are errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- --deny warnings
	cd tests/kubernetes && test -z "$$(gofmt -l tools)" && go vet ./tools/...
	shellcheck $(SCRIPTS)

doc: ## build the API documentation; broken links are errors
	RUSTDOCFLAGS="--deny warnings" cargo doc --workspace --no-deps
