//! Copies of one client's datagrams for wiretaps.

use std::rc::Rc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::Channels;
use super::conversation::send;
use crate::agent::proxy::datagrams::{Datagram, Queue};
use crate::agent::proxy::rules::Rule;

/// Copies of what one client sends. What a tap does not take at once is lost.
pub(super) struct Taps {
    queues: Vec<(Rc<Rule>, Queue)>,
    _carriers: JoinSet<()>,
}

impl Taps {
    pub(super) fn new<C: Channels>(rules: &[Rc<Rule>], channels: &Rc<C>) -> Self {
        let mut carriers = JoinSet::new();
        let queues = rules.iter().map(|rule| {
            let (queue, copies) = Queue::new();
            carriers.spawn_local(carry(rule.clone(), channels.clone(), copies));
            (rule.clone(), queue)
        });
        Self { queues: queues.collect(), _carriers: carriers }
    }

    pub(super) fn copy(&self, datagram: &[u8]) {
        for (rule, queue) in &self.queues {
            if !queue.push(datagram) {
                rule.counters().lost_copy();
            }
        }
    }
}

async fn carry<C: Channels>(rule: Rc<Rule>, channels: Rc<C>, mut copies: mpsc::Receiver<Datagram>) {
    let mut channel: Option<C::Laptop> = None;
    let mut counted = false;
    while let Some(copy) = copies.recv().await {
        // A laptop that is not there may come back, and by another way.
        if channel.as_ref().is_none_or(|open| channels.is_left_out(&rule, open)) {
            channel = channels.laptop(&rule).await.ok();
        }
        let Some(open) = &channel else {
            rule.counters().lost_copy();
            continue;
        };
        if send(open, &copy).await.is_err() {
            // It was an earlier one that did not arrive; this one has not been sent yet.
            rule.counters().lost_copy();
            let _ = send(open, &copy).await;
        } else if !std::mem::replace(&mut counted, true) {
            rule.counters().went_to_laptop();
        }
    }
}
