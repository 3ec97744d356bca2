//! Paths: what carries WireGuard's datagrams. A path is not a session; a session outlives its paths.

pub(crate) mod stream;
pub(crate) mod udp;
pub(crate) mod upgrade;

use std::{fmt, future::Future, net::SocketAddr, pin::Pin};

use tokio::io::{AsyncRead, AsyncWrite};

/// A kind of path, best last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PathKind {
    /// A stream through the API server's port-forward.
    Forward,
    /// A stream through the API server's proxy.
    Proxy,
    /// UDP, straight to the manager.
    Udp,
}

impl fmt::Display for PathKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Forward => "forward",
            Self::Proxy => "proxy",
            Self::Udp => "udp",
        })
    }
}

/// Which paths may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PathPolicy {
    /// The best that answers.
    #[default]
    Auto,
    /// This one alone.
    Only(PathKind),
}

impl PathPolicy {
    /// Whether paths of `kind` may be used.
    #[must_use]
    pub fn allows(self, kind: PathKind) -> bool {
        match self {
            Self::Auto => true,
            Self::Only(only) => only == kind,
        }
    }
}

/// How much memory the paths of a lane may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// Buffers of 64 KiB that one system call fills with datagrams.
    pub(crate) udp_reads: usize,
    /// The UDP socket's buffers, bytes.
    pub(crate) udp_receive: usize,
    pub(crate) udp_send: usize,
    /// Longest frames that one read of a stream may bring.
    pub(crate) stream_frames: usize,
    /// Bytes that may wait for a stream's writer before producers pause.
    pub(crate) stream_waiting: usize,
}

impl Room {
    /// For a laptop, or a manager: 1 MiB, and for each stream as much again.
    pub(crate) const AMPLE: Self = Self {
        // Eight measured as fast as more.
        udp_reads: 8,
        // A lane can be away for a millisecond or two; at 10 Gb/s that is 2 MiB to receive. Sending is paced by the
        // socket becoming writable, and a larger buffer would only be delay.
        udp_receive: 4 << 20,
        udp_send: 1 << 20,
        // One read takes what the peer sent in one write.
        stream_frames: 4,
        // Four super-packets keep a writer busy that takes them in one call each; more would only be delay: the kernel's
        // send buffer holds the path's bandwidth-delay product already.
        stream_waiting: 256 << 10,
    };

    /// For an agent, which has 64 MiB for all that it does, and a lane to each manager: 256 KiB, and 384 KiB while a
    /// stream is open, besides 768 KiB of the kernel's. At 1 Gb/s the socket holds what comes in 4 ms.
    pub(crate) const SCANT: Self = Self {
        udp_reads: 2,
        udp_receive: 512 << 10,
        udp_send: 256 << 10,
        stream_frames: 1,
        stream_waiting: 64 << 10,
    };
}

/// Where a datagram came from, and so where an answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Via {
    Udp(SocketAddr),
    Stream(u64),
}

/// Bytes both ways: what a stream path runs over.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A stream whose making is nobody's business here.
pub type BoxStream = Box<dyn Stream>;

/// Why a stream could not be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct DialError {
    /// What happened, for people.
    pub message: String,
    /// Whether asking again is pointless until something is changed: no permission, no such thing.
    pub refused: bool,
}

/// Makes streams to the manager. Dialling runs on the lane's own runtime.
pub trait StreamDialer: Send + Sync {
    /// The kind of path that the streams are.
    fn kind(&self) -> PathKind;

    /// Where the streams lead, for people: a pod's name.
    fn target(&self) -> String;

    /// Opens a stream that carries frames from its first byte on.
    fn dial(&self) -> Pin<Box<dyn Future<Output = Result<BoxStream, DialError>> + Send + '_>>;
}
