#!/usr/bin/env bash
# Builds Kubernetes, etcd, CoreDNS and metrics-server from Go modules into target/kubernetes/bin, once per go.mod and go.sum.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# name, package, and a cold build's minutes on two cores; the API server first, as most others share its packages
programs=(
    "etcd go.etcd.io/etcd/server/v3 0.6"
    "kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver 4"
    "kubectl k8s.io/kubernetes/cmd/kubectl 0.3"
    "kubelet k8s.io/kubernetes/cmd/kubelet 1"
    "kube-controller-manager k8s.io/kubernetes/cmd/kube-controller-manager 0.5"
    "kube-scheduler k8s.io/kubernetes/cmd/kube-scheduler 0.1"
    "kube-proxy k8s.io/kubernetes/cmd/kube-proxy 0.1"
    "coredns github.com/coredns/coredns 1"
    "metrics-server sigs.k8s.io/metrics-server/cmd/metrics-server 0.3"
)

# Without -X the version reads v0.0.0-master, which clients cannot compare.
ldflags="-s -w -X k8s.io/component-base/version.gitVersion=$KUBERNETES_VERSION"
stamp=$bin/.built

# The state that the binaries were built from.
wanted() {
    cat "$here/go.mod" "$here/go.sum" <(echo "$ldflags") | sha256sum | cut -d' ' -f1
}

build() {
    local number=0 program name package minutes began
    # One at a time: two links of this size at once do not fit small machines.
    for program in "${programs[@]}"; do
        read -r name package minutes <<<"$program"
        number=$((number + 1))
        began=$EPOCHREALTIME
        say "building $name ($number of ${#programs[@]}; about $minutes min on two cores if nothing is cached)"
        patiently "building $name" go build -trimpath -ldflags "$ldflags" -o "$bin/$name.new" "$package"
        mv "$bin/$name.new" "$bin/$name"
        say "built $name in $(elapsed "$began") s"
    done
}

# Our own test peer and Ingress controller. Left alone if they come out the same, so that the images with them need not be
# made again.
build_tools() {
    local tool
    for tool in echo ingress; do
        go build -trimpath -ldflags "-s -w" -o "$bin/tpd-$tool.new" "./tools/$tool"
        if cmp -s "$bin/tpd-$tool.new" "$bin/tpd-$tool"; then
            rm "$bin/tpd-$tool.new"
        else
            mv "$bin/tpd-$tool.new" "$bin/tpd-$tool"
        fi
    done
}

cd "$here"
export CGO_ENABLED=0
mkdir -p "$bin"
if [[ $(cat "$stamp" 2>/dev/null) != "$(wanted)" ]]; then
    say "downloading Go modules (400 MB)"
    patiently "downloading" go mod download
    build
    wanted >"$stamp"
fi
build_tools
