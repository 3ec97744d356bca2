//! A stream to the manager, for as long as one is wanted.

use std::{io, rc::Rc, time::Duration};

use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use super::Link;
use crate::{lane, path::Via, path::upgrade::upgrade};

/// A dial that takes longer is given up: the manager is a pod of the same cluster, and a lost SYN is repeated after a second.
const DIAL_TIMEOUT: Duration = Duration::from_secs(3);

/// Pauses between attempts, doubling.
const LEAST_PAUSE: Duration = Duration::from_millis(100);
const MOST_PAUSE: Duration = Duration::from_secs(2);

/// A stream that lasted this long was a good one: the next attempt is made soon.
const GOOD: Duration = Duration::from_secs(5);

impl Link {
    /// Opens a stream whenever one is wanted, and carries it to its end.
    pub(super) async fn keep_stream(self: Rc<Self>) {
        let mut wanted = self.wants_stream.subscribe();
        let mut pause = LEAST_PAUSE;
        while wanted.wait_for(|wanted| *wanted).await.is_ok() {
            let opened = Instant::now();
            let problem = match timeout(DIAL_TIMEOUT, self.dial()).await {
                Ok(Ok((stream, already_read))) => {
                    tokio::select! {
                        problem = Rc::clone(&self).carry(stream, already_read) => problem,
                        _ = wanted.wait_for(|wanted| !*wanted) => "UDP answers".to_owned(),
                    }
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no answer within {} s", DIAL_TIMEOUT.as_secs()),
            };
            tracing::debug!(problem, "stream");
            self.close_stream();
            if opened.elapsed() >= GOOD {
                pause = LEAST_PAUSE;
            }
            sleep(pause).await;
            pause = (pause * 2).min(MOST_PAUSE);
        }
    }

    async fn dial(&self) -> io::Result<(TcpStream, Vec<u8>)> {
        let mut stream = TcpStream::connect(self.stream_address).await?;
        stream.set_nodelay(true)?;
        let (path, token) = self.upgrade;
        let already_read = upgrade(&mut stream, path, token).await?;
        Ok((stream, already_read))
    }

    /// Runs one stream until it ends; answers why it did.
    async fn carry(self: Rc<Self>, stream: TcpStream, already_read: Vec<u8>) -> String {
        let id = self.exit.overlay.borrow_mut().open_stream(self.stream_address);
        self.stream.set(Some(id));
        self.ways.borrow_mut().opened(self.now());
        // The manager may have forgotten the session; if it hasn't, a new one does no harm.
        self.exit.overlay.borrow_mut().initiate(Via::Stream(id), self.manager);
        let (reader, writer) = stream.into_split();
        tokio::select! {
            problem = lane::read_stream(Rc::clone(&self), id, reader, &already_read) => problem,
            problem = lane::write_stream(Rc::clone(&self), id, writer) => problem,
        }
    }

    /// Ends the stream that is open, if one is.
    pub(super) fn close_stream(&self) {
        if let Some(id) = self.stream.take() {
            self.exit.overlay.borrow_mut().close_stream(id);
            self.ways.borrow_mut().closed();
            self.choose();
        }
    }
}
