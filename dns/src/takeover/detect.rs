//! Is systemd-resolved what programs resolve names with? That it runs doesn't say so.

use std::{fs, path::Path, time::Duration};

use tokio::time::timeout;
use zbus::{Connection, connection::Builder, fdo::PeerProxy};

use super::{
    Files,
    resolv_conf::text::Text,
    resolved::{PATH, SERVICE},
};

/// Where resolved's stub listens: all of its features, or just forwarding.
const STUBS: [&str; 2] = ["127.0.0.53", "127.0.0.54"];
/// resolved is started by the bus when it is asked for the first time.
const START: Duration = Duration::from_secs(2);

/// Time for any later call: resolved answers within milliseconds, and a command must not hang with it.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection to resolved if it is in use and answers.
pub(super) async fn resolved_in_use(files: &Files) -> Option<Connection> {
    if !(asks_stub(&files.resolv_conf) || asks_nss(files)) {
        return None;
    }
    match timeout(START, connect()).await {
        Ok(Ok(connection)) => Some(connection),
        Ok(Err(error)) => {
            tracing::info!(%error, "systemd-resolved is configured but cannot be reached; using resolv.conf");
            None
        }
        Err(_) => {
            tracing::info!("systemd-resolved is configured but does not answer; using resolv.conf");
            None
        }
    }
}

async fn connect() -> zbus::Result<Connection> {
    let connection = Builder::system().method_timeout(PATIENCE).build().await?;
    PeerProxy::builder(&connection).destination(SERVICE).path(PATH).build().await?.ping().await?;
    Ok(connection)
}

fn asks_stub(resolv_conf: &Path) -> bool {
    let servers = fs::read(resolv_conf).map(|content| Text::parse(&content).servers).unwrap_or_default();
    servers.iter().any(|server| STUBS.contains(&server.ip().to_string().as_str()))
}

/// Does glibc ask resolved, and resolved other servers than those in resolv.conf? A resolv.conf of somebody else's is where resolved too has
/// its servers from, so changing that one file is enough and reaches the programs that don't use glibc as well.
fn asks_nss(files: &Files) -> bool {
    let nsswitch = fs::read_to_string(&files.nsswitch).unwrap_or_default();
    let own = fs::canonicalize(&files.resolv_conf).is_ok_and(|path| path.starts_with("/run/systemd/resolve"));
    own && resolves_before_dns(&nsswitch)
}

fn resolves_before_dns(nsswitch: &str) -> bool {
    let hosts = nsswitch.lines().filter_map(|line| line.trim().strip_prefix("hosts:")).next();
    let mut services = hosts.unwrap_or_default().split_whitespace();
    services.find(|service| matches!(*service, "resolve" | "dns")) == Some("resolve")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_in_nsswitch_decides() {
        for (text, expected) in [
            ("hosts: files resolve [!UNAVAIL=return] dns", true),
            ("passwd: files\nhosts:\tmymachines resolve [!UNAVAIL=return] files myhostname dns\n", true),
            ("hosts: files dns", false),
            ("hosts: files dns resolve", false),
            ("# hosts: resolve\nhosts: files", false),
            ("", false),
        ] {
            assert_eq!(resolves_before_dns(text), expected, "{text:?}");
        }
    }
}
