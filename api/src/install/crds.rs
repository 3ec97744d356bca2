//! The custom resources, as the API server is told of them.

use kube::CustomResourceExt;
use serde_json::{Value, json};

use crate::intercept::Intercept;
use crate::session::ClientSession;

/// Every CustomResourceDefinition of tpd.
#[must_use]
pub fn custom_resource_definitions() -> Vec<Value> {
    [ClientSession::crd(), Intercept::crd()]
        .map(|definition| finish(serde_json::to_value(definition).expect("a CRD is plain data")))
        .into()
}

/// The same as one YAML document for the chart.
///
/// JSON is YAML, so no YAML writer is needed here; and no value in it looks like a template.
#[must_use]
pub fn custom_resource_definitions_yaml() -> String {
    custom_resource_definitions().iter().map(|definition| format!("---\n{definition:#}\n")).collect()
}

/// Labels, and protection: deleting a definition deletes every object of its kind, so neither `helm uninstall`
/// nor a chart that drops it may.
fn finish(mut definition: Value) -> Value {
    drop_formats(&mut definition);
    definition["metadata"]["labels"] = json!({ "app.kubernetes.io/part-of": "tpd" });
    definition["metadata"]["annotations"] = json!({ "helm.sh/resource-policy": "keep" });
    definition
}

/// The API server knows no unsigned formats and warns of each; the bounds beside them say the same.
fn drop_formats(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            fields.retain(|name, value| {
                name != "format" || !value.as_str().is_some_and(|it| it.starts_with("uint"))
            });
            fields.values_mut().for_each(drop_formats);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_formats),
        _ => {}
    }
}
