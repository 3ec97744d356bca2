//! Memory that many connections share.

use std::{cell::Cell, rc::Rc};

/// Bytes that connections may use for buffers beyond the size that each starts with. Clones share what is left.
#[derive(Clone, Debug)]
pub struct Budget(Rc<Cell<usize>>);

impl Budget {
    /// A budget of so many bytes.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self(Rc::new(Cell::new(bytes)))
    }

    /// A buffer that may grow at the cost of this budget.
    pub(super) fn allowance(&self, first: usize, most: usize) -> Allowance {
        Allowance { budget: self.clone(), first, size: first, most }
    }
}

/// The size of one buffer. What it has taken from the budget it gives back when dropped.
#[derive(Debug)]
pub(super) struct Allowance {
    budget: Budget,
    first: usize,
    size: usize,
    most: usize,
}

impl Allowance {
    pub(super) const fn size(&self) -> usize {
        self.size
    }

    /// Doubles the size, if the budget has room and it isn't the largest already.
    pub(super) fn grow(&mut self) {
        let left = self.budget.0.get();
        if self.size < self.most && left >= self.size {
            self.budget.0.set(left - self.size);
            self.size *= 2;
        }
    }

    /// Goes back to the first size.
    pub(super) fn shrink(&mut self) {
        let left = &self.budget.0;
        left.set(left.get() + self.size - self.first);
        self.size = self.first;
    }
}

impl Drop for Allowance {
    fn drop(&mut self) {
        self.shrink();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_buffer_takes_others_lack_until_it_is_gone() {
        let budget = Budget::new(100);
        let mut greedy = budget.allowance(10, 1000);
        (0..10).for_each(|_| greedy.grow());
        assert_eq!(greedy.size(), 80);
        let mut late = budget.allowance(10, 1000);
        (0..10).for_each(|_| late.grow());
        assert_eq!(late.size(), 40);
        drop(greedy);
        late.grow();
        assert_eq!(late.size(), 80);
        drop(late);
        assert_eq!(budget.0.get(), 100);
    }

    #[test]
    fn there_is_a_largest_size() {
        let mut allowance = Budget::new(1 << 20).allowance(10, 40);
        (0..10).for_each(|_| allowance.grow());
        assert_eq!(allowance.size(), 40);
    }
}
