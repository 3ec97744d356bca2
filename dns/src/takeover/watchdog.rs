//! A process of its own that outlives the daemon by a moment, and gives the resolver back when the daemon was killed.
//!
//! ```text
//! daemon ── watchdog::spawn ──► child: watchdog::restore_when_gone(state_dir, stdin)
//!    └── holds the other end of the child's stdin, which closes when the daemon ends, in whatever way
//! ```

use std::{
    io::{self, Read},
    os::unix::process::{CommandExt, parent_id},
    path::Path,
    process::{Child, Command, Stdio},
};

use super::{
    TakeoverError,
    resolv_conf::{Recovery, recover_from},
};

/// The daemon's end. The child restores and ends as soon as this is dropped or its process is gone.
#[derive(Debug)]
pub struct Watchdog {
    child: Child,
}

/// Starts `command`, which has to call [`restore_when_gone`] with its standard input.
///
/// It gets a process group of its own, so that a Ctrl-C in the daemon's terminal leaves it alone.
pub fn spawn(mut command: Command) -> io::Result<Watchdog> {
    let child = command.stdin(Stdio::piped()).process_group(0).spawn()?;
    Ok(Watchdog { child })
}

impl Watchdog {
    /// The child's process, so that it can be told apart from others.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Ends the child and waits for it; for after [`super::Guard::revert`], when it has nothing left to do.
    pub fn end(mut self) -> io::Result<()> {
        drop(self.child.stdin.take());
        self.child.wait().map(drop)
    }
}

/// Blocks until `daemon` ends, then undoes the takeover that the parent process has left behind. Call it first thing in the child.
///
/// Afterwards nothing is left to do: the tunnel's interface, its routes and what systemd-resolved knew about it went with the daemon.
pub fn restore_when_gone(state_dir: &Path, mut daemon: impl Read) -> Result<Recovery, TakeoverError> {
    let owner = parent_id();
    let mut buffer = [0; 64];
    loop {
        match daemon.read(&mut buffer) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    recover_from(state_dir, owner)
}
