//! The daemon's log: a file of bounded size that the invoker may read.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tracing_subscriber::EnvFilter;

use crate::invoker::Invoker;

/// The log and the one before it take twice this at most.
const LIMIT: u64 = 8 * 1024 * 1024;

/// What is logged unless `TPD_LOG` says otherwise. boringtun calls ordinary idle events errors.
const FILTER: &str = "info,boringtun=off,zbus=warn";

/// Sends all logging to `path`.
pub(crate) fn start(path: &Path, invoker: &Invoker) -> io::Result<()> {
    let file = Rotating::open(path, (invoker.uid, invoker.gid))?;
    let filter = invoker.variable("TPD_LOG").and_then(|filter| EnvFilter::try_new(filter).ok());
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|| EnvFilter::new(FILTER)))
        .with_ansi(false)
        .with_writer(Mutex::new(file))
        .try_init()
        .map_err(io::Error::other)
}

/// Opens the log for something that writes to it directly, as a panic does to standard error.
pub(crate) fn open(path: &Path, owner: (u32, u32)) -> io::Result<File> {
    if let Some(directory) = path.parent() {
        public_directory(directory)?;
    }
    // Somebody else's tells of clusters that are none of the owner's business.
    if fs::metadata(path).is_ok_and(|found| found.uid() != owner.0) {
        fs::rename(path, before(path))?;
    }
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    // Where we are not root the file is the invoker's anyway.
    let _ = fchown(&file, Some(owner.0), Some(owner.1));
    Ok(file)
}

/// Where a log goes that is set aside.
fn before(path: &Path) -> PathBuf {
    let mut before = path.as_os_str().to_owned();
    before.push(".1");
    before.into()
}

/// A directory that everyone may look into, whatever root's umask is.
pub(crate) fn public_directory(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

struct Rotating {
    path: PathBuf,
    owner: (u32, u32),
    file: File,
    size: u64,
}

impl Rotating {
    fn open(path: &Path, owner: (u32, u32)) -> io::Result<Self> {
        let file = open(path, owner)?;
        let size = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), owner, file, size })
    }

    fn rotate(&mut self) -> io::Result<()> {
        fs::rename(&self.path, before(&self.path))?;
        *self = Self::open(&self.path, self.owner)?;
        Ok(())
    }
}

impl Write for Rotating {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.size > LIMIT {
            self.rotate()?;
        }
        let written = self.file.write(line)?;
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The newest `count` lines of a log, and how long the log was when they were read.
pub(crate) fn tail(path: &Path, count: usize) -> io::Result<(String, u64)> {
    let text = String::from_utf8_lossy(&fs::read(path)?).into_owned();
    let lines: Vec<_> = text.split_inclusive('\n').collect();
    let newest = lines[lines.len().saturating_sub(count)..].concat();
    Ok((newest, text.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("tpd-log-{name}-{}", std::process::id()));
        let _ = fs::remove_file(&path);
        path
    }

    #[test]
    fn a_full_log_is_set_aside() {
        let path = scratch("rotate");
        let owner = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let mut log = Rotating::open(&path, owner).unwrap();
        log.write_all(b"old\n").unwrap();
        log.size = LIMIT + 1;
        log.write_all(b"new 1\nnew 2\n").unwrap();
        assert_eq!(tail(&path, 1).unwrap(), ("new 2\n".into(), 12));
        assert_eq!(fs::read_to_string(before(&path)).unwrap(), "old\n");
        fs::remove_file(before(&path)).unwrap();
        fs::remove_file(path).unwrap();
    }

    /// Only root may write for others.
    #[test]
    fn somebody_elses_log_is_set_aside() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let path = scratch("owner");
        Rotating::open(&path, (1000, 1000)).unwrap().write_all(b"ann's\n").unwrap();
        Rotating::open(&path, (1000, 1000)).unwrap().write_all(b"too\n").unwrap();
        Rotating::open(&path, (1001, 1001)).unwrap().write_all(b"bob's\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "bob's\n");
        assert_eq!(fs::read_to_string(before(&path)).unwrap(), "ann's\ntoo\n");
        assert_eq!(fs::metadata(before(&path)).unwrap().uid(), 1000);
        fs::remove_file(before(&path)).unwrap();
        fs::remove_file(path).unwrap();
    }
}
