//! The app's environment, repeated in the agent's under prefixed names, so that the kubelet resolves it there too: what it
//! holds is handed to a laptop without anybody reading Secrets.

use k8s_openapi::api::core::v1::{Container, EnvFromSource, EnvVar, EnvVarSource};
use tpd_api::inject::APP_ENVIRONMENT;

/// The variables of the container with that number, renamed; and the sources of more.
///
/// Every reference becomes optional: an agent that waits for a Secret which a later container makes would wait for ever.
#[must_use]
pub fn copies(number: usize, container: &Container) -> (Vec<EnvVar>, Vec<EnvFromSource>) {
    let prefix = format!("{APP_ENVIRONMENT}{number}_");
    let sources: Vec<_> =
        container.env_from.iter().flatten().map(|source| source_copy(&prefix, source)).collect();
    let originals = container.env.as_deref().unwrap_or_default();
    let mut copies = Vec::with_capacity(originals.len());
    for (position, original) in originals.iter().enumerate() {
        let known = |name: &str| {
            originals[..position].iter().any(|earlier| earlier.name == name)
                || !sources.is_empty() && !is_service_link(name)
        };
        copies.extend(copy(&prefix, container, original, &known));
    }
    (copies, sources)
}

fn copy(
    prefix: &str,
    container: &Container,
    original: &EnvVar,
    known: &dyn Fn(&str) -> bool,
) -> Option<EnvVar> {
    let value_from = match &original.value_from {
        Some(source) => Some(optional(source, container)?),
        None => None,
    };
    Some(EnvVar {
        name: format!("{prefix}{}", original.name),
        value: original.value.as_deref().map(|value| rewrite(value, prefix, known)),
        value_from,
    })
}

/// A source that cannot keep the agent from starting; `None` for a kind that this build does not know.
fn optional(source: &EnvVarSource, container: &Container) -> Option<EnvVarSource> {
    let mut source = source.clone();
    if let Some(reference) = &mut source.secret_key_ref {
        reference.optional = Some(true);
    } else if let Some(reference) = &mut source.config_map_key_ref {
        reference.optional = Some(true);
    } else if let Some(reference) = &mut source.resource_field_ref {
        reference.container_name.get_or_insert_with(|| container.name.clone());
    } else {
        source.field_ref.as_ref()?;
    }
    Some(source)
}

fn source_copy(prefix: &str, source: &EnvFromSource) -> EnvFromSource {
    let mut source = source.clone();
    source.prefix = Some(format!("{prefix}{}", source.prefix.unwrap_or_default()));
    if let Some(reference) = &mut source.secret_ref {
        reference.optional = Some(true);
    }
    if let Some(reference) = &mut source.config_map_ref {
        reference.optional = Some(true);
    }
    source
}

/// Whether a variable is, by its name, one that the kubelet sets for a Service: those have no copies, and the agent's own say
/// the same.
fn is_service_link(name: &str) -> bool {
    name.ends_with("_SERVICE_HOST") || name.contains("_SERVICE_PORT") || name.contains("_PORT_")
}

/// A value whose references to the app's variables lead to their copies. `$$` stands for a dollar, so `$$(X)` is no reference.
fn rewrite(value: &str, prefix: &str, known: &dyn Fn(&str) -> bool) -> String {
    let mut result = String::with_capacity(value.len());
    let mut rest = value;
    while let Some(at) = rest.find('$') {
        let (before, reference) = rest.split_at(at);
        result.push_str(before);
        if let Some(after) = reference.strip_prefix("$$") {
            result.push_str("$$");
            rest = after;
            continue;
        }
        let name = reference.strip_prefix("$(").and_then(|name| name.split_once(')'));
        match name {
            Some((name, after)) if known(name) => {
                result.push_str(&format!("$({prefix}{name})"));
                rest = after;
            }
            _ => {
                result.push('$');
                rest = &reference[1..];
            }
        }
    }
    result + rest
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json, to_value};

    use super::copies;

    #[test]
    fn every_kind_of_variable_has_its_copy() {
        let container = from_value(json!({
            "name": "app",
            "env": [
                { "name": "HOST", "value": "db" },
                { "name": "URL", "value": "http://$(HOST):$(PORT)/$$(HOST)?$(BROKEN" },
                { "name": "EMPTY" },
                { "name": "POD", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } },
                { "name": "CPU", "valueFrom": { "resourceFieldRef": { "resource": "limits.cpu" } } },
                { "name": "KEY", "valueFrom": { "secretKeyRef": { "name": "s", "key": "k" } } },
                { "name": "NEW", "valueFrom": { "unheardOf": { "name": "s" } } },
            ],
        }))
        .unwrap();
        let (copies, sources) = copies(2, &container);
        assert!(sources.is_empty());
        assert_eq!(
            to_value(copies).unwrap(),
            json!([
                { "name": "TPD_APP_2_HOST", "value": "db" },
                { "name": "TPD_APP_2_URL", "value": "http://$(TPD_APP_2_HOST):$(PORT)/$$(HOST)?$(BROKEN" },
                { "name": "TPD_APP_2_EMPTY" },
                { "name": "TPD_APP_2_POD", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } },
                {
                    "name": "TPD_APP_2_CPU",
                    "valueFrom": { "resourceFieldRef": { "resource": "limits.cpu", "containerName": "app" } },
                },
                {
                    "name": "TPD_APP_2_KEY",
                    "valueFrom": { "secretKeyRef": { "name": "s", "key": "k", "optional": true } },
                },
            ])
        );
    }

    #[test]
    fn sources_are_prefixed_and_references_into_them_follow() {
        let container = from_value(json!({
            "name": "app",
            "envFrom": [{ "configMapRef": { "name": "c" } }, { "prefix": "S_", "secretRef": { "name": "s" } }],
            "env": [{ "name": "URL", "value": "$(S_USER)@$(WEB_SERVICE_HOST) $(URL)" }],
        }))
        .unwrap();
        let (copies, sources) = copies(0, &container);
        assert_eq!(
            to_value(sources).unwrap(),
            json!([
                { "prefix": "TPD_APP_0_", "configMapRef": { "name": "c", "optional": true } },
                { "prefix": "TPD_APP_0_S_", "secretRef": { "name": "s", "optional": true } },
            ])
        );
        assert_eq!(
            copies[0].value.as_deref(),
            Some("$(TPD_APP_0_S_USER)@$(WEB_SERVICE_HOST) $(TPD_APP_0_URL)")
        );
    }
}
