//! What outlives a daemon that is killed: which intercepts there are, and what is behind their ports here. It is on a file system in
//! memory, so a reboot ends it; local addresses are nowhere else.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tpd_api::local::InterceptRequest;

/// Where it is kept. For root alone: who writes here says where intercepted traffic goes.
pub(crate) const STATE: &str = "/run/tpd/intercepts.json";

/// The intercepts of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct State {
    /// URL of the API server.
    pub(crate) server: String,
    /// The ClientSession, with its namespace: whoever connects to another cluster, or as somebody else, has another one.
    pub(crate) session: String,
    pub(crate) intercepts: Vec<Kept>,
}

/// One intercept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Kept {
    pub(crate) name: String,
    pub(crate) request: InterceptRequest,
    /// Of the request's ports, in order.
    pub(crate) overlay_ports: Vec<u16>,
}

/// What a daemon before this one left. `None` where there is nothing, or nothing that can be read: then there is nothing to resume.
pub(crate) fn load(path: &Path) -> Option<State> {
    let state: State = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    let whole = state.intercepts.iter().all(|kept| kept.overlay_ports.len() == kept.request.ports.len());
    whole.then_some(state)
}

/// Keeps it, in one step: a reader sees the old or the new state. Without intercepts there is nothing to keep.
pub(crate) fn save(path: &Path, state: &State) -> io::Result<()> {
    if state.intercepts.is_empty() {
        return match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    }
    let fresh = path.with_extension("new");
    let _ = fs::remove_file(&fresh);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
    file.write_all(&serde_json::to_vec(state)?)?;
    drop(file);
    fs::rename(fresh, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::intercept::example;

    #[test]
    fn what_was_kept_is_found_and_for_root_alone() {
        let path = std::env::temp_dir().join(format!("tpd-intercepts-{}", std::process::id()));
        let kept =
            Kept { name: "web-x".into(), request: example("web", &["http"]), overlay_ports: vec![20_001] };
        let mut state =
            State { server: "https://api".into(), session: "tpd-system/x".into(), intercepts: vec![kept] };
        save(&path, &state).unwrap();
        save(&path, &state).unwrap();
        assert_eq!(load(&path), Some(state.clone()));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

        state.intercepts[0].overlay_ports.clear();
        save(&path, &state).unwrap();
        assert_eq!(load(&path), None);
        state.intercepts.clear();
        save(&path, &state).unwrap();
        assert!(!path.exists() && load(&path).is_none());
        save(&path, &state).unwrap();

        fs::write(&path, "{garbage").unwrap();
        assert_eq!(load(&path), None);
        fs::remove_file(path).unwrap();
    }
}
