//! What is in a resolv.conf, and what we write into it (resolv.conf(5)).

use std::{
    fmt::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6},
};

use rustix::net::{AddressFamily, SocketType, netdevice, socket};

use crate::rules::Scope;

/// Domains that glibc before 2.26, musl and Go read of a search list, in octets.
const MAX_SEARCH: usize = 256;
const PORT: u16 = 53;

/// The parts of a resolv.conf that matter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Text {
    pub(crate) servers: Vec<SocketAddr>,
    pub(crate) search: Vec<String>,
    /// `options` and `sortlist` lines, as they are.
    pub(crate) kept: Vec<String>,
}

impl Text {
    pub(crate) fn parse(content: &[u8]) -> Self {
        let mut text = Self::default();
        for line in String::from_utf8_lossy(content).lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => text.servers.extend(words.next().and_then(server)),
                // The last one counts.
                Some("search" | "domain") => text.search = words.map(str::to_owned).collect(),
                Some("options" | "sortlist") => text.kept.push(line.trim().to_owned()),
                _ => {}
            }
        }
        text
    }

    /// The servers that programs ask: this machine, where none is named.
    pub(crate) fn effective_servers(&self) -> Vec<SocketAddr> {
        match &*self.servers {
            [] => vec![(Ipv4Addr::LOCALHOST, PORT).into()],
            servers => servers.to_vec(),
        }
    }

    /// The file that has programs ask `server`, with the cluster's search list before the one they had.
    ///
    /// The old servers aren't listed behind it: musl asks all at once and would take their NXDOMAIN for cluster names.
    pub(crate) fn taken_over(&self, server: IpAddr, scope: &Scope, host: &str) -> String {
        let mut text = String::from(
            "# Written by tpd while connected to a cluster. `tpd down` puts back what was here before;\n\
             # after a crash, or when this is still here after a reboot, any `tpd up` or `tpd down` does.\n",
        );
        // Writing to a String doesn't fail.
        let _ = writeln!(text, "nameserver {server}");
        let _ = writeln!(text, "search {}", self.search_list(scope, host).join(" "));
        for line in &self.kept {
            let _ = writeln!(text, "{line}");
        }
        text
    }

    fn search_list(&self, scope: &Scope, host: &str) -> Vec<String> {
        let Scope { zone, namespace, .. } = scope;
        let mut list = vec![format!("{namespace}.svc.{zone}"), format!("svc.{zone}"), zone.clone()];
        // Without a list of its own, a system searches the domain of its host name.
        let implied =
            host.split_once('.').map(|(_, domain)| domain.to_owned()).filter(|_| self.search.is_empty());
        for domain in self.search.iter().cloned().chain(implied) {
            let length: usize = list.iter().map(|known| known.len() + 1).sum();
            if !list.contains(&domain) && domain != "." && length + domain.len() <= MAX_SEARCH {
                list.push(domain);
            }
        }
        list
    }
}

fn server(word: &str) -> Option<SocketAddr> {
    let (address, zone) = word.split_once('%').unwrap_or((word, ""));
    match address.parse().ok()? {
        IpAddr::V4(address) => Some((address, PORT).into()),
        IpAddr::V6(address) => Some(SocketAddrV6::new(address, PORT, 0, scope_id(zone)).into()),
    }
}

/// The index of the interface that a link-local address belongs to; 0 for none.
fn scope_id(zone: &str) -> u32 {
    let by_name = || {
        let socket = socket(AddressFamily::INET, SocketType::DGRAM, None).ok()?;
        netdevice::name_to_index(&socket, zone).ok()
    };
    match zone {
        "" => 0,
        zone => zone.parse().ok().or_else(by_name).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scope() -> Scope {
        Scope { zone: "cluster.local".into(), namespace: "shop".into(), ..Scope::default() }
    }

    fn taken_over(content: &str, host: &str) -> Vec<String> {
        let text = Text::parse(content.as_bytes()).taken_over("100.127.0.5".parse().unwrap(), &scope(), host);
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
    }

    #[test]
    fn reads_servers() {
        let text = Text::parse(
            b"# c\nnameserver 192.0.2.1\n nameserver\t2001:db8::1 \nnameserver fe80::1%7\nnameserver x\n",
        );
        let servers: Vec<_> = text.servers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:53", "[fe80::1%7]:53"]);
        assert_eq!(Text::parse(b"").effective_servers()[0].to_string(), "127.0.0.1:53");
    }

    #[test]
    fn the_clusters_search_list_comes_before_the_old_one() {
        let old = "nameserver 192.0.2.1\nsearch corp.example cluster.local\noptions ndots:2 timeout:1\nsortlist 192.0.2.0\n";
        assert_eq!(
            taken_over(old, "host.ignored.example"),
            [
                "nameserver 100.127.0.5",
                "search shop.svc.cluster.local svc.cluster.local cluster.local corp.example",
                "options ndots:2 timeout:1",
                "sortlist 192.0.2.0",
            ]
        );
    }

    #[test]
    fn the_domain_of_the_host_name_stays_searched() {
        let search = |content, host| taken_over(content, host)[1].clone();
        let ours = "search shop.svc.cluster.local svc.cluster.local cluster.local";
        assert_eq!(search("", "laptop.corp.example"), format!("{ours} corp.example"));
        assert_eq!(search("domain other.example", "laptop.corp.example"), format!("{ours} other.example"));
        assert_eq!(search("search .", "laptop"), ours);
    }

    #[test]
    fn the_search_list_stays_short_enough_for_everyone() {
        let long = format!("search {} b.example", vec![format!("{}.example", "a".repeat(60)); 4].join(" "));
        let distinct = long.replacen('a', "x", 1).replacen('a', "y", 70);
        assert!(taken_over(&distinct, "laptop")[1].len() <= "search ".len() + MAX_SEARCH);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(content in proptest::collection::vec(any::<u8>(), 0..400)) {
            let text = Text::parse(&content);
            text.taken_over("::1".parse().unwrap(), &scope(), "a.b");
        }
    }
}
