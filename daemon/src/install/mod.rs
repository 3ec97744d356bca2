//! Installing the manager into a cluster, and taking it out again.

mod bindings;
mod ready;
mod released;
mod resource;
mod whereabouts;

use std::time::Duration;

use kube::Client;
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};
use tpd_api::exit::ExitCode;
use tpd_api::install::{Options, objects};

pub(crate) use ready::wait as wait_ready;
use resource::Resource;

use crate::failure::Failure;
use crate::kube::errors::{self, Call};
use crate::progress::Progress;

/// Time for one object. Admission webhooks of others may take up to 30 s each by Kubernetes' own rules.
const OBJECT_TIMEOUT: Duration = Duration::from_secs(35);

/// Time for a namespace to empty itself; its pods have 2 s to leave.
const GONE_TIMEOUT: Duration = Duration::from_secs(120);

/// A cluster to install into.
pub(crate) struct Site {
    pub(crate) client: Client,
    pub(crate) server: String,
    pub(crate) namespace: String,
}

impl Site {
    /// Applies every object, in order.
    pub(crate) async fn apply(&self, options: &Options, progress: &mut Progress) -> Result<(), Failure> {
        for object in objects(options) {
            let resource = Resource::of(&self.client, &object);
            progress.step(&format!("applying {resource}"));
            self.bounded("apply", &resource, resource.apply(&object)).await?;
        }
        Ok(())
    }

    /// Deletes every object, the last first, and waits until the namespace is gone.
    pub(crate) async fn delete(&self, options: &Options, progress: &mut Progress) -> Result<(), Failure> {
        for object in objects(options).iter().rev() {
            let resource = Resource::of(&self.client, object);
            progress.step(&format!("deleting {resource}"));
            self.bounded("delete", &resource, resource.delete()).await?;
        }
        let namespace = objects(options).into_iter().find(|object| object["kind"] == "Namespace");
        match namespace {
            Some(namespace) => self.await_gone(&Resource::of(&self.client, &namespace), progress).await,
            None => Ok(()),
        }
    }

    async fn await_gone(&self, resource: &Resource, progress: &mut Progress) -> Result<(), Failure> {
        progress.step(&format!("waiting until {resource} is gone"));
        let deadline = Instant::now() + GONE_TIMEOUT;
        while self.bounded("get", resource, resource.get()).await?.is_some() {
            if Instant::now() > deadline {
                return Err(Failure::new(ExitCode::Timeout, format!("{resource} is still being deleted"))
                    .help(format!("see what holds it: kubectl get namespace {} -o yaml", self.namespace)));
            }
            sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    /// Whether the manager is installed.
    pub(crate) async fn is_installed(&self, options: &Options) -> Result<bool, Failure> {
        for object in objects(options).iter().filter(|object| object["kind"] == "StatefulSet") {
            let resource = Resource::of(&self.client, object);
            if self.bounded("get", &resource, resource.get()).await?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn bounded<T>(
        &self,
        verb: &str,
        resource: &Resource,
        request: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, Failure> {
        let doing = format!("{verb} {resource}");
        let call = Call { doing: &doing, server: &self.server, namespace: &self.namespace };
        match timeout(OBJECT_TIMEOUT, request).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(refused(call, &error)),
            Err(_) => Err(Failure::new(
                ExitCode::Unreachable,
                format!("the API server did not {doing} within 35 s"),
            )),
        }
    }
}

/// An installation is an administrator's affair: the developer's rules would not help.
fn refused(call: Call<'_>, error: &kube::Error) -> Failure {
    let failure = errors::failure(call, error);
    match failure.code {
        ExitCode::Forbidden => failure.help(
            "installing needs an administrator of the cluster (ClusterRole cluster-admin): name such a context with --context.
Others can render the objects for them with: tpd install --dry-run",
        ),
        ExitCode::NotInstalled => Failure::new(ExitCode::Failure, format!("cannot {}", call.doing))
            .caused_by(error)
            .help("tpd needs Kubernetes 1.33 or newer"),
        _ => failure,
    }
}

/// The objects as text to look at or to apply by other means.
pub(crate) fn render(options: &Options, json: bool) -> String {
    let objects = objects(options);
    if json {
        let list = serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        return format!("{list:#}\n");
    }
    objects.iter().map(document).collect()
}

fn document(object: &Value) -> String {
    format!("---\n{}", serde_yaml::to_string(object).expect("plain data"))
}
