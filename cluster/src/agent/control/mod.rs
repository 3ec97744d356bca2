//! Connections to managers: one to each, kept up.

mod dial;
mod session;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};
use tpd_api::agent::{InterceptReport, Report, ToAgent};
use tracing::{debug, info, warn};

pub use self::dial::{DialError, Dialer};
use self::session::{Outgoing, run};
use super::parting::Loss;

/// Pause before a manager is dialled again, the first time, and the longest one: what comes back is to serve within three seconds.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Longest pause that a manager may ask for.
const LONGEST_REFUSAL: Duration = Duration::from_secs(60);

/// A connection that lasted for so long was not refused.
const LASTED: Duration = Duration::from_secs(5);

/// What happens between the agent and its managers.
#[derive(Debug)]
pub struct Event {
    /// The address that was dialled.
    pub manager: SocketAddr,
    /// What happened.
    pub what: What,
}

/// See [`Event`].
#[derive(Debug)]
pub enum What {
    /// It has said something.
    Said(ToAgent),
    /// The connection is lost, in this way.
    Lost(Loss),
}

/// What managers are to hear.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Standing {
    /// Generation of the last configuration of each manager that is in force: that one, or a newer one of another manager.
    pub applied: BTreeMap<SocketAddr, u64>,
    /// How each intercept fares.
    pub intercepts: Arc<[InterceptReport]>,
    /// Ports of laptops that are still in use without one.
    pub held: Arc<[SocketAddr]>,
}

impl Standing {
    /// What one of them is to hear, if something of its own is in force.
    fn report(&self, manager: SocketAddr) -> Option<Report> {
        let generation = *self.applied.get(&manager)?;
        Some(Report { generation, intercepts: self.intercepts.to_vec(), held: self.held.to_vec() })
    }
}

/// Keeps a connection to one manager, for ever.
pub async fn keep(
    dialer: Rc<Dialer>,
    manager: SocketAddr,
    standing: watch::Receiver<Standing>,
    events: mpsc::Sender<Event>,
) {
    let mut pause = FIRST_PAUSE;
    loop {
        let began = Instant::now();
        let refused = match dialer.dial(manager).await {
            Ok(stream) => {
                debug!(%manager, "connected");
                let outgoing = Outgoing { greeting: dialer.greeting(), standing: standing.clone() };
                let (ended, refused) = run(stream, outgoing, manager, &events).await;
                info!(%manager, reason = %ended, "the connection to a manager ended");
                // The worker is what ends this task; until then it listens.
                let _ = events.send(Event { manager, what: What::Lost(ended.loss()) }).await;
                refused
            }
            Err(error @ DialError::Refused { .. }) => {
                warn!(%manager, %error, "a manager refuses this agent");
                error.retry_after()
            }
            Err(error) => {
                debug!(%manager, %error, "no connection to a manager");
                None
            }
        };
        if began.elapsed() >= LASTED {
            pause = FIRST_PAUSE;
        }
        sleep(refused.map_or(pause, |refused| refused.clamp(pause, LONGEST_REFUSAL))).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
