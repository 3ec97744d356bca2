//! Which namespace the cluster's tpd is in. Its cluster-wide objects have fixed names, so there is one, and whoever uninstalled
//! another namespace's remains would take those of the living one along.

use k8s_openapi::api::rbac::v1::{ClusterRoleBinding, Subject};
use kube::Api;
use tpd_api::MANAGER;
use tpd_api::exit::ExitCode;

use super::{OBJECT_TIMEOUT, Site, refused};
use crate::failure::Failure;
use crate::kube::errors::{Call, judged};

impl Site {
    /// That the cluster-wide objects, if there are any, are not another namespace's.
    pub(crate) async fn check_whereabouts(&self) -> Result<(), Failure> {
        let doing = format!("get ClusterRoleBinding {MANAGER}");
        let call = Call { doing: &doing, server: &self.server, namespace: &self.namespace };
        let bindings: Api<ClusterRoleBinding> = Api::all(self.client.clone());
        let binding = judged(call, refused, OBJECT_TIMEOUT, bindings.get_opt(MANAGER)).await?;
        let subjects = binding.and_then(|binding| binding.subjects).unwrap_or_default();
        elsewhere(&subjects, &self.namespace).map_or(Ok(()), |other| Err(misplaced(other, &self.namespace)))
    }
}

/// The namespace of whoever is bound, if that is another one.
fn elsewhere<'a>(subjects: &'a [Subject], own: &str) -> Option<&'a str> {
    let mut namespaces = subjects.iter().filter_map(|subject| subject.namespace.as_deref()).peekable();
    let first = *namespaces.peek()?;
    namespaces.all(|namespace| namespace != own).then_some(first)
}

fn misplaced(other: &str, own: &str) -> Failure {
    Failure::new(ExitCode::Usage, format!("the cluster's tpd is installed in namespace {other}, not in {own}"))
        .help(format!(
            "uninstall that with: tpd uninstall --manager-namespace {other}\nWhat is left in {own} goes with: kubectl delete namespace {own}"
        ))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};
    use tpd_api::install::{Options, objects};

    use super::*;

    fn subjects(value: Value) -> Vec<Subject> {
        from_value(value).unwrap()
    }

    #[test]
    fn an_installation_in_another_namespace_is_left_alone() {
        let of = |namespace: &str| {
            let options = Options { namespace: namespace.into(), ..Options::default() };
            let mut objects = objects(&options).into_iter();
            let binding = objects.find(|object| object["kind"] == "ClusterRoleBinding").unwrap();
            subjects(binding["subjects"].clone())
        };
        assert_eq!(elsewhere(&of("live"), "live"), None);
        assert_eq!(elsewhere(&of("live"), "stale"), Some("live"));
        let both: Vec<_> = of("live").into_iter().chain(of("stale")).collect();
        assert_eq!(elsewhere(&both, "stale"), None);
    }

    #[test]
    fn who_is_bound_without_a_namespace_is_nowhere() {
        assert_eq!(elsewhere(&[], "tpd-system"), None);
        let ann = subjects(json!([{ "kind": "User", "name": "ann" }]));
        assert_eq!(elsewhere(&ann, "tpd-system"), None);
    }

    #[test]
    fn where_it_is_instead_is_said() {
        let failure = misplaced("live", "stale");
        assert_eq!(failure.code, ExitCode::Usage);
        assert_eq!(failure.error, "the cluster's tpd is installed in namespace live, not in stale");
        let help = failure.help.unwrap();
        assert!(help.contains("--manager-namespace live") && help.contains("kubectl delete namespace stale"));
    }
}
