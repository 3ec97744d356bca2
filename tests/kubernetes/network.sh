#!/usr/bin/env bash
# Makes the network namespaces and the links between them:
#   laptop 198.51.100.2 ── 198.51.100.1 wan 203.0.113.1 ── 203.0.113.2 node (pods 10.244.0.0/16, services 10.96.0.0/16)
#   laptop2 192.0.2.194 ── 192.0.2.193 ┘
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# link NAMESPACE_A DEVICE_A IPV4/LEN,IPV6/LEN NAMESPACE_B DEVICE_B IPV4/LEN,IPV6/LEN
link() {
    ip link add name "$2" netns "$1" mtu 1500 type veth peer name "$5" netns "$4" mtu 1500
    address "$1" "$2" "$3"
    address "$4" "$5" "$6"
}

# address NAMESPACE DEVICE IPV4/LEN,IPV6/LEN
address() {
    ip -n "$1" address add "${3%,*}" dev "$2"
    # nodad: an address that is still being checked for duplicates cannot be bound, and there is nobody to collide with.
    ip -n "$1" address add "${3#*,}" dev "$2" nodad
    ip -n "$1" link set "$2" up
}

default_route() {
    ip -n "$1" -4 route add default via "$2"
    ip -n "$1" -6 route add default via "$3"
}

forward() {
    in_net "$1" sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.default.forwarding=1
}

for ns in "$NODE_NS" "$WAN_NS" "$LAPTOP_NS" "$LAPTOP2_NS"; do
    ip netns add "$ns"
    ip -n "$ns" link set lo up
done

link "$LAPTOP_NS" eth0 "$LAPTOP4/24,$LAPTOP6/64" "$WAN_NS" laptop "$WAN_LAPTOP4/24,$WAN_LAPTOP6/64"
link "$LAPTOP2_NS" eth0 "$LAPTOP2_4/26,$LAPTOP2_6/64" "$WAN_NS" laptop2 "$WAN_LAPTOP2_4/26,$WAN_LAPTOP2_6/64"
link "$NODE_NS" eth0 "$NODE4/24,$NODE6/64" "$WAN_NS" node "$WAN_NODE4/24,$WAN_NODE6/64"
default_route "$LAPTOP_NS" "$WAN_LAPTOP4" "$WAN_LAPTOP6"
default_route "$LAPTOP2_NS" "$WAN_LAPTOP2_4" "$WAN_LAPTOP2_6"
default_route "$NODE_NS" "$WAN_NODE4" "$WAN_NODE6"
forward "$WAN_NS"
forward "$NODE_NS"
in_net "$NODE_NS" nft -f "$here/config/node.nft"
