//! Who was bound to the ClusterRole of intercepts: those bindings lead nowhere once it is gone.

use k8s_openapi::api::rbac::v1::{ClusterRoleBinding, RoleBinding, RoleRef};
use kube::Api;
use kube::api::{DeleteParams, ListParams, ObjectMeta};
use tpd_api::MANAGER;
use tpd_api::install::INTERCEPT_ROLE;

use super::{OBJECT_TIMEOUT, Site, refused};
use crate::failure::Failure;
use crate::kube::errors::{Call, judged};
use crate::progress::Progress;

/// The bindings to the role of intercepts, wherever they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bindings {
    /// RoleBindings that an installation made, as namespace and name.
    own: Vec<(String, String)>,
    /// The commands that remove those that other people made.
    pub(crate) foreign: Vec<String>,
}

impl Site {
    /// Finds them all.
    pub(crate) async fn bindings(&self) -> Result<Bindings, Failure> {
        let call = Call { doing: "list RoleBindings", server: &self.server, namespace: &self.namespace };
        let roles: Api<RoleBinding> = Api::all(self.client.clone());
        let everything = ListParams::default();
        let roles = judged(call, refused, OBJECT_TIMEOUT, roles.list(&everything)).await?;
        let call = Call { doing: "list ClusterRoleBindings", ..call };
        let cluster: Api<ClusterRoleBinding> = Api::all(self.client.clone());
        let cluster = judged(call, refused, OBJECT_TIMEOUT, cluster.list(&everything)).await?;
        Ok(Bindings::sorted(&roles.items, &cluster.items))
    }

    /// Deletes those that an installation made.
    pub(crate) async fn unbind(&self, bindings: &Bindings, progress: &mut Progress) -> Result<(), Failure> {
        for (namespace, name) in &bindings.own {
            progress.step(&format!("deleting RoleBinding {namespace}/{name}"));
            let doing = format!("delete RoleBinding {name}");
            let call = Call { doing: &doing, server: &self.server, namespace };
            let api: Api<RoleBinding> = Api::namespaced(self.client.clone(), namespace);
            let delete = async {
                match api.delete(name, &DeleteParams::default()).await {
                    Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
                    other => other.map(drop),
                }
            };
            judged(call, refused, OBJECT_TIMEOUT, delete).await?;
        }
        Ok(())
    }
}

impl Bindings {
    fn sorted(roles: &[RoleBinding], cluster: &[ClusterRoleBinding]) -> Self {
        let mut bindings = Self::default();
        for binding in roles.iter().filter(|binding| leads_to_ours(&binding.role_ref)) {
            let metadata = &binding.metadata;
            let (namespace, name) = (text(&metadata.namespace), text(&metadata.name));
            if is_own(metadata) {
                bindings.own.push((namespace, name));
            } else {
                bindings.foreign.push(format!("kubectl -n {namespace} delete rolebinding {name}"));
            }
        }
        for binding in cluster.iter().filter(|binding| leads_to_ours(&binding.role_ref)) {
            let name = text(&binding.metadata.name);
            bindings.foreign.push(format!("kubectl delete clusterrolebinding {name}"));
        }
        bindings
    }
}

fn leads_to_ours(role: &RoleRef) -> bool {
    role.kind == "ClusterRole" && role.name == INTERCEPT_ROLE
}

/// Every object of an installation has these labels. One of them alone is what other people's objects around tpd may have, too.
fn is_own(metadata: &ObjectMeta) -> bool {
    let has = |label: &str, value: &str| {
        metadata.labels.as_ref().and_then(|labels| labels.get(label)).is_some_and(|own| own == value)
    };
    has("app.kubernetes.io/name", MANAGER) && has("app.kubernetes.io/part-of", "tpd")
}

fn text(value: &Option<String>) -> String {
    value.clone().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};

    use tpd_api::install::{Options, objects};

    use super::Bindings;

    #[test]
    fn what_is_installed_is_known_again() {
        let options = Options {
            developer_groups: vec!["devs".into()],
            intercept_namespaces: vec!["shop".into(), "store".into()],
            ..Options::default()
        };
        let roles = objects(&options).into_iter().filter(|object| object["kind"] == "RoleBinding");
        let roles: Vec<_> = roles.map(|role| from_value(role).unwrap()).collect();
        let found = Bindings::sorted(&roles, &[]);
        let namespaces: Vec<_> = found.own.iter().map(|(namespace, _)| namespace.as_str()).collect();
        assert_eq!((namespaces, found.foreign), (vec!["shop", "store"], vec![]));
    }

    fn binding(kind: &str, name: &str, labels: Value) -> Value {
        let role = json!({ "apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name });
        json!({ "metadata": { "namespace": "shop", "name": "b", "labels": labels }, "roleRef": role })
    }

    #[test]
    fn other_peoples_bindings_are_named_and_not_deleted() {
        let own = json!({ "app.kubernetes.io/name": "tpd-manager", "app.kubernetes.io/part-of": "tpd" });
        let roles = json!([
            binding("ClusterRole", "tpd-intercept", own.clone()),
            binding("ClusterRole", "tpd-intercept", json!({ "app.kubernetes.io/part-of": "tpd" })),
            binding("Role", "tpd-intercept", own),
            binding("ClusterRole", "view", json!({})),
        ]);
        let cluster = json!([binding("ClusterRole", "tpd-intercept", json!({}))]);
        let found =
            Bindings::sorted(&from_value::<Vec<_>>(roles).unwrap(), &from_value::<Vec<_>>(cluster).unwrap());
        assert_eq!(found.own, [("shop".to_owned(), "b".to_owned())]);
        assert_eq!(
            found.foreign,
            ["kubectl -n shop delete rolebinding b", "kubectl delete clusterrolebinding b"]
        );
    }
}
