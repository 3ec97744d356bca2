//! How packets that come in reach the task of their flow.

use std::{
    cell::{Cell, RefCell},
    task::{Context, Waker},
};

/// The link between a flow's entry in the table and its task.
pub(super) struct Task {
    waker: RefCell<Waker>,
    /// Whether it has been woken since it last ran.
    woken: Cell<bool>,
    aborted: Cell<bool>,
}

impl Default for Task {
    fn default() -> Self {
        Self {
            waker: RefCell::new(Waker::noop().clone()),
            woken: Cell::new(false),
            aborted: Cell::new(false),
        }
    }
}

impl Task {
    /// Has the task run after the lane's present batch.
    pub(super) fn wake(&self) {
        if !self.woken.replace(true) {
            self.waker.borrow().wake_by_ref();
        }
    }

    /// Has the flow end at once.
    pub(super) fn abort(&self) {
        self.aborted.set(true);
        self.wake();
    }

    pub(super) fn is_aborted(&self) -> bool {
        self.aborted.get()
    }

    /// To be called whenever the task starts to run.
    pub(super) fn park(&self, context: &Context<'_>) {
        self.woken.set(false);
        let mut waker = self.waker.borrow_mut();
        if !waker.will_wake(context.waker()) {
            waker.clone_from(context.waker());
        }
    }
}
