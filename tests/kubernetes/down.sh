#!/usr/bin/env bash
# Takes the cluster down, whole or in whatever state a crash left it: processes, mounts, cgroups, namespaces, state.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Ends all that lives in a network namespace: politely first, so that a daemon can put things back.
end_processes() {
    local pids deadline=$((SECONDS + 3))
    pids=$(ip netns pids "$1")
    # shellcheck disable=SC2086 # a list
    [[ -z $pids ]] || kill $pids 2>/dev/null || true
    while pids=$(ip netns pids "$1") && [[ -n $pids ]]; do
        # shellcheck disable=SC2086
        ((SECONDS < deadline)) || kill -KILL $pids 2>/dev/null || true
        sleep 0.05
    done
}

# Killing pid 1 of the node kills everything in it at once, pods with network namespaces of their own too.
end_node() {
    local pid
    if pid=$(init_of "$NODE_NS"); then
        kill -KILL "$pid"
        # It goes last of all that it contains, so mounts and cgroups are free when it is gone.
        while [[ -e /proc/$pid ]]; do sleep 0.05; done
    fi
}

remove_cgroups() {
    local hierarchy
    for hierarchy in $(cgroup_hierarchies); do
        [[ ! -d $hierarchy/$CGROUP ]] || find "$hierarchy/$CGROUP" -depth -type d -exec rmdir {} +
    done
}

need_root
end_node
for ns in "$LAPTOP_NS" "$LAPTOP2_NS" "$WAN_NS" "$NODE_NS"; do
    if netns_exists "$ns"; then
        end_processes "$ns"
        ip netns delete "$ns"
    fi
done
remove_cgroups
# `ip netns add` made this a mount point of its own when it was first used.
if [[ -d /run/netns && -z $(ls -A /run/netns) ]] && mountpoint -q /run/netns; then
    umount /run/netns
fi
# Logs stay for whoever wants to know what happened; the next boot replaces them.
if [[ -d $run ]]; then
    find "$run" -mindepth 1 -maxdepth 1 ! -name log -exec rm -rf {} +
fi
say "the cluster is down"
