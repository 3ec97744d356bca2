//! One connection to a manager: lines both ways, until either side has nothing more to say.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, WriteHalf};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::codec::{FramedRead, LinesCodec, LinesCodecError};
use tpd_api::agent::{BEAT, Hello, IDLE_BEAT, IDLE_SILENCE, MAX_LINE, SILENCE, ToAgent, ToManager};

use super::{Event, Standing, What};
use crate::agent::parting::Loss;

/// Least time between two reports.
const REPORT_PERIOD: Duration = Duration::from_secs(1);

/// How a connection ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// The manager closed it.
    Closed,
    /// It has said nothing for too long.
    Silent,
    /// It ended it for this reason.
    Refused(String),
    /// It failed.
    Failed(io::Error),
    /// What came was no line.
    Garbage(LinesCodecError),
}

impl Ended {
    pub(super) fn loss(&self) -> Loss {
        match self {
            Self::Silent => Loss::Silent,
            Self::Failed(error) if error.kind() == io::ErrorKind::TimedOut => Loss::Silent,
            Self::Closed | Self::Refused(_) | Self::Failed(_) | Self::Garbage(_) => Loss::Closed,
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed"),
            Self::Silent => f.write_str("silent for too long"),
            Self::Refused(reason) => f.write_str(reason),
            Self::Failed(error) => write!(f, "{error}"),
            Self::Garbage(error) => write!(f, "{error}"),
        }
    }
}

/// What a manager is to hear.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) greeting: Hello,
    pub(super) standing: watch::Receiver<Standing>,
}

/// What both directions know of the connection.
#[derive(Debug, Default)]
struct Shared {
    /// Whether an intercept concerns the agent, so that both sides say something often.
    busy: AtomicBool,
    changed: Notify,
}

/// Talks until the connection ends; how it did, and for how long the manager wants to be left alone.
pub(super) async fn run(
    stream: impl AsyncRead + AsyncWrite,
    outgoing: Outgoing,
    manager: SocketAddr,
    events: &mpsc::Sender<Event>,
) -> (Ended, Option<Duration>) {
    let (reader, writer) = tokio::io::split(stream);
    let shared = Shared::default();
    tokio::select! {
        ended = listen(reader, manager, events, &shared) => ended,
        Err(error) = speak(writer, manager, outgoing, &shared) => (Ended::Failed(error), None),
    }
}

async fn listen(
    reader: impl AsyncRead + Unpin,
    manager: SocketAddr,
    events: &mpsc::Sender<Event>,
    shared: &Shared,
) -> (Ended, Option<Duration>) {
    let mut lines = FramedRead::new(reader, LinesCodec::new_with_max_length(MAX_LINE));
    loop {
        let patience = if shared.busy.load(Ordering::Relaxed) { SILENCE } else { IDLE_SILENCE };
        let line = match timeout(patience, lines.next()).await {
            Err(_) => return (Ended::Silent, None),
            Ok(None) => return (Ended::Closed, None),
            Ok(Some(Err(LinesCodecError::Io(error)))) => return (Ended::Failed(error), None),
            Ok(Some(Err(error))) => return (Ended::Garbage(error), None),
            Ok(Some(Ok(line))) => line,
        };
        // Messages of a newer manager are not understood, and not minded.
        let Ok(message) = serde_json::from_str(&line) else { continue };
        match message {
            ToAgent::Beat => continue,
            ToAgent::Refused { reason, retry_after } => {
                return (Ended::Refused(reason), Some(Duration::from_secs(retry_after)));
            }
            ToAgent::Config(ref config) => {
                shared.busy.store(!config.intercepts.is_empty(), Ordering::Relaxed);
                shared.changed.notify_one();
            }
            ToAgent::Carried { .. } => {}
        }
        if events.send(Event { manager, what: What::Said(message) }).await.is_err() {
            return (Ended::Closed, None);
        }
    }
}

/// Sends the greeting, reports as they change, and beats in between. Ends only with an error.
async fn speak(
    mut writer: WriteHalf<impl AsyncRead + AsyncWrite>,
    manager: SocketAddr,
    outgoing: Outgoing,
    shared: &Shared,
) -> io::Result<()> {
    let Outgoing { greeting, mut standing } = outgoing;
    send(&mut writer, &ToManager::Hello(Box::new(greeting))).await?;
    let (mut spoken, mut report_at, mut reported) = (Instant::now(), Instant::now(), None);
    loop {
        let beat_at = spoken + if shared.busy.load(Ordering::Relaxed) { BEAT } else { IDLE_BEAT };
        let report = standing.borrow_and_update().report(manager);
        let news = report != reported;
        let next = if news { beat_at.min(report_at) } else { beat_at };
        if Instant::now() < next {
            tokio::select! {
                () = sleep_until(next) => {}
                Ok(()) = standing.changed() => {}
                () = shared.changed.notified() => {}
            }
            continue;
        }
        spoken = Instant::now();
        match report {
            Some(report) if news && spoken >= report_at => {
                send(&mut writer, &ToManager::Report(report.clone())).await?;
                (report_at, reported) = (spoken + REPORT_PERIOD, Some(report));
            }
            _ => send(&mut writer, &ToManager::Beat).await?,
        }
    }
}

async fn send(writer: &mut (impl AsyncWrite + Unpin), message: &ToManager) -> io::Result<()> {
    let mut line = serde_json::to_vec(message).map_err(io::Error::other)?;
    line.push(b'\n');
    timeout(IDLE_SILENCE, async {
        writer.write_all(&line).await?;
        writer.flush().await
    })
    .await
    .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::SocketAddr;
    use std::time::Duration;

    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream, Lines, duplex};
    use tokio::sync::{mpsc, watch};
    use tokio::task::JoinHandle;
    use tokio::time::{Instant, sleep, timeout};
    use tpd_api::agent::{Config, Entry, Hello, Intercept, InterceptReport, ToAgent, ToManager};

    use super::{Ended, Outgoing, run};
    use crate::agent::control::{Event, Standing, What};
    use crate::agent::merge::tests::{config, intercept};

    const MANAGER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8443);

    struct Pair {
        manager: Lines<BufReader<DuplexStream>>,
        events: mpsc::Receiver<Event>,
        standing: watch::Sender<Standing>,
        session: JoinHandle<(Ended, Option<Duration>)>,
    }

    impl Pair {
        fn new() -> Self {
            let (manager, agent) = duplex(64 << 10);
            let (sender, events) = mpsc::channel(8);
            let (standing, receiver) = watch::channel(Standing::default());
            let greeting = Hello { version: "1".into(), public_key: "k".into(), entry: Entry::Redirect };
            let outgoing = Outgoing { greeting, standing: receiver };
            let session = tokio::spawn(async move { run(agent, outgoing, MANAGER, &sender).await });
            Self { manager: BufReader::new(manager).lines(), events, standing, session }
        }

        async fn heard(&mut self) -> ToManager {
            let line = timeout(Duration::from_secs(60), self.manager.next_line()).await.unwrap();
            serde_json::from_str(&line.unwrap().unwrap()).unwrap()
        }

        async fn says(&mut self, line: &str) {
            let stream = self.manager.get_mut().get_mut();
            stream.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        }

        async fn configures(&mut self, intercepts: Vec<Intercept>) -> Config {
            let config = Config { intercepts, ..config(1, "10.0.0.1:8443", &[]) };
            self.says(&serde_json::to_string(&ToAgent::Config(Box::new(config))).unwrap()).await;
            match self.events.recv().await {
                Some(Event { manager: MANAGER, what: What::Said(ToAgent::Config(config)) }) => *config,
                other => panic!("{other:?}"),
            }
        }
    }

    fn standing(generation: u64, to_laptop: u64) -> Standing {
        let report = InterceptReport { uid: "i".into(), to_laptop, ..InterceptReport::default() };
        let applied = BTreeMap::from([(MANAGER, generation)]);
        Standing { applied, intercepts: vec![report].into(), ..Standing::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_understood_is_ignored_and_silence_ends_it() {
        let mut pair = Pair::new();
        assert!(matches!(pair.heard().await, ToManager::Hello(_)));
        pair.says(r#"{"type":"news","from":"the future"}"#).await;
        pair.says("garbage").await;
        pair.configures(vec![]).await;
        let quiet = Instant::now();
        assert!(matches!(pair.session.await.unwrap(), (Ended::Silent, None)));
        assert_eq!(quiet.elapsed().as_secs(), 40);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_manager_is_gone_within_a_second_while_an_intercept_concerns_the_agent() {
        let mut pair = Pair::new();
        pair.configures(vec![intercept("i", "fd74::2")]).await;
        let quiet = Instant::now();
        assert!(matches!(pair.session.await.unwrap(), (Ended::Silent, None)));
        assert!(quiet.elapsed() < Duration::from_secs(1), "{:?}", quiet.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn beats_are_as_frequent_as_they_must_be() {
        let mut pair = Pair::new();
        pair.heard().await;
        let begun = Instant::now();
        assert_eq!(pair.heard().await, ToManager::Beat);
        assert_eq!(begun.elapsed().as_secs(), 15);
        pair.configures(vec![intercept("i", "fd74::2")]).await;
        let begun = Instant::now();
        assert_eq!(pair.heard().await, ToManager::Beat);
        assert!(begun.elapsed() <= Duration::from_millis(251), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn reports_come_at_once_and_then_once_a_second() {
        let mut pair = Pair::new();
        pair.heard().await;
        pair.standing.send_replace(standing(3, 1));
        let begun = Instant::now();
        let ToManager::Report(report) = pair.heard().await else { panic!("no report") };
        assert_eq!((report.generation, report.intercepts[0].to_laptop), (3, 1));
        assert!(begun.elapsed() < Duration::from_millis(10));
        for count in 2..20 {
            sleep(Duration::from_millis(10)).await;
            pair.standing.send_replace(standing(3, count));
        }
        let ToManager::Report(report) = pair.heard().await else { panic!("no report") };
        assert_eq!(report.intercepts[0].to_laptop, 19);
        assert_eq!(begun.elapsed().as_secs(), 1);
        assert_eq!(pair.heard().await, ToManager::Beat, "the same is not said twice");
    }

    #[tokio::test(start_paused = true)]
    async fn a_manager_may_ask_to_be_left_alone() {
        let mut pair = Pair::new();
        let refused = ToAgent::Refused { reason: "full".into(), retry_after: 7 };
        pair.says(&serde_json::to_string(&refused).unwrap()).await;
        let (ended, pause) = pair.session.await.unwrap();
        assert_eq!((ended.to_string().as_str(), pause), ("full", Some(Duration::from_secs(7))));
    }

    #[tokio::test(start_paused = true)]
    async fn an_endless_line_ends_the_connection() {
        let mut pair = Pair::new();
        let chunk = "x".repeat(64 << 10);
        let stream = pair.manager.get_mut().get_mut();
        while stream.write_all(chunk.as_bytes()).await.is_ok() {}
        assert!(matches!(pair.session.await.unwrap(), (Ended::Garbage(_), None)));
    }
}
