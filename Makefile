# What people and CI run. Only cargo and root are needed; each target gets its other parts by itself.
.PHONY: demo test lint deny unit cli e2e build clean

KM := $(CURDIR)/target/release/kata-manager

## The main job, for real: registry, containerd, two guests, apply, a pod, a boot, uninstall.
demo: build
	KM_BIN=$(KM) cargo run --quiet -p km-tests-e2e --bin demo

## Every test.
test: lint unit cli e2e

lint: deny
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --no-deps

## Licences, bans, sources, advisories.
deny:
	hack/deny

unit:
	cargo test --workspace --exclude km-tests-e2e --exclude km-tests-cli

cli: build
	KM_BIN=$(KM) cargo test -p km-tests-cli

e2e: build
	KM_BIN=$(KM) KM_E2E_REQUIRE=1 cargo run --quiet -p km-tests-e2e --bin km-tests-e2e

build:
	cargo build --release -p kata-manager

clean:
	cargo clean
