//! What there is beside this laptop's own intercepts: what one would come to, and those of other people.

use kube::Api;
use kube::api::{ListParams, Patch};
use kube::core::Request;
use tpd_api::intercept::Intercept;
use tpd_api::local::{InterceptRequest, Other, Preview};

use super::keeper::{creating, patching};
use super::{Keeper, refusals, resource, webhook};
use crate::failure::Failure;
use crate::kube::errors::{self, Call};
use crate::kube::session::CALL_TIMEOUT;
use crate::kube::warnings;

/// Most objects that are listed; a person reads fewer.
const MAX_LISTED: u32 = 500;

impl Keeper {
    /// What an intercept would come to: it is asked for by a dry run, so what the cluster refuses it refuses now, and what the
    /// manager warns of takes no right to see pods.
    pub(crate) async fn preview(&self, request: &InterceptRequest) -> Result<Preview, Failure> {
        resource::check(request)?;
        let place = self.place()?;
        let object = self.draft(request, &place);
        let name = object.metadata.name.as_deref().unwrap_or_default();
        let doing = creating(&request.namespace, name);
        let call = Call { doing: &doing, server: place.server(), namespace: &request.namespace };
        let client = place.cluster.client().await?;
        let url = Api::<Intercept>::namespaced(client.clone(), &request.namespace).resource_url().to_owned();
        let ask = || async {
            let (parameters, patch) = (patching().dry_run(), Patch::Apply(&object));
            let request = Request::new(&url).patch(name, &parameters, &patch);
            warnings::of(&client, request.map_err(kube::Error::BuildRequest)?).await.or_else(unseen)
        };
        Ok(Preview { notes: webhook::judged(call, ask).await? })
    }

    /// Intercepts that this laptop does not keep, in one namespace or in all: those of others, and what its user has made by hand.
    pub(crate) async fn others(&self, namespace: Option<&str>) -> Result<Vec<Other>, Failure> {
        namespace.map_or(Ok(()), resource::check_name)?;
        let place = self.place()?;
        let client = place.cluster.client().await?;
        let (api, doing): (Api<Intercept>, _) = match namespace {
            Some(namespace) => {
                (Api::namespaced(client, namespace), format!("list Intercepts in namespace {namespace}"))
            }
            None => (Api::all(client), "list Intercepts in every namespace".to_owned()),
        };
        let call =
            Call { doing: &doing, server: place.server(), namespace: namespace.unwrap_or("NAMESPACE") };
        let parameters = ListParams::default().limit(MAX_LISTED);
        let listed = errors::judged(call, refusals::failure, CALL_TIMEOUT, api.list(&parameters)).await?;
        let others = listed.items.into_iter().map(describe);
        Ok(others.filter(|other| self.get(&other.namespace, &other.name).is_err()).collect())
    }
}

fn describe(intercept: Intercept) -> Other {
    Other {
        namespace: intercept.metadata.namespace.unwrap_or_default(),
        name: intercept.metadata.name.unwrap_or_default(),
        owner: intercept.spec.owner,
        workload: intercept.spec.workload,
        filter: intercept.spec.filter,
        mode: intercept.spec.mode,
        status: intercept.status,
    }
}

/// Somebody else's webhook may bear no dry run, and let the intercept itself pass.
fn unseen(error: kube::Error) -> Result<Vec<String>, kube::Error> {
    match error {
        kube::Error::Api(status) if status.message.contains("does not support dry run") => {
            Ok(vec![format!("which pods will be replaced cannot be seen: {}", status.message)])
        }
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn who_cannot_be_asked_beforehand_is_no_obstacle() {
        let api = |message: &str| kube::Error::Api(Status::failure(message, "").with_code(400).boxed());
        let notes = unseen(api(r#"admission webhook "x.example" does not support dry run"#)).unwrap();
        assert!(
            notes[0].starts_with("which pods will be replaced cannot be seen: admission webhook"),
            "{notes:?}"
        );
        assert!(unseen(api("spec.ports is required")).is_err());
    }
}
