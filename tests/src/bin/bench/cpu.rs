//! Who used how much processor time meanwhile.

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Milliseconds in what `/proc` counts in, on every architecture that the kernel still supports (`USER_HZ`).
const TICK_MS: u64 = 10;

/// The servers in the pods. Their clients are our children.
const SERVERS: [&str; 3] = ["iperf3", "nginx", "tpd-echo"];

/// The processes that carry a contender's traffic.
#[derive(Clone, Debug, Default)]
pub(crate) struct Involved {
    /// By id: what was started for it.
    pub(crate) processes: Vec<u32>,
    /// By name: what it goes through on the node.
    pub(crate) components: &'static [&'static str],
    /// First process of the node, whose descendants they are: other clusters may run on this machine.
    pub(crate) node: u32,
}

/// Processor time spent between two moments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spent {
    /// By the processes that carry the traffic.
    pub(crate) involved: Duration,
    /// By the whole machine, with what the kernel does on nobody's account.
    pub(crate) everything: Duration,
    /// What everything else than the measurement took, in percent of the machine. The host's theft counts.
    pub(crate) background_percent: f64,
}

/// The counters at one moment.
#[derive(Debug)]
pub(crate) struct Meter<'a> {
    involved: &'a Involved,
    at: Instant,
    reading: Reading,
}

#[derive(Clone, Copy, Debug)]
struct Reading {
    involved: Duration,
    load: Duration,
    idle: Duration,
    processors: u32,
}

impl<'a> Meter<'a> {
    /// Starts counting.
    pub(crate) fn start(involved: &'a Involved) -> Result<Self> {
        Ok(Self { involved, at: Instant::now(), reading: Reading::take(involved)? })
    }

    /// What was spent since the start.
    pub(crate) fn stop(&self) -> Result<Spent> {
        let elapsed = self.at.elapsed();
        let now = Reading::take(self.involved)?;
        let involved = now.involved.saturating_sub(self.reading.involved);
        let ours = involved + now.load.saturating_sub(self.reading.load);
        let (idle, available) = (now.idle.saturating_sub(self.reading.idle), elapsed * now.processors);
        let everything = available.saturating_sub(idle);
        let others = everything.saturating_sub(ours);
        let background_percent = 100.0 * others.as_secs_f64() / available.as_secs_f64();
        Ok(Spent { involved, everything, background_percent })
    }
}

impl Reading {
    fn take(involved: &Involved) -> Result<Self> {
        let (idle, processors) = idle()?;
        let mut reading = Self { involved: Duration::ZERO, load: Duration::ZERO, idle, processors };
        let processes = processes();
        for (pid, process) in &processes {
            let runs_there = |names: &[&str]| {
                names.contains(&process.name.as_str()) && descends(&processes, *pid, involved.node)
            };
            if *pid == std::process::id() {
                reading.load += process.own + process.children;
            } else if involved.processes.contains(pid) || runs_there(involved.components) {
                reading.involved += process.own;
            } else if runs_there(&SERVERS) {
                reading.load += process.own;
            }
        }
        Ok(reading)
    }
}

struct Process {
    name: String,
    parent: u32,
    own: Duration,
    children: Duration,
}

/// Every process there is; one that ends while we look is left out.
fn processes() -> HashMap<u32, Process> {
    let Ok(directory) = fs::read_dir("/proc") else { return HashMap::new() };
    directory
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            Some((pid, parse_process(&stat)?))
        })
        .collect()
}

/// The ids of the processes of a name on a node.
pub(crate) fn named(name: &str, node: u32) -> Vec<u32> {
    let processes = processes();
    let of_name = processes.iter().filter(|(_, process)| process.name == name);
    of_name.map(|(pid, _)| *pid).filter(|pid| descends(&processes, *pid, node)).collect()
}

fn descends(processes: &HashMap<u32, Process>, pid: u32, ancestor: u32) -> bool {
    let parent = |pid: &u32| processes.get(pid).map(|process| process.parent);
    std::iter::successors(Some(pid), parent).any(|pid| pid == ancestor)
}

/// `proc_pid_stat(5)`. The name is in parentheses, and may contain some.
fn parse_process(stat: &str) -> Option<Process> {
    let (before, after) = stat.rsplit_once(") ")?;
    let (_, name) = before.split_once('(')?;
    let fields: Vec<&str> = after.split(' ').collect();
    let ticks = |index: usize| Some(ticks(fields.get(index)?.parse().ok()?));
    // The parent is field 4, utime, stime, cutime and cstime are 14 to 17; `after` begins with field 3.
    Some(Process {
        name: name.to_owned(),
        parent: fields.get(1)?.parse().ok()?,
        own: ticks(11)? + ticks(12)?,
        children: ticks(13)? + ticks(14)?,
    })
}

/// Time that processors were idle in, all together, and how many there are. What is left was spent, or the host gave it to
/// others. Many kernels only sample at each tick what it was spent on, and a load at even intervals may never meet one.
fn idle() -> Result<(Duration, u32)> {
    let stat = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    parse_idle(&stat).context("/proc/stat has another form than expected")
}

fn parse_idle(stat: &str) -> Option<(Duration, u32)> {
    let mut lines = stat.lines();
    // After the name: user, nice, system, idle, iowait.
    let columns: Vec<u64> =
        lines.next()?.split_whitespace().skip(1).map_while(|column| column.parse().ok()).collect();
    let processors = lines.take_while(|line| line.starts_with("cpu")).count();
    Some((ticks(columns.get(3)? + columns.get(4)?), u32::try_from(processors).ok()?))
}

fn ticks(count: u64) -> Duration {
    Duration::from_millis(TICK_MS * count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_process_whose_name_has_parentheses() {
        let stat = "7 (a (b) c) S 1 7 7 0 -1 4194560 10 20 0 0 30 40 50 60 20 0 1 0 100";
        let process = parse_process(stat).unwrap();
        assert_eq!((process.name.as_str(), process.parent), ("a (b) c", 1));
        assert_eq!(process.own, Duration::from_millis(700));
        assert_eq!(process.children, Duration::from_millis(1100));
    }

    #[test]
    fn tells_nodes_apart_by_descent() {
        let process =
            |parent| Process { name: String::new(), parent, own: Duration::ZERO, children: Duration::ZERO };
        let processes =
            HashMap::from([(1, process(0)), (10, process(1)), (11, process(10)), (20, process(1))]);
        assert!(descends(&processes, 11, 10));
        assert!(!descends(&processes, 20, 10));
    }

    #[test]
    fn a_processor_that_waits_for_a_disk_is_idle() {
        let stat =
            "cpu  1 2 3 40 50 4 5 6 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\ncpu1 0 1 2 39 49 3 4 5 0 0\nintr 1\n";
        assert_eq!(parse_idle(stat), Some((Duration::from_millis(900), 2)));
    }
}
