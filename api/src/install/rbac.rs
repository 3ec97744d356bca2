//! Who may do what: the manager, and the developers.

use serde_json::{Value, json};

use super::{
    CA_SECRET, DEVELOPER_ROLE, INTERCEPT_ROLE, KEY_SECRET, LEASE, Options, WEBHOOKS, cluster_metadata,
    labels, metadata,
};
use crate::{GROUP, MANAGER, STREAM_PORT};

const RBAC: &str = "rbac.authorization.k8s.io";

pub(super) fn objects(options: &Options) -> Vec<Value> {
    let mut objects = vec![
        json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(options, MANAGER) }),
        json!({
            "apiVersion": format!("{RBAC}/v1"), "kind": "ClusterRole",
            "metadata": cluster_metadata(MANAGER), "rules": cluster_rules(),
        }),
        json!({
            "apiVersion": format!("{RBAC}/v1"), "kind": "ClusterRoleBinding",
            "metadata": cluster_metadata(MANAGER),
            "roleRef": { "apiGroup": RBAC, "kind": "ClusterRole", "name": MANAGER },
            "subjects": [manager(options)],
        }),
        json!({
            "apiVersion": format!("{RBAC}/v1"), "kind": "Role",
            "metadata": metadata(options, MANAGER), "rules": namespace_rules(),
        }),
        json!({
            "apiVersion": format!("{RBAC}/v1"), "kind": "RoleBinding",
            "metadata": metadata(options, MANAGER),
            "roleRef": { "apiGroup": RBAC, "kind": "Role", "name": MANAGER },
            "subjects": [manager(options)],
        }),
        json!({
            "apiVersion": format!("{RBAC}/v1"), "kind": "Role",
            "metadata": metadata(options, DEVELOPER_ROLE),
            "rules": developer_rules(options.replicas, options.port_forward),
        }),
        json!({
            "apiVersion": format!("{RBAC}/v1"), "kind": "ClusterRole",
            "metadata": cluster_metadata(INTERCEPT_ROLE), "rules": intercept_rules(),
        }),
    ];
    if !options.developer_groups.is_empty() {
        objects.push(developer_binding(options));
        objects.extend(
            options.intercept_namespaces.iter().map(|namespace| intercept_binding(options, namespace)),
        );
    }
    objects
}

fn manager(options: &Options) -> Value {
    json!({ "kind": "ServiceAccount", "name": MANAGER, "namespace": options.namespace })
}

/// Reading; and of what is the workloads' own, only to have a pod replaced by one with an agent, and to tell of it. What was released
/// for that and has no workload any more is deleted: no eviction would be granted once a disruption budget has nothing else left to
/// count.
fn cluster_rules() -> Value {
    json!([
        { "apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "watch"] },
        { "apiGroups": ["networking.k8s.io"], "resources": ["servicecidrs"], "verbs": ["list", "watch"] },
        { "apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "patch", "delete"] },
        { "apiGroups": [""], "resources": ["pods/eviction"], "verbs": ["create"] },
        { "apiGroups": [""], "resources": ["namespaces"], "verbs": ["get", "list", "watch"] },
        { "apiGroups": [""], "resources": ["services"], "verbs": ["list", "watch"] },
        { "apiGroups": [""], "resources": ["limitranges", "resourcequotas"], "verbs": ["list"] },
        { "apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["list"] },
        { "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"] },
        {
            "apiGroups": ["apps"], "resources": ["daemonsets", "deployments", "replicasets", "statefulsets"],
            "verbs": ["get", "list"],
        },
        { "apiGroups": [GROUP], "resources": ["intercepts"], "verbs": ["list", "watch", "delete"] },
        { "apiGroups": [GROUP], "resources": ["intercepts/status"], "verbs": ["patch"] },
        { "apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch"] },
        { "apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"] },
        {
            "apiGroups": ["admissionregistration.k8s.io"],
            "resources": ["mutatingwebhookconfigurations", "validatingwebhookconfigurations"],
            "resourceNames": [WEBHOOKS], "verbs": ["get", "patch"],
        },
    ])
}

/// In its own namespace. `create` cannot be limited by name: an object that is being created has none yet.
fn namespace_rules() -> Value {
    json!([
        { "apiGroups": [GROUP], "resources": ["clientsessions"], "verbs": ["get", "list", "watch", "delete"] },
        { "apiGroups": [GROUP], "resources": ["clientsessions/status"], "verbs": ["patch"] },
        { "apiGroups": [""], "resources": ["pods", "services"], "verbs": ["list", "watch"] },
        { "apiGroups": [""], "resources": ["secrets"], "verbs": ["create"] },
        { "apiGroups": [""], "resources": ["secrets"], "resourceNames": [KEY_SECRET, CA_SECRET], "verbs": ["get"] },
        { "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"] },
        {
            "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "resourceNames": [LEASE],
            "verbs": ["get", "update"],
        },
    ])
}

/// The rules of the developer's role in the manager's namespace: all that `tpd up` needs there.
///
/// Without `port_forward` the session needs an API server that can reach the manager's pods itself.
#[must_use]
pub fn developer_rules(replicas: u32, port_forward: bool) -> Value {
    let pods: Vec<_> = (0..replicas).map(|replica| format!("{MANAGER}-{replica}")).collect();
    let ports: Vec<_> = pods.iter().map(|pod| format!("{pod}:{STREAM_PORT}")).collect();
    let mut rules = vec![
        json!({
            "apiGroups": [GROUP], "resources": ["clientsessions"],
            "verbs": ["create", "get", "watch", "patch", "delete"],
        }),
        json!({ "apiGroups": [""], "resources": ["pods/proxy"], "resourceNames": ports, "verbs": ["get"] }),
    ];
    if port_forward {
        rules.push(json!({
            "apiGroups": [""], "resources": ["pods/portforward"], "resourceNames": pods,
            "verbs": ["get", "create"],
        }));
    }
    Value::from(rules)
}

/// The rules of the role of who intercepts, wherever it is bound.
#[must_use]
pub fn intercept_rules() -> Value {
    json!([{
        "apiGroups": [GROUP], "resources": ["intercepts"],
        "verbs": ["create", "get", "list", "watch", "patch", "delete"],
    }])
}

fn developer_binding(options: &Options) -> Value {
    json!({
        "apiVersion": format!("{RBAC}/v1"), "kind": "RoleBinding",
        "metadata": metadata(options, DEVELOPER_ROLE),
        "roleRef": { "apiGroup": RBAC, "kind": "Role", "name": DEVELOPER_ROLE },
        "subjects": groups(options),
    })
}

fn intercept_binding(options: &Options, namespace: &str) -> Value {
    json!({
        "apiVersion": format!("{RBAC}/v1"), "kind": "RoleBinding",
        "metadata": { "name": INTERCEPT_ROLE, "namespace": namespace, "labels": labels() },
        "roleRef": { "apiGroup": RBAC, "kind": "ClusterRole", "name": INTERCEPT_ROLE },
        "subjects": groups(options),
    })
}

fn groups(options: &Options) -> Value {
    let groups = options.developer_groups.iter();
    groups.map(|group| json!({ "apiGroup": RBAC, "kind": "Group", "name": group })).collect()
}
