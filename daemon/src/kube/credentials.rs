//! Credential plugins (`exec` in a kubeconfig), run as the invoker and once per expiry.
//!
//! kube would run them as root, and three times for each client it makes.

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;
use std::{fs, io};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::config::{AuthInfo, ExecConfig};
use serde::Deserialize;
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::runtime::Handle;
use tokio::time::timeout;
use tpd_api::exit::ExitCode;

use crate::failure::Failure;
use crate::invoker::Invoker;

/// Plugins may log in over the network; a minute is what the slowest (SSO with a cold cache) need.
const PLUGIN_TIMEOUT: Duration = Duration::from_secs(60);

/// A credential is renewed this long before it expires, so that a request under way still passes.
const RENEW_BEFORE_SECONDS: i64 = 60;

/// How long a token from a file is used before the file is looked at again, as kubectl does.
const TOKEN_SECONDS: i64 = 60;

/// A credential plugin and the person it runs for.
#[derive(Clone, Debug)]
pub(crate) struct Plugin {
    pub(crate) exec: ExecConfig,
    pub(crate) invoker: Invoker,
}

/// What a plugin answered.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Credential {
    #[serde(default)]
    expiration_timestamp: Option<Time>,
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    client_certificate_data: Option<String>,
    #[serde(default)]
    client_key_data: Option<String>,
}

#[derive(Deserialize)]
struct ExecCredential {
    status: Option<Credential>,
}

impl Credential {
    pub(crate) fn is_fresh(&self) -> bool {
        self.expiration_timestamp
            .as_ref()
            .is_none_or(|expiry| expiry.0.as_second() - Timestamp::now().as_second() > RENEW_BEFORE_SECONDS)
    }

    /// The token in a file, as far as `invoker` may read it.
    pub(crate) async fn of_file(path: &Path, invoker: &Invoker) -> Result<Self, Failure> {
        let file = path.to_owned();
        let read = invoker.act_aside(move || fs::read_to_string(file)).await.and_then(|read| read);
        let token = read.map_err(|error| {
            let what = format!("the token in {}, which the kubeconfig names, cannot be read", path.display());
            Failure::new(ExitCode::Unauthenticated, what).caused_by(&error)
        })?;
        let expiry = Timestamp::now() + SignedDuration::from_secs(RENEW_BEFORE_SECONDS + TOKEN_SECONDS);
        Ok(Self {
            expiration_timestamp: Some(Time(expiry)),
            token: Some(token.trim().to_owned()),
            ..Self::default()
        })
    }

    /// Puts the credential where kube looks for it.
    pub(crate) fn apply(&self, auth: &mut AuthInfo) {
        auth.token = self.token.clone().map(Into::into);
        if let (Some(certificate), Some(key)) = (&self.client_certificate_data, &self.client_key_data) {
            auth.client_certificate_data = Some(base64(certificate.as_bytes()));
            auth.client_key_data = Some(base64(key.as_bytes()).into());
        }
    }
}

impl Plugin {
    pub(crate) async fn run(&self) -> Result<Credential, Failure> {
        let name = self.exec.command.as_deref().unwrap_or_default();
        let plugin = self.start(name).map_err(|error| self.cannot_start(name, &error))?;
        let output = match timeout(PLUGIN_TIMEOUT, plugin.wait_with_output()).await {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => return Err(self.failed(name, &error.to_string(), "")),
            Err(_) => return Err(self.failed(name, "it did not end within 60 s", "")),
        };
        if !output.status.success() {
            return Err(self.failed(name, &output.status.to_string(), &said(&output)));
        }
        serde_yaml::from_slice::<ExecCredential>(&output.stdout)
            .map_err(|error| {
                self.failed(name, &format!("its output is no ExecCredential: {error}"), &said(&output))
            })?
            .status
            .ok_or_else(|| self.failed(name, "its ExecCredential has no status", &said(&output)))
    }

    /// As the person: a process has the rights of the thread that starts it, and those of all the person's groups.
    fn start(&self, name: &str) -> io::Result<Child> {
        let runtime = Handle::current();
        let start = || {
            let _within = runtime.enter();
            self.command(name).spawn()
        };
        self.invoker.act(start).flatten()
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        command
            .args(self.exec.args.iter().flatten())
            .env_clear()
            .envs(&self.invoker.environment)
            .current_dir(if self.invoker.directory.is_dir() {
                &self.invoker.directory
            } else {
                Path::new("/")
            })
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        for variable in self.exec.env.iter().flatten() {
            if let (Some(name), Some(value)) = (variable.get("name"), variable.get("value")) {
                command.env(name, value);
            }
        }
        command.env("KUBERNETES_EXEC_INFO", self.request());
        command
    }

    /// The `ExecCredential` that asks; see "client-go credential plugins" in the Kubernetes documentation.
    fn request(&self) -> String {
        let mut spec = json!({ "interactive": false });
        if let Some(cluster) = self.exec.cluster.as_ref().filter(|_| self.exec.provide_cluster_info) {
            spec["cluster"] = json!(cluster);
        }
        json!({ "apiVersion": self.exec.api_version, "kind": "ExecCredential", "spec": spec }).to_string()
    }

    fn cannot_start(&self, name: &str, error: &io::Error) -> Failure {
        let hint = self.exec.install_hint.clone().unwrap_or_else(|| {
            format!("check that {name:?} is in PATH ({})", self.invoker.variable("PATH").unwrap_or("empty"))
        });
        Failure::new(ExitCode::Unauthenticated, format!("the credential plugin {name:?} cannot be started"))
            .caused_by(error)
            .help(hint)
    }

    fn failed(&self, name: &str, why: &str, said: &str) -> Failure {
        let failure =
            Failure::new(ExitCode::Unauthenticated, format!("the credential plugin {name:?} failed"))
                .because(why)
                .help(
                    "run any kubectl command as yourself; if that asks you to log in, do it, then try again",
                );
        if said.is_empty() { failure } else { failure.because(format!("it said: {said}")) }
    }
}

/// What a plugin wrote to standard error; its end, since the reason tends to stand there.
fn said(output: &Output) -> String {
    // Enough for a stack trace's last lines, and bounded.
    const LIMIT: usize = 2000;
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.trim();
    let start = text.char_indices().rev().take(LIMIT).last().map_or(0, |(index, _)| index);
    text[start..].to_owned()
}

pub(super) fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plugin(script: &str) -> Plugin {
        Plugin {
            exec: ExecConfig {
                api_version: Some("client.authentication.k8s.io/v1".into()),
                command: Some("/bin/sh".into()),
                args: Some(vec!["-c".into(), script.into()]),
                ..ExecConfig::default()
            },
            invoker: Invoker {
                uid: 65534,
                gid: 65534,
                environment: [
                    ("WHO".to_owned(), "ann".to_owned()),
                    ("PATH".to_owned(), "/usr/bin:/bin".to_owned()),
                ]
                .into(),
                directory: "/".into(),
            },
        }
    }

    #[tokio::test]
    async fn it_runs_as_the_invoker_and_in_its_environment() {
        let script = r#"echo "{\"status\": {\"token\": \"$(id -u):$(id -G):$WHO:$HOME\"}}""#;
        let credential = plugin(script).run().await.unwrap();
        let expected = if rustix::process::geteuid().is_root() {
            "65534:65534:ann:".to_owned()
        } else {
            return;
        };
        assert_eq!(credential.token, Some(expected));
        assert!(credential.is_fresh());
    }

    #[tokio::test]
    async fn what_it_said_is_shown() {
        let failure = plugin("echo token has expired >&2; exit 3").run().await.unwrap_err();
        assert_eq!(failure.code, ExitCode::Unauthenticated);
        assert_eq!(failure.causes, ["exit status: 3", "it said: token has expired"]);
    }

    #[tokio::test]
    async fn a_token_in_a_file_is_read_with_the_invokers_rights() {
        use std::os::unix::fs::PermissionsExt as _;

        let path = std::env::temp_dir().join(format!("tpd-token-{}", std::process::id()));
        fs::write(&path, "secret\n").unwrap();
        let invoker = plugin("").invoker;
        let credential = Credential::of_file(&path, &invoker).await.unwrap();
        assert!(credential.is_fresh() && credential.token.as_deref() == Some("secret"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let refused = Credential::of_file(&path, &invoker).await;
        assert_eq!(refused.is_err(), rustix::process::geteuid().is_root());
        fs::remove_file(path).unwrap();
    }

    #[tokio::test]
    async fn an_old_credential_is_not_fresh() {
        let script = r#"echo '{"status": {"token": "t", "expirationTimestamp": "2020-01-01T00:00:00Z"}}'"#;
        assert!(!plugin(script).run().await.unwrap().is_fresh());
    }
}
