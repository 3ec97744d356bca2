#!/usr/bin/env bash
# images.sh build: the cluster's and the tests' images, from scratch, into target/images/.
# images.sh import ARCHIVE: loads one into the running node.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

stage_dir=$target/kubernetes/stage

# outdated NAME INPUT...: whether the image has to be built (again).
outdated() {
    local archive=$images/$1.tar input
    shift
    [[ -e $archive ]] || return 0
    for input in "${BASH_SOURCE[0]}" "$root/deploy/oci-image.sh" "$@"; do
        [[ ! $input -nt $archive ]] || return 0
    done
    return 1
}

# A root file system with the few files that programs expect to find anywhere. Sets $fs.
new_rootfs() {
    fs=$stage_dir/$1
    rm -rf "$fs"
    mkdir -p "$fs"/{etc,tmp,var/log,var/lib,run,usr/bin,usr/sbin,usr/lib,usr/lib64}
    chmod 1777 "$fs/tmp"
    local merged
    for merged in bin sbin lib lib64; do
        ln -s "usr/$merged" "$fs/$merged"
    done
    cp "$here/config/image/passwd" "$here/config/image/group" "$here/config/image/nsswitch.conf" "$fs/etc"
}

# add PATH...: files of this machine and the libraries they load, at the same paths.
add() {
    local path library
    for path in "$@"; do
        install -D "$path" "$fs$path"
        for library in $(ldd "$path" 2>/dev/null | grep -o '/[^ ]*' | sort -u); do
            [[ -e $fs$library ]] || install -D "$library" "$fs$library"
        done
    done
}

# add_shell: busybox, under the names of the tools that are not there already.
add_shell() {
    local tool
    install -D "$(command -v busybox)" "$fs/usr/bin/busybox"
    for tool in $("$fs/usr/bin/busybox" --list); do
        [[ -e $fs/usr/bin/$tool ]] || ln -s busybox "$fs/usr/bin/$tool"
    done
}

# finish NAME REFERENCE USER ENTRYPOINT...
finish() {
    "$root/deploy/oci-image.sh" "$2" "$images/$1.tar" "$fs" "${@:3}"
    rm -rf "$fs"
    say "image $2 ($(du -h "$images/$1.tar" | cut -f1))"
}

# static_image NAME REFERENCE BINARY: an image of one static binary, which runs as nobody in particular.
static_image() {
    local program
    outdated "$1" "$3" || return 0
    program=/usr/bin/$(basename "$3")
    new_rootfs "$1"
    install "$3" "$fs$program"
    finish "$1" "$2" 65532:65532 "$program"
}

pause_image() {
    outdated pause "$here/tools/pause/pause.c" || return 0
    new_rootfs pause
    gcc -static -Os -s -Wall -Werror -o "$fs/pause" "$here/tools/pause/pause.c"
    finish pause tpd-test/pause:1 65535:65535 /pause
}

nginx_image() {
    outdated nginx "$here/config/image/nginx.conf" || return 0
    new_rootfs nginx
    add /usr/sbin/nginx
    mkdir -p "$fs"/{etc/nginx,var/lib/nginx,var/log/nginx}
    cp "$here/config/image/nginx.conf" "$fs/etc/nginx"
    finish nginx tpd-test/nginx:1 0:0 /usr/sbin/nginx -g 'daemon off;'
}

postgresql_image() {
    outdated postgresql "$here/config/image/postgresql.sh" || return 0
    new_rootfs postgresql
    local pg=/usr/lib/postgresql/15 module
    add $pg/bin/{postgres,initdb,psql,pg_isready,pgbench}
    for module in "$pg"/lib/*.so; do
        # The just-in-time compiler alone would bring 100 MB of LLVM.
        [[ $module == */llvmjit.so ]] || add "$module"
    done
    mkdir -p "$fs/usr/share/postgresql" "$fs/usr/share/zoneinfo"
    cp -rL /usr/share/postgresql/15 "$fs/usr/share/postgresql"
    cp -rL /usr/share/zoneinfo/{Etc,UTC} "$fs/usr/share/zoneinfo"
    add_shell
    install "$here/config/image/postgresql.sh" "$fs/usr/bin/start-postgresql"
    finish postgresql tpd-test/postgresql:15 999:999 /usr/bin/start-postgresql
}

iperf3_image() {
    outdated iperf3 || return 0
    new_rootfs iperf3
    add /usr/bin/iperf3
    finish iperf3 tpd-test/iperf3:1 65532:65532 /usr/bin/iperf3 --server
}

# HAProxy as an Ingress controller; it keeps its configuration in /run.
ingress_image() {
    outdated ingress "$bin/tpd-ingress" || return 0
    new_rootfs ingress
    add /usr/sbin/haproxy
    install "$bin/tpd-ingress" "$fs/usr/bin"
    finish ingress tpd-test/ingress:1 65532:65532 /usr/bin/tpd-ingress
}

# What a developer would want in a debugging pod; it does nothing until something is executed in it.
toolbox_image() {
    outdated toolbox "$bin/tpd-echo" || return 0
    new_rootfs toolbox
    add /usr/bin/{curl,dig,ping,getent,iperf3,wrk} /usr/lib/postgresql/15/bin/psql
    install "$bin/tpd-echo" "$fs/usr/bin"
    ln -s ../lib/postgresql/15/bin/psql "$fs/usr/bin/psql"
    add_shell
    finish toolbox tpd-test/toolbox:1 0:0 /usr/bin/sleep infinity
}

build() {
    pause_image
    static_image coredns tpd-test/coredns:1 "$bin/coredns"
    static_image metrics-server tpd-test/metrics-server:1 "$bin/metrics-server"
    static_image echo tpd-test/echo:1 "$bin/tpd-echo"
    nginx_image
    postgresql_image
    iperf3_image
    ingress_image
    toolbox_image
}

case ${1-} in
    build) build ;;
    import) in_node ctr --namespace k8s.io images import --all-platforms "$2" >/dev/null ;;
    *) fail "usage: images.sh build | import ARCHIVE" ;;
esac
