# shellcheck shell=bash
# Names, addresses, paths and small helpers shared by every script of the local cluster. Sourced, never run.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
target=$root/target
bin=$target/kubernetes/bin
export images=$target/images
# TPD_CLUSTER=NAME is another cluster beside the first, with namespaces and state of its own.
suffix=${TPD_CLUSTER:+-$TPD_CLUSTER}
run=$target/kubernetes/run$suffix
export PATH=$bin:/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin:$PATH

KUBERNETES_VERSION=v1.37.2

# Documentation ranges (RFC 5737, RFC 3849), so that no address here can be one of the machine's real neighbours.
NODE_NS=tpd-node$suffix
WAN_NS=tpd-wan$suffix
LAPTOP_NS=tpd-laptop$suffix
LAPTOP2_NS=tpd-laptop2$suffix
LAPTOP4=198.51.100.2 LAPTOP6=2001:db8:1::2
WAN_LAPTOP4=198.51.100.1 WAN_LAPTOP6=2001:db8:1::1
LAPTOP2_4=192.0.2.194 LAPTOP2_6=2001:db8:3::2
WAN_LAPTOP2_4=192.0.2.193 WAN_LAPTOP2_6=2001:db8:3::1
WAN_NODE4=203.0.113.1 WAN_NODE6=2001:db8:2::1
NODE4=203.0.113.2 NODE6=2001:db8:2::2

POD_CIDRS=10.244.0.0/16,fd00:10:244::/56
SERVICE_CIDRS=10.96.0.0/16,fd00:10:96::/112
API_SERVICE4=10.96.0.1 API_SERVICE6=fd00:10:96::1

# The parent of every pod's cgroup, in each hierarchy.
CGROUP=tpd-node$suffix

export KUBERNETES_VERSION NODE_NS WAN_NS LAPTOP_NS LAPTOP4 LAPTOP6 WAN_LAPTOP4 WAN_LAPTOP6 WAN_NODE4 WAN_NODE6
export LAPTOP2_NS LAPTOP2_4 LAPTOP2_6 WAN_LAPTOP2_4 WAN_LAPTOP2_6
export NODE4 NODE6 POD_CIDRS SERVICE_CIDRS API_SERVICE4 API_SERVICE6 CGROUP

# One clock for a command and the scripts that it calls.
export TPD_BEGAN=${TPD_BEGAN:-$EPOCHSECONDS}
SECONDS=$((EPOCHSECONDS - TPD_BEGAN))

# Prints a line that starts with the seconds since the command began.
say() {
    printf '[%3ds] %s\n' "$SECONDS" "$*"
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# stage TITLE COMMAND...: runs it and prints how long it took.
stage() {
    local title=$1 began=$EPOCHREALTIME
    shift
    say "$title ..."
    "$@"
    say "$title: done in $(elapsed "$began") s"
}

# patiently WHAT COMMAND...: says every half a minute that it is still at it.
patiently() {
    local what=$1 began=$SECONDS ticker
    shift
    # $$ is this script, so that no ticker outlives it, even if it is killed.
    (while sleep 30 && kill -0 $$; do say "still $what ($((SECONDS - began)) s)"; done) 2>/dev/null &
    ticker=$!
    "$@" || { kill "$ticker"; return 1; }
    kill "$ticker"
}

# elapsed EPOCHREALTIME: seconds since then, with one decimal.
elapsed() {
    awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }'
}

# await SECONDS WHAT COMMAND...: polls the command until it succeeds.
await() {
    local limit=$1 what=$2 deadline
    shift 2
    deadline=$((SECONDS + limit))
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || fail "$what: not within $limit s; the logs are in $run/log"
        sleep 0.1
    done
    say "$what"
}

need_root() {
    ((EUID == 0)) || fail "network namespaces need root: run this with sudo"
}

netns_exists() {
    [[ -e /run/netns/$1 ]]
}

# in_net NAMESPACE COMMAND...: nsenter and not `ip netns exec`, which would mount a fresh /sys without its cgroups.
in_net() {
    local ns=$1
    shift
    nsenter --net="/run/netns/$ns" -- "$@"
}

# The pid, as the machine sees it, of the first process in a namespace's mount and UTS namespaces.
init_of() {
    local pid
    pid=$(cat "$run/$1.pid" 2>/dev/null) && [[ -n $pid && -e /proc/$pid/ns/net ]] || return 1
    [[ $(stat -Lc %i "/proc/$pid/ns/net") == $(stat -Lc %i "/run/netns/$1" 2>/dev/null) ]] || return 1
    echo "$pid"
}

# in_node COMMAND...: in the node's mount, pid, UTS and network namespaces.
in_node() {
    local pid
    pid=$(init_of "$NODE_NS") || fail "the node is not running: tests/kubernetes/cluster up"
    nsenter --target "$pid" --mount --pid --uts --net -- "$@"
}

# The administrator sits in the WAN: the machine itself has no way to the node.
admin() {
    in_net "$WAN_NS" kubectl --kubeconfig "$run/admin.kubeconfig" "$@"
}

# Fills the @NAME@ placeholders of a template from the variables of those names.
render() {
    local text name
    text=$(<"$1")
    for name in $(grep -o '@[A-Za-z0-9_]*@' "$1" | tr -d @ | sort -u); do
        text=${text//"@$name@"/${!name}}
    done
    printf '%s\n' "$text"
}

cgroup_hierarchies() {
    awk '$3 == "cgroup" || $3 == "cgroup2" { print $2 }' /proc/mounts
}
