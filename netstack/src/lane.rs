//! One lane: a thread that owns everything its packets touch, and the tasks that move them.
//!
//! Tasks share state by `Rc`, never across threads. Each runs a batch to completion: what arrives is opened and
//! delivered at once, the flows that it concerns run next, and what they produce is flushed after them, because
//! the runtime's queue is first in, first out.

use std::{cell::RefCell, future::poll_fn, io, rc::Rc, thread};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::UdpSocket,
    task::LocalSet,
    time::{MissedTickBehavior, interval},
};

use crate::{
    overlay::{Arrival, Overlay},
    packet,
    path::{Via, stream, udp},
    peers::PeerId,
    tunnel::{MIN_OUTPUT, OVERHEAD, TICK},
};

/// Reads from a socket or TUN in one turn before other tasks have theirs: at 64 KiB a read, half a megabyte, which
/// is sealed in about half a millisecond.
pub(crate) const READS_PER_TURN: usize = 8;

/// What a lane does with what arrives.
pub(crate) trait Lane: 'static {
    fn overlay(&self) -> &RefCell<Overlay>;

    /// An inner packet, from an address that is the peer's.
    fn deliver(&self, peer: PeerId, via: Via, packet: &mut [u8]);

    /// A batch has ended; `authentic` if anything in it was.
    fn batch_end(&self, via: Via, authentic: bool);
}

/// Starts a thread with a runtime of its own, and runs what `start` makes there until it ends.
pub(crate) fn spawn<F, T>(name: &str, start: F) -> io::Result<thread::JoinHandle<()>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Future<Output = ()>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        LocalSet::new().block_on(&runtime, async { start().await });
        // A name lookup that hangs must not keep whoever waits for the thread's end.
        runtime.shutdown_background();
    })
}

/// Room to open any datagram into.
pub(crate) fn open_buffer() -> Vec<u8> {
    vec![0; packet::MAX + OVERHEAD + MIN_OUTPUT]
}

fn take<L: Lane>(lane: &L, via: Via, datagram: &[u8], opened: &mut [u8]) -> bool {
    let arrival = lane.overlay().borrow_mut().receive(via, datagram, opened);
    if let Arrival::Packet(peer, length) = arrival {
        lane.deliver(peer, via, &mut opened[..length]);
    }
    arrival != Arrival::Nothing
}

/// Receives UDP datagrams for as long as the lane lives.
pub(crate) async fn receive_udp<L: Lane>(lane: Rc<L>, socket: Rc<UdpSocket>) -> io::Result<()> {
    let mut input = udp::Input::new(&socket, &lane.overlay().borrow().room)?;
    let mut opened = open_buffer();
    // No datagram is longer than the buffer: GRO's are cut before they come here.
    loop {
        socket.readable().await?;
        for _ in 0..READS_PER_TURN {
            let mut last = None;
            let result = input.receive(&socket, |source, datagram| {
                let via = Via::Udp(source);
                let authentic = take(&*lane, via, datagram, &mut opened);
                let before = last.is_some_and(|(previous, authentic)| previous == via && authentic);
                last = Some((via, authentic || before));
            });
            if let Some((via, authentic)) = last {
                lane.batch_end(via, authentic);
            }
            match result {
                // One that comes alone is answered before it is asked whether there is another.
                Ok(1) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // An ICMP error about an earlier datagram; the socket itself is sound.
                Err(error) => tracing::debug!(%error, "udp receive"),
            }
        }
        tokio::task::yield_now().await;
    }
}

/// Reads frames until the stream ends; answers why.
pub(crate) async fn read_stream<L: Lane>(
    lane: Rc<L>,
    id: u64,
    mut reader: impl AsyncRead + Unpin,
    already_read: &[u8],
) -> String {
    let via = Via::Stream(id);
    let mut input = stream::Input::new(lane.overlay().borrow().room.stream_frames, already_read);
    let mut opened = open_buffer();
    let mut length = 0;
    loop {
        let mut authentic = false;
        let frames = input.advance(length, |frame| authentic |= take(&*lane, via, frame, &mut opened));
        lane.batch_end(via, authentic);
        if let Err(error) = frames {
            return error.to_string();
        }
        length = match reader.read(input.space()).await {
            Ok(0) => return "the other side closed it".into(),
            Ok(length) => length,
            Err(error) => return error.to_string(),
        };
    }
}

/// Writes what is sealed for a stream until it is closed; answers why.
pub(crate) async fn write_stream<L: Lane>(
    lane: Rc<L>,
    id: u64,
    mut writer: impl AsyncWrite + Unpin,
) -> String {
    let mut taken = Vec::new();
    loop {
        taken.clear();
        let closed = poll_fn(|cx| lane.overlay().borrow_mut().poll_output(id, &mut taken, cx)).await.is_err();
        if closed {
            let _ = writer.shutdown().await;
            return "closed".into();
        }
        if let Err(error) = write(&mut writer, &taken).await {
            return error.to_string();
        }
    }
}

async fn write(writer: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    writer.write_all(bytes).await?;
    writer.flush().await
}

/// Sends UDP batches once whoever fills them has had its turn. To be spawned: only so does it run right behind those
/// tasks, and not after the runtime has looked for events.
pub(crate) async fn flush<L: Lane>(lane: Rc<L>) {
    loop {
        let blocked = poll_fn(|cx| lane.overlay().borrow_mut().poll_flush(cx)).await;
        if let Some(socket) = blocked
            && socket.writable().await.is_err()
        {
            return;
        }
    }
}

/// Runs the tunnels' clocks.
pub(crate) async fn tick<L: Lane>(lane: Rc<L>) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        lane.overlay().borrow_mut().tick();
    }
}
