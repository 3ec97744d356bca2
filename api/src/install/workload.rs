//! The manager itself: its StatefulSet, and the Services that lead to it.

use serde_json::{Value, json};

use super::{MANAGER_UID, Options, UdpService, labels, metadata};
use crate::{HEALTH_PORT, MANAGER, OVERLAY_PORT, STREAM_PORT};

pub(super) fn objects(options: &Options) -> Vec<Value> {
    let mut objects = vec![headless_service(options)];
    if options.udp_service != UdpService::None {
        objects.extend((0..options.replicas).map(|replica| udp_service(options, replica)));
    }
    if options.replicas > 1 {
        objects.push(disruption_budget(options));
    }
    objects.push(stateful_set(options));
    objects
}

fn selector() -> Value {
    json!({ "app.kubernetes.io/name": MANAGER })
}

fn headless_service(options: &Options) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata(options, MANAGER),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": true,
            "selector": selector(),
            "ports": [
                { "name": "stream", "port": STREAM_PORT, "protocol": "TCP", "targetPort": "stream" },
                { "name": "health", "port": HEALTH_PORT, "protocol": "TCP", "targetPort": "health" },
            ],
        },
    })
}

/// One replica's UDP port. It is published before the pod is ready, because WireGuard itself tells who answers,
/// and a laptop that waits for a restarted manager should not wait for a readiness probe too.
fn udp_service(options: &Options, replica: u32) -> Value {
    let name = format!("{MANAGER}-{replica}");
    let kind = match options.udp_service {
        UdpService::LoadBalancer => "LoadBalancer",
        UdpService::NodePort | UdpService::None => "NodePort",
    };
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata(options, &name),
        "spec": {
            "type": kind,
            "ipFamilyPolicy": "PreferDualStack",
            "publishNotReadyAddresses": true,
            "selector": { "statefulset.kubernetes.io/pod-name": name },
            "ports": [{ "name": "overlay", "port": OVERLAY_PORT, "protocol": "UDP", "targetPort": "overlay" }],
        },
    })
}

fn disruption_budget(options: &Options) -> Value {
    json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": metadata(options, MANAGER),
        "spec": { "maxUnavailable": 1, "selector": { "matchLabels": selector() } },
    })
}

fn stateful_set(options: &Options) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata(options, MANAGER),
        "spec": {
            "serviceName": MANAGER,
            "replicas": options.replicas,
            "podManagementPolicy": "Parallel",
            "revisionHistoryLimit": 3,
            "selector": { "matchLabels": selector() },
            "template": { "metadata": { "labels": labels() }, "spec": pod(options) },
        },
    })
}

fn pod(options: &Options) -> Value {
    let mut pod = json!({
        "serviceAccountName": MANAGER,
        "enableServiceLinks": false,
        // It leaves within a fraction of a second; a replacement cannot start before it has.
        "terminationGracePeriodSeconds": 2,
        "securityContext": {
            "runAsNonRoot": true,
            "runAsUser": MANAGER_UID,
            "runAsGroup": MANAGER_UID,
            "seccompProfile": { "type": "RuntimeDefault" },
            // Lets a process without capabilities send ICMP echo, so that ping works through the overlay.
            "sysctls": [{ "name": "net.ipv4.ping_group_range", "value": "0 2147483647" }],
        },
        "topologySpreadConstraints": [{
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": { "matchLabels": selector() },
        }],
        "containers": [container(options)],
    });
    if !options.pull_secrets.is_empty() {
        let secrets: Vec<_> = options.pull_secrets.iter().map(|name| json!({ "name": name })).collect();
        pod["imagePullSecrets"] = Value::from(secrets);
    }
    pod
}

fn container(options: &Options) -> Value {
    json!({
        "name": "manager",
        "image": options.image,
        "imagePullPolicy": options.pull_policy,
        "env": environment(options),
        "ports": [
            { "name": "stream", "containerPort": STREAM_PORT, "protocol": "TCP" },
            { "name": "overlay", "containerPort": OVERLAY_PORT, "protocol": "UDP" },
            { "name": "health", "containerPort": HEALTH_PORT, "protocol": "TCP" },
        ],
        "livenessProbe": {
            "httpGet": { "path": "/livez", "port": "health" },
            "periodSeconds": 10, "timeoutSeconds": 2, "failureThreshold": 3,
        },
        "readinessProbe": {
            "httpGet": { "path": "/readyz", "port": "health" },
            "periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 3,
        },
        // The limit holds a thousand busy connections; there is no CPU limit, because throttling is latency.
        "resources": { "requests": { "cpu": "100m", "memory": "64Mi" }, "limits": { "memory": "1Gi" } },
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"] },
        },
    })
}

fn environment(options: &Options) -> Value {
    let field = |name: &str, path: &str| {
        let reference = json!({ "apiVersion": "v1", "fieldPath": path });
        json!({ "name": name, "valueFrom": { "fieldRef": reference } })
    };
    let value = |name: &str, value: String| json!({ "name": name, "value": value });
    let list =
        |networks: &[ipnet::IpNet]| networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let mut environment = vec![
        field("POD_NAME", "metadata.name"),
        field("POD_UID", "metadata.uid"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("POD_IPS", "status.podIPs"),
        value("TPD_POOL_V4", options.pool_v4.to_string()),
        value("TPD_POOL_V6", options.pool_v6.to_string()),
        value("TPD_SESSION_TIMEOUT", options.session_timeout.to_string()),
        value("TPD_WATCH_PODS", options.watch_pods.to_string()),
        value("TPD_AGENT_IMAGE", options.agent_image.clone()),
        value("TPD_AGENT_PULL_POLICY", options.pull_policy.clone()),
    ];
    if !options.pod_networks.is_empty() {
        environment.push(value("TPD_POD_NETWORKS", list(&options.pod_networks)));
    }
    if !options.service_networks.is_empty() {
        environment.push(value("TPD_SERVICE_NETWORKS", list(&options.service_networks)));
    }
    Value::from(environment)
}
