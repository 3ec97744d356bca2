//! One object of an installation in the API server, whatever its kind.

use std::fmt;

use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::Value;
use tpd_api::install::FIELD_MANAGER;

/// Where an object lives.
pub(super) struct Resource {
    api: Api<DynamicObject>,
    kind: String,
    name: String,
}

impl Resource {
    /// The place of an object that `tpd_api::install` made: those are whole and named.
    pub(super) fn of(client: &Client, object: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (kind, name) = (text(&object["kind"]), text(&object["metadata"]["name"]));
        let api_version = text(&object["apiVersion"]);
        let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &kind));
        let api = match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
            None => Api::all_with(client.clone(), &resource),
        };
        Self { api, kind, name }
    }

    pub(super) async fn apply(&self, object: &Value) -> Result<(), kube::Error> {
        // Forced: what `tpd install` says about its own objects counts, also after somebody's kubectl edit.
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        self.api.patch(&self.name, &parameters, &Patch::Apply(object)).await.map(drop)
    }

    /// Deletes it; that it is gone already is fine.
    pub(super) async fn delete(&self) -> Result<(), kube::Error> {
        match self.api.delete(&self.name, &DeleteParams::background()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            other => other.map(drop),
        }
    }

    pub(super) async fn get(&self) -> Result<Option<DynamicObject>, kube::Error> {
        self.api.get_opt(&self.name).await
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}
