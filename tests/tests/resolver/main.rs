//! Taking over the system's resolver, for real: systemd-resolved and resolv.conf in all its shapes, asked by glibc, musl, Go and dig.
//!
//! Each test is a laptop of its own: a process in its own network, mount and process namespaces, with a cluster and an internet on the other
//! ends of two cables. `tests/resolver/overlay.sh` brings systemd-resolved, which is never installed.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a panic is how a test fails, and what it prints is read by a person"
)]
#![allow(clippy::disallowed_methods, reason = "a test may sleep: nobody waits for its thread")]

mod lab;
mod lookups;
mod roles;

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    time::{Duration, Instant},
};

use lab::{Lab, isolated, wait_until};
use lookups::{Program, check, resolve};

const RESOLV_CONF: &str = "/etc/resolv.conf";
const OLD: &str = "nameserver 192.0.2.53\nsearch corp.example\noptions timeout:3\n";

/// The process that this executable plays when a test starts it again.
#[test]
fn role() {
    roles::play();
}

#[test]
fn resolv_conf_as_a_file() {
    isolated("resolv_conf_as_a_file", "", || {
        fs::write(RESOLV_CONF, OLD).unwrap();
        let mut lab = Lab::start(&["dev"]);
        assert_eq!(lab.backend(), "resolv.conf");
        let taken = fs::read_to_string(RESOLV_CONF).unwrap();
        assert!(taken.contains("nameserver 100.127.0.5\nsearch shop.svc.cluster.local"), "{taken}");
        check(&Program::ALL, &lookups::CLUSTER);
        check(&Program::ALL, &lookups::INTERNET);
        check(&[Program::Go, Program::Dig], &lookups::RECORDS);
        lab.stop();
        assert_eq!(fs::read_to_string(RESOLV_CONF).unwrap(), OLD);
        check(&Program::ALL, &lookups::INTERNET);
    });
}

#[test]
fn resolv_conf_without_the_list_of_namespaces() {
    isolated("resolv_conf_without_the_list_of_namespaces", "", || {
        fs::write(RESOLV_CONF, OLD).unwrap();
        let _lab = Lab::start(&[]);
        check(&Program::ALL, &lookups::CLUSTER);
        check(&Program::ALL, &lookups::INTERNET);
    });
}

#[test]
fn large_answers_come_whole() {
    isolated("large_answers_come_whole", "", || {
        fs::write(RESOLV_CONF, OLD).unwrap();
        let _lab = Lab::start(&[]);
        for program in [Program::Glibc, Program::Go, Program::Dig] {
            assert_eq!(resolve(program, "many.shop").len(), 100, "{program:?}");
        }
        // Before 1.2.4 musl has no TCP, and takes what fits into a datagram.
        assert!(resolve(Program::Musl, "many.shop").len() >= 20);
    });
}

#[test]
fn resolv_conf_as_a_link() {
    isolated("resolv_conf_as_a_link", "", || {
        fs::write("/run/resolv.conf", OLD).unwrap();
        fs::remove_file(RESOLV_CONF).unwrap();
        symlink("../run/resolv.conf", RESOLV_CONF).unwrap();
        let mut lab = Lab::start(&["dev"]);
        check(&Program::ALL, &lookups::CLUSTER);
        assert_eq!(
            fs::read_to_string("/run/resolv.conf").unwrap(),
            OLD,
            "the target belongs to somebody else"
        );

        // Another network: whoever maintains the target names another server.
        fs::write("/run/resolv.conf", "nameserver 198.51.100.54\n").unwrap();
        wait_until("the new server is asked", || {
            resolve(Program::Glibc, "second.example.com") == ["203.0.113.54"]
        });
        lab.stop();
        assert_eq!(fs::read_link(RESOLV_CONF).unwrap(), Path::new("../run/resolv.conf"));
    });
}

#[test]
fn resolv_conf_as_a_mount() {
    isolated("resolv_conf_as_a_mount", "", || {
        fs::write("/run/mounted", OLD).unwrap();
        lab::run("mount --bind /run/mounted /etc/resolv.conf");
        let mut lab = Lab::start(&["dev"]);
        check(&Program::ALL, &lookups::CLUSTER);
        lab.stop();
        assert_eq!(fs::read_to_string("/run/mounted").unwrap(), OLD);
    });
}

#[test]
fn a_file_comes_back_after_kill_9() {
    comes_back("a_file_comes_back_after_kill_9", "echo 'nameserver 192.0.2.53' >/etc/resolv.conf");
}

#[test]
fn a_link_comes_back_after_kill_9() {
    let link = "echo 'nameserver 192.0.2.53' >/run/resolv.conf; ln -sf ../run/resolv.conf /etc/resolv.conf";
    comes_back("a_link_comes_back_after_kill_9", link);
}

#[test]
fn a_mount_comes_back_after_kill_9() {
    let mount = "echo 'nameserver 192.0.2.53' >/run/mounted; mount --bind /run/mounted /etc/resolv.conf";
    comes_back("a_mount_comes_back_after_kill_9", mount);
}

fn comes_back(test: &str, prepare: &str) {
    isolated(test, "", || {
        let resolv_conf = || lab::output("cat /etc/resolv.conf; readlink /etc/resolv.conf");
        lab::run(prepare);
        let before = resolv_conf();
        let mut lab = Lab::start(&["dev"]);
        assert_ne!(resolv_conf(), before);
        let killed = Instant::now();
        lab.kill();
        wait_until("resolv.conf is as before", || resolv_conf() == before);
        println!("back {:.0?} after kill -9", killed.elapsed());
        assert!(killed.elapsed() < Duration::from_secs(2));
        check(&Program::ALL, &lookups::INTERNET);
    });
}

#[test]
fn resolv_conf_comes_back_after_a_reboot() {
    isolated("resolv_conf_comes_back_after_a_reboot", "", || {
        fs::write(RESOLV_CONF, OLD).unwrap();
        Lab::start(&[]).cut_power();
        assert!(
            fs::read_to_string(RESOLV_CONF).unwrap().contains("100.127.0.5"),
            "nobody was left to restore it"
        );
        let mut lab = Lab::start(&[]);
        check(&Program::ALL, &lookups::CLUSTER);
        lab.stop();
        assert_eq!(fs::read_to_string(RESOLV_CONF).unwrap(), OLD);
    });
}

#[test]
fn systemd_restores_resolv_conf_while_it_boots() {
    isolated("systemd_restores_resolv_conf_while_it_boots", "target/resolver-root", || {
        lab::run("mkdir -p /run/systemd/system; echo 'nameserver 192.0.2.53' >/run/resolv.conf");
        let boot = "systemd-tmpfiles --create --remove --boot --prefix=/etc/resolv.conf";
        let entries = || lab::output("ls /etc/tmpfiles.d");

        fs::write(RESOLV_CONF, OLD).unwrap();
        Lab::start(&[]).cut_power();
        assert!(fs::read_to_string(RESOLV_CONF).unwrap().contains("100.127.0.5"));
        lab::run(boot);
        assert_eq!(fs::read_to_string(RESOLV_CONF).unwrap(), OLD);

        lab::run("ln -sf ../run/resolv.conf /etc/resolv.conf");
        Lab::start(&[]).cut_power();
        lab::run(boot);
        assert_eq!(fs::read_link(RESOLV_CONF).unwrap(), Path::new("../run/resolv.conf"));

        let mut lab = Lab::start(&[]);
        assert!(entries().contains("tpd-"));
        lab.stop();
        assert!(!entries().contains("tpd-"), "nothing is left for the next boot");
    });
}

#[test]
fn resolv_conf_is_taken_again_from_who_rewrites_it() {
    isolated("resolv_conf_is_taken_again_from_who_rewrites_it", "", || {
        fs::write(RESOLV_CONF, OLD).unwrap();
        let mut lab = Lab::start(&["dev"]);
        let new = "nameserver 198.51.100.54\nsearch other.example\n";
        fs::write(RESOLV_CONF, new).unwrap();
        wait_until("the proxy is back in front", || resolve(Program::Glibc, "web") == ["10.96.0.7"]);
        assert_eq!(
            resolve(Program::Glibc, "second.example.com"),
            ["203.0.113.54"],
            "the new network's server"
        );
        lab.stop();
        assert_eq!(fs::read_to_string(RESOLV_CONF).unwrap(), new, "what was written last comes back");
    });
}

#[test]
fn resolv_conf_is_taken_again_from_who_replaces_it() {
    isolated("resolv_conf_is_taken_again_from_who_replaces_it", "", || {
        fs::write(RESOLV_CONF, OLD).unwrap();
        let mut lab = Lab::start(&["dev"]);
        // As NetworkManager does when it is told to manage the file: another file in its place, then a link.
        lab::run("echo 'nameserver 198.51.100.54' >/etc/new; mv /etc/new /etc/resolv.conf");
        wait_until("the proxy is back in front", || resolve(Program::Musl, "web") == ["10.96.0.7"]);
        assert_eq!(resolve(Program::Musl, "second.example.com"), ["203.0.113.54"]);
        lab::run(
            "echo 'nameserver 192.0.2.53' >/run/nm; ln -sf /run/nm /etc/new; mv /etc/new /etc/resolv.conf",
        );
        wait_until("and again", || resolve(Program::Musl, "web") == ["10.96.0.7"]);
        assert_eq!(resolve(Program::Musl, "second.example.com"), ["203.0.113.53"]);
        lab.stop();
        assert_eq!(fs::read_link(RESOLV_CONF).unwrap(), Path::new("/run/nm"));
    });
}

#[test]
fn what_somebody_else_wrote_is_never_overwritten() {
    isolated("what_somebody_else_wrote_is_never_overwritten", "", || {
        fs::write(RESOLV_CONF, OLD).unwrap();
        let mut lab = Lab::start(&[]);
        let foreign = "nameserver 198.51.100.54\n";
        lab.suspend();
        fs::write(RESOLV_CONF, foreign).unwrap();
        lab.kill();
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(fs::read_to_string(RESOLV_CONF).unwrap(), foreign);
    });
}

#[test]
fn systemd_resolved() {
    isolated("systemd_resolved", "target/resolver-root", || {
        lab::start_resolved();
        let mut lab = Lab::start(&["shop", "dev"]);
        assert_eq!(lab.backend(), "systemd-resolved");
        let before = fs::read_to_string(RESOLV_CONF).unwrap();
        println!("{before}{}", lab::output("resolvectl --no-pager"));
        check(&Program::ALL, lookups::CLUSTER_BY_DOMAIN);
        check(&[Program::Glibc, Program::Musl, Program::Go], lookups::CLUSTER_BY_SEARCH);
        check(&Program::ALL, &lookups::INTERNET);
        check(&[Program::Go, Program::Dig], &lookups::RECORDS);

        // Another network: names under a namespace's domain that the cluster hasn't go to its server from now on.
        lab::run("resolvectl dns wan0 198.51.100.54");
        let asked = || lab::output("dig +short @100.127.0.5 second.dev");
        wait_until("the new server is asked", || asked() == "203.0.113.54\n");
        lab.stop();
        assert!(!lab::output("resolvectl --no-pager").contains("cluster.local"));
        check(&Program::ALL, &lookups::INTERNET);
        assert!(resolve(Program::Glibc, "web.shop.svc.cluster.local").is_empty());
    });
}

#[test]
fn systemd_resolved_by_nss() {
    isolated("systemd_resolved_by_nss", "target/resolver-root", || {
        lab::run("sed -i 's/^hosts:.*/hosts: files resolve [!UNAVAIL=return] dns/' /etc/nsswitch.conf");
        lab::start_resolved();
        let _lab = Lab::start(&["shop", "dev"]);
        check(&[Program::Glibc], lookups::CLUSTER_BY_DOMAIN);
        check(&[Program::Glibc], &[("web", &["10.96.0.7"])]);
        check(&[Program::Glibc], &lookups::INTERNET);
    });
}

#[test]
fn systemd_resolved_without_the_list_of_namespaces() {
    isolated("systemd_resolved_without_the_list_of_namespaces", "target/resolver-root", || {
        lab::start_resolved();
        let _lab = Lab::start(&[]);
        check(&[Program::Glibc, Program::Go], &lookups::CLUSTER);
        check(&Program::ALL, &lookups::INTERNET);
    });
}

#[test]
fn systemd_resolved_forgets_after_kill_9() {
    isolated("systemd_resolved_forgets_after_kill_9", "target/resolver-root", || {
        lab::start_resolved();
        let mut lab = Lab::start(&["dev"]);
        lab.kill();
        // The tunnel's interface goes with the daemon that holds it; here it is a cable.
        lab::run("ip link del tpd0");
        wait_until("nothing is left", || !lab::output("resolvectl --no-pager").contains("cluster.local"));
        check(&Program::ALL, &lookups::INTERNET);
    });
}

#[test]
fn a_systemd_resolved_that_hangs_holds_nobody_up() {
    isolated("a_systemd_resolved_that_hangs_holds_nobody_up", "target/resolver-root", || {
        lab::start_resolved();
        let mut lab = Lab::start(&["dev"]);
        lab::run("kill -STOP $(pidof systemd-resolved)");
        lab.ends();
        lab::run("kill -CONT $(pidof systemd-resolved)");
    });
}

#[test]
fn systemd_resolved_is_told_again_after_its_restart() {
    isolated("systemd_resolved_is_told_again_after_its_restart", "target/resolver-root", || {
        lab::start_resolved();
        let _lab = Lab::start(&["dev"]);
        lab::run(
            "kill $(pidof systemd-resolved); while pidof systemd-resolved; do sleep 0.05; done; rm -rf /run/systemd/resolve",
        );
        lab::start_resolved();
        wait_until("names resolve again", || resolve(Program::Glibc, "web.dev") == ["10.96.0.8"]);
        lab::run("resolvectl revert tpd0");
        wait_until("and after somebody reverted them", || {
            resolve(Program::Glibc, "web.dev") == ["10.96.0.8"]
        });
    });
}

#[test]
fn two_hundred_namespaces_cost_nothing() {
    isolated("two_hundred_namespaces_cost_nothing", "target/resolver-root", || {
        lab::start_resolved();
        let namespaces: Vec<_> =
            (0..200).map(|index| format!("team-{index}")).chain(["dev".to_owned()]).collect();
        let namespaces: Vec<_> = namespaces.iter().map(String::as_str).collect();
        let lab = Lab::start(&namespaces);
        println!("taken over and proven in {} ms with 201 namespaces", lab.milliseconds());
        assert!(lab.milliseconds() < 300);
        check(&Program::ALL, lookups::CLUSTER_BY_DOMAIN);
    });
}
