//! This process to the kernel: what it uses, and how much it may.

use std::{fs, io};

use rustix::process::{Resource, getrlimit, setrlimit};

/// Ticks of /proc's CPU times in a second: a constant of the kernel's interface on every architecture (USER_HZ).
const TICKS: f64 = 100.0;

/// Allows as many file descriptors as the hard limit has room for: a connection costs one, and some container runtimes
/// begin with 1,024.
///
/// # Errors
/// Fails where a sandbox forbids the call.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    Ok(setrlimit(Resource::Nofile, limit)?)
}

/// What the process uses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Memory that is in RAM, bytes.
    pub resident_bytes: u64,
    /// CPU time so far, seconds.
    pub cpu_seconds: f64,
    /// Open file descriptors.
    pub descriptors: u64,
}

/// The present usage; what the kernel does not tell reads as zero.
#[must_use]
pub fn usage() -> Usage {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    Usage {
        resident_bytes: resident(&status),
        cpu_seconds: cpu(&stat),
        descriptors: fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64),
    }
}

fn resident(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: u64 = line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or_default();
    kib * 1024
}

/// The 14th and 15th field, user and system; the 2nd is the name in brackets, which may hold blanks.
fn cpu(stat: &str) -> f64 {
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = after_name.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok());
    ticks.sum::<f64>() / TICKS
}

#[cfg(test)]
mod tests {
    use super::{cpu, resident, usage};

    #[test]
    fn the_kernels_formats() {
        assert_eq!(resident("Name:\tx\nVmRSS:\t    1234 kB\n"), 1234 * 1024);
        let stat = "7 (a (b) c) S 1 7 7 0 -1 4194560 200 0 0 0 250 50 0 0 20 0 1 0 100 1 1";
        assert!((cpu(stat) - 3.0).abs() < f64::EPSILON);
        assert_eq!((resident(""), cpu("")), (0, 0.0));
    }

    #[test]
    fn a_live_process_uses_something() {
        let usage = usage();
        assert!(usage.resident_bytes > 0 && usage.descriptors > 2);
    }
}
