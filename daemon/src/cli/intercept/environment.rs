//! The app's environment: in a file, and for a command.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use tpd_api::exit::ExitCode;

use crate::failure::Failure;
use crate::invoker::Invoker;

/// Variables that say where a process runs, and on this machine are this machine's.
const OWN: [&str; 8] = ["HOME", "HOSTNAME", "LOGNAME", "PATH", "PWD", "SHELL", "TERM", "USER"];

/// Writes variables to a file that its owner alone may read: there are secrets among them. It is a new file that takes the place of
/// the one of that name, so whoever has that open, or may read it, learns nothing.
///
/// Under sudo it is written as whoever called sudo: names and links lead where that person may write, and nowhere else.
pub(super) fn write(
    path: &Path,
    variables: &BTreeMap<String, String>,
    invoker: &Invoker,
) -> Result<(), Failure> {
    let path = invoker.absolute(path);
    let text = render(variables);
    let written = invoker.act(|| replace(&path, text.as_bytes()));
    let failure = match written {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(failure)) => failure,
        Err(error) => cannot_be_written(&path, &error),
    };
    Err(if invoker.is_under_root() && failure.help.is_none() {
        failure.help(format!(
            "under sudo it is written with the rights of whoever called it: uid {}, gid {}",
            invoker.uid, invoker.gid
        ))
    } else {
        failure
    })
}

fn replace(path: &Path, text: &[u8]) -> Result<(), Failure> {
    let path = target(path.to_owned())?;
    let beside = beside(&path);
    let written = || -> io::Result<()> {
        // `create_new` follows no link that somebody else has put there.
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(text)?;
        fs::rename(&beside, &path)
    };
    written().map_err(|error| {
        if error.kind() != io::ErrorKind::AlreadyExists {
            let _ = fs::remove_file(&beside);
        }
        cannot_be_written(&path, &error)
    })
}

fn cannot_be_written(path: &Path, error: &io::Error) -> Failure {
    Failure::new(ExitCode::Failure, format!("{} cannot be written", path.display())).caused_by(error)
}

/// The file to write: where links lead.
fn target(path: PathBuf) -> Result<PathBuf, Failure> {
    let refused = |what: &str| {
        Err(Failure::new(ExitCode::Usage, format!("{} is {what}", path.display()))
            .help("name a file with --env-file; one that is there already is replaced"))
    };
    match fs::symlink_metadata(&path) {
        // One that leads nowhere is replaced.
        Ok(found) if found.is_symlink() => match fs::canonicalize(&path) {
            Ok(path) => target(path),
            Err(_) => Ok(path),
        },
        Ok(found) if found.is_dir() => refused("a directory"),
        Ok(found) if !found.is_file() => refused("no regular file"),
        // Whoever writes it says what else is wrong with it.
        Ok(_) | Err(_) => Ok(path),
    }
}

/// A name in the same directory, and so in the same file system.
fn beside(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".tpd-{}", std::process::id()));
    path.with_file_name(name)
}

/// Lines that a shell reads (`set -a; . FILE`), and whatever else reads `.env` files. Names that no shell has are left out.
fn render(variables: &BTreeMap<String, String>) -> String {
    let named = variables.iter().filter(|(name, _)| is_name(name));
    named.map(|(name, value)| format!("{name}={}\n", quote(value))).collect()
}

fn is_name(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && name.starts_with(|first: char| !first.is_ascii_digit())
}

fn quote(value: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_./:@%+,-".contains(&byte);
    if value.bytes().all(plain) { value.to_owned() } else { format!("'{}'", value.replace('\'', r"'\''")) }
}

/// What a command gets of them.
pub(super) fn for_command(variables: BTreeMap<String, String>) -> BTreeMap<String, String> {
    variables.into_iter().filter(|(name, _)| !OWN.contains(&name.as_str())).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};

    use super::*;

    fn variables(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_shell_reads_back_what_was_written() {
        let nasty = [
            ("DB_URL", "postgres://u:p@db:5432/x?sslmode=off"),
            ("EMPTY", ""),
            ("LINES", "a\nb"),
            ("QUOTES", "it's \"$HOME\" `x` \\"),
            ("PLAIN", "a-b_c.d/e:1"),
            ("not.a.name", "x"),
            ("9X", "x"),
        ];
        let text = render(&variables(&nasty));
        assert!(text.contains("PLAIN=a-b_c.d/e:1\n") && !text.contains("not.a.name") && !text.contains("9X"));
        let path = std::env::temp_dir().join(format!("tpd-env-{}", std::process::id()));
        fs::write(&path, &text).unwrap();
        for (name, value) in &nasty[..5] {
            let script = format!(". {}; printf %s \"${name}\"", path.display());
            let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), *value, "{name}");
        }
        fs::remove_file(path).unwrap();
    }

    /// Somebody else than root, which who runs the tests may be.
    fn invoker() -> Invoker {
        let (uid, gid) = match rustix::process::getuid() {
            uid if uid.is_root() => (65_534, 65_533),
            uid => (uid.as_raw(), rustix::process::getgid().as_raw()),
        };
        Invoker { uid, gid, environment: BTreeMap::new(), directory: "/".into() }
    }

    /// One of the invoker's.
    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("tpd-env-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        chown(&path, Some(invoker().uid), Some(invoker().gid)).unwrap();
        path
    }

    #[test]
    fn the_file_is_for_its_owner_alone_and_a_new_one() {
        let directory = directory("mode");
        let (path, old) = (directory.join(".env"), directory.join("old"));
        fs::write(&old, "old").unwrap();
        fs::hard_link(&old, &path).unwrap();
        write(&path, &variables(&[("A", "1")]), &invoker()).unwrap();
        let made = fs::metadata(&path).unwrap();
        assert_eq!(made.permissions().mode() & 0o777, 0o600);
        assert_eq!((made.uid(), made.gid()), (invoker().uid, invoker().gid));
        assert_eq!(fs::read_to_string(&path).unwrap(), "A=1\n");
        assert_eq!(fs::read_to_string(&old).unwrap(), "old");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 2, "nothing else is left");
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn what_is_no_file_is_refused_and_links_are_followed() {
        let directory = directory("target");
        let (file, link, nowhere) =
            (directory.join("file"), directory.join("link"), directory.join("nowhere"));
        fs::write(&file, "old").unwrap();
        symlink(&file, &link).unwrap();
        symlink(directory.join("none"), &nowhere).unwrap();
        let refused = |path: &Path| {
            let failure = write(path, &BTreeMap::new(), &invoker()).unwrap_err();
            assert_eq!(failure.code, ExitCode::Usage);
            failure.error
        };
        assert!(refused(&directory).ends_with("is a directory"));
        assert!(refused(Path::new("/dev/null")).ends_with("is no regular file"));

        for path in [&link, &nowhere] {
            write(path, &variables(&[("A", "1")]), &invoker()).unwrap();
            assert_eq!(fs::read_to_string(path).unwrap(), "A=1\n");
        }
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(fs::symlink_metadata(&nowhere).unwrap().is_file(), "what leads nowhere is replaced");
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn no_link_leads_to_where_whoever_called_sudo_may_not_write() {
        let (directory, locked) = (directory("mine"), directory("locked"));
        // Root may write there, whatever the mode is.
        chown(&locked, Some(rustix::process::getuid().as_raw()), None).unwrap();
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
        symlink(&locked, directory.join("d")).unwrap();
        let path = directory.join("d").join("x.sh");
        let failure = write(&path, &variables(&[("A", "1")]), &invoker()).unwrap_err();
        assert_eq!(failure.error, format!("{} cannot be written", path.display()));
        assert!(failure.causes[0].contains("Permission denied"), "{:?}", failure.causes);
        assert_eq!(failure.help.is_some(), invoker().is_under_root());
        assert_eq!(fs::read_dir(&locked).unwrap().count(), 0);
        fs::remove_dir_all(directory).unwrap();
        fs::remove_dir_all(locked).unwrap();
    }

    #[test]
    fn a_command_keeps_its_own_place() {
        let app = variables(&[("PATH", "/app/bin"), ("HOME", "/root"), ("DB", "x")]);
        assert_eq!(for_command(app), variables(&[("DB", "x")]));
    }
}
