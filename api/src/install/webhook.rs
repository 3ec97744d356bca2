//! The managers' webhooks, and the Service that leads to them.
//!
//! The managers put their CA into both configurations themselves.

use serde_json::{Value, json};

use super::{Options, WEBHOOKS, cluster_metadata, metadata};
use crate::inject::{DISABLED, INJECT};
use crate::{GROUP, MANAGER, STREAM_PORT, WEBHOOK_SERVICE};

/// Port of the Service where the API server calls.
const PORT: u16 = 443;

/// They are removed first and come last, so that they never stand without those who answer.
pub(super) fn objects(options: &Options) -> Vec<Value> {
    vec![service(options), mutating(options), validating(options)]
}

fn service(options: &Options) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata(options, WEBHOOK_SERVICE),
        "spec": {
            "selector": { "app.kubernetes.io/name": MANAGER },
            "ports": [
                { "name": "webhooks", "port": PORT, "protocol": "TCP", "targetPort": "stream" },
                { "name": "agents", "port": STREAM_PORT, "protocol": "TCP", "targetPort": "stream" },
            ],
        },
    })
}

/// Never stands in a pod's way: where no manager answers within two seconds, the pod starts without an agent.
fn mutating(options: &Options) -> Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": cluster_metadata(WEBHOOKS),
        "webhooks": [{
            "name": "pods.tpd.dev",
            "admissionReviewVersions": ["v1"],
            "clientConfig": client(options, "/v1/webhook/pods"),
            "failurePolicy": "Ignore",
            "timeoutSeconds": 2,
            "matchPolicy": "Equivalent",
            "reinvocationPolicy": "Never",
            "sideEffects": "None",
            "namespaceSelector": { "matchExpressions": [
                {
                    "key": "kubernetes.io/metadata.name", "operator": "NotIn",
                    "values": ["kube-system", options.namespace],
                },
                { "key": INJECT, "operator": "NotIn", "values": [DISABLED] },
            ] },
            "objectSelector": { "matchExpressions": [{ "key": INJECT, "operator": "NotIn", "values": [DISABLED] }] },
            "rules": [{
                "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"],
                "scope": "Namespaced",
            }],
        }],
    })
}

/// Concerns nothing but tpd's own resource.
fn validating(options: &Options) -> Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": cluster_metadata(WEBHOOKS),
        "webhooks": [{
            "name": "intercepts.tpd.dev",
            "admissionReviewVersions": ["v1"],
            "clientConfig": client(options, "/v1/webhook/intercepts"),
            "failurePolicy": "Fail",
            "timeoutSeconds": 5,
            "matchPolicy": "Equivalent",
            "sideEffects": "None",
            "rules": [{
                "apiGroups": [GROUP], "apiVersions": ["v1alpha1"], "operations": ["CREATE", "UPDATE"],
                "resources": ["intercepts"], "scope": "Namespaced",
            }],
        }],
    })
}

fn client(options: &Options, path: &str) -> Value {
    json!({ "service": {
        "namespace": options.namespace, "name": WEBHOOK_SERVICE, "path": path, "port": PORT,
    } })
}
