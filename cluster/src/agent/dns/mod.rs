//! A resolver for laptops that answers as the pod itself would be answered: by its /etc/hosts, its search domains and its name
//! servers. It listens on the pod's loopback; port 53 of the agent's overlay address leads there.

mod answer;
mod files;
mod upstream;

use std::fs::File;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use hickory_proto::op::{Message, ResponseCode};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};
use tpd_api::inject::DNS_PORT;
use tracing::debug;

use self::answer::{Asked, about, aliased, by_hosts, is_final, reply};
use self::files::{Hosts, Resolver};

/// Questions in work at a time. A laptop's resolver has a few on the way; more are dropped, and asked again.
const QUESTIONS: usize = 64;

/// TCP connections at a time.
const CONNECTIONS: usize = 16;

/// For the next question on a TCP connection (RFC 7766, 6.2.3: seconds).
const IDLE: Duration = Duration::from_secs(5);

/// Longest question over UDP, bytes. More than any resolver sends.
const MAX_QUESTION: usize = 4096;

/// Largest file that is read, bytes.
const MAX_FILE: u64 = 256 << 10;

/// Pause after a failed call on a listening socket.
const PAUSE: Duration = Duration::from_millis(50);

/// Where the resolver is reached.
pub const ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), DNS_PORT);

/// Files that tell how the pod resolves names. The kubelet may rewrite them, so each question reads them.
#[derive(Clone, Debug)]
pub struct Files {
    /// hosts(5).
    pub hosts: PathBuf,
    /// resolv.conf(5).
    pub resolver: PathBuf,
}

impl Default for Files {
    fn default() -> Self {
        Self { hosts: "/etc/hosts".into(), resolver: "/etc/resolv.conf".into() }
    }
}

/// Serves until dropped.
///
/// # Errors
/// Fails where the port is taken.
pub async fn serve(address: SocketAddr, files: Files) -> anyhow::Result<()> {
    let datagrams = UdpSocket::bind(address).await.with_context(|| format!("listen on UDP {address}"))?;
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on TCP {address}"))?;
    let server = Server { files: Rc::new(files), questions: Arc::new(Semaphore::new(QUESTIONS)) };
    tokio::join!(server.datagrams(Rc::new(datagrams)), server.connections(listener));
    Ok(())
}

#[derive(Clone)]
struct Server {
    files: Rc<Files>,
    questions: Arc<Semaphore>,
}

impl Server {
    async fn datagrams(&self, socket: Rc<UdpSocket>) {
        let mut buffer = [0; MAX_QUESTION];
        loop {
            let Ok((length, asker)) = socket.recv_from(&mut buffer).await else {
                sleep(PAUSE).await;
                continue;
            };
            let Ok(place) = Arc::clone(&self.questions).try_acquire_owned() else { continue };
            let (question, server, socket) = (buffer[..length].to_vec(), self.clone(), Rc::clone(&socket));
            spawn_local(async move {
                let answer = server.answer(&question, place).await;
                if let Some(answer) = answer.and_then(|answer| answer::over_udp(&question, answer)) {
                    // The asker may be gone; it does not matter.
                    let _ = socket.send_to(&answer, asker).await;
                }
            });
        }
    }

    async fn connections(&self, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                sleep(PAUSE).await;
                continue;
            };
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
            let server = self.clone();
            spawn_local(async move {
                if let Err(error) = server.connection(stream).await {
                    debug!(%error, "dns over tcp");
                }
                drop(place);
            });
        }
    }

    /// Answers one question after another.
    async fn connection<S>(&self, mut stream: S) -> std::io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        loop {
            let Ok(length) = timeout(IDLE, stream.read_u16()).await else { return Ok(()) };
            let mut question = vec![0; length?.into()];
            if timeout(IDLE, stream.read_exact(&mut question)).await.is_err() {
                return Ok(());
            }
            let Ok(place) = Arc::clone(&self.questions).acquire_owned().await else { return Ok(()) };
            let Some(answer) = self.answer(&question, place).await else { return Ok(()) };
            // One who does not read has the place that others wait for.
            let Ok(written) = timeout(IDLE, stream.write_all(&upstream::framed(&answer))).await else {
                return Ok(());
            };
            written?;
        }
    }

    /// The octets of the answer; `None` where there is nothing to say.
    async fn answer(&self, packet: &[u8], place: OwnedSemaphorePermit) -> Option<Vec<u8>> {
        let answer = match answer::read(packet)? {
            Asked::Question(question) => self.resolve(&question).await,
            Asked::Other(refusal) => refusal,
        };
        drop(place);
        answer.to_vec().ok()
    }

    async fn resolve(&self, question: &Message) -> Message {
        if let Some(answer) = by_hosts(question, &Hosts::parse(&read(&self.files.hosts))) {
            return answer;
        }
        let resolver = Resolver::parse(&read(&self.files.resolver));
        search(&resolver, question).await
    }
}

/// Looks for the name in every place where a program of the pod would. Where it is nowhere, what was said to the name as it was
/// asked counts.
async fn search(resolver: &Resolver, question: &Message) -> Message {
    let name = question.queries.first().map(|query| query.name().clone()).unwrap_or_default();
    let mut as_asked = None;
    for candidate in resolver.candidates(&name) {
        match upstream::ask(resolver, &about(question, &candidate)).await {
            Ok(found) if is_final(&found) => return aliased(question, found),
            Ok(nothing) if candidate == name => as_asked = Some(nothing),
            Ok(_) => {}
            Err(error) => {
                debug!(%error, "a question to the pod's name servers");
                break;
            }
        }
    }
    as_asked.unwrap_or_else(|| reply(question, ResponseCode::ServFail))
}

/// A small file's text; nothing where it cannot be read. It is in memory, so nobody waits for it.
fn read(path: &Path) -> String {
    let mut text = String::new();
    if let Ok(file) = File::open(path) {
        // What is there up to a failure is used.
        let _ = file.take(MAX_FILE).read_to_string(&mut text);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};
    use std::rc::Rc;
    use std::sync::Arc;

    use hickory_proto::op::{Message, Query, ResponseCode};
    use hickory_proto::rr::rdata::A;
    use hickory_proto::rr::{Name, RData, Record, RecordType};
    use tokio::io::{AsyncWriteExt as _, duplex};
    use tokio::net::UdpSocket;
    use tokio::sync::Semaphore;
    use tokio::time::timeout;

    use super::answer::reply;
    use super::files::Resolver;
    use super::{Files, IDLE, QUESTIONS, Server, search, upstream};

    /// A name server that knows one name, and the questions that it was asked.
    async fn name_server(known: &str) -> SocketAddr {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let (address, known) = (socket.local_addr().unwrap(), Name::from_ascii(known).unwrap());
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            while let Ok((length, asker)) = socket.recv_from(&mut buffer).await {
                let question = Message::from_vec(&buffer[..length]).unwrap();
                let answer = if *question.queries[0].name() == known {
                    let mut answer = reply(&question, ResponseCode::NoError);
                    let data = RData::A(A(Ipv4Addr::new(10, 0, 0, 1)));
                    answer.add_answer(Record::from_rdata(known.clone(), 5, data));
                    answer
                } else {
                    reply(&question, ResponseCode::NXDomain)
                };
                // Another's answer comes first, and is not taken for one.
                let mut stray = answer.clone();
                stray.metadata.id ^= 1;
                socket.send_to(&stray.to_vec().unwrap(), asker).await.unwrap();
                socket.send_to(&answer.to_vec().unwrap(), asker).await.unwrap();
            }
        });
        address
    }

    fn question(name: &str) -> Message {
        let mut question = Message::query();
        question.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        question
    }

    async fn resolver(known: &str) -> Resolver {
        let mut resolver = Resolver::parse("search shop.svc svc\noptions ndots:5\n");
        resolver.servers = vec![name_server(known).await];
        resolver
    }

    #[tokio::test]
    async fn names_are_searched_for_as_the_pod_does() {
        let resolver = resolver("db.svc.").await;
        let answer = search(&resolver, &question("db.")).await;
        assert_eq!(answer.queries[0].name().to_ascii(), "db.");
        let data: Vec<_> = answer.answers.iter().map(|record| record.data.to_string()).collect();
        assert_eq!(data, ["db.svc.", "10.0.0.1"]);
        let answer = search(&resolver, &question("db.svc.")).await;
        assert_eq!(answer.answers.len(), 1, "no alias");
        let answer = search(&resolver, &question("other.")).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    }

    #[tokio::test]
    async fn a_pod_without_a_server_that_answers_fails_to_resolve() {
        let answer = search(&Resolver::parse(""), &question("db.")).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
        let mut silent = Resolver::parse("options attempts:1");
        silent.timeout = std::time::Duration::from_millis(20);
        silent.servers = vec![UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()];
        let answer = search(&silent, &question("db.")).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_read_loses_its_place() {
        let files = Files { hosts: "/nonexistent".into(), resolver: "/nonexistent".into() };
        let server = Server { files: Rc::new(files), questions: Arc::new(Semaphore::new(QUESTIONS)) };
        let (mut asker, stream) = duplex(16);
        let asked = upstream::framed(&question("db.").to_vec().unwrap());
        let (ended, written) =
            tokio::join!(timeout(2 * IDLE, server.connection(stream)), asker.write_all(&asked));
        written.unwrap();
        ended.expect("nobody waits for it").unwrap();
    }
}
