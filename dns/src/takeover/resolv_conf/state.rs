//! The way back: what was at resolv.conf's place, what we put there, and exchanging one for the other.
//!
//! The way back is on disk before anything changes, so at any moment a crash leaves enough to undo what was done.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::{
        fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown, symlink},
        io::AsFd,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use super::boot;
use crate::takeover::TakeoverError;

/// Everybody's resolver reads it.
const MODE: u32 = 0o644;

/// What was there before us.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Before {
    /// Where the symbolic link led, if it was one.
    link: Option<PathBuf>,
    /// What programs read there; `None` if there was nothing.
    pub(super) content: Option<Vec<u8>>,
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Before {
    pub(super) fn read(path: &Path) -> io::Result<Self> {
        let link = match fs::read_link(path) {
            Ok(target) => Some(target),
            Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::NotFound) => {
                None
            }
            Err(error) => return Err(error),
        };
        let content = read(path)?;
        let (mode, uid, gid) = match fs::metadata(path) {
            Ok(metadata) => (metadata.mode() & 0o7777, metadata.uid(), metadata.gid()),
            Err(_) => (MODE, 0, 0),
        };
        Ok(Self { link, content, mode, uid, gid })
    }

    pub(super) fn link(&self) -> Option<&Path> {
        self.link.as_deref()
    }

    /// Mode, owner and group.
    pub(super) fn attributes(&self) -> (u32, u32, u32) {
        (self.mode, self.uid, self.gid)
    }

    /// The file behind the symbolic link, which somebody else may go on maintaining.
    pub(super) fn target(&self, path: &Path) -> Option<PathBuf> {
        self.link.as_ref().map(|target| path.parent().unwrap_or_else(|| Path::new("/")).join(target))
    }
}

#[cfg(test)]
impl Before {
    pub(super) fn nothing() -> Self {
        Self { link: None, content: None, mode: MODE, uid: 0, gid: 0 }
    }

    pub(super) fn file(content: &[u8]) -> Self {
        Self { content: Some(content.into()), ..Self::nothing() }
    }

    pub(super) fn link_to(target: &str) -> Self {
        Self { link: Some(target.into()), ..Self::nothing() }
    }
}

/// The way back, as it is kept on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    path: PathBuf,
    pub(super) before: Before,
    ours: String,
    /// The process that took over. A watchdog undoes the work of its own and of no later one.
    owner: u32,
    /// What restores it at boot, if anything does.
    boot: Option<PathBuf>,
}

/// What became of a takeover that was to be undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    /// There was none.
    Nothing,
    /// The system has what it had.
    Restored,
    /// Somebody else has changed the settings since, and they were left so.
    LeftAlone,
}

impl Saved {
    pub(super) fn new(path: &Path, before: Before, ours: String) -> Self {
        Self { path: path.to_owned(), before, ours, owner: std::process::id(), boot: None }
    }

    /// Is what programs read there what we wrote?
    pub(super) fn is_in_force(&self) -> bool {
        matches!(read(&self.path), Ok(Some(content)) if content == self.ours.as_bytes())
    }

    /// Writes the way back, then resolv.conf.
    pub(super) fn take(&mut self, state_dir: &Path) -> Result<(), TakeoverError> {
        fs::create_dir_all(state_dir).map_err(file_error("create", state_dir))?;
        let _lock = lock(state_dir)?;
        self.boot = boot::arrange(&self.path, &self.before).unwrap_or_else(|error| {
            tracing::warn!(%error, "resolv.conf would not be restored by a reboot");
            None
        });
        self.save(state_dir)?;
        let replaced = replace(&self.path, self.ours.as_bytes(), MODE, None);
        let replaced = replaced.map_err(|error| change_error(error, &self.path))?;
        if replaced == Replaced::InPlace {
            // A mount doesn't outlive the system, and what is under it was never touched.
            self.cancel_boot()?;
        }
        Ok(())
    }

    /// The file is somebody else's for now, and would be at the next boot.
    pub(super) fn yielded(&self) {
        if let Err(error) = self.cancel_boot() {
            tracing::warn!(%error, "the next boot would undo what somebody else wrote");
        }
    }

    fn cancel_boot(&self) -> Result<(), TakeoverError> {
        match &self.boot {
            Some(entry) => boot::cancel(entry).map_err(file_error("remove", entry)),
            None => Ok(()),
        }
    }

    fn save(&self, state_dir: &Path) -> Result<(), TakeoverError> {
        let path = state_file(state_dir);
        let json = serde_json::to_vec(self).expect("a struct of plain fields is JSON");
        write_and_rename(&path, &json, 0o600, None).map_err(file_error("write", &path))
    }

    fn restore(&self) -> io::Result<Recovery> {
        if !self.is_in_force() {
            return Ok(Recovery::LeftAlone);
        }
        let Before { link, content, mode, uid, gid } = &self.before;
        let still_link = fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.is_symlink());
        match (link, content) {
            // The link itself couldn't be replaced, so the file behind it was written.
            (Some(_), Some(content)) if still_link => overwrite(&self.path, content)?,
            (Some(target), _) => link_and_rename(target, &self.path)?,
            (None, Some(content)) => drop(replace(&self.path, content, *mode, Some((*uid, *gid)))?),
            (None, None) => match fs::remove_file(&self.path) {
                Err(error) if falls_back(&error) => overwrite(&self.path, b"")?,
                result => result?,
            },
        }
        Ok(Recovery::Restored)
    }
}

/// Undoes the takeover whose way back is in `state_dir`, if there is one: after a crash, a reboot or a power cut.
///
/// What somebody else has changed since stays as it is.
pub fn recover(state_dir: &Path) -> Result<Recovery, TakeoverError> {
    recover_if(state_dir, |_| true)
}

/// The same, for the takeover of process `owner` alone.
pub(crate) fn recover_from(state_dir: &Path, owner: u32) -> Result<Recovery, TakeoverError> {
    recover_if(state_dir, |saved| saved.owner == owner)
}

fn recover_if(state_dir: &Path, concerns: impl Fn(&Saved) -> bool) -> Result<Recovery, TakeoverError> {
    let path = state_file(state_dir);
    if !path.exists() {
        return Ok(Recovery::Nothing);
    }
    let _lock = lock(state_dir)?;
    let Some(content) = read(&path).map_err(file_error("read", &path))? else { return Ok(Recovery::Nothing) };
    let saved: Saved =
        serde_json::from_slice(&content).map_err(io::Error::from).map_err(file_error("understand", &path))?;
    if !concerns(&saved) {
        return Ok(Recovery::Nothing);
    }
    let recovery = saved.restore().map_err(|error| change_error(error, &saved.path))?;
    saved.cancel_boot()?;
    fs::remove_file(&path).map_err(file_error("remove", &path))?;
    tracing::info!(path = %saved.path.display(), ?recovery, "resolver given back");
    Ok(recovery)
}

fn state_file(state_dir: &Path) -> PathBuf {
    state_dir.join("resolv.conf.json")
}

/// Held while state and resolv.conf are out of step, so that a watchdog and a new daemon don't undo each other's work.
fn lock(state_dir: &Path) -> Result<File, TakeoverError> {
    let path = state_dir.join("resolv.conf.lock");
    let open = || {
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path)?;
        flock(file.as_fd(), FlockOperation::LockExclusive)?;
        Ok(file)
    };
    open().map_err(file_error("lock", &path))
}

pub(super) fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// How a file got its new content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Replaced {
    InOneStep,
    InPlace,
}

/// Puts a file with `content` at `path` in one step, or where that can't be, writes it into the one that is there.
fn replace(path: &Path, content: &[u8], mode: u32, owner: Option<(u32, u32)>) -> io::Result<Replaced> {
    match write_and_rename(path, content, mode, owner) {
        Err(error) if falls_back(&error) => overwrite(path, content).map(|()| Replaced::InPlace),
        result => result.map(|()| Replaced::InOneStep),
    }
}

/// A mount point (containers, `ip netns exec`) can't be renamed over, nor anything in a directory that is read-only.
fn falls_back(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::BUSY | Errno::ROFS | Errno::ACCESS | Errno::XDEV))
}

fn write_and_rename(path: &Path, content: &[u8], mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
    in_one_step(path, |temporary| {
        let mut file = OpenOptions::new().create_new(true).write(true).mode(mode).open(temporary)?;
        file.write_all(content)?;
        // The mode again, for the umask has taken its share.
        file.set_permissions(Permissions::from_mode(mode))?;
        if let Some((uid, gid)) = owner {
            fchown(&file, Some(uid), Some(gid))?;
        }
        file.sync_all()
    })
}

fn link_and_rename(target: &Path, path: &Path) -> io::Result<()> {
    in_one_step(path, |temporary| symlink(target, temporary))
}

fn in_one_step(path: &Path, make: impl Fn(&Path) -> io::Result<()>) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".tpd-{}", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let result = make(&temporary).and_then(|()| fs::rename(&temporary, path));
    if result.is_err() {
        // It may not even have been made.
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// Writes first and cuts off afterwards, so that no reader ever finds the file empty.
fn overwrite(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.write_all(content)?;
    file.set_len(content.len() as u64)?;
    file.sync_all()
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TakeoverError {
    let path = path.to_owned();
    move |source| TakeoverError::File { action, path, source }
}

fn change_error(error: io::Error, path: &Path) -> TakeoverError {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::PERM) => TakeoverError::Immutable { path: path.to_owned() },
        _ => file_error("change", path)(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "nameserver 192.0.2.1\n";
    const OURS: &str = "nameserver 100.127.0.5\n";

    struct Bench(PathBuf);

    impl Bench {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("tpd-dns-{}-{name}", std::process::id()));
            fs::create_dir_all(path.join("state")).unwrap();
            Self(path)
        }

        fn conf(&self) -> PathBuf {
            self.0.join("resolv.conf")
        }

        fn state(&self) -> PathBuf {
            self.0.join("state")
        }

        fn take(&self) -> Saved {
            let mut saved = Saved::new(&self.conf(), Before::read(&self.conf()).unwrap(), OURS.into());
            saved.take(&self.state()).unwrap();
            assert!(saved.is_in_force());
            saved
        }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_file_comes_back_with_its_mode() {
        let bench = Bench::new("file");
        fs::write(bench.conf(), OLD).unwrap();
        fs::set_permissions(bench.conf(), Permissions::from_mode(0o664)).unwrap();
        bench.take();
        assert_eq!(recover(&bench.state()).unwrap(), Recovery::Restored);
        assert_eq!(fs::read_to_string(bench.conf()).unwrap(), OLD);
        assert_eq!(fs::metadata(bench.conf()).unwrap().mode() & 0o7777, 0o664);
        assert_eq!(recover(&bench.state()).unwrap(), Recovery::Nothing);
        assert_eq!(fs::read_dir(&bench.0).unwrap().count(), 2, "nothing is left behind");
    }

    #[test]
    fn a_link_comes_back_and_its_target_is_never_touched() {
        let bench = Bench::new("link");
        fs::write(bench.0.join("target"), OLD).unwrap();
        symlink("target", bench.conf()).unwrap();
        let saved = bench.take();
        assert_eq!(saved.before.target(&bench.conf()), Some(bench.0.join("target")));
        assert_eq!(fs::read_to_string(bench.0.join("target")).unwrap(), OLD);
        assert_eq!(recover(&bench.state()).unwrap(), Recovery::Restored);
        assert_eq!(fs::read_link(bench.conf()).unwrap(), Path::new("target"));
    }

    #[test]
    fn a_dangling_link_and_nothing_at_all_come_back_too() {
        let bench = Bench::new("dangling");
        symlink("nowhere", bench.conf()).unwrap();
        bench.take();
        assert_eq!(recover(&bench.state()).unwrap(), Recovery::Restored);
        assert_eq!(fs::read_link(bench.conf()).unwrap(), Path::new("nowhere"));
        fs::remove_file(bench.conf()).unwrap();
        bench.take();
        assert_eq!(recover(&bench.state()).unwrap(), Recovery::Restored);
        assert!(!bench.conf().exists());
    }

    #[test]
    fn what_somebody_else_wrote_stays() {
        let bench = Bench::new("foreign");
        fs::write(bench.conf(), OLD).unwrap();
        bench.take();
        fs::write(bench.conf(), "nameserver 203.0.113.1\n").unwrap();
        assert_eq!(recover(&bench.state()).unwrap(), Recovery::LeftAlone);
        assert_eq!(fs::read_to_string(bench.conf()).unwrap(), "nameserver 203.0.113.1\n");
    }

    #[test]
    fn a_watchdog_undoes_its_own_daemons_work_alone() {
        let bench = Bench::new("owner");
        fs::write(bench.conf(), OLD).unwrap();
        bench.take();
        assert_eq!(recover_from(&bench.state(), std::process::id() + 1).unwrap(), Recovery::Nothing);
        assert_eq!(recover_from(&bench.state(), std::process::id()).unwrap(), Recovery::Restored);
    }

    #[test]
    fn a_broken_way_back_is_an_error_that_names_the_file() {
        let bench = Bench::new("broken");
        fs::write(state_file(&bench.state()), "{").unwrap();
        let error = recover(&bench.state()).unwrap_err();
        assert!(error.to_string().contains("cannot understand"), "{error}");
    }
}
