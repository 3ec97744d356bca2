#!/usr/bin/env bash
# Installs what the cluster, the images and the tests need from Debian, and checks for the Go and Rust toolchains.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

packages=(
    # the node
    containerd runc containernetworking-plugins iptables nftables conntrack iproute2 openssl
    # what goes into images, and the laptop's own tools
    nginx-light haproxy postgresql-15 postgresql-client-15 iperf3 busybox-static curl bind9-dnsutils iputils-ping netcat-openbsd wrk
    # building
    gcc g++ libc6-dev make git jq tar procps util-linux shellcheck
    # the resolver that the laptop's DNS is tested with, unpacked elsewhere and never installed here
    dbus
    # another C library's way of looking names up
    musl-tools
)

missing_packages() {
    local installed package
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' 2>/dev/null | awk '$1 == "installed" { print $2 }')
    for package in "${packages[@]}"; do
        grep -qx -- "$package" <<<"$installed" || echo "$package"
    done
}

# Debian starts services as it installs them; none of these may run outside the node's namespaces.
hold_services() {
    local policy=/usr/sbin/policy-rc.d saved
    saved=$(mktemp -d)
    [[ ! -e $policy ]] || cp -a "$policy" "$saved/policy-rc.d"
    # shellcheck disable=SC2064 # expanded now: the trap outlives this function's variables
    trap "restore_services '$policy' '$saved'" EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
}

restore_services() {
    rm -f "$1"
    [[ ! -e $2/policy-rc.d ]] || cp -a "$2/policy-rc.d" "$1"
    rm -rf "$2"
}

# The server package would also create and start a database of its own.
skip_database_creation() {
    [[ ! -e /etc/postgresql-common/createcluster.conf ]] || return 0
    mkdir -p /etc/postgresql-common
    echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
}

# disable_services PACKAGE...: nor may those that we brought start with the machine next time.
disable_services() {
    local package
    command -v systemctl >/dev/null || return 0
    for package in "$@"; do
        case $package in
            containerd) systemctl disable --quiet containerd ;;
            haproxy) systemctl disable --quiet haproxy ;;
            nginx-light) systemctl disable --quiet nginx ;;
            postgresql-15) systemctl disable --quiet postgresql ;;
        esac
    done
}

install_packages() {
    local missing
    mapfile -t missing < <(missing_packages)
    ((${#missing[@]})) || return 0
    need_root
    say "installing ${missing[*]}"
    hold_services
    skip_database_creation
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold "${missing[@]}" >/dev/null
    disable_services "${missing[@]}"
}

check_toolchains() {
    local wrong=0
    if ! command -v go >/dev/null; then
        echo "Go is missing: unpack Go 1.26 or newer from https://go.dev/dl/ to /usr/local/go" >&2
        wrong=1
    fi
    if ! PATH=$PATH:$HOME/.cargo/bin command -v cargo >/dev/null; then
        echo "Rust is missing: install 1.95 or newer with https://rustup.rs" >&2
        wrong=1
    fi
    ((wrong == 0)) || exit 1
}

command -v apt-get >/dev/null || fail "the local cluster is made for Debian 12; use tpd on your own cluster instead (README)"
check_toolchains
install_packages
