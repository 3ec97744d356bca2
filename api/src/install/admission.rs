//! The owner rules, enforced in the API server itself: they hold while no manager runs.

use serde_json::{Value, json};

use super::{Options, cluster_metadata};
use crate::{GROUP, MANAGER};

/// Names of the policies and of their bindings.
const SESSIONS: &str = "tpd-clientsession-owner";
const INTERCEPTS: &str = "tpd-intercept-owner";

/// Whoever changes or deletes on behalf of the cluster: those who empty a namespace that is deleted, and who collect what has
/// lost its owner.
const COLLECTORS: &str = "\
'system:serviceaccount:kube-system:namespace-controller', \
'system:serviceaccount:kube-system:generic-garbage-collector', \
'system:kube-controller-manager'";

/// Whether an intercept has a filter. A path that every request has, such as `/*`, is none.
const FILTERED: &str = "\
has(object.spec.filter) && (\
has(object.spec.filter.headers) && size(object.spec.filter.headers) > 0 || \
has(object.spec.filter.paths) && size(object.spec.filter.paths) > 0 && \
!object.spec.filter.paths.exists(path, path.matches('^/?[*]+$')) || \
has(object.spec.filter.methods) && size(object.spec.filter.methods) > 0 || \
has(object.spec.filter.grpc) && size(object.spec.filter.grpc) > 0)";

/// Whether its namespace demands one.
const FILTER_REQUIRED: &str = "\
has(namespaceObject.metadata.labels) && 'tpd.dev/require-filter' in namespaceObject.metadata.labels && \
namespaceObject.metadata.labels['tpd.dev/require-filter'] == 'true'";

/// Whether it asks for the environment of the app's container. A change asks anew: it may be another workload's, or another
/// session that it goes to, and who had the right once need not have it still.
const ENVIRONMENT: &str = "\
has(object.spec.environment) && object.spec.environment && \
(oldObject == null || object.spec != oldObject.spec)";

/// Whether the user could read that environment by exec, too.
const MAY_EXEC: &str = "\
authorizer.group('').resource('pods').subresource('exec').namespace(request.namespace).check('create').allowed()";

pub(super) fn objects(options: &Options) -> Vec<Value> {
    let mut intercepts = owner_rules("intercept");
    intercepts.extend([
        validation(
            "request.operation == 'DELETE' || !variables.environment || variables.mayExec",
            r#"'spec.environment hands out the environment of the app, Secrets among it: that takes the right to create pods/exec in namespace ' + request.namespace"#,
        ),
        validation(
            "request.operation == 'DELETE' || variables.filtered || !variables.filterRequired \
             || (request.operation == 'UPDATE' && object.spec == oldObject.spec)",
            r#"'namespace ' + request.namespace + ' demands a filter (tpd.dev/require-filter): take only your own requests, by --header, --path, --method or --grpc'"#,
        ),
    ]);
    let managers = format!("'system:serviceaccount:{}:{MANAGER}'", options.namespace);
    let variables = [
        ("environment", ENVIRONMENT),
        ("mayExec", MAY_EXEC),
        ("filtered", FILTERED),
        ("filterRequired", FILTER_REQUIRED),
    ];
    vec![
        policy(
            SESSIONS,
            "clientsessions",
            "'system:serviceaccount:' + request.namespace + ':tpd-manager'",
            &[],
            owner_rules("session"),
        ),
        binding(SESSIONS),
        policy(INTERCEPTS, "intercepts", &managers, &variables, intercepts),
        binding(INTERCEPTS),
    ]
}

/// A policy on one kind of objects. Beside their owners, they may be changed or deleted by administrators (whoever may
/// `administer` them there), by the manager, and by collectors.
fn policy(
    name: &str,
    resource: &str,
    manager: &str,
    variables: &[(&str, &str)],
    validations: Vec<Value>,
) -> Value {
    let privileged = format!(
        "authorizer.group('{GROUP}').resource('{resource}').namespace(request.namespace).check('administer').allowed() || \
         request.userInfo.username in [{manager}, {COLLECTORS}]"
    );
    let own = [("user", "request.userInfo.username"), ("privileged", &privileged)];
    let variables: Vec<_> = own
        .iter()
        .chain(variables)
        .map(|(name, expression)| json!({ "name": name, "expression": expression }))
        .collect();
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": cluster_metadata(name),
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {
                "resourceRules": [{
                    "apiGroups": [GROUP],
                    "apiVersions": ["*"],
                    "operations": ["CREATE", "UPDATE", "DELETE"],
                    "resources": [resource],
                }],
            },
            "variables": variables,
            "validations": validations,
        },
    })
}

/// What is somebody's stays theirs.
fn owner_rules(what: &str) -> Vec<Value> {
    vec![
        validation(
            "request.operation != 'CREATE' || object.spec.owner == variables.user",
            r#"'spec.owner is "' + object.spec.owner + '", but you are "' + variables.user + '"'"#,
        ),
        validation(
            "request.operation != 'UPDATE' || object.spec.owner == oldObject.spec.owner",
            &format!(r#"'this {what} belongs to "' + oldObject.spec.owner + '"; spec.owner never changes'"#),
        ),
        validation(
            "request.operation == 'CREATE' || oldObject.spec.owner == variables.user \
             || variables.privileged",
            &format!(
                r#"'this {what} belongs to "' + oldObject.spec.owner + '"; you are "' + variables.user + '"'"#
            ),
        ),
    ]
}

fn validation(expression: &str, message: &str) -> Value {
    json!({ "expression": expression, "messageExpression": message, "reason": "Forbidden" })
}

fn binding(name: &str) -> Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": cluster_metadata(name),
        "spec": { "policyName": name, "validationActions": ["Deny"] },
    })
}

#[cfg(test)]
mod tests {
    use super::{INTERCEPTS, Options, objects};

    #[test]
    fn every_change_of_an_intercept_with_an_environment_takes_the_right_to_it() {
        let objects = objects(&Options::default());
        let policy = objects
            .iter()
            .find(|object| {
                object["kind"] == "ValidatingAdmissionPolicy" && object["metadata"]["name"] == INTERCEPTS
            })
            .unwrap();
        let variables = policy["spec"]["variables"].as_array().unwrap();
        let asked = variables.iter().find(|variable| variable["name"] == "environment").unwrap();
        let asked = asked["expression"].as_str().unwrap();
        assert!(asked.ends_with("(oldObject == null || object.spec != oldObject.spec)"), "{asked}");
    }
}
