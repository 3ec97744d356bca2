#!/bin/bash
# isolate.sh LAYER COMMAND...: runs COMMAND in network, mount and process namespaces of its own, on a copy-on-write view of this
# machine's files with those of LAYER (a directory, or "" for none) over them. Nothing is left when it ends, however it ends.
set -euo pipefail

if [[ $1 != --inside ]]; then
    exec unshare --net --mount --pid --fork --kill-child --propagation private "$0" --inside "$@"
fi
layer=$2
shift 2

# In this mount namespace alone, so any directory will do.
base=/mnt
mount -t tmpfs tpd-resolver "$base"
mkdir "$base"/{layer,upper,work,root}
[[ -z $layer ]] || cp -a "$layer/." "$base/layer"
mount -t overlay overlay -o "lowerdir=$base/layer:/,upperdir=$base/upper,workdir=$base/work" "$base/root"
mount -t proc proc "$base/root/proc"
mount -t sysfs -o ro sysfs "$base/root/sys"
mount --rbind /dev "$base/root/dev"
mount -t tmpfs tmpfs "$base/root/run"
ip link set lo up
exec chroot "$base/root" "$@"
