//! Whether anything listens at a local port.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use futures::future::join_all;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tpd_api::intercept::Protocol;
use tpd_api::local::LocalPort;

/// How often local ports are looked at: as often as a person looks.
pub(crate) const INTERVAL: Duration = Duration::from_secs(2);

/// Time for a local connection, as long as an agent waits for one: what takes longer gets no traffic.
const LIMIT: Duration = Duration::from_millis(500);

/// The addresses among `ports` where nothing accepts a connection. Of UDP it cannot be told.
pub(crate) async fn silent(ports: impl IntoIterator<Item = &LocalPort>) -> BTreeSet<SocketAddr> {
    let ports = ports.into_iter().filter(|port| port.protocol == Protocol::Tcp);
    let addresses: BTreeSet<SocketAddr> = ports.map(|port| port.local).collect();
    let looked = addresses.into_iter().map(|address| async move {
        let answered = timeout(LIMIT, TcpStream::connect(address)).await;
        (!matches!(answered, Ok(Ok(_)))).then_some(address)
    });
    join_all(looked).await.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_without_a_listener_is_silent_and_udp_never_is() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let open = listener.local_addr().unwrap();
        let closed = {
            let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            other.local_addr().unwrap()
        };
        let port = |local, protocol| LocalPort { local, port: None, protocol };
        let ports = [
            port(open, Protocol::Tcp),
            port(closed, Protocol::Tcp),
            port("127.0.0.1:9".parse().unwrap(), Protocol::Udp),
        ];
        assert_eq!(silent(&ports).await, BTreeSet::from([closed]));
    }
}
