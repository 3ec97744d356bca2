//! What is looked up, by whom, and what has to come of it.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use crate::lab::built;

/// Who looks names up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// getaddrinfo of the GNU C library, by way of nsswitch.conf.
    Glibc,
    /// getaddrinfo of musl, linked statically.
    Musl,
    /// Go's own resolver, linked statically.
    Go,
    /// dig, which follows no search list.
    Dig,
}

impl Program {
    pub(crate) const ALL: [Self; 4] = [Self::Glibc, Self::Musl, Self::Go, Self::Dig];
}

/// A name and its addresses; none for one that must not resolve.
pub(crate) type Lookup = (&'static str, &'static [&'static str]);

pub(crate) const CLUSTER: [Lookup; 11] = [
    ("web", &["10.96.0.7"]),
    ("web.shop", &["10.96.0.7"]),
    ("web.dev", &["10.96.0.8"]),
    ("web.shop.svc", &["10.96.0.7"]),
    ("web.shop.svc.cluster.local", &["10.96.0.7"]),
    ("WEB.Shop.svc.CLUSTER.local", &["10.96.0.7"]),
    ("pg-0.pgsql.shop.svc.cluster.local", &["10.244.0.9"]),
    ("dual.shop", &["10.96.0.9", "fd00:10:96::9"]),
    ("ext.shop", &["203.0.113.2"]),
    ("10-244-0-9.shop.pod", &["10.244.0.9"]),
    ("nowhere.shop.svc.cluster.local", &[]),
];

/// Those that systemd-resolved routes by a domain, whoever asks.
pub(crate) const CLUSTER_BY_DOMAIN: &[Lookup] = CLUSTER.split_at(1).1;

/// The one that needs a search list.
pub(crate) const CLUSTER_BY_SEARCH: &[Lookup] = CLUSTER.split_at(1).0;

pub(crate) const INTERNET: [Lookup; 6] = [
    // Under a domain that is a namespace too.
    ("site.dev", &["203.0.113.4"]),
    ("www.site.dev", &["203.0.113.4"]),
    ("example.com", &["203.0.113.1"]),
    ("www.example.com", &["203.0.113.2"]),
    ("both.example.com", &["2001:db8::3", "203.0.113.3"]),
    ("nowhere.example.com", &[]),
];

/// (name, type, answer) of other records.
pub(crate) const RECORDS: [Lookup; 5] = [
    ("srv _http._tcp.web.shop.svc.cluster.local", &["80 web.shop.svc.cluster.local."]),
    ("srv _http._tcp.web.shop", &["80 web.shop.svc.cluster.local."]),
    ("txt dns-version.cluster.local", &["1.1.0"]),
    ("ptr 10.96.0.7", &["web.shop.svc.cluster.local."]),
    ("ptr 192.0.2.80", &["host.example.com."]),
];

/// Nothing may take longer: neither what resolves nor what doesn't.
const LIMIT: Duration = Duration::from_millis(1000);

/// Has each program look up each name.
pub(crate) fn check(programs: &[Program], lookups: &[Lookup]) {
    for program in programs {
        for (name, expected) in lookups {
            let started = Instant::now();
            let found = resolve(*program, name);
            let took = started.elapsed();
            println!("{program:?} {name}: {found:?} in {took:.0?}");
            assert_eq!(found, *expected, "{program:?} {name}");
            assert!(took < LIMIT, "{program:?} {name} took {took:?}");
        }
    }
}

/// What `program` finds, sorted. A name may carry a type before it (`srv`, `txt`, `ptr`).
pub(crate) fn resolve(program: Program, name: &str) -> Vec<String> {
    let (kind, name) = name.split_once(' ').unwrap_or(("host", name));
    let mut command = match program {
        Program::Glibc => command("getent", &["ahosts", name]),
        Program::Musl => command(built("resolver-lookup-musl"), &[name]),
        Program::Go => command(built("resolver-lookup-go"), &[kind, name]),
        Program::Dig => dig(kind, name),
    };
    let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
    let mut found: Vec<String> = output.lines().filter_map(|line| tidy(program, kind, line)).collect();
    found.sort();
    found.dedup();
    found
}

fn command(program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

fn dig(kind: &str, name: &str) -> Command {
    let options = ["+short", "+time=3", "+tries=1"];
    match kind {
        "ptr" => command("dig", &[&options[..], &["-x", name]].concat()),
        "host" => command("dig", &[&options[..], &[name, "A", name, "AAAA"]].concat()),
        kind => command("dig", &[&options[..], &[name, kind]].concat()),
    }
}

/// The part of a line that all programs would print.
fn tidy(program: Program, kind: &str, line: &str) -> Option<String> {
    match (program, kind) {
        (Program::Glibc, _) => line.split_whitespace().next().map(str::to_owned),
        // An alias on the way to the address, or a comment.
        (Program::Dig, "host") => line.parse::<std::net::IpAddr>().ok().map(|address| address.to_string()),
        (Program::Dig, "srv") => line.splitn(3, ' ').nth(2).map(str::to_owned),
        (Program::Dig, "txt") => Some(line.trim_matches('"').to_owned()),
        (Program::Dig, _) => {
            line.ends_with('.').then(|| line.to_owned()).filter(|line| !line.ends_with("arpa."))
        }
        (Program::Musl | Program::Go, _) => Some(line.to_owned()),
    }
}
