//! Datagrams that wait for their side. What finds no room is dropped, as everywhere in UDP.

use std::cell::Cell;
use std::ops::Deref;
use std::rc::Rc;

use tokio::sync::mpsc;

use super::buffer::Buffer;

/// Most datagrams in one queue. With what each takes beside its bytes, a queue of small ones is no larger than its bytes may be.
const MOST: usize = 64;

/// Most bytes in one queue: as many as the kernel has waiting for a socket (`net.core.rmem_default`).
const QUEUE: usize = 208 << 10;

/// Most bytes in all queues of a thread: twenty full ones, and a sixth of what may wait on all connections of an agent.
const ALL: usize = 4 << 20;

thread_local! {
    /// What waits in all queues of this thread, bytes.
    static WAITING: Cell<usize> = const { Cell::new(0) };
}

/// One datagram, which takes its room until it is dropped.
#[derive(Debug)]
pub(super) struct Datagram {
    bytes: Buffer,
    queue: Rc<Cell<usize>>,
}

impl Datagram {
    /// `None` where there is no room.
    fn new(bytes: &[u8], queue: &Rc<Cell<usize>>) -> Option<Self> {
        let fits = queue.get() + bytes.len() <= QUEUE && WAITING.get() + bytes.len() <= ALL;
        fits.then(|| {
            queue.update(|waiting| waiting + bytes.len());
            WAITING.set(WAITING.get() + bytes.len());
            Self { bytes: bytes.to_vec().into(), queue: queue.clone() }
        })
    }
}

impl Deref for Datagram {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.filled()
    }
}

impl Drop for Datagram {
    fn drop(&mut self) {
        self.queue.update(|waiting| waiting - self.bytes.len());
        WAITING.set(WAITING.get() - self.bytes.len());
    }
}

/// The end of a queue that datagrams are put into.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    sender: mpsc::Sender<Datagram>,
    waiting: Rc<Cell<usize>>,
}

impl Queue {
    pub(super) fn new() -> (Self, mpsc::Receiver<Datagram>) {
        let (sender, receiver) = mpsc::channel(MOST);
        (Self { sender, waiting: Rc::default() }, receiver)
    }

    /// Whether there was room.
    pub(super) fn push(&self, bytes: &[u8]) -> bool {
        Datagram::new(bytes, &self.waiting).is_some_and(|datagram| self.sender.try_send(datagram).is_ok())
    }

    /// Whether nobody takes anything out any more.
    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

#[cfg(test)]
mod tests {
    use super::{ALL, MOST, QUEUE, Queue};
    use crate::agent::proxy::held;

    #[test]
    fn a_queue_is_bounded_by_number_and_by_bytes_and_has_room_again() {
        let before = held();
        let (queue, mut datagrams) = Queue::new();
        for _ in 0..MOST {
            assert!(queue.push(b"small"));
        }
        assert!(!queue.push(b"small"));
        while datagrams.try_recv().is_ok() {}

        let large = [1; QUEUE / 4];
        for _ in 0..4 {
            assert!(queue.push(&large));
        }
        assert!(!queue.push(b"x"));
        assert!(held() - before >= QUEUE, "what waits is known");
        let taken = datagrams.try_recv().unwrap();
        assert_eq!(*taken, large);
        assert!(!queue.push(&large), "it is still there");
        drop(taken);
        assert!(queue.push(&large));
        drop(datagrams);
        assert!(queue.is_closed());
        assert_eq!(held(), before);
    }

    #[test]
    fn all_queues_together_are_bounded() {
        let queues: Vec<_> = (0..=ALL / QUEUE + 1).map(|_| Queue::new()).collect();
        let large = [1; QUEUE / 4];
        let taken = queues.iter().flat_map(|(queue, _)| (0..4).map(|_| queue.push(&large)));
        assert_eq!(taken.filter(|taken| *taken).count(), ALL / large.len());
        drop(queues);
        let (queue, _datagrams) = Queue::new();
        assert!(queue.push(&large));
    }
}
