#!/usr/bin/env bash
# Builds tpd's container images into target/images/: tpd-manager.tar, known as tpd/manager:VERSION, and tpd-agent.tar, likewise.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH=$PATH:$HOME/.cargo/bin
for tool in cargo jq strip tar; do
    command -v "$tool" >/dev/null || { echo "error: $tool is missing; install it and run this again" >&2; exit 1; }
done

triple=$(rustc -vV | sed -n 's/^host: //p')
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/Cargo.toml" | head -1)

# static_image BINARY FEATURE USER: an image of that one file, built with no other feature of its crate. The C library is linked in,
# and ours use no name service of it.
static_image() {
    local rootfs
    (cd "$root" && cargo build --release --package tpd-cluster --no-default-features --features "$2" --bin "$1" \
        --target "$triple" \
        --config "target.$triple.rustflags=[\"-C\",\"target-feature=+crt-static\"]")
    rootfs=$(mktemp -d)
    chmod 755 "$rootfs"
    mkdir -p "$rootfs/usr/bin"
    # Function names stay, so that a profile or a backtrace can be read.
    strip --strip-debug -o "$rootfs/usr/bin/$1" "${CARGO_TARGET_DIR:-$root/target}/$triple/release/$1"
    "$root/deploy/oci-image.sh" "${1/-//}:$version" "$root/target/images/$1.tar" "$rootfs" "$3:$3" "/usr/bin/$1"
    rm -rf "$rootfs"
    echo "${1/-//}:$version is in target/images/$1.tar"
}

static_image tpd-manager manager 65532
# The user that the redirect knows heartbeats by (AGENT_UID in api/src/inject.rs).
static_image tpd-agent agent 1337
