//! The way back after a power cut: an entry for systemd-tmpfiles, which restores resolv.conf while the system boots.
//!
//! Without it a machine that was switched off while connected would come up with a name server that isn't there, and have no DNS
//! until somebody calls tpd. Where there is no systemd, that is how it is.

use std::{
    fmt::Write,
    fs, io,
    path::{Path, PathBuf},
};

use super::state::Before;

/// The file that counts at boot; a test's isn't it.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Exists where systemd is the init system (sd_booted(3)).
const SYSTEMD: &str = "/run/systemd/system";
/// Of several entries for a path the first counts, by the names of their files; systemd-resolved brings one too.
const ENTRY: &str = "/etc/tmpfiles.d/00-tpd-resolv-conf.conf";

/// Has the next boot restore `path`. The entry's own path if there is one now.
pub(super) fn arrange(path: &Path, before: &Before) -> io::Result<Option<PathBuf>> {
    if path != Path::new(RESOLV_CONF) || !Path::new(SYSTEMD).exists() {
        return Ok(None);
    }
    let entry = PathBuf::from(ENTRY);
    if let Some(directory) = entry.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(&entry, line(path, before))?;
    Ok(Some(entry))
}

/// Has the next boot leave resolv.conf alone.
pub(super) fn cancel(entry: &Path) -> io::Result<()> {
    match fs::remove_file(entry) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// The entry (tmpfiles.d(5)). The exclamation mark restricts it to the boot.
fn line(path: &Path, before: &Before) -> String {
    let escaped = |bytes: &[u8]| bytes.iter().fold(String::new(), |text, byte| text + &escape(*byte));
    let path = path.display();
    let entry = match (before.link(), &before.content) {
        (Some(target), _) => format!("L+! {path} - - - - {}", escaped(target.as_os_str().as_encoded_bytes())),
        (None, Some(content)) => {
            let (mode, uid, gid) = before.attributes();
            format!("f+! {path} {mode:04o} {uid} {gid} - {}", escaped(content))
        }
        (None, None) => format!("r! {path}"),
    };
    format!(
        "# Written by tpd while connected: puts resolv.conf back if the machine goes down before `tpd down`.\n{entry}\n"
    )
}

/// An octet of an argument, which is unescaped as in C first, and has its specifiers (%) expanded then.
fn escape(byte: u8) -> String {
    match byte {
        b'%' => "%%".into(),
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'/' | b':' | b'-' | b'_' => char::from(byte).into(),
        _ => {
            let mut text = String::new();
            // Writing to a String doesn't fail.
            let _ = write!(text, "\\x{byte:02x}");
            text
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_restore_what_was_there() {
        let path = Path::new(RESOLV_CONF);
        let entry = |before| line(path, &before).lines().nth(1).unwrap().to_owned();
        let file = Before::file(b"nameserver 192.0.2.1\n# 100%\n");
        assert_eq!(
            entry(file),
            "f+! /etc/resolv.conf 0644 0 0 - nameserver\\x20192.0.2.1\\x0a\\x23\\x20100%%\\x0a"
        );
        assert_eq!(entry(Before::link_to("../run/a b")), "L+! /etc/resolv.conf - - - - ../run/a\\x20b");
        assert_eq!(entry(Before::nothing()), "r! /etc/resolv.conf");
    }
}
