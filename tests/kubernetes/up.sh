#!/usr/bin/env bash
# Boots the cluster, or says at once that a healthy one is there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

healthy() {
    [[ -e $run/complete ]] && init_of "$NODE_NS" >/dev/null && init_of "$LAPTOP_NS" >/dev/null && init_of "$LAPTOP2_NS" >/dev/null &&
        [[ $(admin get --raw /readyz --request-timeout=2s 2>/dev/null) == ok ]] &&
        [[ $(admin get node node -o jsonpath='{.status.conditions[?(@.type=="Ready")].status}' --request-timeout=2s 2>/dev/null) == True ]]
}

# in_background PIDNAME LOG COMMAND...: a session of its own, so that Ctrl-C in this terminal leaves the cluster alone.
in_background() {
    local name=$1 log=$2
    shift 2
    setsid "$@" </dev/null >"$run/log/$log" 2>&1 &
    echo $! >"$run/$name.pid"
}

start_wan() {
    render "$here/config/upstream.Corefile" >"$run/upstream.Corefile"
    in_background "$WAN_NS" upstream-dns.log nsenter --net="/run/netns/$WAN_NS" -- coredns -conf "$run/upstream.Corefile"
}

# start_laptop NAMESPACE NAME
start_laptop() {
    in_background "$1" "$2.log" nsenter --net="/run/netns/$1" -- \
        unshare --mount --uts --propagation private -- "$here/laptop-init.sh" "$2"
}

# hand_down HIERARCHY CONTROLLER...: cgroup v2 gives a child only what its parent says, and the kubelet wants all of these.
hand_down() {
    local controller
    for controller in "${@:2}"; do
        if grep -qsw "$controller" "$1/cgroup.controllers"; then
            echo "+$controller" >"$1/cgroup.subtree_control"
        fi
    done
}

make_cgroups() {
    local hierarchy
    for hierarchy in $(cgroup_hierarchies); do
        mkdir -p "$hierarchy/$CGROUP"
        hand_down "$hierarchy" cpu cpuset hugetlb memory pids
    done
}

start_node() {
    make_cgroups
    in_background node-parent node.log nsenter --net="/run/netns/$NODE_NS" -- \
        unshare --mount --pid --uts --fork --kill-child --propagation private -- "$here/node.sh"
    await 10 "the node's namespaces are there" find_node_init
}

# unshare's child: pid 1 inside, and the way into the node from outside.
find_node_init() {
    local pid
    pid=$(pgrep -P "$(cat "$run/node-parent.pid")") && echo "$pid" >"$run/$NODE_NS.pid"
}

import_images() {
    local archive
    for archive in pause coredns metrics-server nginx postgresql iperf3 toolbox echo ingress; do
        "$here/images.sh" import "$images/$archive.tar"
    done
    say "images imported"
}

node_ready() {
    admin wait --for=condition=Ready node/node --timeout=0
}

add_ons_ready() {
    admin --namespace kube-system wait --for=condition=Available deployment --all --timeout=0
}

boot() {
    local importing
    mkdir -p "$run/log"
    "$here/network.sh"
    "$here/pki.sh" make
    start_wan
    start_laptop "$LAPTOP_NS" laptop
    start_laptop "$LAPTOP2_NS" laptop2
    start_node
    await 5 "laptop ready" test -e "$run/laptop-ready"
    await 5 "second laptop ready" test -e "$run/laptop2-ready"
    await 20 "containerd answers" in_node ctr version
    import_images &
    importing=$!
    await 60 "API server ready" admin get --raw /readyz
    admin apply --server-side -f "$here/manifests" >/dev/null
    await 60 "node Ready" node_ready
    wait "$importing"
    await 120 "CoreDNS and metrics-server available" add_ons_ready
    touch "$run/complete"
}

need_root
# These directories get contents of their own on the node and on the laptop, and would hide the repository.
case $root/ in
    /etc/* | /run/* | /var/*) fail "clone the repository to a place outside /etc, /run and /var" ;;
esac
if healthy; then
    say "the cluster is already running"
    exit
fi
stage "Debian packages" "$here/prerequisites.sh"
stage "Kubernetes $KUBERNETES_VERSION" "$here/build.sh"
stage "test images" "$here/images.sh" build
if [[ -e $run ]]; then
    stage "clearing what an earlier cluster left" "$here/down.sh"
fi
stage "boot" boot
cat <<END

Kubernetes $KUBERNETES_VERSION is up.
  tests/kubernetes/cluster kubectl get pods -A      kubectl as the administrator
  tests/kubernetes/cluster laptop                   a shell on the laptop, with the developer's kubeconfig
  tests/kubernetes/cluster down                     takes all of it down
END
