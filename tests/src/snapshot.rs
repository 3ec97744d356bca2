//! What `tpd up` may change on a laptop and `tpd down` must put back.

use std::collections::BTreeMap;

use crate::Laptop;

/// Each thing is a script whose output must come out the same, byte for byte.
const THINGS: &[(&str, &str)] = &[
    ("devices", "ip -brief link | awk '{ print $1, $3 }'"),
    ("addresses", "ip -brief address"),
    ("IPv4 routes", "ip -4 route show table all"),
    ("IPv6 routes", "ip -6 route show table all"),
    ("IPv4 rules", "ip -4 rule"),
    ("IPv6 rules", "ip -6 rule"),
    ("resolv.conf", "ls -l --time-style=+ /etc/resolv.conf; cat /etc/resolv.conf"),
    ("files beside resolv.conf", "ls -a /etc | grep -i resolv"),
    ("hosts and name service", "cat /etc/hosts /etc/nsswitch.conf"),
    (
        "systemd-resolved",
        "if [ -S /run/systemd/resolve/io.systemd.Resolve ]; then resolvectl dns; resolvectl domain; resolvectl default-route; fi",
    ),
    ("firewall", "nft list ruleset"),
];

/// The state of a laptop's network at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<&'static str, String>);

impl Snapshot {
    /// Looks at everything.
    #[must_use]
    pub fn of(laptop: &Laptop) -> Self {
        let script: String = THINGS.iter().map(|(_, script)| format!("{script}\necho '<next>'\n")).collect();
        let run = laptop.run(&script);
        let texts = run.stdout.split("<next>\n");
        Self(THINGS.iter().map(|(name, _)| *name).zip(texts.map(str::to_owned)).collect())
    }

    /// What differs, as something to read; nothing if all is the same.
    ///
    /// # Errors
    /// Each thing that differs, before and after.
    pub fn same_as(&self, after: &Self) -> Result<(), String> {
        let mut differences = String::new();
        for (name, before) in &self.0 {
            let now = &after.0[name];
            if before != now {
                differences += &format!("{name} were\n{before}and are now\n{now}");
            }
        }
        if differences.is_empty() { Ok(()) } else { Err(differences) }
    }
}
