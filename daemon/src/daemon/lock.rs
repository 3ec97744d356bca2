//! One daemon per machine.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};

/// Held by the daemon for as long as it lives; its process id is in it.
pub(crate) const LOCK: &str = "/run/tpd/lock";

/// The daemon's hold on the machine.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// `None` where another daemon has it.
    pub(crate) fn take(path: &Path) -> io::Result<Option<Self>> {
        // For root alone: whoever may open it may lock it, and then no daemon starts.
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                file.set_len(0)?;
                write!(file, "{}", std::process::id())?;
                Ok(Some(Self { _file: file }))
            }
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Kills the daemon that holds the lock, if one does: for one that no longer listens. Its guard puts things back.
pub(crate) fn kill_holder(path: &Path) -> io::Result<()> {
    if Lock::take(path)?.is_some() {
        return Ok(());
    }
    let pid = fs::read_to_string(path)?.trim().parse().ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("the lock names no process"))?;
    Ok(kill_process(pid, Signal::KILL)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_lock_is_held_by_one() {
        let path = std::env::temp_dir().join(format!("tpd-lock-{}", std::process::id()));
        let held = Lock::take(&path).unwrap();
        assert!(held.is_some() && Lock::take(&path).unwrap().is_none());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(held);
        assert!(Lock::take(&path).unwrap().is_some());
        fs::remove_file(path).unwrap();
    }
}
