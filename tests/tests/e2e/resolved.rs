//! A laptop whose resolver is systemd-resolved.
//!
//! It is never installed: `tests/resolver/overlay.sh` unpacks it, and a view of the laptop's files has it on top.

use std::time::Duration;

use tpd_tests::{Laptop, Run};

/// Makes the view, starts systemd-resolved as a distribution sets it up, and runs the script that follows. All of it ends
/// with the script.
const LAPTOP: &str = r#"
set -eu
layer=$1 script=$2
mount -t tmpfs tmpfs /mnt
mkdir /mnt/layer /mnt/upper /mnt/work /mnt/root
cp -a "$layer/." /mnt/layer
mount -t overlay overlay -o lowerdir=/mnt/layer:/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
mount -t proc proc /mnt/root/proc
mount -t sysfs -o ro sysfs /mnt/root/sys
mount --rbind /dev /mnt/root/dev
mount -t tmpfs tmpfs /mnt/root/run
exec chroot /mnt/root sh -eu -c "
    mkdir -p /run/dbus /run/systemd/resolve
    chown systemd-resolve: /run/systemd/resolve
    dbus-daemon --system --nopidfile --fork
    /usr/lib/systemd/systemd-resolved >/dev/null 2>&1 &
    ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
    until resolvectl >/dev/null 2>&1 && [ -e /run/systemd/resolve/stub-resolv.conf ]; do sleep 0.05; done
    resolvectl dns eth0 198.51.100.1
    resolvectl domain eth0 '~.'
    $script"
"#;

/// What `tpd up` may change and has to put back there.
const STATE: &str = "state() { resolvectl dns; resolvectl domain; resolvectl default-route; cat /etc/resolv.conf; ls -l --time-style=+ /etc/resolv.conf; ip route; ip -6 route; }";

fn with_resolved(laptop: &Laptop, script: &str) -> Run {
    laptop.cluster.machine("tests/resolver/overlay.sh").limit(Duration::from_secs(300)).run().ok();
    let launcher = "unshare --mount --pid --fork --kill-child --propagation private sh -c \"$launch\" sh target/resolver-root \"$script\"";
    let script = format!("{STATE}\n{script}");
    laptop.script(launcher).env("launch", LAPTOP).env("script", script).run()
}

#[test]
fn names_resolve_and_down_gives_the_resolver_back() {
    let laptop = Laptop::take();
    let run = with_resolved(
        &laptop,
        "state >/run/before
         getent ahosts www.example.com
         tpd up --namespace shop
         tpd status
         for name in web web.shop web.shop.svc web.shop.svc.cluster.local ring-0.ring.shop; do getent ahosts $name; tpd-echo resolve $name; done
         getent ahosts www.example.com
         curl -sS --max-time 2 http://web.shop
         tpd down
         state | diff /run/before -
         ! getent ahosts web.shop.svc.cluster.local
         getent ahosts www.example.com",
    );
    run.ok().says(&["systemd-resolved", "Hello from web-"]);
}

#[test]
fn a_daemon_that_is_killed_leaves_the_resolver_as_it_was() {
    let laptop = Laptop::take();
    let run = with_resolved(
        &laptop,
        "state >/run/before
         tpd up --namespace shop
         getent ahosts web.shop
         kill -KILL $(tpd status --output json | sed -n 's/.*\"pid\": \\([0-9]*\\).*/\\1/p')
         began=$(date +%s%N)
         until state | diff /run/before - && ! getent ahosts web.shop.svc.cluster.local; do
             [ $(($(date +%s%N) - began)) -lt 2000000000 ]
             sleep 0.05
         done
         getent ahosts www.example.com",
    );
    run.ok();
}
