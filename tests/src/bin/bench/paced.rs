//! HTTP requests at an even rate, from a client that takes little of the machine: it shares that with what it measures, which
//! would otherwise wait for the client more than for anything else.
//!
//! An open loop: requests are due at even intervals, whatever becomes of those before them. Latency counts from then, and
//! has in it what a request waited for a connection that was free, or this client for a processor.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use rustix::time::{timerfd_create, timerfd_settime};
use serde::{Deserialize, Serialize};

/// As many as wrk has.
const CONNECTIONS: usize = 32;

/// What answers may be late at the end. If the server makes so much less than it was asked for, there is no figure.
const PATIENCE: Duration = Duration::from_secs(5);

/// An answer has some 200 bytes.
const LONGEST_ANSWER: usize = 4096;

/// The timer's name among the connections.
const TIMER: u64 = u64::MAX;

/// What became of the requests. All were answered, and well: at the first that was not there is an error instead.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Paced {
    pub(crate) requests: u32,
    pub(crate) p50_micros: f64,
    pub(crate) p99_micros: f64,
    /// Until the last answer; below the rate that was asked for where the server, or this client, did not keep up.
    pub(crate) per_second: f64,
}

/// `bench paced SERVER RATE SECONDS`: so many requests in a second, and what became of them.
pub(crate) fn ask_here(server: SocketAddr, rate: f64, seconds: u64) -> Result<()> {
    let pace = Pace::new(rate, Duration::from_secs(seconds))?;
    let paced = Client::connect(server, CONNECTIONS)?.run(pace)?;
    writeln!(std::io::stdout(), "{}", serde_json::to_string(&paced)?)?;
    Ok(())
}

/// When requests are due: one at the end of each interval.
#[derive(Debug)]
struct Pace {
    interval: Duration,
    requests: u32,
    /// How many intervals are over.
    due: u32,
    sent: u32,
}

impl Pace {
    fn new(rate: f64, length: Duration) -> Result<Self> {
        let requests = rate * length.as_secs_f64();
        ensure!((1.0..1e8).contains(&requests), "{requests} requests are too few, or too many");
        Ok(Self { interval: Duration::from_secs_f64(1.0 / rate), requests: requests as u32, due: 0, sent: 0 })
    }

    fn pass(&mut self, intervals: u64) {
        let due = u64::from(self.due).saturating_add(intervals);
        self.due = u32::try_from(due).map_or(self.requests, |due| due.min(self.requests));
    }

    /// When the next request was due, counted from the beginning; nothing if none is.
    fn next_due(&self) -> Option<Duration> {
        (self.sent < self.due).then(|| self.interval * (self.sent + 1))
    }
}

/// One thread with connections that stay open.
#[derive(Debug)]
struct Client {
    request: Vec<u8>,
    epoll: OwnedFd,
    /// A timeout of `epoll_wait` counts milliseconds, and the kernel may put it off by 50 us more. This is on time, keeps to
    /// the grid it began with, and counts how often it should have woken us.
    timer: OwnedFd,
    connections: Vec<Connection>,
    /// Those without a request, so that all have their turn.
    free: VecDeque<usize>,
}

impl Client {
    fn connect(server: SocketAddr, count: usize) -> Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
        epoll::add(&epoll, &timer, EventData::new_u64(TIMER), EventFlags::IN)?;
        let mut connections = Vec::with_capacity(count);
        for index in 0..count {
            let connection = Connection::open(server)?;
            epoll::add(&epoll, &connection.stream, EventData::new_u64(index as u64), EventFlags::IN)?;
            connections.push(connection);
        }
        let request = format!("GET / HTTP/1.1\r\nHost: {server}\r\n\r\n").into_bytes();
        Ok(Self { request, epoll, timer, connections, free: (0..count).collect() })
    }

    fn run(mut self, mut pace: Pace) -> Result<Paced> {
        let mut latencies = Vec::with_capacity(pace.requests as usize);
        let mut events = Vec::with_capacity(self.connections.len() + 1);
        let began = Instant::now();
        let deadline = began + pace.interval * pace.requests + PATIENCE;
        self.start_timer(pace.interval)?;
        while latencies.len() < pace.requests as usize {
            let left = deadline.saturating_duration_since(Instant::now());
            let (answered, all) = (latencies.len(), pace.requests);
            ensure!(!left.is_zero(), "{answered} of {all} requests were answered in time");
            epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&Timespec::try_from(left)?))?;
            for event in events.drain(..) {
                match event.data.u64() {
                    TIMER => pace.pass(self.intervals_over()?),
                    index => latencies.extend(self.receive(index as usize)?),
                }
            }
            self.send(began, &mut pace)?;
        }
        Ok(summary(latencies, began.elapsed()))
    }

    fn start_timer(&self, interval: Duration) -> Result<()> {
        let interval = Timespec::try_from(interval)?;
        let each = Itimerspec { it_interval: interval, it_value: interval };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &each)?;
        Ok(())
    }

    /// How many ended since this was asked last; there is at least one when the timer can be read.
    fn intervals_over(&self) -> Result<u64> {
        let mut count = [0; 8];
        rustix::io::read(&self.timer, &mut count)?;
        Ok(u64::from_ne_bytes(count))
    }

    /// Sends what is due, as far as connections are free; the rest stays due.
    fn send(&mut self, began: Instant, pace: &mut Pace) -> Result<()> {
        while let Some(due) = pace.next_due()
            && let Some(index) = self.free.pop_front()
        {
            let connection = &mut self.connections[index];
            connection.stream.write_all(&self.request).context("a request cannot be sent")?;
            connection.due = Some(began + due);
            pace.sent += 1;
        }
        Ok(())
    }

    /// The latency of the request that the connection had, if that is answered now.
    fn receive(&mut self, index: usize) -> Result<Option<Duration>> {
        let connection = &mut self.connections[index];
        if !connection.receive()? {
            return Ok(None);
        }
        let due = connection.due.take().context("there is an answer without a request")?;
        self.free.push_back(index);
        Ok(Some(due.elapsed()))
    }
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    /// When the request was that is under way.
    due: Option<Instant>,
    answer: [u8; LONGEST_ANSWER],
    /// How much of that there is.
    length: usize,
}

impl Connection {
    fn open(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&server, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, due: None, answer: [0; LONGEST_ANSWER], length: 0 })
    }

    /// Reads what there is, and says whether the answer is complete.
    fn receive(&mut self) -> Result<bool> {
        let count = self.stream.read(&mut self.answer[self.length..]).context("an answer cannot be read")?;
        ensure!(count > 0, "the server closed a connection, or an answer is over {LONGEST_ANSWER} bytes");
        self.length += count;
        let complete = is_complete(&self.answer[..self.length])?;
        if complete {
            self.length = 0;
        }
        Ok(complete)
    }
}

/// Whether this is all of an answer; an error if it is not a good one.
fn is_complete(answer: &[u8]) -> Result<bool> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head) = response.parse(answer)? else { return Ok(false) };
    match response.code {
        Some(200) => {}
        other => bail!("the answer's status is {}", other.unwrap_or_default()),
    }
    let length = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let length: usize = length
        .and_then(|header| str::from_utf8(header.value).ok()?.parse().ok())
        .context("the answer has no Content-Length")?;
    ensure!(answer.len() - head <= length, "more came than the answer");
    Ok(answer.len() - head == length)
}

/// Of one latency at least.
fn summary(mut latencies: Vec<Duration>, took: Duration) -> Paced {
    latencies.sort_unstable();
    let count = latencies.len();
    let micros = |index: usize| latencies[index].as_secs_f64() * 1e6;
    Paced {
        requests: count as u32,
        p50_micros: micros(count / 2),
        p99_micros: micros(count * 99 / 100),
        per_second: count as f64 / took.as_secs_f64(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::time::sleep;

    use super::*;

    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nServer: x\r\ncontent-length: 6\r\n\r\nHello\n";

    fn millis(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn requests_are_due_at_even_intervals() {
        let mut pace = Pace::new(500.0, millis(10)).unwrap();
        assert_eq!((pace.requests, pace.next_due()), (5, None));
        pace.pass(2);
        assert_eq!(pace.next_due(), Some(millis(2)));
        pace.sent += 1;
        // However late it is sent.
        pace.pass(1);
        assert_eq!(pace.next_due(), Some(millis(4)));
        pace.pass(u64::MAX);
        pace.sent = 5;
        assert_eq!(pace.next_due(), None);
    }

    #[test]
    fn refuses_a_rate_that_is_none() {
        for rate in [0.0, -1.0, 0.5, 1e12, f64::NAN, f64::INFINITY] {
            assert!(Pace::new(rate, millis(1000)).is_err(), "{rate}");
        }
    }

    #[test]
    fn an_answer_is_complete_with_its_last_byte() {
        for cut in 0..ANSWER.len() {
            assert!(!is_complete(&ANSWER[..cut]).unwrap(), "{cut}");
        }
        assert!(is_complete(ANSWER).unwrap());
        assert!(is_complete(&[ANSWER, b"H"].concat()).is_err());
    }

    #[test]
    fn a_bad_answer_is_none() {
        for bad in
            ["HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n", "SSH-2.0-x\r\n"]
        {
            assert!(is_complete(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn sums_up() {
        let paced = summary((1..=200).rev().map(millis).collect(), millis(500));
        assert_eq!((paced.requests, paced.per_second), (200, 400.0));
        assert_eq!((paced.p50_micros, paced.p99_micros), (101e3, 199e3));
    }

    #[tokio::test]
    async fn latency_counts_from_when_a_request_was_due() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            for _ in 0..10 {
                assert!(stream.read(&mut [0; 1000]).await.unwrap() > 0);
                sleep(millis(10)).await;
                let (head, rest) = ANSWER.split_at(20);
                stream.write_all(head).await.unwrap();
                sleep(millis(1)).await;
                stream.write_all(rest).await.unwrap();
            }
        };
        // Ten are due within 10 ms, and their only connection takes 11 ms for each.
        let client = tokio::task::spawn_blocking(move || {
            Client::connect(server, 1)?.run(Pace::new(1000.0, millis(10))?)
        });
        let ((), paced) = tokio::join!(serve, client);
        let paced = paced.unwrap().unwrap();
        assert_eq!(paced.requests, 10);
        assert!(paced.p99_micros >= 100e3 && paced.p50_micros >= 60e3, "{paced:?}");
        assert!(paced.per_second < 91.0, "{paced:?}");
    }
}
