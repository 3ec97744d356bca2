//! One client's conversation: with the laptop while that is there, else with the app.

use std::collections::VecDeque;
use std::future::pending;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use super::entry::{Back, Call, Entry};
use super::taps::Taps;
use super::{Channels, Datagrams, LONGEST};
use crate::agent::proxy::datagrams::Datagram;
use crate::agent::proxy::rules::{Choice, Rule};

/// How long a laptop's answer is awaited before it is looked whether the laptop is there, and how often from then on. One that
/// is gone has half a second to give a sign of life, and is left at the fourth look, 0.8 s after what was sent to it in vain.
pub(super) const BEAT: Duration = Duration::from_millis(200);

/// How long that goes on, twice as long as it may take. What is not answered by then wants no answer, and has arrived.
pub(super) const DOUBT: Duration = Duration::from_secs(2);

/// Most datagrams of a client that are kept until it is known that the laptop takes any: half of what may wait, in number. In bytes
/// they are no more than one may have, a third of it.
const OPENING: usize = 32;

/// How often a laptop that was left is tried again, as often as one that refuses connections.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// How long a laptop has to refuse what it is tried with: what it has to give a sign of life, and a moment for that to be noticed.
pub(super) const TRIAL: Duration = Duration::from_millis(600);

/// The way back to one client.
pub(super) struct Answers {
    entry: Rc<Entry>,
    back: Back,
}

impl Answers {
    pub(super) fn new(entry: &Rc<Entry>, call: Call) -> Self {
        Self { entry: Rc::clone(entry), back: entry.back(call) }
    }

    /// Passes the next datagram of a channel on, if there is one.
    async fn pass_any(&self, channel: Option<&impl Datagrams>) -> io::Result<()> {
        match channel {
            Some(channel) => self.pass(channel).await,
            None => pending().await,
        }
    }

    /// Passes the next datagram of a channel on.
    async fn pass(&self, channel: &impl Datagrams) -> io::Result<()> {
        channel
            .recv(|datagram| {
                // What the kernel does not take at once is as lost as any datagram may be.
                let _ = self.entry.try_send(datagram, &self.back);
            })
            .await
    }
}

/// What one client sends.
struct Incoming {
    datagrams: mpsc::Receiver<Datagram>,
    taps: Taps,
}

impl Incoming {
    /// The next datagram; `None` once the client has been forgotten.
    async fn next(&mut self) -> Option<Datagram> {
        let datagram = self.datagrams.recv().await?;
        self.taps.copy(&datagram);
        Some(datagram)
    }
}

/// Relays what one client sends, and the answers, until the client has been forgotten or nobody can be reached.
pub(super) async fn converse<C: Channels>(
    choice: Choice,
    channels: Rc<C>,
    datagrams: mpsc::Receiver<Datagram>,
    answers: Answers,
) {
    let incoming = Incoming { datagrams, taps: Taps::new(&choice.taps, &channels) };
    let mut client = Client { incoming, answers, channels: &*channels };
    let Some(rule) = &choice.laptop else { return client.with_app().await };
    let mut laptop = channels.laptop(rule).await.ok();
    // Kept once it is there: it may have more to say when the laptop is back.
    let mut app = None;
    loop {
        let unanswered = match laptop {
            Some(laptop) => match client.with_laptop(rule, &laptop, app.as_ref()).await {
                Ok(()) => return,
                Err(unanswered) => unanswered,
            },
            None => VecDeque::new(),
        };
        rule.counters().failed_open();
        if app.is_none() {
            app = channels.app().await.ok();
        }
        let Some(app) = &app else { return };
        laptop = client.with_app_meanwhile(rule, unanswered, app).await;
        if laptop.is_none() {
            return;
        }
    }
}

/// One client, and the ways that its datagrams may take.
struct Client<'a, C> {
    incoming: Incoming,
    answers: Answers,
    channels: &'a C,
}

impl<C: Channels> Client<'_, C> {
    /// Relays until the client has been forgotten. Fails when the laptop refuses, or answers nothing and is left out, with what it
    /// has not answered: with the last datagram, and with all of them while it has taken none.
    ///
    /// Counts the conversation once it is known not to have been refused.
    async fn with_laptop(
        &mut self,
        rule: &Rc<Rule>,
        laptop: &C::Laptop,
        app: Option<&C::App>,
    ) -> Result<(), VecDeque<Datagram>> {
        let Self { incoming, answers, channels } = self;
        let mut uncounted = Some(rule);
        let mut unanswered = VecDeque::new();
        let (mut first, mut sent) = (Instant::now(), Instant::now());
        let mut beat = interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                datagram = incoming.next() => {
                    let taken = !unanswered.is_empty() && first.elapsed() >= DOUBT;
                    if taken || datagram.is_none() {
                        count(&mut uncounted);
                    }
                    let Some(datagram) = datagram else { return Ok(()) };
                    sent = Instant::now();
                    if unanswered.is_empty() {
                        first = sent;
                        beat.reset();
                    }
                    let result = send(laptop, &datagram).await;
                    keep(&mut unanswered, datagram, if uncounted.is_some() { OPENING } else { 1 });
                    if result.is_err() {
                        return Err(unanswered);
                    }
                }
                _ = beat.tick(), if !unanswered.is_empty() => {
                    if sent.elapsed() >= DOUBT {
                        count(&mut uncounted);
                        unanswered.clear();
                    } else if channels.is_left_out(rule, laptop) {
                        return Err(unanswered);
                    } else {
                        // If it has gone, it will be left out.
                        channels.ask(rule);
                    }
                }
                passed = answers.pass(laptop) => {
                    if passed.is_err() {
                        return Err(unanswered);
                    }
                    count(&mut uncounted);
                    unanswered.clear();
                }
                // What it was asked before.
                _ = answers.pass_any(app) => {}
            }
        }
    }

    /// Relays until the client has been forgotten. The app's refusals are the client's own business: it asks again, or not.
    async fn with_app(&mut self) {
        let Self { incoming, answers, channels } = self;
        let Ok(app) = channels.app().await else { return };
        loop {
            tokio::select! {
                datagram = incoming.next() => {
                    let Some(datagram) = datagram else { return };
                    let _ = send(&app, &datagram).await;
                }
                _ = answers.pass(&app) => {}
            }
        }
    }

    /// The same, until the laptop is there again: a way to it then.
    ///
    /// Whether something listens there shows only in what becomes of a datagram. So from time to time the laptop gets a copy of
    /// what goes to the app, which waits for nobody; and it is there if it answers that, or does not refuse it in time.
    async fn with_app_meanwhile(
        &mut self,
        rule: &Rule,
        unanswered: VecDeque<Datagram>,
        app: &C::App,
    ) -> Option<C::Laptop> {
        let Self { incoming, answers, channels } = self;
        for datagram in unanswered {
            let _ = send(app, &datagram).await;
        }
        // Kept from one trial to the next: each way is a flow more for the laptop, for a minute.
        let mut way: Option<C::Laptop> = None;
        let mut is_tried = false;
        let mut due = Instant::now() + RETRY;
        loop {
            tokio::select! {
                datagram = incoming.next() => {
                    let datagram = datagram?;
                    let _ = send(app, &datagram).await;
                    if !is_tried && Instant::now() >= due {
                        is_tried = try_again(*channels, rule, &mut way, &datagram).await;
                        due = Instant::now() + if is_tried { TRIAL } else { RETRY };
                    }
                }
                answer = heard(way.as_ref().filter(|_| is_tried)) => {
                    if answer.is_ok() {
                        return way;
                    }
                    (is_tried, due) = (false, Instant::now() + RETRY);
                }
                () = sleep_until(due), if is_tried => {
                    if way.as_ref().is_some_and(|way| !channels.is_left_out(rule, way)) {
                        return way;
                    }
                    (is_tried, due) = (false, Instant::now() + RETRY);
                }
                _ = answers.pass(app) => {}
            }
        }
    }
}

/// Sends a datagram to the laptop, by another way where the last one leads nowhere. Tells whether there is one.
async fn try_again<C: Channels>(
    channels: &C,
    rule: &Rule,
    way: &mut Option<C::Laptop>,
    datagram: &[u8],
) -> bool {
    if way.as_ref().is_none_or(|way| channels.is_left_out(rule, way)) {
        *way = channels.laptop(rule).await.ok();
    }
    let Some(way) = way else { return false };
    channels.ask(rule);
    send(way, datagram).await.is_ok()
}

/// What a way does not take at once is lost, as it may be anywhere: one that has ended takes nothing, and says nothing.
pub(super) async fn send(channel: &impl Datagrams, datagram: &[u8]) -> io::Result<()> {
    timeout(BEAT, channel.send(datagram)).await.unwrap_or(Ok(()))
}

/// Completes once a laptop that is tried has answered, or refused.
async fn heard(way: Option<&impl Datagrams>) -> io::Result<()> {
    match way {
        // What it says is not needed: the app answers that.
        Some(laptop) => laptop.recv(|_| ()).await,
        None => pending().await,
    }
}

/// Adds a datagram to those that may have to be sent again, and lets go of the oldest where they are too many.
fn keep(unanswered: &mut VecDeque<Datagram>, datagram: Datagram, most: usize) {
    unanswered.push_back(datagram);
    let bytes = |kept: &VecDeque<Datagram>| kept.iter().map(|one| one.len()).sum::<usize>();
    while unanswered.len() > most || bytes(unanswered) > LONGEST {
        unanswered.pop_front();
    }
}

/// Counts a conversation as the laptop's, once.
fn count(uncounted: &mut Option<&Rc<Rule>>) {
    if let Some(rule) = uncounted.take() {
        rule.counters().went_to_laptop();
    }
}
