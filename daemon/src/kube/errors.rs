//! What the API server's answers mean to a person: which exit code, which cause, what to do.

use std::error::Error;
use std::future::Future;
use std::time::Duration;

use serde_json::json;
use tokio::time::timeout;
use tpd_api::exit::ExitCode;
use tpd_api::install::{DEVELOPER_ROLE, Options, developer_rules};

use crate::failure::Failure;

/// What a call wanted, so that a refusal can be answered with the rule to add.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call<'a> {
    /// What was being done, as "create ClientSession tpd-system/x".
    pub(crate) doing: &'a str,
    pub(crate) server: &'a str,
    /// Namespace that the rules go into: the manager's, or the workload's.
    pub(crate) namespace: &'a str,
}

/// What makes a failure of a call into one that a person can act on.
pub(crate) type Judge = fn(Call<'_>, &kube::Error) -> Failure;

/// Runs a call with a bound on its time.
pub(crate) async fn bounded<T>(
    call: Call<'_>,
    limit: Duration,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Failure> {
    judged(call, failure, limit, request).await
}

/// The same for calls whose failures mean other things.
pub(crate) async fn judged<T>(
    call: Call<'_>,
    judge: Judge,
    limit: Duration,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Failure> {
    match timeout(limit, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(judge(call, &error)),
        Err(_) => Err(unreachable(call.server).because(format!(
            "to {} took longer than {} s",
            call.doing,
            limit.as_secs_f32()
        ))),
    }
}

/// A failure of a call, as a person can act on it.
pub(crate) fn failure(call: Call<'_>, error: &kube::Error) -> Failure {
    match error {
        kube::Error::Api(status) => match status.code {
            401 => unauthenticated(call.server).because(&status.message),
            403 => forbidden(call, &status.message),
            404 => not_installed(call.namespace).because(&status.message),
            _ => Failure::new(ExitCode::Failure, format!("the API server would not {}", call.doing))
                .because(&status.message),
        },
        kube::Error::Service(cause) => disconnected(call.server, &**cause),
        kube::Error::HyperError(cause) => unreachable(call.server).caused_by(cause),
        kube::Error::Auth(_) => unauthenticated(call.server).caused_by(error),
        _ => Failure::new(ExitCode::Failure, format!("cannot {}", call.doing)).caused_by(error),
    }
}

/// A failure before the first byte was sent: certificates, keys, tokens that cannot be read.
pub(crate) fn setup(server: &str, error: &kube::Error) -> Failure {
    let code = match error {
        kube::Error::Auth(_) => ExitCode::Unauthenticated,
        kube::Error::ProxyProtocolUnsupported { .. } => ExitCode::Unreachable,
        _ => ExitCode::Kubeconfig,
    };
    Failure::new(code, format!("no connection to {server} can be made with this kubeconfig")).caused_by(error)
}

fn disconnected(server: &str, cause: &(dyn Error + 'static)) -> Failure {
    let failure = unreachable(server).caused_by(cause);
    if !failure.causes.iter().any(|cause| cause.contains("peer certificate")) {
        return failure;
    }
    // It answers, then; but nothing that it says could be believed.
    Failure { error: format!("the certificate of the API server {server} cannot be trusted"), ..failure }
        .help("the kubeconfig may belong to an earlier cluster of that address: fetch it anew; or something on the way intercepts TLS")
}

fn unreachable(server: &str) -> Failure {
    Failure::new(ExitCode::Unreachable, format!("the API server {server} does not answer"))
        .help("check it with: kubectl version\nA VPN may have to be up, or the server's URL in the kubeconfig is out of date.")
}

fn unauthenticated(server: &str) -> Failure {
    Failure::new(ExitCode::Unauthenticated, format!("the API server {server} does not accept these credentials"))
        .help("a token or certificate may have expired: log in again as you do for kubectl, then check with: kubectl auth whoami")
}

pub(crate) fn not_installed(namespace: &str) -> Failure {
    Failure::new(ExitCode::NotInstalled, format!("no tpd manager is installed in namespace {namespace:?}"))
        .help("an administrator of the cluster installs it with: tpd install\nIf it is in another namespace, name that with --manager-namespace.")
}

fn forbidden(call: Call<'_>, message: &str) -> Failure {
    Failure::new(ExitCode::Forbidden, format!("you may not {}", call.doing))
        .because(message)
        .help(rules(call.namespace, &user(message).unwrap_or_else(|| "USER".into())))
}

/// The user in a refusal of the API server: `... is forbidden: User "ann" cannot create ...`.
pub(crate) fn user(message: &str) -> Option<String> {
    let (_, rest) = message.split_once("User \"")?;
    Some(rest.split_once('"')?.0.to_owned())
}

/// The least RBAC that a developer needs, to be applied by an administrator.
pub(crate) fn rules(namespace: &str, user: &str) -> String {
    let defaults = Options::default();
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": { "name": DEVELOPER_ROLE, "namespace": namespace },
        "rules": developer_rules(defaults.replicas, defaults.port_forward),
    });
    format!(
        "an administrator grants it; tpd install has made the Role already where tpd is installed:
  kubectl -n {namespace} create rolebinding {DEVELOPER_ROLE}-{binding} --role={DEVELOPER_ROLE} --user={user}
The Role is:
{role}",
        binding = dns_label(user),
        role = serde_yaml::to_string(&role).expect("plain data"),
    )
}

/// A name that an object may have, made from a user's.
pub(crate) fn dns_label(text: &str) -> String {
    let label: String = text
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(40)
        .collect();
    let trimmed = label.trim_matches('-');
    if trimmed.is_empty() { "x".into() } else { trimmed.to_owned() }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    const CALL: Call<'static> =
        Call { doing: "create ClientSession x", server: "https://api:6443", namespace: "tpd-system" };

    fn api(code: u16, message: &str) -> kube::Error {
        kube::Error::Api(Status::failure(message, "").with_code(code).boxed())
    }

    #[test]
    fn a_refusal_names_what_is_missing_and_prints_the_rules() {
        let message =
            r#"clientsessions.tpd.dev is forbidden: User "ann@corp" cannot create resource "clientsessions""#;
        let failure = failure(CALL, &api(403, message));
        assert_eq!(failure.code, ExitCode::Forbidden);
        assert_eq!(failure.error, "you may not create ClientSession x");
        assert_eq!(failure.causes, [message]);
        let help = failure.help.unwrap();
        assert!(help.contains("--user=ann@corp") && help.contains("tpd-developer-ann-corp"));
        assert!(help.contains("- clientsessions") && help.contains("- tpd-manager-0:8443"));
    }

    #[test]
    fn every_answer_has_its_exit_code() {
        assert_eq!(failure(CALL, &api(401, "Unauthorized")).code, ExitCode::Unauthenticated);
        assert_eq!(failure(CALL, &api(404, "not found")).code, ExitCode::NotInstalled);
        assert_eq!(failure(CALL, &api(422, "invalid")).code, ExitCode::Failure);
        assert_eq!(failure(CALL, &kube::Error::Service("refused".into())).code, ExitCode::Unreachable);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_hangs_ends() {
        let failure = bounded::<()>(CALL, Duration::from_secs(2), std::future::pending()).await.unwrap_err();
        assert_eq!(failure.code, ExitCode::Unreachable);
        assert_eq!(failure.causes, ["to create ClientSession x took longer than 2 s"]);
    }
}
