//! Watching a service from the laptop while something happens to the path there.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Laptop;
use crate::wait::pause;

/// How an attempt to connect ends, as the program that attempts it sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is connected, and stays so.
    Connected,
    /// `ECONNREFUSED`.
    Refused,
    /// `EHOSTUNREACH` or `ENETUNREACH`, or a prohibition.
    Unreachable,
    /// No answer.
    Timeout,
    /// It seemed to be connected, and was closed or reset right away: what no network without a proxy does.
    ConnectedThenClosed,
}

/// Attempts a connection from the calling thread's network namespace, and says how it ended and after how long.
///
/// # Panics
/// On an error that is no outcome of a connection attempt.
#[must_use]
pub fn attempt(address: SocketAddr, limit: Duration) -> (Outcome, Duration) {
    let began = Instant::now();
    let result = TcpStream::connect_timeout(&address, limit);
    let took = began.elapsed();
    let outcome = match result {
        Ok(stream) => stays_open(stream),
        Err(error) => match error.kind() {
            ErrorKind::ConnectionRefused => Outcome::Refused,
            ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::PermissionDenied => {
                Outcome::Unreachable
            }
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Outcome::Timeout,
            // The standard library's word for an ICMP error that the kernel has reported and forgotten.
            _ if error.to_string().contains("POLLHUP") => Outcome::Unreachable,
            _ => panic!("connecting to {address}: {error}"),
        },
    };
    (outcome, took)
}

fn stays_open(mut stream: TcpStream) -> Outcome {
    stream.set_read_timeout(Some(Duration::from_millis(300))).expect("a time-out that is not zero");
    match stream.read(&mut [0]) {
        Ok(1) => Outcome::Connected,
        Err(error) if error.kind() == ErrorKind::WouldBlock => Outcome::Connected,
        _ => Outcome::ConnectedThenClosed,
    }
}

/// Opens a new connection to an echo service twenty times a second, and keeps count.
#[derive(Debug)]
pub struct Probe {
    worker: Worker<Vec<(Instant, Result<(), String>)>>,
}

impl Probe {
    /// Begins.
    #[must_use]
    pub fn start(laptop: &Laptop, echo: SocketAddr) -> Self {
        let worker = Worker::start(laptop, move |ended| {
            let mut attempts = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                let result = round_trip(echo).map_err(|error| error.to_string());
                attempts.push((Instant::now(), result));
                pause(Duration::from_millis(50));
            }
            attempts
        });
        Self { worker }
    }

    /// Ends, and tells the time from `since` until the last failure was over: none if nothing failed.
    ///
    /// # Panics
    /// If it never worked again.
    #[track_caller]
    pub fn outage_after(self, since: Instant) -> Duration {
        let attempts = self.worker.finish();
        let Some(last_failure) = attempts.iter().rposition(|(_, result)| result.is_err()) else {
            return Duration::ZERO;
        };
        match attempts.get(last_failure + 1) {
            Some((recovered, _)) => recovered.duration_since(since),
            None => panic!("new connections still fail: {:?}", attempts[last_failure].1),
        }
    }

    /// Ends, and counts the attempts and the failures.
    #[must_use]
    pub fn count(self) -> (usize, Vec<String>) {
        let attempts = self.worker.finish();
        let total = attempts.len();
        (total, attempts.into_iter().filter_map(|(_, result)| result.err()).collect())
    }
}

/// One echo over one new connection, each step within half a second.
fn round_trip(echo: SocketAddr) -> io::Result<()> {
    let limit = Duration::from_millis(500);
    let mut stream = TcpStream::connect_timeout(&echo, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"probe")?;
    stream.read_exact(&mut [0; 5])
}

/// Holds one connection to an echo service and sends a few bytes to and fro all the while.
#[derive(Debug)]
pub struct Held {
    worker: Worker<Result<Duration, String>>,
}

impl Held {
    /// Connects and begins.
    #[must_use]
    pub fn start(laptop: &Laptop, echo: SocketAddr) -> Self {
        let worker = Worker::start(laptop, move |ended| hold(echo, ended).map_err(|error| error.to_string()));
        Self { worker }
    }

    /// Ends, and tells the longest time that an answer took.
    ///
    /// # Panics
    /// If the connection broke.
    #[track_caller]
    pub fn longest_gap(self) -> Duration {
        match self.worker.finish() {
            Ok(gap) => gap,
            Err(error) => panic!("a connection that was open all the while broke: {error}"),
        }
    }
}

fn hold(echo: SocketAddr, ended: &AtomicBool) -> io::Result<Duration> {
    let mut stream = TcpStream::connect_timeout(&echo, Duration::from_secs(5))?;
    stream.set_nodelay(true)?;
    // Longer than any outage that a test makes; what counts is the gap.
    stream.set_read_timeout(Some(Duration::from_secs(90)))?;
    let mut longest = Duration::ZERO;
    let mut message = [0; 32];
    while !ended.load(Ordering::Relaxed) {
        let began = Instant::now();
        stream.write_all(&message)?;
        let sent = message;
        stream.read_exact(&mut message)?;
        if sent != message {
            return Err(io::Error::other("the echo differs from what was sent"));
        }
        message[0] = message[0].wrapping_add(1);
        longest = longest.max(began.elapsed());
        pause(Duration::from_millis(5));
    }
    Ok(longest)
}

/// A thread in the laptop's namespace that works until it is told to end.
#[derive(Debug)]
struct Worker<T> {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<T>>,
}

impl<T: Send + 'static> Worker<T> {
    fn start(laptop: &Laptop, work: impl FnOnce(&AtomicBool) -> T + Send + 'static) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let netns = laptop.netns();
        let until = Arc::clone(&ended);
        let thread = thread::spawn(move || crate::inside(&netns, || work(&until)));
        Self { ended, thread: Some(thread) }
    }

    fn finish(mut self) -> T {
        self.ended.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("it is finished once");
        thread.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause))
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}
