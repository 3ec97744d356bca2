//! A name server that plays the cluster's or the internet's, on loopback, with as much misbehaviour as a test wants.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::A},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    time::timeout,
};

/// Makes the reply to a question; `None` is silence. The flag says that it came over TCP.
pub(crate) type Answers = dyn Fn(&Message, bool) -> Option<Message> + Send + Sync;

/// A running server. Ends with the test's runtime.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub(crate) async fn start(
        answers: impl Fn(&Message, bool) -> Option<Message> + Send + Sync + 'static,
    ) -> Self {
        Self::start_at(fresh_address(), answers).await
    }

    pub(crate) async fn start_at(
        address: SocketAddr,
        answers: impl Fn(&Message, bool) -> Option<Message> + Send + Sync + 'static,
    ) -> Self {
        let answers: Arc<Answers> = Arc::new(answers);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let udp = UdpSocket::bind(address).await.unwrap();
        let address = udp.local_addr().unwrap();
        let tcp = TcpListener::bind(address).await.unwrap();
        tokio::spawn(serve_tcp(tcp, Arc::clone(&answers), Arc::clone(&seen)));
        tokio::spawn(serve_udp(udp, answers, Arc::clone(&seen)));
        Self { address, seen }
    }

    /// The questions so far, as `name TYPE`, with `tcp` before those that came that way.
    pub(crate) fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

/// A loopback address that no other test uses, so that a port which UDP gave is free for TCP too.
pub(crate) fn fresh_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let process = std::process::id() as u8;
    let [_, _, high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    (Ipv4Addr::new(127, process | 1, high, low), 0).into()
}

fn note(question: &Message, tcp: bool) -> String {
    let asked = &question.queries[0];
    format!(
        "{}{} {}",
        if tcp { "tcp " } else { "" },
        asked.name().to_ascii().trim_end_matches('.'),
        asked.query_type()
    )
}

async fn serve_udp(socket: UdpSocket, answers: Arc<Answers>, seen: Arc<Mutex<Vec<String>>>) {
    let mut buffer = [0; 4096];
    while let Ok((length, asker)) = socket.recv_from(&mut buffer).await {
        let question = Message::from_vec(&buffer[..length]).unwrap();
        seen.lock().unwrap().push(note(&question, false));
        if let Some(reply) = answers(&question, false) {
            socket.send_to(&reply.to_vec().unwrap(), asker).await.unwrap();
        }
    }
}

async fn serve_tcp(listener: TcpListener, answers: Arc<Answers>, seen: Arc<Mutex<Vec<String>>>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let (answers, seen) = (Arc::clone(&answers), Arc::clone(&seen));
        tokio::spawn(async move {
            while let Ok(question) = read(&mut stream).await {
                let question = Message::from_vec(&question).unwrap();
                seen.lock().unwrap().push(note(&question, true));
                if let Some(reply) = answers(&question, true) {
                    write(&mut stream, &reply.to_vec().unwrap()).await;
                }
            }
        });
    }
}

pub(crate) async fn read(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

pub(crate) async fn write(stream: &mut TcpStream, message: &[u8]) {
    stream.write_u16(message.len() as u16).await.unwrap();
    stream.write_all(message).await.unwrap();
}

pub(crate) fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

/// A question as a stub resolver sends it.
pub(crate) fn question(text: &str, kind: RecordType) -> Message {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(text), kind));
    message
}

/// The reply to `question` with `code` and `data`, all under the name asked for.
pub(crate) fn reply(
    question: &Message,
    code: ResponseCode,
    data: impl IntoIterator<Item = RData>,
) -> Message {
    let mut reply = Message::new(question.metadata.id, MessageType::Response, OpCode::Query);
    reply.metadata.response_code = code;
    reply.metadata.recursion_available = true;
    let asked = question.queries[0].clone();
    reply.add_answers(data.into_iter().map(|data| Record::from_rdata(asked.name().clone(), 30, data)));
    reply.add_query(asked);
    reply
}

pub(crate) fn address(text: &str) -> RData {
    RData::A(A(text.parse::<Ipv4Addr>().unwrap()))
}

/// Sends `packet` to `server` over UDP; the reply, if one comes within 6 seconds.
pub(crate) async fn send(server: SocketAddr, packet: &[u8]) -> Option<Vec<u8>> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server).await.unwrap();
    socket.send(packet).await.unwrap();
    let mut buffer = [0; 65_535];
    let length = timeout(Duration::from_secs(6), socket.recv(&mut buffer)).await.ok()?.unwrap();
    Some(buffer[..length].to_vec())
}

/// The reply to (`text`, `kind`) from `server` over UDP.
pub(crate) async fn ask(server: SocketAddr, text: &str, kind: RecordType) -> Message {
    let reply = send(server, &question(text, kind).to_vec().unwrap()).await.expect("a reply");
    Message::from_vec(&reply).unwrap()
}

/// The same over TCP.
pub(crate) async fn ask_tcp(server: SocketAddr, text: &str, kind: RecordType) -> Message {
    let mut stream = TcpStream::connect(server).await.unwrap();
    write(&mut stream, &question(text, kind).to_vec().unwrap()).await;
    Message::from_vec(&read(&mut stream).await.unwrap()).unwrap()
}
