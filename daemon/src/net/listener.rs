//! Who listens on a port of this machine, for an error that names the program and not only the port.

use std::collections::HashSet;
use std::fs;

/// The programs that listen on `port`, UDP or TCP, as `name (pid 1)`. Empty where /proc does not tell.
pub(crate) fn listeners(port: u16) -> Vec<String> {
    let inodes: HashSet<u64> = ["udp", "udp6", "tcp", "tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(format!("/proc/net/{table}")).ok())
        .flat_map(|table| bound(&table, port))
        .collect();
    if inodes.is_empty() {
        return Vec::new();
    }
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|&pid| holds(pid, &inodes)).map(|pid| format!("{} (pid {pid})", command(pid))).collect()
}

/// The inodes of a /proc/net table's sockets that are bound to `port` and connected to nobody; see proc_net(5).
fn bound(table: &str, port: u16) -> Vec<u64> {
    let suffix = format!(":{port:04X}");
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<_> = line.split_ascii_whitespace().collect();
            let (local, remote, inode) = (fields.get(1)?, fields.get(2)?, fields.get(9)?);
            (local.ends_with(&suffix) && remote.ends_with(":0000")).then(|| inode.parse().ok())?
        })
        .collect()
}

fn holds(pid: u32, inodes: &HashSet<u64>) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|target| {
        let inode = target.to_str().and_then(|text| text.strip_prefix("socket:[")?.strip_suffix(']'));
        inode.and_then(|inode| inode.parse().ok()).is_some_and(|inode| inodes.contains(&inode))
    })
}

fn command(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).map_or_else(|_| "?".into(), |name| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found_by_its_socket() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let found = listeners(socket.local_addr().unwrap().port());
        let me = format!("(pid {})", std::process::id());
        assert!(found.iter().any(|listener| listener.ends_with(&me)), "{found:?}");
    }

    #[test]
    fn a_connection_from_the_port_is_no_listener() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 00000000:0035 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 17 1\n   \
            1: 0100007F:0035 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 18 1\n";
        assert_eq!(bound(table, 53), [17]);
    }
}
