# What people and CI run. Rust (rust-version in Cargo.toml) and root are needed; each target gets its other parts by itself.
.PHONY: demo test lint unit cli e2e fuzz faults build clean node test-node test-node-part test-node-iommufd
.NOTPARALLEL:

TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
HOST := $(shell rustc -vV | sed -n 's/^host: //p')
KM := $(TARGET)/$(HOST)/release/kata-manager

# The main job, for real: registry, containerd, two guests, apply, a pod, a boot, uninstall.
demo: build shim
	KM_BIN=$(KM) KM_SHIM=$(SHIM) cargo run --quiet --locked -p km-tests-e2e --bin demo

# Every test. Tests that this machine cannot run say so and count as ignored.
test: lint unit cli e2e test-node-part

lint:
	cargo fmt --all --check
	cargo fmt --manifest-path tests/e2e/inner-shim/Cargo.toml --check
	cargo fmt --manifest-path tests/cdi-oracle/Cargo.toml --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --locked --workspace --no-deps
	hack/deny

unit:
	cargo test --locked --workspace --exclude km-tests-e2e --exclude km-tests-cli

cli: build
	KM_BIN=$(KM) cargo test --locked -p km-tests-cli

# First each containerd's reading of prepared configurations, then whole nodes.
e2e: build shim
	hack/dumps
	cargo build --quiet --locked -p km-kubelet-stand-in
	KM_BIN=$(KM) KM_SHIM=$(SHIM) cargo run --quiet --locked -p km-tests-e2e --bin km-tests-e2e

# Each fuzz target for a few seconds; SECONDS_EACH=600 for longer.
SECONDS_EACH := 10
fuzz:
	hack/fuzz --seconds $(SECONDS_EACH)

# A thousand kills, and every kind of system call on the store failing in every way, some times each. "make e2e" has thirty.
# SEED=N repeats a run.
faults: build
	KM_BIN=$(KM) KM_FAULT_SEED=$(or $(SEED),$(shell date +%s)) KM_FAULT_KILLS=1000 KM_FAULT_ROUNDS=3 cargo run --quiet --locked -p km-tests-e2e --bin km-tests-e2e -- faults::

# The device plugin through ten thousand starts of the kubelet, some minutes: nothing may be left of them. "make e2e" has a hundred.
.PHONY: reconnects
reconnects: build
	cargo build --quiet --locked -p km-kubelet-stand-in
	KM_BIN=$(KM) KM_PLUGIN_RECONNECTS=10000 cargo run --quiet --locked -p km-tests-e2e --bin km-tests-e2e -- plugin::nothing_is_left_of_reconnects

# CDI's own library for Rust judges our specs, in a workspace of its own. Not in "make test", but in .ci/run: the library brings 180 crates, with a TLS
# library in C among them, which take minutes to build. Its folder is its own: there cargo gives our crates, which are outside both
# workspaces, the names that "make fuzz" gives them, and those are instrumented.
.PHONY: oracle
oracle:
	CARGO_TARGET_DIR=$(TARGET)/oracle cargo test --quiet --locked --manifest-path tests/cdi-oracle/Cargo.toml

# Both programs are static: they run on any Linux of this architecture, and from an empty container image. They are linked to a fixed address, as
# Go's programs are: relocating them takes a quarter of the time of a run that finds nothing to do (ARCHITECTURE.md, "Why not").
FLAGS := --config 'target.$(HOST).rustflags=["-Ctarget-feature=+crt-static", "-Crelocation-model=static"]'

# Random numbers come from the kernel alone: aws-lc would otherwise gather timing noise of its own first, which takes longer than
# everything else that such a run does.
build:
	AWS_LC_SYS_NO_JITTER_ENTROPY=1 cargo build --release --locked -p kata-manager --target $(HOST) $(FLAGS)
	@! readelf --program-headers $(KM) | grep INTERP || { echo "$(KM) is not static"; exit 1; }

# The shim, by a cargo call of its own: what the rest of the workspace wants of a crate must not make it grow.
SHIM := $(TARGET)/$(HOST)/shim/containerd-shim-kata-qemu-nvidia-gpu-v2
.PHONY: shim
shim:
	cargo build --profile shim --locked -p km-shim --target $(HOST) $(FLAGS)
	@! readelf --program-headers $(SHIM) | grep INTERP || { echo "$(SHIM) is not static"; exit 1; }
	@[ $$(stat -c %s $(SHIM)) -lt 4194304 ] || { echo "$(SHIM) has 4 MiB or more"; exit 1; }

# The program, and the shim where the program looks for it. "make build shim" first, as whoever may build; then this, as whoever may write.
PREFIX ?= /usr/local
.PHONY: install
install:
	install -D -m 755 $(KM) $(DESTDIR)$(PREFIX)/bin/kata-manager
	install -D -m 755 $(SHIM) $(DESTDIR)$(PREFIX)/libexec/kata-manager/$(notdir $(SHIM))

# A shell in a GPU node without a GPU: make node SHAPE=one-gpu. `poweroff` or Ctrl-A X ends it. RUN='lspci -nn' runs a command instead.
SHAPE ?= one-gpu
node: build box
	KM_BIN=$(KM) cargo run --quiet --locked -p km-tests-e2e --bin node -- $(SHAPE) $(if $(RUN),'$(RUN)')

# Device code on such nodes, one of each shape, and a whole node. FILTER=one-gpu runs a part, FILTER='--skip one-gpu' the rest.
test-node: build box
	KM_BIN=$(KM) KM_SHIM=$(SHIM) cargo run --quiet --locked -p km-tests-e2e --bin km-test-node -- $(FILTER)

# The part that "make test" has.
test-node-part:
	$(MAKE) --no-print-directory test-node FILTER=one-gpu

# The same on a kernel with iommufd, which is built first: six minutes on two idle cores, once. It needs gcc, flex, bison, bc and libelf-dev.
test-node-iommufd: build box
	KM_NODE_IOMMUFD=1 KM_BIN=$(KM) KM_SHIM=$(SHIM) cargo run --quiet --locked -p km-tests-e2e --bin km-test-node

.PHONY: box
box: shim
	cargo build --quiet --locked -p km-gpu-emulator -p km-kubelet-stand-in -p km-node-agent
	CARGO_TARGET_DIR=$(TARGET) cargo build --quiet --locked --manifest-path tests/e2e/inner-shim/Cargo.toml --bin km-inner-shim

clean:
	cargo clean
	rm -rf .parts
