//! The watches that intercepts need, in all namespaces.

use std::fmt;

use futures::stream::{BoxStream, Stream, select_all};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tpd_api::intercept::Intercept;

use super::objects::{self, TrimmedPod, key};
use super::world::{Change, Kind, Step};
use crate::manager::watch::{keyed, repeated};

/// Seconds after which the watch of intercepts is renewed: one that an API server lost without a word must not leave traffic
/// at a laptop that has left, or keep a new intercept waiting, or its pods without agents.
pub const INTERCEPTS_TIMEOUT: u32 = 30;

/// Every watch in one stream, which never ends.
pub fn all(client: &Client) -> impl Stream<Item = Change> + Send + Unpin + use<> {
    let intercepts = watcher::Config::default().timeout(INTERCEPTS_TIMEOUT);
    select_all([
        one(client, Kind::Intercepts, intercepts, |event: Event<Intercept>| {
            let event = keyed(event, key, |object| Some(objects::intercept(object)));
            event.map(|event| Step::Intercept(Box::new(event)))
        }),
        one(client, Kind::Pods, watcher::Config::default(), |event: Event<TrimmedPod>| {
            let event = keyed(event, key, |object| Some(objects::pod(object)));
            event.map(|event| Step::Pod(Box::new(event)))
        }),
        one(client, Kind::Services, watcher::Config::default(), |event: Event<Service>| {
            keyed(event, key, |object| Some(objects::service(object))).map(Step::Service)
        }),
        one(client, Kind::Slices, watcher::Config::default(), |event: Event<EndpointSlice>| {
            keyed(event, key, objects::slice).map(Step::Slice)
        }),
    ])
}

fn one<K>(
    client: &Client,
    kind: Kind,
    config: watcher::Config,
    step: impl Fn(Event<K>) -> Option<Step> + Send + 'static,
) -> BoxStream<'static, Change>
where
    K: Resource<DynamicType = ()> + Clone + fmt::Debug + DeserializeOwned + Send + 'static,
{
    let change = move |event: Event<K>| {
        let revision = revision(&event);
        step(event).map(|step| Change { revision, step })
    };
    let denied = move || Change { revision: 0, step: Step::Denied(kind) };
    repeated(kind, Api::all(client.clone()), config, change, denied)
}

/// Since Kubernetes 1.35 it is written down that these are numbers that grow; they always were.
fn revision<K: Resource>(event: &Event<K>) -> u64 {
    let (Event::Apply(object) | Event::Delete(object) | Event::InitApply(object)) = event else { return 0 };
    object.meta().resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or_default()
}
