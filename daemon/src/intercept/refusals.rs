//! What the API server's refusals mean where intercepts are concerned. Most of them come from the manager's webhook, whose messages
//! are written for people and shown as they are.

use kube::core::Status;
use serde_json::json;
use tpd_api::exit::ExitCode;
use tpd_api::install::{INTERCEPT_ROLE, intercept_rules};

use super::webhook;
use crate::failure::Failure;
use crate::kube::errors::{self, Call, dns_label};

/// A failure of a call about intercepts, as a person can act on it.
pub(crate) fn failure(call: Call<'_>, error: &kube::Error) -> Failure {
    let kube::Error::Api(status) = error else { return errors::failure(call, error) };
    match status.code {
        403 => forbidden(call, status),
        404 if is_unknown_resource(&status.message) => outdated().because(status.message.trim()),
        404 => refused(ExitCode::NotFound, status),
        409 => refused(ExitCode::Conflict, status),
        412 => refused(ExitCode::NoAgent, status),
        400 | 422 => refused(ExitCode::Usage, status),
        _ if webhook::is_undecided(status) => errors::failure(call, error).help(
            "the manager may be starting or down; an administrator sees with: kubectl -n tpd-system get pods,events",
        ),
        _ => errors::failure(call, error),
    }
}

/// The cluster has no such resource: it was installed before there were intercepts.
fn outdated() -> Failure {
    Failure::new(ExitCode::NotInstalled, "the manager is older than this command and knows no intercepts")
        .help("an administrator upgrades it with: tpd install")
}

/// An object that is missing is named; a resource that is missing is not.
fn is_unknown_resource(message: &str) -> bool {
    message.contains("could not find the requested resource") || message.contains("page not found")
}

fn refused(code: ExitCode, status: &Status) -> Failure {
    let mut lines = said(&status.message).lines();
    let failure = Failure::new(code, lines.next().unwrap_or_default());
    let rest: Vec<_> = lines.collect();
    if rest.is_empty() { failure } else { failure.help(rest.join("\n")) }
}

/// A webhook's own words, without what the API server puts before them.
fn said(message: &str) -> &str {
    let own = message.split_once("denied the request: ").filter(|_| message.starts_with("admission webhook"));
    own.map_or(message, |(_, own)| own).trim()
}

/// RBAC's refusal names the user and the verb. Those of policies and of the webhook say themselves what is wrong.
fn forbidden(call: Call<'_>, status: &Status) -> Failure {
    match errors::user(&status.message) {
        Some(user) => Failure::new(ExitCode::Forbidden, format!("you may not {}", call.doing))
            .because(&status.message)
            .help(rules(call.namespace, &user)),
        None => refused(ExitCode::Forbidden, status),
    }
}

/// The least RBAC for intercepts in a namespace, to be applied by an administrator.
fn rules(namespace: &str, user: &str) -> String {
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": { "name": INTERCEPT_ROLE },
        "rules": intercept_rules(),
    });
    format!(
        "an administrator grants it; tpd install has made the ClusterRole already:
  kubectl -n {namespace} create rolebinding {INTERCEPT_ROLE}-{binding} --clusterrole={INTERCEPT_ROLE} --user={user}
The ClusterRole is:
{role}",
        binding = dns_label(user),
        role = serde_yaml::to_string(&role).expect("plain data"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALL: Call<'static> =
        Call { doing: "create Intercept shop/web-ann", server: "https://api:6443", namespace: "shop" };

    fn judge(code: u16, message: &str) -> Failure {
        failure(CALL, &kube::Error::Api(Status::failure(message, "").with_code(code).boxed()))
    }

    #[test]
    fn the_webhooks_words_are_shown_as_they_are() {
        let message = "admission webhook \"intercepts.tpd.dev\" denied the request: port 8080 of deployment/web is intercepted by \"bob\"\nadd a filter: --header";
        let failure = judge(409, message);
        assert_eq!(failure.code, ExitCode::Conflict);
        assert_eq!(failure.error, "port 8080 of deployment/web is intercepted by \"bob\"");
        assert_eq!(failure.help.as_deref(), Some("add a filter: --header"));
        let failure = judge(
            404,
            "admission webhook \"intercepts.tpd.dev\" denied the request: there is no deployment/wbe; is it web?",
        );
        assert_eq!(failure.code, ExitCode::NotFound);
        assert_eq!(failure.error, "there is no deployment/wbe; is it web?");
        assert_eq!(judge(422, "Intercept is invalid: spec.ports").code, ExitCode::Usage);
        assert_eq!(judge(412, "the pods of deployment/web get no agent").code, ExitCode::NoAgent);
        assert_eq!(judge(404, "namespaces \"shp\" not found").code, ExitCode::NotFound);
    }

    #[test]
    fn a_missing_right_comes_with_the_role_of_that_namespace() {
        let message = r#"intercepts.tpd.dev is forbidden: User "ann@corp" cannot create resource "intercepts" in API group "tpd.dev" in the namespace "shop""#;
        let failure = judge(403, message);
        assert_eq!(
            (failure.code, &*failure.error),
            (ExitCode::Forbidden, "you may not create Intercept shop/web-ann")
        );
        let help = failure.help.unwrap();
        assert!(help.contains(
            "kubectl -n shop create rolebinding tpd-intercept-ann-corp --clusterrole=tpd-intercept --user=ann@corp"
        ));
        assert!(help.contains("- intercepts"));
    }

    #[test]
    fn a_policys_refusal_is_no_missing_right() {
        let message =
            "admission webhook \"intercepts.tpd.dev\" denied the request: namespace shop demands a filter";
        let failure = judge(403, message);
        assert_eq!((failure.code, failure.help), (ExitCode::Forbidden, None));
    }

    #[test]
    fn a_manager_without_intercepts_is_older() {
        for message in ["the server could not find the requested resource", "404 page not found\n"] {
            let failure = judge(404, message);
            assert_eq!(failure.code, ExitCode::NotInstalled);
            assert!(failure.error.contains("older"));
        }
    }
}
