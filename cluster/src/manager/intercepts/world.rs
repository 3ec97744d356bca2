//! What is known of the cluster for the sake of intercepts: a value that watch events change.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::ops::Bound;

use kube::runtime::watcher::Event;
use tpd_api::agent::Entry;
use tpd_api::overlay::DualAddress;
use tpd_netstack::key::PublicKey;

use super::births::Births;
use super::objects::{Intercept, Pod, Service, Slice};
use crate::manager::endpoints::Replica;
use crate::manager::store::{Store, is_older};

/// The kinds of objects that are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Intercepts.
    Intercepts,
    /// Pods.
    Pods,
    /// Services.
    Services,
    /// EndpointSlices.
    Slices,
}

/// One step of a watch, by namespace and name of the object.
#[derive(Clone, Debug)]
pub enum Step {
    /// An intercept.
    Intercept(Box<Event<(String, Intercept)>>),
    /// A pod.
    Pod(Box<Event<(String, Pod)>>),
    /// A Service.
    Service(Event<(String, Service)>),
    /// An EndpointSlice.
    Slice(Event<(String, Slice)>),
    /// The API server will not give these.
    Denied(Kind),
}

/// A step, and the version of the object.
#[derive(Clone, Debug)]
pub struct Change {
    /// The object's resource version; 0 where there is none.
    pub revision: u64,
    /// What has changed.
    pub step: Step,
}

/// A laptop that is on the overlay, or is about to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Laptop {
    /// Whose it is.
    pub owner: String,
    /// Its overlay addresses, once it has some.
    pub address: Option<DualAddress>,
    /// Its lanes' keys.
    pub keys: Vec<PublicKey>,
}

/// What the rest of the manager knows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    /// Laptops by the name of their sessions; `None` until they have been listed.
    pub laptops: Option<BTreeMap<String, Laptop>>,
    /// The manager's pods.
    pub replicas: BTreeMap<String, Replica>,
    /// Which installation agents must belong to, once that is known.
    pub installation: Option<String>,
}

impl Known {
    /// Whether an overlay address is a laptop's.
    #[must_use]
    pub fn has(&self, address: Ipv6Addr) -> bool {
        let addresses = self.laptops.iter().flatten().filter_map(|(_, laptop)| laptop.address);
        addresses.into_iter().any(|laptop| laptop.ipv6 == address)
    }
}

/// The cluster as it is known.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Where it is noted who makes pods.
    pub births: Births,
    intercepts: Store<Intercept>,
    pods: Store<Pod>,
    services: Store<Service>,
    slices: Store<Slice>,
    left: Vec<Pod>,
    revision: u64,
}

impl World {
    /// Takes in a change. Tells whether anything that matters is different now.
    pub fn apply(&mut self, change: Change) -> bool {
        self.revision = self.revision.max(change.revision);
        match change.step {
            Step::Intercept(event) => self.intercepts.apply(*event),
            Step::Pod(event) => {
                if let Event::Apply((key, pod)) | Event::InitApply((key, pod)) = &*event {
                    self.note_birth(key, pod);
                }
                self.note_leave(&event);
                self.pods.apply(*event)
            }
            Step::Service(event) => self.services.apply(event),
            Step::Slice(event) => self.slices.apply(event),
            // They tell the endpoints of Services without a selector, and can be gone without.
            Step::Denied(Kind::Slices) => self.slices.give_up(),
            Step::Denied(_) => false,
        }
    }

    fn note_birth(&self, key: &str, pod: &Pod) {
        let is_new = self.pods.items().get(key).is_none_or(|known| known.uid != pod.uid);
        if let Some(maker) = pod.maker.as_ref().filter(|_| is_new) {
            self.births.note(maker, pod.entry == Some(Entry::Redirect));
        }
    }

    /// Notes the pods that Services led to until this event.
    fn note_leave(&mut self, event: &Event<(String, Pod)>) {
        if !self.settled() {
            return;
        }
        let pods = &self.pods;
        let leaves = |known: &&Pod, now: Option<&Pod>| {
            let stays = now.is_some_and(|now| now.uid == known.uid && !now.leaving);
            known.ready && !known.leaving && !stays
        };
        match event {
            Event::Apply((key, pod)) => {
                self.left.extend(pods.items().get(key).filter(|known| leaves(known, Some(pod))).cloned());
            }
            Event::Delete((key, _)) => {
                self.left.extend(pods.items().get(key).filter(|known| leaves(known, None)).cloned());
            }
            Event::InitDone => {
                let gone = pods.items().iter().filter(|(key, known)| leaves(known, pods.incoming(key)));
                self.left.extend(gone.map(|(_, known)| known.clone()));
            }
            Event::Init | Event::InitApply(_) => {}
        }
    }

    /// The pods that have left since this was last asked, as they were when Services led to them.
    pub fn take_left(&mut self) -> Vec<Pod> {
        std::mem::take(&mut self.left)
    }

    /// Takes in what the API server answered to a write, without waiting for the watch to tell. The watch may have been quicker,
    /// and have told of a later change too: nothing would tell of that again.
    pub fn written(&mut self, key: String, intercept: Intercept) {
        let is_news = self.intercepts.items().get(&key).is_some_and(|old| {
            old.uid == intercept.uid && !is_older(&intercept.resource_version, &old.resource_version)
        });
        if is_news {
            self.intercepts.put(key, intercept);
        }
    }

    /// Whether every list is complete. Before that nothing may be concluded from what is not there.
    #[must_use]
    pub fn settled(&self) -> bool {
        self.intercepts.settled() && self.pods.settled() && self.services.settled() && self.slices.settled()
    }

    /// The newest version of any object that was seen.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// All intercepts by namespace and name.
    #[must_use]
    pub fn intercepts(&self) -> &BTreeMap<String, Intercept> {
        self.intercepts.items()
    }

    /// All pods by namespace and name.
    #[must_use]
    pub fn pods(&self) -> &BTreeMap<String, Pod> {
        self.pods.items()
    }

    /// The Services of a namespace.
    pub fn services_in<'a>(&'a self, namespace: &str) -> impl Iterator<Item = &'a Service> + use<'a> {
        within(self.services.items(), namespace)
    }

    /// The pods of a namespace.
    pub fn pods_in<'a>(&'a self, namespace: &str) -> impl Iterator<Item = &'a Pod> + use<'a> {
        within(self.pods.items(), namespace)
    }

    /// The EndpointSlices of a namespace.
    pub fn slices_in<'a>(&'a self, namespace: &str) -> impl Iterator<Item = &'a Slice> + use<'a> {
        within(self.slices.items(), namespace)
    }
}

/// The items whose keys begin with a namespace and a slash. `0` is the character behind the slash.
fn within<'a, T>(
    items: &'a BTreeMap<String, T>,
    namespace: &str,
) -> impl Iterator<Item = &'a T> + use<'a, T> {
    let bounds = (Bound::Included(format!("{namespace}/")), Bound::Excluded(format!("{namespace}0")));
    items.range(bounds).map(|(_, item)| item)
}

#[cfg(test)]
mod tests {
    use kube::runtime::watcher::Event;

    use super::super::births::Made;
    use super::super::samples::{intercept, pod};
    use super::{Change, Entry, Intercept, Kind, Pod, Step, World};

    fn apply(world: &mut World, step: Step) -> bool {
        world.apply(Change { revision: 7, step })
    }

    #[test]
    fn every_list_must_be_complete_but_that_of_slices() {
        let mut world = World::default();
        for step in [
            Step::Intercept(Box::new(Event::InitDone)),
            Step::Pod(Box::new(Event::InitDone)),
            Step::Denied(Kind::Services),
            Step::Denied(Kind::Slices),
        ] {
            apply(&mut world, step);
            assert!(!world.settled());
        }
        apply(&mut world, Step::Service(Event::InitDone));
        assert!(world.settled());
        assert_eq!(world.revision(), 7);
    }

    #[test]
    fn namespaces_are_kept_apart() {
        let mut world = World::default();
        for key in ["sho/a", "shop-2/b", "shop/c", "shop/d", "shop2/e"] {
            let mut pod = pod(key);
            pod.name = key.into();
            apply(&mut world, Step::Pod(Box::new(Event::Apply((key.into(), pod)))));
        }
        let names: Vec<_> = world.pods_in("shop").map(|pod| pod.name.as_str()).collect();
        assert_eq!(names, ["shop/c", "shop/d"]);
    }

    #[test]
    fn an_answer_to_a_write_never_revives_an_intercept() {
        let mut world = World::default();
        world.written("shop/a".into(), intercept("a"));
        assert!(world.intercepts().is_empty());
    }

    #[test]
    fn births_are_noted_once() {
        let mut world = World::default();
        let made = |name: &str, entry| Pod { maker: Some("r".into()), entry, ..pod(name) };
        let event = |pod: Pod| (format!("shop/{}", pod.name), pod);
        for pod in [made("a", None), made("a", None), made("b", Some(Entry::Redirect))] {
            apply(&mut world, Step::Pod(Box::new(Event::Apply(event(pod)))));
        }
        apply(&mut world, Step::Pod(Box::new(Event::Init)));
        for pod in [made("b", Some(Entry::Redirect)), made("c", None), pod("alone")] {
            apply(&mut world, Step::Pod(Box::new(Event::InitApply(event(pod)))));
        }
        apply(&mut world, Step::Pod(Box::new(Event::InitDone)));
        assert_eq!(world.births.of("r"), Made { all: 3, redirected: 1 });
    }

    #[test]
    fn an_answer_that_comes_late_undoes_no_later_change() {
        let version = |version: &str, generation| Intercept {
            resource_version: version.into(),
            generation,
            ..intercept("a")
        };
        let mut world = World::default();
        let changed = Event::Apply(("shop/a".to_owned(), version("11", 2)));
        apply(&mut world, Step::Intercept(Box::new(changed)));
        world.written("shop/a".into(), version("10", 1));
        assert_eq!(world.intercepts()["shop/a"].generation, 2);
        world.written("shop/a".into(), version("12", 3));
        assert_eq!(world.intercepts()["shop/a"].generation, 3);
    }
}
