#!/usr/bin/env bash
# laptop-init.sh [NAME]: the first process of a laptop's mount, UTS and network namespaces, which live as long as it does. What a VPN client
# changes in /etc, /var and /run on the laptop stays in there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name=${1:-laptop}

# A writable copy, in memory, of a directory: files in it can be renamed and removed, as bind mounts could not.
overlay() {
    mkdir -p "/run/overlay$1/upper" "/run/overlay$1/work"
    mount -t overlay overlay -o "lowerdir=$1,upperdir=/run/overlay$1/upper,workdir=/run/overlay$1/work" "$1"
}

mount --make-rprivate /
# A /sys that shows the laptop's own network devices.
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 tmpfs /run
overlay /etc
overlay /var
mkdir -p /run/lock
hostname "$name"
printf '127.0.0.1 localhost\n::1 localhost\n127.0.1.1 %s\n' "$name" >/etc/hosts
rm -f /etc/resolv.conf
printf 'nameserver %s\nnameserver %s\n' "$WAN_LAPTOP4" "$WAN_LAPTOP6" >/etc/resolv.conf
touch "$run/$name-ready"
exec sleep infinity
