//! A command at a terminal, and whoever types there.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::wait::until;
use crate::{Laptop, Run, Running};

/// A command on a laptop that has a terminal of its own, as script(1) makes one. It is killed if this is dropped.
#[derive(Debug)]
pub struct Terminal {
    running: Running,
    keys: File,
    files: Files,
}

impl Terminal {
    /// Starts it.
    ///
    /// # Panics
    /// If there is nowhere to keep what is shown.
    #[must_use]
    #[track_caller]
    pub fn open(laptop: &Laptop, command: &str) -> Self {
        let files = Files::create(laptop);
        // Open at both ends, a pipe is there before its reader and does not end with a writer.
        let keys = File::options().read(true).write(true).open(files.keys()).expect("the pipe is there");
        let (screen, pipe) = (files.screen().display().to_string(), files.keys().display().to_string());
        let script =
            format!("exec script --quiet --return --flush --command \"$AT_TERMINAL\" {screen} <{pipe}");
        // One that has no size breaks no lines, and shows no progress either.
        let command = format!("stty rows 40 cols 200; exec {command}");
        let script = laptop.script(&script).env("AT_TERMINAL", command).env("TERM", "xterm");
        Self { running: script.env("SHELL", "/bin/sh").start(), keys, files }
    }

    /// Waits until it has shown this.
    #[track_caller]
    pub fn until_shows(&self, limit: Duration, text: &str) {
        until(limit, &format!("the terminal shows {text:?}"), || {
            let shown = fs::read(self.files.screen()).unwrap_or_default();
            let shown = String::from_utf8_lossy(&shown);
            // The first line is script's own, and has the command.
            let shown = shown.split_once('\n').map_or("", |(_, shown)| shown);
            if shown.contains(text) { Ok(()) } else { Err(format!("but {shown:?}")) }
        });
    }

    /// Types: `\x03` is Ctrl-C, `\x04` Ctrl-D.
    ///
    /// # Panics
    /// If nobody reads.
    pub fn types(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).expect("the pipe takes a few bytes");
    }

    /// Waits for the command to end. Its exit code is as a shell has it; what it printed and what it complained of is one text.
    #[must_use]
    #[track_caller]
    pub fn finish(self) -> Run {
        self.running.finish()
    }
}

/// A pipe to type into, and what was shown.
#[derive(Debug)]
struct Files(PathBuf);

impl Files {
    #[track_caller]
    fn create(laptop: &Laptop) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let files =
            Self(std::env::temp_dir().join(format!("tpd-e2e-{}-terminal-{number}", std::process::id())));
        laptop
            .cluster
            .machine(&format!("mkdir {} && mkfifo {}", files.0.display(), files.keys().display()))
            .run()
            .ok();
        files
    }

    fn keys(&self) -> PathBuf {
        self.0.join("keys")
    }

    fn screen(&self) -> PathBuf {
        self.0.join("screen")
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
