//! Which way leads to the manager: answers and the time in, a choice out. Pure; times count from the uplink's start.

use std::time::Duration;

/// How often each way is asked.
pub(super) const BEAT: Duration = Duration::from_millis(250);

/// A way that has answered nothing for so long leads nowhere: three beats, and the answer to a fourth.
pub(super) const SILENCE: Duration = Duration::from_millis(900);

/// UDP that has answered nothing for so long is doubted, and a stream opened in time: two beats were lost.
const DOUBT: Duration = Duration::from_millis(600);

/// What UDP is given to answer at first, before a stream is opened.
const FIRST: Duration = Duration::from_secs(1);

/// How often UDP is asked while only the stream answers: each question is a full packet. At each beat first: a manager that was
/// made anew may answer there a moment after it takes streams.
const UDP_PROBE: Duration = Duration::from_secs(10);
const EAGER_PROBE: Duration = Duration::from_secs(2);

/// How often handshakes are sent when nothing has answered for [`EAGER`].
const SLOW: Duration = Duration::from_secs(1);
const EAGER: Duration = Duration::from_secs(5);

/// How long a stream is kept open once UDP answers again. A manager has hundreds of agents, and each stream costs it 600 KiB.
const STREAM_KEPT: Duration = Duration::from_secs(10);

/// A stream that has answered nothing for so long is given up for another: TCP repeats what was lost after 0.2, 0.6 and 1.4 s.
const STREAM_SILENCE: Duration = Duration::from_secs(3);

/// Answers in a row that UDP owes after it failed once, doubling with each failure, and the most: 16 s of beats.
const STEADY: u32 = 4;
const MOST_STEADY: u32 = 64;

/// A way to the manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// UDP.
    Udp,
    /// A stream to the manager's own port.
    Stream,
}

/// The state of both ways.
#[derive(Debug, Default)]
pub(super) struct Ways {
    udp: Option<Udp>,
    stream: Option<Stream>,
    chosen: Option<Way>,
    /// Since when it has been the present choice.
    since: Duration,
    /// How often UDP was chosen and fell silent.
    failures: u32,
    asked_udp: Option<Duration>,
}

/// UDP, while it answers.
#[derive(Debug)]
struct Udp {
    answered: Duration,
    /// Answers since it was last silent.
    answers: u32,
}

/// An open stream.
#[derive(Debug)]
struct Stream {
    opened: Duration,
    answered: Option<Duration>,
}

/// What is to be done at a beat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Beat {
    /// UDP is to be asked.
    pub(super) udp: bool,
    /// The stream is to be asked, if one is open.
    pub(super) stream: bool,
    /// A handshake is to go ahead: the manager may have forgotten the session.
    pub(super) handshake: bool,
}

impl Ways {
    /// `way` has answered a question that was asked within [`SILENCE`].
    pub(super) fn answered(&mut self, way: Way, now: Duration) {
        match way {
            Way::Udp => {
                let answers = self.udp.as_ref().map_or(0, |udp| udp.answers);
                self.udp = Some(Udp { answered: now, answers: answers.saturating_add(1) });
            }
            Way::Stream => {
                if let Some(stream) = &mut self.stream {
                    stream.answered = Some(now);
                }
            }
        }
    }

    /// A stream was opened.
    pub(super) fn opened(&mut self, now: Duration) {
        self.stream = Some(Stream { opened: now, answered: None });
    }

    /// The stream has ended.
    pub(super) fn closed(&mut self) {
        self.stream = None;
    }

    /// The way to take now; `None` while none answers.
    pub(super) fn choose(&mut self, now: Duration) -> Option<Way> {
        self.udp = self.udp.take().filter(|udp| now.saturating_sub(udp.answered) < SILENCE);
        if self.udp.is_none() && self.chosen == Some(Way::Udp) {
            self.failures = self.failures.saturating_add(1);
        }
        let answered = self.stream.as_ref().and_then(|stream| stream.answered);
        let streams = answered.is_some_and(|answered| now.saturating_sub(answered) < SILENCE);
        let choice = match &self.udp {
            // Unsteady is better than nothing.
            Some(udp) if udp.answers >= self.steady() || !streams => Some(Way::Udp),
            _ => streams.then_some(Way::Stream),
        };
        if choice != self.chosen {
            self.chosen = choice;
            self.since = now;
        }
        choice
    }

    fn steady(&self) -> u32 {
        match self.failures {
            0 => 1,
            failures => STEADY.saturating_mul(1 << (failures - 1).min(8)).min(MOST_STEADY),
        }
    }

    /// The choice as it was made last.
    pub(super) fn chosen(&self) -> Option<Way> {
        self.chosen
    }

    /// When the chosen way will have been silent for too long, should it stay so.
    pub(super) fn expiry(&self) -> Option<Duration> {
        let answered = match self.chosen? {
            Way::Udp => self.udp.as_ref().map(|udp| udp.answered),
            Way::Stream => self.stream.as_ref().and_then(|stream| stream.answered),
        };
        answered.map(|answered| answered + SILENCE)
    }

    /// What to do at this beat.
    pub(super) fn beat(&mut self, now: Duration) -> Beat {
        let pause = match self.chosen {
            _ if self.udp.is_some() => Duration::ZERO,
            Some(_) if now.saturating_sub(self.since) < EAGER_PROBE => Duration::ZERO,
            Some(_) => UDP_PROBE,
            None if now.saturating_sub(self.since) < EAGER => Duration::ZERO,
            None => SLOW,
        };
        let udp = self.asked_udp.is_none_or(|asked| now.saturating_sub(asked) >= pause);
        if udp {
            self.asked_udp = Some(now);
        }
        Beat { udp, stream: true, handshake: self.chosen.is_none() }
    }

    /// Whether a stream should be open, or opened.
    pub(super) fn wants_stream(&self, now: Duration) -> bool {
        match &self.udp {
            Some(udp) if self.chosen == Some(Way::Udp) && now.saturating_sub(udp.answered) < DOUBT => {
                self.stream.is_some() && now.saturating_sub(self.since) < STREAM_KEPT
            }
            _ => now >= FIRST,
        }
    }

    /// Whether the open stream has been silent for so long that another may do better.
    pub(super) fn is_stream_dead(&self, now: Duration) -> bool {
        let heard = self.stream.as_ref().map(|stream| stream.answered.unwrap_or(stream.opened));
        heard.is_some_and(|heard| now.saturating_sub(heard) >= STREAM_SILENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// Both ways, of which some answer each beat at once, from `now` on for `length`.
    fn run(ways: &mut Ways, now: &mut Duration, length: Duration, udp: bool, stream: bool) {
        let end = *now + length;
        while *now < end {
            *now += BEAT;
            let beat = ways.beat(*now);
            if beat.udp && udp {
                ways.answered(Way::Udp, *now);
            }
            match (ways.wants_stream(*now), ways.stream.is_some()) {
                (true, false) if stream => ways.opened(*now),
                (false, true) => ways.closed(),
                _ => {}
            }
            if stream {
                ways.answered(Way::Stream, *now);
            }
            ways.choose(*now);
        }
    }

    #[test]
    fn udp_that_answers_needs_no_stream() {
        let (mut ways, mut now) = (Ways::default(), Duration::ZERO);
        assert!(ways.beat(now).handshake);
        run(&mut ways, &mut now, BEAT, true, true);
        assert_eq!(ways.chosen(), Some(Way::Udp));
        run(&mut ways, &mut now, Duration::from_secs(60), true, true);
        assert!(ways.stream.is_none());
        assert!(!ways.beat(now).handshake);
    }

    #[test]
    fn where_udp_does_not_answer_a_stream_is_opened_after_a_second() {
        let (mut ways, mut now) = (Ways::default(), Duration::ZERO);
        run(&mut ways, &mut now, ms(750), false, true);
        assert_eq!((ways.chosen(), ways.stream.is_some()), (None, false));
        run(&mut ways, &mut now, BEAT, false, true);
        assert_eq!(ways.chosen(), Some(Way::Stream));
        // UDP is asked on, for two seconds at each beat, and every ten seconds then.
        let asked: Vec<u32> = (1..=400).filter(|beat| ways.beat(now + BEAT * *beat).udp).collect();
        assert_eq!(asked, [1, 2, 3, 4, 5, 6, 7, 47, 87, 127, 167, 207, 247, 287, 327, 367]);
    }

    #[test]
    fn back_on_udp_the_stream_is_kept_for_a_while() {
        let (mut ways, mut now) = (Ways::default(), Duration::ZERO);
        run(&mut ways, &mut now, Duration::from_secs(2), false, true);
        run(&mut ways, &mut now, UDP_PROBE, true, true);
        assert_eq!((ways.chosen(), ways.stream.is_some()), (Some(Way::Udp), true));
        run(&mut ways, &mut now, STREAM_KEPT, true, true);
        assert_eq!((ways.chosen(), ways.stream.is_some()), (Some(Way::Udp), false));
    }

    #[test]
    fn udp_that_falls_silent_leaves_no_gap() {
        let (mut ways, mut now) = (Ways::default(), Duration::ZERO);
        run(&mut ways, &mut now, Duration::from_secs(5), true, true);
        let silent = now;
        while ways.chosen() == Some(Way::Udp) {
            run(&mut ways, &mut now, BEAT, false, true);
        }
        assert_eq!(ways.chosen(), Some(Way::Stream));
        assert!(now - silent <= SILENCE + BEAT);
    }

    #[test]
    fn a_manager_that_vanishes_is_noticed_within_a_second() {
        let (mut ways, mut now) = (Ways::default(), Duration::ZERO);
        run(&mut ways, &mut now, Duration::from_secs(5), true, false);
        let expiry = ways.expiry().unwrap();
        assert_eq!(expiry, now + SILENCE);
        assert_eq!(ways.choose(expiry - ms(1)), Some(Way::Udp));
        assert_eq!(ways.choose(expiry), None);
        assert!(ways.beat(expiry).handshake);
        assert_eq!(ways.expiry(), None);
        // Asked eagerly first, and once a second then.
        let asked = (1..=60).filter(|beat| ways.beat(expiry + BEAT * *beat).udp).count();
        assert!((25..40).contains(&asked), "{asked}");
    }

    #[test]
    fn udp_that_flaps_must_prove_itself_longer_each_time() {
        let (mut ways, mut now) = (Ways::default(), Duration::ZERO);
        run(&mut ways, &mut now, BEAT, true, true);
        let mut needed = Vec::new();
        for _ in 0..6 {
            run(&mut ways, &mut now, SILENCE + BEAT, false, true);
            assert_eq!(ways.chosen(), Some(Way::Stream));
            ways.asked_udp = None;
            let before = now;
            while ways.chosen() != Some(Way::Udp) {
                run(&mut ways, &mut now, BEAT, true, true);
            }
            needed.push((now - before).as_millis() / BEAT.as_millis());
        }
        assert_eq!(needed, [4, 8, 16, 32, 64, 64]);
    }

    #[test]
    fn unsteady_udp_is_better_than_nothing() {
        let mut ways = Ways { failures: 3, ..Ways::default() };
        ways.answered(Way::Udp, BEAT);
        assert_eq!(ways.choose(BEAT), Some(Way::Udp));
    }

    #[test]
    fn a_stream_that_is_silent_is_given_up() {
        let mut ways = Ways::default();
        ways.opened(BEAT);
        assert!(!ways.is_stream_dead(BEAT + STREAM_SILENCE - ms(1)));
        assert!(ways.is_stream_dead(BEAT + STREAM_SILENCE));
        ways.answered(Way::Stream, 2 * BEAT);
        assert!(!ways.is_stream_dead(BEAT + STREAM_SILENCE));
    }
}
