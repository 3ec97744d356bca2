//! Through the API server's port-forward: a WebSocket, and in it the manager's stream port.
//!
//! As `kubectl` does it, the WebSocket carries SPDY where the API server knows how to tunnel that (Kubernetes 1.31), and
//! the older channels elsewhere. kube's own port-forward speaks only the latter, 4 KiB a message.

use std::future::Future;
use std::pin::Pin;

use tpd_api::session::Endpoint;

use super::channels::{self, Channels};
use super::tunnel::{self, Tunnel};
use super::{Refusal, Replicas, upgrade, websocket};
use crate::overlay::{BoxStream, DialError, PathKind, StreamDialer};

/// Dials the manager's replicas through port-forward.
#[derive(Debug)]
pub(crate) struct Forward(pub(crate) Replicas);

impl StreamDialer for Forward {
    fn kind(&self) -> PathKind {
        PathKind::Forward
    }

    fn target(&self) -> String {
        self.0.target()
    }

    fn dial(&self) -> Pin<Box<dyn Future<Output = Result<BoxStream, DialError>> + Send + '_>> {
        Box::pin(self.0.first(move |endpoint| self.connect(endpoint)))
    }
}

impl Forward {
    async fn connect(&self, endpoint: Endpoint) -> Result<BoxStream, Refusal> {
        let client = self.0.cluster.stream_client().await?;
        let path = format!(
            "/api/v1/namespaces/{}/pods/{}/portforward?ports={}",
            self.0.namespace, endpoint.pod, endpoint.port
        );
        let socket = match websocket::open(&client, &path, &[tunnel::NAME, channels::NAME]).await {
            // Whoever on the way knows of channels only may not pass over what it does not know.
            Err(Refusal { status: Some(400 | 403), .. }) => {
                websocket::open(&client, &path, &[channels::NAME]).await?
            }
            answer => answer?,
        };
        if socket.protocol == tunnel::NAME {
            upgrade::over(socket.speak(Tunnel::new(endpoint.port)).await).await
        } else {
            upgrade::over(socket.speak(Channels::default()).await).await
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::{SinkExt as _, StreamExt as _};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_tungstenite::WebSocketStream;
    use tokio_tungstenite::tungstenite::Message;
    use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
    use tokio_tungstenite::tungstenite::protocol::Role;

    use super::*;
    use crate::invoker::Invoker;
    use crate::kube::{cluster::Cluster, config::Target};

    /// The manager's answer to the request for a stream, and the stream's first bytes.
    const STREAM: &[u8] =
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tpd\r\n\r\nhello";

    async fn api_server() -> (TcpListener, Forward) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = Target::example(&format!("http://{}", listener.local_addr().unwrap()));
        let invoker = Invoker { uid: 0, gid: 0, environment: [].into(), directory: "/".into() };
        let endpoint = Endpoint { pod: "manager".into(), port: 8443, udp: Vec::new() };
        let cluster = Arc::new(Cluster::new(target, &invoker));
        (listener, Forward(Replicas::new(cluster, "tpd-system", vec![endpoint])))
    }

    /// A connection, the protocols that it offers, and its key.
    async fn asked(listener: &TcpListener) -> (TcpStream, String, String) {
        let (mut connection, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(connection.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        let header = |name: &str| {
            let line = head.lines().find_map(|line| line.split_once(": ").filter(|(key, _)| *key == name));
            line.unwrap_or_else(|| panic!("no {name} in {head}")).1.to_owned()
        };
        (connection, header("sec-websocket-protocol"), header("sec-websocket-key"))
    }

    async fn switch(mut connection: TcpStream, key: &str, protocol: &str) -> WebSocketStream<TcpStream> {
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Accept: {}\r\nSec-WebSocket-Protocol: {protocol}\r\n\r\n",
            derive_accept_key(key.as_bytes())
        );
        connection.write_all(answer.as_bytes()).await.unwrap();
        WebSocketStream::from_raw_socket(connection, Role::Server, None).await
    }

    async fn says_hello(forward: &Forward) {
        let mut stream = forward.dial().await.unwrap();
        let mut text = [0; 5];
        stream.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"hello");
    }

    #[tokio::test]
    async fn spdy_is_spoken_where_it_is_tunnelled() {
        let (listener, forward) = api_server().await;
        let serve = async {
            let (connection, protocols, key) = asked(&listener).await;
            assert_eq!(protocols, "SPDY/3.1+portforward.k8s.io, v4.channel.k8s.io");
            let mut socket = switch(connection, &key, tunnel::NAME).await;
            let first = socket.next().await.unwrap().unwrap().into_data();
            assert_eq!(first[..8], [0x80, 3, 0, 1, 1, 0, 0, 83], "the error's stream is opened first");
            for part in [&[0, 0, 0, 3], &(STREAM.len() as u32).to_be_bytes(), STREAM] {
                socket.send(Message::binary(part.to_vec())).await.unwrap();
            }
            socket
        };
        tokio::join!(serve, says_hello(&forward));
    }

    #[tokio::test]
    async fn channels_are_spoken_where_the_tunnel_is_refused() {
        let (listener, forward) = api_server().await;
        let serve = async {
            let (mut connection, _, _) = asked(&listener).await;
            let refusal = "HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
            connection.write_all(refusal.as_bytes()).await.unwrap();
            let (connection, protocols, key) = asked(&listener).await;
            assert_eq!(protocols, channels::NAME);
            let mut socket = switch(connection, &key, channels::NAME).await;
            let first = socket.next().await.unwrap().unwrap().into_data();
            assert!(first.starts_with(b"\0GET /v1/stream"), "{first:?}");
            for message in [&[0, 0xfb, 0x20], &[1, 0xfb, 0x20], &[b"\0", STREAM].concat()[..]] {
                socket.send(Message::binary(message.to_vec())).await.unwrap();
            }
            socket
        };
        tokio::join!(serve, says_hello(&forward));
    }
}
