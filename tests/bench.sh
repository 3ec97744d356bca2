#!/usr/bin/env bash
# Measures tpd beside its peers on the local cluster: bench.sh [--quick] [--rounds N] [--only NAME,...]; `--only intercept` is agents and intercepts
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/kubernetes/lib.sh"

cluster=$here/cluster
peers=$target/bench/peers

# The newest of each on crates.io when this was written.
BORINGTUN=0.7.1
GOTATUN=0.10.2

# peer CRATE VERSION BINARY: from crates.io, built once. One that does not build is left out, and the table says so.
peer() {
    [[ $("$peers/bin/$3" --version 2>/dev/null) != *" $2" ]] || return 0
    cargo install --quiet --root "$peers" --locked --version "$2" "$1" ||
        say "$1 could not be built; the table goes without it"
}

build_peers() {
    mkdir -p "$peers"
    peer boringtun-cli "$BORINGTUN" boringtun-cli
    peer gotatun-cli "$GOTATUN" gotatun
}

need_root
cd "$root"
export PATH=$PATH:$HOME/.cargo/bin
stage "packages and toolchains" "$here/prerequisites.sh"
stage "tpd's command line" make --no-print-directory build
stage "tpd's image" make --no-print-directory images
stage "the benchmark" cargo build --release --quiet --package tpd-tests --bin bench
stage "the peers" patiently "building the peers" build_peers
stage "the local Kubernetes" "$cluster" up
stage "the servers" "$cluster" samples
stage "tpd in the cluster" "$cluster" install

# Two at once would measure each other.
exec flock --nonblock --conflict-exit-code 75 "$target/bench/lock" "$target/release/bench" --repository "$root" "$@"
