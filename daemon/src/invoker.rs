//! The person behind the command: under sudo that is whoever called sudo, and not root.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::{env, fs, io, thread};

use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use serde::{Deserialize, Serialize};

/// Variables that sudo sets to root's; the invoker's own are in the environment that sudo was started with.
const REPLACED_BY_SUDO: [&str; 8] = ["HOME", "PATH", "USER", "USERNAME", "LOGNAME", "SHELL", "MAIL", "TERM"];

/// Proxy settings that the connection to the API server obeys.
const PROXY_VARIABLES: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"];

/// Whose kubeconfig, credentials and environment count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Invoker {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) environment: BTreeMap<String, String>,
    /// Where relative paths start.
    pub(crate) directory: PathBuf,
}

impl Invoker {
    pub(crate) fn detect() -> Self {
        let own: BTreeMap<_, _> = env::vars_os()
            .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let directory = env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        match sudo_user(&own) {
            Some((uid, gid)) if rustix::process::geteuid().is_root() => {
                let environment = match sudo_environment() {
                    Some(before) => behind_sudo(before, own),
                    None => with_home(own, uid),
                };
                Self { uid, gid, environment, directory }
            }
            _ => Self {
                uid: rustix::process::getuid().as_raw(),
                gid: rustix::process::getgid().as_raw(),
                environment: own,
                directory,
            },
        }
    }

    pub(crate) fn variable(&self, name: &str) -> Option<&str> {
        self.environment.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub(crate) fn home(&self) -> Option<PathBuf> {
        self.variable("HOME").map(PathBuf::from)
    }

    /// A path as this person means it.
    pub(crate) fn absolute(&self, path: &Path) -> PathBuf {
        self.directory.join(path)
    }

    /// Whether this process is root, and this person is not.
    pub(crate) fn is_under_root(&self) -> bool {
        rustix::process::geteuid().is_root() && self.uid != 0
    }

    /// Does something with this person's own rights, and none of root's.
    ///
    /// To the kernel, rights are a thread's. This one gives root's up for good, and ends; the others keep them.
    pub(crate) fn act<T: Send>(&self, deed: impl FnOnce() -> T + Send) -> io::Result<T> {
        if !self.is_under_root() {
            return Ok(deed());
        }
        thread::scope(|scope| {
            let acting = thread::Builder::new().spawn_scoped(scope, || {
                self.give_up_root()?;
                Ok(deed())
            })?;
            acting.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// The same where nobody may be kept waiting: what is read may be on a network.
    pub(crate) async fn act_aside<T: Send + 'static>(
        &self,
        deed: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let person = self.clone();
        tokio::task::spawn_blocking(move || person.act(deed)).await.map_err(io::Error::other)?
    }

    /// The user last, who may change nothing any more.
    fn give_up_root(&self) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        set_thread_groups(&groups_of(self.uid))?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    }

    /// The proxy settings to give to a process that connects for this person.
    pub(crate) fn proxy_variables(&self) -> impl Iterator<Item = (&str, &str)> {
        PROXY_VARIABLES.iter().filter_map(|name| Some((*name, self.variable(name)?)))
    }
}

fn sudo_user(own: &BTreeMap<String, String>) -> Option<(u32, u32)> {
    let number = |name: &str| own.get(name)?.parse().ok();
    Some((number("SUDO_UID")?, number("SUDO_GID")?))
}

/// The environment that the nearest sudo above this process was started with.
fn sudo_environment() -> Option<BTreeMap<String, String>> {
    // A login under a desktop is some twenty processes deep; the bound only guards against a torn read.
    let mut pid = std::process::id();
    for _ in 0..64 {
        pid = parent(pid)?;
        if fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim_end() == "sudo" {
            return fs::read(format!("/proc/{pid}/environ")).ok().map(|raw| parse_environment(&raw));
        }
    }
    None
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command in brackets and may itself hold brackets and spaces; see proc(5).
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(1)?.parse().ok().filter(|&pid| pid > 0)
}

fn parse_environment(raw: &[u8]) -> BTreeMap<String, String> {
    raw.split(|&byte| byte == 0)
        .filter_map(|entry| std::str::from_utf8(entry).ok()?.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// What the invoker had before sudo, with what was given on sudo's own command line (`sudo KUBECONFIG=x tpd up`).
fn behind_sudo(before: BTreeMap<String, String>, own: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut environment = before;
    environment.extend(
        own.into_iter()
            .filter(|(key, _)| !REPLACED_BY_SUDO.contains(&key.as_str()) && !key.starts_with("SUDO_")),
    );
    environment
}

/// Without sudo's own environment at hand (a wrapper that execs), at least the home directory is the user's.
fn with_home(mut own: BTreeMap<String, String>, uid: u32) -> BTreeMap<String, String> {
    if let Some(home) = fs::read_to_string("/etc/passwd").ok().and_then(|passwd| home_of(&passwd, uid)) {
        own.insert("HOME".into(), home);
    }
    own
}

fn home_of(passwd: &str, uid: u32) -> Option<String> {
    entry_of(passwd, uid).and_then(|fields| fields.get(5).map(|home| (*home).to_owned()))
}

/// The fields of a user's line; see passwd(5).
fn entry_of(passwd: &str, uid: u32) -> Option<Vec<&str>> {
    passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2).and_then(|field| field.parse().ok()) == Some(uid))
}

/// The groups that a user is in besides the own one, as far as this machine itself knows them.
fn groups_of(uid: u32) -> Vec<Gid> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let groups = members_of(&read("/etc/passwd"), &read("/etc/group"), uid);
    groups.into_iter().map(Gid::from_raw).collect()
}

/// The same of the files' contents; see group(5).
fn members_of(passwd: &str, group: &str, uid: u32) -> Vec<u32> {
    let Some(name) = entry_of(passwd, uid).and_then(|fields| fields.first().copied()) else {
        return Vec::new();
    };
    let fields = group.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let own = fields
        .filter(|fields| fields.get(3).is_some_and(|members| members.split(',').any(|one| one == name)));
    own.filter_map(|fields| fields.get(2)?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    }

    #[test]
    fn the_invokers_home_and_path_survive_sudo() {
        let before = map(&[("HOME", "/home/ann"), ("PATH", "/home/ann/bin"), ("AWS_PROFILE", "dev")]);
        let own = map(&[("HOME", "/root"), ("PATH", "/usr/sbin"), ("SUDO_UID", "1000"), ("LANG", "C")]);
        let environment = behind_sudo(before, own);
        assert_eq!(
            environment,
            map(&[("HOME", "/home/ann"), ("PATH", "/home/ann/bin"), ("AWS_PROFILE", "dev"), ("LANG", "C")])
        );
    }

    #[test]
    fn a_variable_given_to_sudo_wins() {
        let environment =
            behind_sudo(map(&[("KUBECONFIG", "/home/ann/a")]), map(&[("KUBECONFIG", "/home/ann/b")]));
        assert_eq!(environment["KUBECONFIG"], "/home/ann/b");
    }

    #[test]
    fn environments_and_passwd_are_parsed() {
        assert_eq!(parse_environment(b"A=1\0B=x=y\0\0bad\0"), map(&[("A", "1"), ("B", "x=y")]));
        let passwd = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n";
        assert_eq!(home_of(passwd, 1000).as_deref(), Some("/home/ann"));
        let group = "root:x:0:\nk3s:x:990:bob,ann\nann:x:1000:\nwheel:x:10:ann2\nvpn:x:991:ann\n";
        assert_eq!(members_of(passwd, group, 1000), [990, 991]);
        assert!(members_of(passwd, group, 7).is_empty());
        assert_eq!(home_of(passwd, 7), None);
    }

    #[test]
    fn the_parent_of_this_process_is_found() {
        assert_eq!(parent(std::process::id()), Some(std::os::unix::process::parent_id()));
    }

    #[test]
    fn whoever_called_sudo_acts_without_roots_rights_and_the_rest_keeps_them() {
        let own = || (rustix::process::geteuid(), rustix::process::getegid());
        let before = own();
        // Without root there is only oneself to be.
        let (uid, gid) =
            if before.0.is_root() { (65_534, 65_533) } else { (before.0.as_raw(), before.1.as_raw()) };
        let person = Invoker { uid, gid, environment: BTreeMap::new(), directory: "/".into() };
        let (rights, groups) = person.act(|| (own(), rustix::process::getgroups().unwrap())).unwrap();
        assert_eq!(rights, (Uid::from_raw(uid), Gid::from_raw(gid)));
        assert!(groups.is_empty() || !before.0.is_root());
        assert!(before.0.is_root() || person.act(own).unwrap() == before);
        assert_eq!(own(), before);
    }
}
