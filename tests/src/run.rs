//! Running a shell script to its end, or to a deadline.

use std::io::{Read, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tpd_api::exit::ExitCode;

use crate::wait::pause;

/// No command of the tests needs longer unless it says so.
const PATIENCE: Duration = Duration::from_secs(60);

/// What `sh` is to do, and where.
#[derive(Debug)]
pub struct Script {
    command: Command,
    text: String,
    limit: Duration,
    input: String,
}

impl Script {
    /// `text` for a shell that `launcher` starts: a program and its arguments.
    #[must_use]
    pub fn new(launcher: &[&str], directory: &Path, text: &str) -> Self {
        let mut command = Command::new(launcher[0]);
        command.args(&launcher[1..]).args(["sh", "-c", text]).current_dir(directory);
        Self { command, text: text.to_owned(), limit: PATIENCE, input: String::new() }
    }

    /// Gives it another time limit than a minute.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Gives it something to read.
    #[must_use]
    pub fn input(mut self, input: impl Into<String>) -> Self {
        self.input = input.into();
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Starts it and lets it run.
    ///
    /// # Panics
    /// If there is no shell.
    #[must_use]
    pub fn start(mut self) -> Running {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let began = Instant::now();
        let mut child =
            self.command.spawn().unwrap_or_else(|error| panic!("cannot start {:?}: {error}", self.text));
        let stdout = collect(child.stdout.take().expect("it is a pipe"));
        let stderr = collect(child.stderr.take().expect("it is a pipe"));
        let mut stdin = child.stdin.take().expect("it is a pipe");
        // A program that reads nothing closes the pipe early, which is its right.
        let _ = stdin.write_all(self.input.as_bytes());
        Running { child, text: self.text, limit: self.limit, began, stdout, stderr }
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// As [`Running::finish`] does.
    #[must_use]
    #[track_caller]
    pub fn run(self) -> Run {
        self.start().finish()
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

/// A script that runs. It is killed if it is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    text: String,
    limit: Duration,
    began: Instant,
    stdout: mpsc::Receiver<String>,
    stderr: mpsc::Receiver<String>,
}

impl Running {
    /// Whether it has ended.
    pub fn ended(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_some())
    }

    /// Process id: of the command itself, where the script is just one, because launcher and shell exec.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it runs over its limit, or leaves somebody behind who holds its output open.
    #[must_use]
    #[track_caller]
    pub fn finish(mut self) -> Run {
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if self.began.elapsed() < self.limit => pause(Duration::from_millis(1)),
                Ok(None) => {
                    let _ = self.child.kill();
                    let rest = Duration::from_secs(2);
                    let (out, err) = (self.stdout.recv_timeout(rest), self.stderr.recv_timeout(rest));
                    panic!("{:?} still runs after {:?}; so far: {out:?} {err:?}", self.text, self.limit)
                }
                Err(error) => panic!("cannot wait for {:?}: {error}", self.text),
            }
        };
        let took = self.began.elapsed();
        let output = |pipe: &str, lines: &mpsc::Receiver<String>| {
            lines.recv_timeout(Duration::from_secs(2)).unwrap_or_else(|_| {
                panic!("{:?} has ended, but something it started still holds its {pipe}", self.text)
            })
        };
        let (stdout, stderr) = (output("stdout", &self.stdout), output("stderr", &self.stderr));
        Run { script: self.text.clone(), code: status.code(), stdout, stderr, took }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a script ended.
#[derive(Clone, Debug)]
pub struct Run {
    /// What was run.
    pub script: String,
    /// Exit code; none after a signal.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
    /// From start to end.
    pub took: Duration,
}

impl Run {
    /// It ended well.
    ///
    /// # Panics
    /// If it did not.
    #[track_caller]
    pub fn ok(&self) -> &Self {
        self.ends_with(0)
    }

    /// It ended with this code of tpd's table.
    ///
    /// # Panics
    /// If it did not.
    #[track_caller]
    pub fn exits(&self, code: ExitCode) -> &Self {
        assert!(
            self.code == Some(code as i32),
            "{:?} should have ended with {} ({code:?}):\n{self}",
            self.script,
            code as i32
        );
        self
    }

    /// It ended with this code.
    ///
    /// # Panics
    /// If it did not.
    #[track_caller]
    pub fn ends_with(&self, code: i32) -> &Self {
        assert!(self.code == Some(code), "{:?} should have ended with {code}:\n{self}", self.script);
        self
    }

    /// It says each of these somewhere, in whatever case.
    ///
    /// # Panics
    /// If one is missing.
    #[track_caller]
    pub fn says(&self, words: &[&str]) -> &Self {
        let text = format!("{}{}", self.stdout, self.stderr).to_lowercase();
        for word in words {
            assert!(text.contains(&word.to_lowercase()), "{:?} does not say {word:?}:\n{self}", self.script);
        }
        self
    }

    /// It took no longer than this.
    ///
    /// # Panics
    /// If it did.
    #[track_caller]
    pub fn within(&self, limit: Duration) -> &Self {
        assert!(self.took <= limit, "{:?} took {:?}, over {limit:?}:\n{self}", self.script, self.took);
        self
    }

    /// What it printed, without the last newline.
    #[must_use]
    pub fn out(&self) -> &str {
        self.stdout.trim_end()
    }

    /// What it printed, as sorted lines.
    #[must_use]
    pub fn lines(&self) -> Vec<&str> {
        let mut lines: Vec<_> = self.stdout.lines().collect();
        lines.sort_unstable();
        lines
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "  exit code {:?} after {:?}", self.code, self.took)?;
        for line in self.stdout.lines() {
            writeln!(f, "  | {line}")?;
        }
        for line in self.stderr.lines() {
            writeln!(f, "  ! {line}")?;
        }
        Ok(())
    }
}
