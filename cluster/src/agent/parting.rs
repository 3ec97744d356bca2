//! How long a way into the overlay outlives the connection to its manager. The way may be well although the connection is not,
//! and what is in flight through it is production's. Pure.

use std::time::Duration;

use tokio::time::Instant;

/// Longest. A manager that lives is dialled again after 0.1, 0.3, 0.7, 1.5 and 3.1 s, and there is time to be let in after the last.
const GRACE: Duration = Duration::from_secs(5);

/// How long the way may lead nowhere once the manager has hung up. One that has ended is silent from then on, and clients wait in
/// vain; an agent that was held up for a period of its CPU limit hears a living one within that time.
const SILENCE: Duration = Duration::from_millis(100);

/// How the connection to a manager was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// It was closed, as the kernel does for a manager that ends.
    Closed,
    /// Nothing came for too long. Whoever is short of CPU time says nothing for a while, on the way neither.
    Silent,
}

/// A way whose manager is lost.
#[derive(Clone, Copy, Debug)]
pub struct Parting {
    lost: Instant,
    loss: Loss,
    /// Since when the way leads nowhere.
    silent: Option<Instant>,
}

impl Parting {
    /// Begins.
    #[must_use]
    pub fn new(loss: Loss, now: Instant) -> Self {
        Self { lost: now, loss, silent: None }
    }

    /// When the way is to be closed, given whether it leads to the manager now.
    pub fn end(&mut self, leads: bool, now: Instant) -> Instant {
        self.silent = (!leads).then(|| self.silent.unwrap_or(now));
        let latest = self.lost + GRACE;
        match (self.loss, self.silent) {
            (Loss::Closed, Some(since)) => latest.min(since + SILENCE),
            _ => latest,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::{Loss, Parting};

    /// Milliseconds from the loss to the end, as it looks after each observation.
    fn ends(loss: Loss, observations: &[(u64, bool)]) -> Vec<u128> {
        let lost = Instant::now();
        let mut parting = Parting::new(loss, lost);
        let each = observations.iter().map(|(at, leads)| {
            let end = parting.end(*leads, lost + Duration::from_millis(*at));
            (end - lost).as_millis()
        });
        each.collect()
    }

    #[test]
    fn a_way_that_leads_there_outlives_its_manager_for_a_while() {
        assert_eq!(ends(Loss::Closed, &[(0, true), (4000, true)]), [5000, 5000]);
        assert_eq!(ends(Loss::Silent, &[(0, true), (4000, true)]), [5000, 5000]);
    }

    #[test]
    fn nobody_waits_for_a_manager_that_has_ended() {
        assert_eq!(ends(Loss::Closed, &[(0, true), (800, false), (850, false)]), [5000, 900, 900]);
        assert_eq!(ends(Loss::Closed, &[(4990, false)]), [5000]);
    }

    #[test]
    fn who_was_held_up_may_be_silent_on_every_way() {
        assert_eq!(ends(Loss::Silent, &[(0, false), (2000, false)]), [5000, 5000]);
        assert_eq!(ends(Loss::Closed, &[(0, false), (50, true), (700, false)]), [100, 5000, 800]);
    }
}
