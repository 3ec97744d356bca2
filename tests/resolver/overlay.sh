#!/bin/bash
# Unpacks systemd-resolved and what it needs into target/resolver-root, without installing it: its post-install script would
# replace the machine's /etc/resolv.conf. tests/resolver/isolate.sh lays the files over / in a mount namespace.
# Builds the programs that look names up, too.
set -euo pipefail
cd "$(dirname "$0")/../.."

root=target/resolver-root
packages=(systemd-resolved libsystemd-shared libnss-resolve dbus dbus-daemon dbus-bin dbus-system-bus-common libdbus-1-3
    libapparmor1 libexpat1 systemd-standalone-tmpfiles)

download() {
    (cd target/resolver-packages && apt-get download -qq "${packages[@]}")
}

unpack() {
    rm -rf "$root" target/resolver-packages
    mkdir -p "$root"/{etc,usr} target/resolver-packages
    download 2>/dev/null || { apt-get update -qq && download; }
    for package in target/resolver-packages/*.deb; do
        dpkg-deb --extract "$package" "$root"
    done
    # In / these are symbolic links into /usr, which directories would hide.
    for directory in lib sbin bin; do
        [[ -d $root/$directory ]] || continue
        cp -a "$root/$directory" "$root/usr/"
        rm -r "${root:?}/$directory"
    done
    # The accounts that the post-install scripts would make.
    with_account passwd 'systemd-resolve:x:64996:64996::/:/usr/sbin/nologin' 'messagebus:x:64995:64995::/:/usr/sbin/nologin'
    with_account group 'systemd-resolve:x:64996:' 'messagebus:x:64995:'
    touch "$root/.complete"
}

with_account() {
    { cat "/etc/$1"; printf '%s\n' "${@:2}"; } | awk -F: '!seen[$1]++' >"$root/etc/$1"
}

newer() {
    [[ -e $2 && $2 -nt $1 ]]
}

[[ -e $root/.complete ]] || unpack
newer tests/resolver/lookup.go target/resolver-lookup-go ||
    CGO_ENABLED=0 go build -trimpath -o target/resolver-lookup-go tests/resolver/lookup.go
newer tests/resolver/lookup.c target/resolver-lookup-musl ||
    musl-gcc -static -O1 -Wall -Werror -o target/resolver-lookup-musl tests/resolver/lookup.c
