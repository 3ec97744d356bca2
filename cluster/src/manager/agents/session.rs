//! One agent's connection, from its first line to its end.

use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tpd_api::agent::{BEAT, Config, Hello, IDLE_BEAT, IDLE_SILENCE, Report, ToAgent, ToManager};

use super::lines::Lines;
use super::token::Identity;

/// For the first line to come. An agent sends it with its request.
const HELLO: Duration = Duration::from_secs(5);

/// An agent that has said nothing for so long is gone, while an intercept concerns it. It beats four times a second, and one that
/// its CPU limit holds up for a second is not gone; no traffic waits for this, only a status.
const SILENCE: Duration = Duration::from_secs(3);

/// For a few lines to be taken off us. Their socket's buffers hold them, unless the agent has stopped reading.
const SENDING: Duration = Duration::from_secs(10);

/// Pause after each line of an agent: a hundred a second are ten times what it has to say.
const PAUSE: Duration = Duration::from_millis(10);

/// What an agent is to know. Only the newest counts: what a slow one has not been sent yet is never sent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outgoing {
    /// All that concerns it, once that is known.
    pub config: Option<Arc<Config>>,
    /// The laptops that this manager carries, of those in the configuration, in order.
    pub carried: Vec<Ipv6Addr>,
    /// Why the connection ends, and in how many seconds the agent may come back.
    pub refused: Option<(String, u64)>,
}

impl Outgoing {
    fn concerned(&self) -> bool {
        self.config.as_ref().is_some_and(|config| !config.intercepts.is_empty())
    }

    /// The messages that one needs who was told `said`.
    fn news(&self, said: &Self) -> Vec<ToAgent> {
        let mut news = Vec::new();
        if let Some((reason, retry_after)) = &self.refused {
            return vec![ToAgent::Refused { reason: reason.clone(), retry_after: *retry_after }];
        }
        if let Some(config) = self.config.as_ref().filter(|_| self.config != said.config) {
            news.push(ToAgent::Config(Box::new(Config::clone(config))));
        }
        if self.carried != said.carried {
            news.push(ToAgent::Carried { laptops: self.carried.clone() });
        }
        news
    }
}

/// What happens to the agents' connections.
#[derive(Debug)]
pub enum Event {
    /// One has said who it is.
    Joined(Box<Joined>),
    /// One tells how it fares.
    Reported {
        /// UID of its pod.
        uid: String,
        /// Number of its connection.
        connection: u64,
        /// What it says.
        report: Report,
    },
    /// One is gone.
    Left {
        /// UID of its pod.
        uid: String,
        /// Number of its connection.
        connection: u64,
    },
}

/// An agent that has said who it is.
#[derive(Debug)]
pub struct Joined {
    /// Its pod.
    pub identity: Identity,
    /// Number of its connection; later ones have higher ones.
    pub connection: u64,
    /// What it says of itself.
    pub hello: Hello,
    /// What it is to know. The connection ends when this is dropped.
    pub outgoing: watch::Sender<Outgoing>,
}

/// Carries a connection until either side ends it.
///
/// # Errors
/// Fails where the other side does not keep to the protocol, falls silent or does not read.
pub async fn run<S: AsyncRead + AsyncWrite>(
    stream: S,
    identity: Identity,
    connection: u64,
    events: mpsc::Sender<Event>,
) -> anyhow::Result<()> {
    let (read, write) = tokio::io::split(stream);
    let mut lines = Lines::new(read);
    let hello = timeout(HELLO, hello(&mut lines)).await.context("no first line")??;
    let (outgoing, said) = watch::channel(Outgoing::default());
    let uid = identity.uid.clone();
    let joined = Joined { identity, connection, hello, outgoing };
    events.send(Event::Joined(Box::new(joined))).await.context("nobody takes agents")?;
    let result = tokio::select! {
        result = listen(lines, &events, &uid, connection, said.clone()) => result,
        result = speak(write, said) => result,
    };
    events.send(Event::Left { uid, connection }).await.context("nobody takes agents")?;
    result
}

async fn hello<R: AsyncRead + Unpin>(lines: &mut Lines<R>) -> anyhow::Result<Hello> {
    let line = lines.next().await?.context("it ended before its first line")?;
    match serde_json::from_slice(&line).context("the first line")? {
        ToManager::Hello(hello) => Ok(*hello),
        ToManager::Report(_) | ToManager::Beat => bail!("the first line does not say who it is"),
    }
}

/// Hears the agent out. A message of a newer version, which cannot be read, is ignored.
async fn listen<R: AsyncRead + Unpin>(
    mut lines: Lines<R>,
    events: &mpsc::Sender<Event>,
    uid: &str,
    connection: u64,
    mut outgoing: watch::Receiver<Outgoing>,
) -> anyhow::Result<()> {
    let mut heard = Instant::now();
    let mut concerned = None;
    loop {
        let since = outgoing.borrow_and_update().concerned().then(|| concerned.unwrap_or_else(Instant::now));
        concerned = since;
        let deadline = since.map_or(heard + IDLE_SILENCE, |since| since.max(heard) + SILENCE);
        tokio::select! {
            line = lines.next() => {
                let Some(line) = line? else { return Ok(()) };
                if let Ok(ToManager::Report(report)) = serde_json::from_slice(&line) {
                    let event = Event::Reported { uid: uid.to_owned(), connection, report };
                    events.send(event).await.context("nobody takes agents")?;
                }
                sleep(PAUSE).await;
                // While it was us who did not listen, it has not been silent.
                heard = Instant::now();
            }
            Ok(()) = outgoing.changed() => {}
            () = sleep_until(deadline) => bail!("it has fallen silent"),
        }
    }
}

/// Tells the agent what is new, and says so where nothing is.
async fn speak<W: AsyncWrite + Unpin>(
    mut to: W,
    mut outgoing: watch::Receiver<Outgoing>,
) -> anyhow::Result<()> {
    let mut said = Outgoing::default();
    loop {
        let now = outgoing.borrow_and_update().clone();
        let mut news = now.news(&said);
        if news.is_empty() {
            news.push(ToAgent::Beat);
        }
        timeout(SENDING, send(&mut to, &news)).await.context("it does not read")??;
        said = now;
        if said.refused.is_some() {
            return Ok(());
        }
        let beat = if said.concerned() { BEAT } else { IDLE_BEAT };
        if let Ok(Err(_)) = timeout(beat, outgoing.changed()).await {
            return Ok(());
        }
    }
}

async fn send<W: AsyncWrite + Unpin>(to: &mut W, news: &[ToAgent]) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    for message in news {
        serde_json::to_writer(&mut lines, message)?;
        lines.push(b'\n');
    }
    to.write_all(&lines).await?;
    Ok(to.flush().await?)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream, Lines, duplex};
    use tokio::sync::mpsc;
    use tokio::time::{sleep, timeout};
    use tpd_api::agent::{Config, Intercept, Manager, ToAgent};

    use super::{Event, Identity, Joined, SILENCE, run};

    const HELLO: &[u8] =
        b"{\"type\":\"hello\",\"version\":\"1\",\"publicKey\":\"k\",\"entry\":{\"type\":\"redirect\"}}\n";

    fn connection() -> (Lines<BufReader<DuplexStream>>, mpsc::Receiver<Event>) {
        let (agent, manager) = duplex(64 << 10);
        let (events, received) = mpsc::channel(16);
        let identity = Identity { namespace: "shop".into(), pod: "web-1".into(), uid: "u1".into() };
        tokio::spawn(run(manager, identity, 7, events));
        (BufReader::new(agent).lines(), received)
    }

    async fn joined() -> (Lines<BufReader<DuplexStream>>, mpsc::Receiver<Event>, Joined) {
        let (mut agent, mut events) = connection();
        agent.get_mut().get_mut().write_all(HELLO).await.unwrap();
        let Some(Event::Joined(joined)) = events.recv().await else { panic!("nobody joined") };
        (agent, events, *joined)
    }

    async fn told(agent: &mut Lines<BufReader<DuplexStream>>) -> ToAgent {
        let line = timeout(Duration::from_secs(60), agent.next_line()).await.unwrap().unwrap().unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn config(generation: u64, intercepts: Vec<Intercept>) -> Arc<Config> {
        Arc::new(Config {
            generation,
            revision: 1,
            workload: "deployment/web".into(),
            address: "fd74::8000".parse().unwrap(),
            manager: Manager {
                key: "k".into(),
                gateway: "fd74::1".parse().unwrap(),
                udp: "10.0.0.1:1".parse().unwrap(),
                stream: "10.0.0.1:2".parse().unwrap(),
            },
            replicas: vec![],
            services: vec![],
            intercepts,
        })
    }

    fn intercept() -> Intercept {
        Intercept {
            uid: "i".into(),
            name: "i".into(),
            generation: 1,
            laptop: "fd74::2".parse().unwrap(),
            ports: vec![],
            filter: tpd_api::filter::Filter::default(),
            mode: tpd_api::agent::Mode::Intercept,
            proxy_protocol: false,
            environment: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_is_told_the_newest_and_no_more() {
        let (mut agent, _events, joined) = joined().await;
        assert_eq!(joined.identity.uid, "u1");
        assert_eq!(told(&mut agent).await, ToAgent::Beat);
        for generation in 1..=3 {
            joined.outgoing.send_modify(|outgoing| outgoing.config = Some(config(generation, vec![])));
        }
        joined.outgoing.send_modify(|outgoing| outgoing.carried = vec!["fd74::2".parse().unwrap()]);
        let ToAgent::Config(config) = told(&mut agent).await else { panic!("no configuration") };
        assert_eq!(config.generation, 3);
        assert_eq!(told(&mut agent).await, ToAgent::Carried { laptops: vec!["fd74::2".parse().unwrap()] });
        assert_eq!(told(&mut agent).await, ToAgent::Beat, "the idle beat");
    }

    #[tokio::test(start_paused = true)]
    async fn reports_are_passed_on_and_what_is_not_understood_is_ignored() {
        let (mut agent, mut events, _joined) = joined().await;
        let stream = agent.get_mut().get_mut();
        stream.write_all(b"{\"type\":\"news\"}\ngarbage\n").await.unwrap();
        let report = b"{\"type\":\"report\",\"generation\":4,\"intercepts\":[]}\n";
        stream.write_all(report).await.unwrap();
        let Some(Event::Reported { report, connection: 7, .. }) = events.recv().await else { panic!() };
        assert_eq!(report.generation, 4);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_agent_is_gone_sooner_while_an_intercept_concerns_it() {
        let (_agent, mut events, joined) = joined().await;
        sleep(Duration::from_secs(35)).await;
        joined.outgoing.send_modify(|outgoing| outgoing.config = Some(config(1, vec![intercept()])));
        let before = tokio::time::Instant::now();
        assert!(matches!(events.recv().await, Some(Event::Left { connection: 7, .. })));
        let silent = before.elapsed();
        assert!((2..=4).contains(&silent.as_secs()), "{silent:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_was_not_listened_to_has_not_been_silent() {
        let (mut agent, mut events, joined) = joined().await;
        joined.outgoing.send_modify(|outgoing| outgoing.config = Some(config(1, vec![intercept()])));
        let stream = agent.get_mut().get_mut();
        for _ in 0..40 {
            stream.write_all(b"{\"type\":\"report\",\"generation\":1,\"intercepts\":[]}\n").await.unwrap();
        }
        for _ in 0..40 {
            // The control loop is busy for longer than an agent may be silent.
            sleep(2 * SILENCE).await;
            assert!(matches!(events.recv().await, Some(Event::Reported { .. })));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_replaced_session_ends() {
        let (mut agent, mut events, joined) = joined().await;
        drop(joined);
        assert!(matches!(events.recv().await, Some(Event::Left { .. })));
        while let Some(line) = agent.next_line().await.unwrap() {
            assert_eq!(line, r#"{"type":"beat"}"#);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_the_last_line() {
        let (mut agent, _events, joined) = joined().await;
        assert_eq!(told(&mut agent).await, ToAgent::Beat);
        joined.outgoing.send_modify(|outgoing| outgoing.refused = Some(("why".into(), 60)));
        assert!(matches!(told(&mut agent).await, ToAgent::Refused { retry_after: 60, .. }));
        assert_eq!(agent.next_line().await.unwrap(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_say_who_it_is_joins_nothing() {
        for first in [&b"garbage\n"[..], b"{\"type\":\"beat\"}\n", b"", b"{\"type\":\"hello\"}\n"] {
            let (mut agent, mut events) = connection();
            agent.get_mut().get_mut().write_all(first).await.unwrap();
            assert!(events.recv().await.is_none(), "{first:?}");
        }
    }
}
