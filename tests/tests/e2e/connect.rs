//! `tpd up`, `tpd status` and `tpd down` when all is well.

use std::time::Duration;

use serde_json::json;
use tpd_api::exit::ExitCode;
use tpd_api::local::Phase;
use tpd_tests::{Cluster, Laptop, Snapshot, until};

use crate::samples::PATHS;

/// From `tpd up` to the first answer of a Service by its name, with the manager installed.
const FIRST_ANSWER: Duration = Duration::from_secs(1);

/// The median of a few, because the machine has other things to do too.
#[track_caller]
fn first_answer(laptop: &Laptop) {
    let mut times: Vec<_> = (0..7)
        .map(|_| {
            let run = laptop.run("tpd up --namespace shop 2>&1 && curl -sS --max-time 5 http://web.shop");
            laptop.run("tpd down").ok();
            run.ok().says(&["Hello from web-"]).took
        })
        .collect();
    times.sort_unstable();
    println!("tpd up to first answer: {times:?}");
    assert!(times[3] < FIRST_ANSWER, "tpd up to first answer takes {:?}; all: {times:?}", times[3]);
}

#[test]
fn the_first_answer_comes_within_a_second() {
    first_answer(&Laptop::take());
}

#[test]
fn two_hundred_namespaces_make_it_no_slower() {
    let laptop = Laptop::take();
    let many = Namespaces::create(laptop.cluster, 200);
    first_answer(&laptop);
    drop(many);
}

struct Namespaces(&'static Cluster);

impl Namespaces {
    fn create(cluster: &'static Cluster, count: usize) -> Self {
        let items: Vec<_> = (0..count)
            .map(|number| {
                json!({ "apiVersion": "v1", "kind": "Namespace",
                    "metadata": { "name": format!("many-{number}"), "labels": { "tpd-test": "many" } } })
            })
            .collect();
        let guard = Self(cluster);
        cluster.apply(&json!({ "apiVersion": "v1", "kind": "List", "items": items }));
        guard
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        let _ = self.0.kubectl("delete namespace -l tpd-test=many");
    }
}

#[test]
fn status_says_which_path_carries_the_session_and_why() {
    let laptop = Laptop::take();
    laptop.run("tpd status").exits(ExitCode::NotConnected);
    laptop.run("tpd status --output json").exits(ExitCode::NotConnected);

    let connection = laptop.up("--namespace shop");
    let status = laptop.status();
    assert_eq!(status.phase, Phase::Connected, "{status:?}");
    assert_eq!(status.request.namespace, "shop");
    assert_eq!(status.user.as_deref(), Some("dev"));
    assert!(status.session.is_some() && status.address.is_some(), "{status:?}");
    assert!(laptop.manager().starts_with("tpd-manager-"));
    assert!(status.networks.len() >= 4, "pods and services of either family: {:?}", status.networks);
    assert_eq!(status.paths.iter().filter(|path| path.active).count(), 1, "{:?}", status.paths);
    assert!(status.paths.iter().all(|path| !path.reason.is_empty()), "{:?}", status.paths);
    assert_eq!(status.dns.as_ref().map(|dns| dns.zone.as_str()), Some("cluster.local"));

    laptop.run("tpd status").ok().says(&["connected", "shop", "cluster.local"]);
    // A better path may be found between two looks.
    until(Duration::from_secs(10), "both forms of `tpd status` name the path and the reason", || {
        let human = laptop.run("tpd status");
        let paths = laptop.status().paths;
        let active = paths.iter().find(|path| path.active).ok_or_else(|| format!("{paths:?}"))?;
        let line = human.stdout.lines().find(|line| line.contains("* ")).unwrap_or_default();
        let kind = format!("{:?}", active.kind).to_lowercase();
        if line.contains(&kind) && line.contains(&active.reason) {
            Ok(())
        } else {
            Err(format!("{active:?}\n{human}"))
        }
    });
    connection.down();
}

#[test]
fn down_leaves_the_laptop_as_it_was_on_every_path() {
    let laptop = Laptop::take();
    for path in PATHS {
        let connection = laptop.up_over(path);
        let status = laptop.status();
        let active = status.paths.iter().find(|path| path.active).expect("a path is active once it is up");
        assert_eq!(active.kind, path, "it was asked for: {:?}", status.paths);
        laptop.run("curl -sS --max-time 5 http://web.shop").ok().says(&["Hello from web-"]);
        let connected = Snapshot::of(&laptop);
        assert!(connection.before().same_as(&connected).is_err(), "tpd up changed nothing");
        connection.down();
        assert_eq!(laptop.processes("tpd"), Vec::<u32>::new(), "tpd down left processes");
    }
}

#[test]
fn ordinary_traffic_goes_where_it_always_went() {
    let laptop = Laptop::take();
    let way = "ip route get 203.0.113.2; ip route get 198.51.100.1; ip -6 route get 2001:db8:2::2; ip route get 192.0.2.10";
    let before = laptop.run(way);
    let _connection = laptop.up("");
    let after = laptop.run(way);
    let device = |text: &str| -> Vec<String> {
        text.split_whitespace()
            .skip_while(|word| *word != "dev")
            .nth(1)
            .map(str::to_owned)
            .into_iter()
            .collect()
    };
    for (before, after) in before.ok().out().lines().zip(after.ok().out().lines()) {
        assert_eq!(device(before), device(after), "{before} became {after}");
    }
    laptop.run("ping -c 1 -W 1 203.0.113.2 && ping -c 1 -W 1 2001:db8:2::2").ok();
}

#[test]
fn up_twice_and_down_twice_are_harmless() {
    let laptop = Laptop::take();
    let connection = laptop.up("--namespace shop");
    let pid = laptop.status().pid;
    laptop.run("tpd up --namespace shop").ok().says(&["already"]).within(Duration::from_secs(1));
    assert_eq!(laptop.status().pid, pid, "the second `tpd up` replaced the daemon of the first");
    laptop.run("tpd up --namespace default").exits(ExitCode::Busy).says(&["shop", "tpd down"]);
    laptop.run("curl -sS --max-time 5 http://web.shop").ok();
    connection.down();
    laptop.run("tpd down").ok().says(&["not connected"]);
}

#[test]
fn foreground_ends_with_a_signal_and_cleans_up() {
    let laptop = Laptop::take();
    let before = Snapshot::of(&laptop);
    for signal in ["INT", "TERM"] {
        let running = laptop.start("exec tpd up --foreground --namespace shop");
        until(Duration::from_secs(10), "a daemon in the foreground connects", || {
            let run = laptop.run("curl -sS --max-time 1 http://web.shop");
            if run.code == Some(0) { Ok(()) } else { Err(run) }
        });
        laptop.cluster.machine(&format!("kill -{signal} {}", running.pid())).run().ok();
        running.finish().ok();
        laptop.until_as(&before, Duration::ZERO);
    }
}

#[test]
fn reading_commands_speak_json() {
    let laptop = Laptop::take();
    for command in ["tpd version --output json", "tpd status --output json"] {
        let run = laptop.run(command);
        let text = if run.code == Some(0) { &run.stdout } else { &run.stderr };
        let parsed = serde_json::from_str::<serde_json::Value>(text);
        assert!(parsed.is_ok(), "{command} prints no JSON:\n{run}");
    }
    laptop.run("tpd completions bash").ok().says(&["complete"]);
    laptop.run("tpd --help").ok().says(&["up", "down", "status", "install", "uninstall", "logs"]);
}

#[test]
fn a_connection_is_one_session_and_down_deletes_it() {
    let laptop = Laptop::take();
    let _first = laptop.up("--namespace shop");
    let sessions = laptop.cluster.object("clientsessions -n tpd-system");
    let items = sessions["items"].as_array().expect("a list has items");
    assert_eq!(items.len(), 1, "earlier tests left sessions: {items:?}");
    assert_eq!(items[0]["spec"]["owner"], "dev");
    assert_eq!(items[0]["status"]["phase"], "Ready");
    laptop.run("tpd down").ok();
    let after = laptop.cluster.object("clientsessions -n tpd-system");
    assert_eq!(after["items"].as_array().map(Vec::len), Some(0), "tpd down leaves its session behind");
}
