//! Agents that will not do, and that no pod is replaced for twice.

use std::collections::BTreeMap;

use k8s_openapi::jiff::Timestamp;

use super::{Pod, PortKey};

/// What a pod with an agent may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lack {
    /// An agent in the path of a port.
    Port(PortKey),
    /// An agent of this installation.
    Installation,
}

/// Since when it is known that pods lack something: a pod made later, that lacks it too, shows that another would not have it either.
/// So each is replaced for the same thing once.
///
/// "When" is the creation of the youngest pod that was there: creations are compared with creations, all by the API server's clock.
/// They are whole seconds, so a successor that was made in the same one counts as there before, and is replaced. Its own successor
/// is not: between two releases the first pod's eviction is tried, a second (the pause between steps) or more after its release.
#[derive(Clone, Debug, Default)]
pub struct Lacks(BTreeMap<(String, Lack), Timestamp>);

impl Lacks {
    /// Takes in which pods of a workload lack what one made now would have, and when its youngest pod was created. Returns those that
    /// may be replaced for it.
    pub fn see<'a>(
        &mut self,
        workload: &str,
        lack: Lack,
        lacking: &[&'a Pod],
        youngest: Timestamp,
    ) -> Vec<&'a str> {
        let known = *self.0.entry((workload.to_owned(), lack)).or_insert(youngest);
        lacking.iter().filter(|pod| pod.created <= known).map(|pod| pod.uid.as_str()).collect()
    }

    /// Forgets all workloads but those that are intercepted.
    pub fn retain(&mut self, intercepted: impl Fn(&str) -> bool) {
        self.0.retain(|(workload, _), _| intercepted(workload));
    }
}

#[cfg(test)]
mod tests {
    use tpd_api::agent::Protocol;

    use super::super::super::samples::{at, injected};
    use super::{Lack, Lacks, Pod};

    #[test]
    fn a_pod_that_is_found_lacking_a_moment_later_is_replaced_too() {
        let lack = Lack::Installation;
        let (old, young) = (injected("old"), Pod { created: at(100), ..injected("young") });
        let mut lacks = Lacks::default();
        assert_eq!(lacks.see("shop/web", lack, &[&old], at(100)), ["uid-old"]);
        assert_eq!(lacks.see("shop/web", lack, &[&old, &young], at(100)), ["uid-old", "uid-young"]);
    }

    #[test]
    fn a_pod_is_replaced_for_a_port_once() {
        let port = Lack::Port((8080, Protocol::Tcp));
        let (old, new) = (injected("old"), Pod { created: at(101), ..injected("new") });
        let mut lacks = Lacks::default();
        assert_eq!(lacks.see("shop/web", port, &[&old], at(100)), ["uid-old"]);
        assert!(lacks.see("shop/web", port, &[&new], at(101)).is_empty());
        lacks.retain(|_| false);
        assert_eq!(lacks.see("shop/web", port, &[&new], at(101)), ["uid-new"]);
    }
}
