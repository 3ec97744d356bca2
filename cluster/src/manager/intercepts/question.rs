//! What a webhook asks the controller, which has the pods in memory, and what it reads of that without asking.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::births::{Births, Made};
use super::objects::Intercept;
use super::track::outlook::Outlook;

/// Questions that may wait: half of the reviews that are read at the same time, and each is answered within milliseconds.
const WAITING: usize = 16;

/// How long an answer is waited for. It is good to know, and nobody is kept waiting for it.
const PATIENCE: Duration = Duration::from_millis(500);

/// A question, and where the answer goes.
#[derive(Debug)]
pub struct Question {
    /// The intercept that somebody asks for.
    pub asked: Intercept,
    /// Dropped where nothing is known yet.
    pub answer: oneshot::Sender<Outlook>,
}

/// Where questions are asked.
#[derive(Clone, Debug)]
pub struct Inquiry {
    questions: mpsc::Sender<Question>,
    births: Births,
}

/// Where they arrive.
#[derive(Debug)]
pub struct Questions {
    questions: mpsc::Receiver<Question>,
    /// What is to be noted without being asked for.
    pub births: Births,
}

impl Questions {
    /// The next one; `None` when nobody asks any more.
    pub async fn recv(&mut self) -> Option<Question> {
        self.questions.recv().await
    }
}

/// Where questions are asked, and where they arrive.
#[must_use]
pub fn inquiry() -> (Inquiry, Questions) {
    let ((sender, receiver), births) = (mpsc::channel(WAITING), Births::default());
    (Inquiry { questions: sender, births: births.clone() }, Questions { questions: receiver, births })
}

impl Inquiry {
    /// How many pods a maker is known to have made, by its UID.
    #[must_use]
    pub fn made(&self, maker: &str) -> Made {
        self.births.of(maker)
    }

    /// What an intercept would mean to its workload's pods; `None` where that is not known, or not soon enough.
    pub async fn outlook(&self, asked: Intercept) -> Option<Outlook> {
        let (answer, answered) = oneshot::channel();
        self.questions.try_send(Question { asked, answer }).ok()?;
        timeout(PATIENCE, answered).await.ok()?.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::intercept;
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_a_controller_that_is_busy_or_knows_nothing() {
        let (inquiry, mut questions) = inquiry();
        assert_eq!(inquiry.outlook(intercept("a")).await, None);
        let answering = async {
            while let Some(Question { asked, answer }) = questions.recv().await {
                if asked.name == "c" {
                    return answer.send(Outlook { pods: 3, ..Outlook::default() });
                }
            }
            unreachable!()
        };
        let asking = async { (inquiry.outlook(intercept("b")).await, inquiry.outlook(intercept("c")).await) };
        let (answered, outlooks) = tokio::join!(answering, asking);
        assert_eq!((outlooks.0, outlooks.1.map(|outlook| outlook.pods)), (None, Some(3)));
        answered.unwrap();
        drop(questions);
        assert_eq!(inquiry.outlook(intercept("d")).await, None);
    }
}
