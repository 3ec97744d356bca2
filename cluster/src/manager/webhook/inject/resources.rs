//! What the agent asks of its node: so that the pod stays admissible and in its class.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Container, LimitRange, LimitRangeItem, PodSpec, ResourceQuota, ResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::quantity::{self, Milli};

/// What a busy agent needs next to nothing of when nothing is intercepted. Requests are what an HPA divides by, so they are
/// small, and there are some, since an HPA on CPU wants one of every container.
const CPU_REQUEST: Milli = 10;
const MEMORY_REQUEST: Milli = 1000 * (32 << 20);

/// The agent's memory budget.
const MEMORY_LIMIT: Milli = 1000 * (64 << 20);

/// That of an agent that all connections of a port go through, whether or not somebody intercepts them: room for 19,000.
const LARGE_MEMORY_LIMIT: Milli = 1000 * (256 << 20);

/// Where a limit of CPU has to be: a Guaranteed pod, or a quota of limits. Intercepted traffic is carried within it, and
/// what does not fit goes to the app.
const CPU_LIMIT: Milli = 100;

/// The two resources that every container has a share of.
const RESOURCES: [Resource; 2] = [Resource::Cpu, Resource::Memory];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resource {
    Cpu,
    Memory,
}

impl Resource {
    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
        }
    }
}

/// Quality of service, as the kubelet derives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Every container's limits are its requests.
    Guaranteed,
    /// Something in between, or nothing at all for the pod's own account.
    Burstable,
    /// Nothing is asked for.
    BestEffort,
}

/// The class of a pod.
#[must_use]
pub fn class(pod: &PodSpec) -> Class {
    let containers = || pod.containers.iter().chain(pod.init_containers.iter().flatten());
    let of = |container: &Container, resource, which| amount(container, resource, which).filter(|it| *it > 0);
    let any = |container: &Container| {
        RESOURCES.iter().any(|resource| {
            of(container, *resource, Which::Request).is_some()
                || of(container, *resource, Which::Limit).is_some()
        })
    };
    let guaranteed = |container: &Container| {
        RESOURCES.iter().all(|resource| {
            let limit = of(container, *resource, Which::Limit);
            limit.is_some() && of(container, *resource, Which::Request) == limit
        })
    };
    match () {
        () if !containers().any(any) => Class::BestEffort,
        () if containers().all(guaranteed) => Class::Guaranteed,
        () => Class::Burstable,
    }
}

/// What the agent gets: as little as its class has it, within what the namespace allows. One that stands in for ports of the
/// app gets more memory where it need not be paid for.
///
/// # Errors
/// Tells what keeps the agent out.
pub fn fit(
    pod: &PodSpec,
    stands_in: bool,
    ranges: &[LimitRange],
    quotas: &[ResourceQuota],
) -> Result<ResourceRequirements, String> {
    let class = class(pod);
    let of = |memory| fit_with(pod, class, memory, ranges, quotas);
    match class {
        // A pod that has a budget of its own shares it among its containers.
        _ if pod.resources.is_some() => Ok(ResourceRequirements::default()),
        Class::BestEffort => Ok(ResourceRequirements::default()),
        // A quota of limits counts it, and a LimitRange may have a request grow with it.
        Class::Burstable if stands_in && !is_limited(quotas, Resource::Memory) => {
            let least = of(MEMORY_LIMIT)?;
            let large = of(LARGE_MEMORY_LIMIT).ok();
            Ok(large.filter(|large| large.requests == least.requests).unwrap_or(least))
        }
        Class::Burstable | Class::Guaranteed => of(MEMORY_LIMIT),
    }
}

fn fit_with(
    pod: &PodSpec,
    class: Class,
    memory: Milli,
    ranges: &[LimitRange],
    quotas: &[ResourceQuota],
) -> Result<ResourceRequirements, String> {
    let mut result = ResourceRequirements::default();
    for resource in RESOURCES {
        let mut share = Share::of(class, resource, memory);
        if share.limit.is_none() && is_limited(quotas, resource) {
            share.limit = Some(CPU_LIMIT);
        }
        for (range, item) in items(ranges, "Container") {
            share.bound(class, resource, item).map_err(|cause| format!("LimitRange {range}: {cause}"))?;
        }
        for (range, item) in items(ranges, "Pod") {
            share.within(pod, resource, item).map_err(|cause| format!("LimitRange {range}: {cause}"))?;
        }
        for quota in quotas {
            share.has_room(pod, resource, quota)?;
        }
        put(&mut result.requests, resource, Some(share.request));
        put(&mut result.limits, resource, share.limit);
    }
    Ok(result)
}

/// What the agent gets of one resource.
#[derive(Clone, Copy, Debug)]
struct Share {
    request: Milli,
    limit: Option<Milli>,
}

impl Share {
    fn of(class: Class, resource: Resource, memory: Milli) -> Self {
        match (class, resource) {
            (Class::Guaranteed, Resource::Cpu) => Self { request: CPU_LIMIT, limit: Some(CPU_LIMIT) },
            (Class::Guaranteed, Resource::Memory) => Self { request: memory, limit: Some(memory) },
            (_, Resource::Cpu) => Self { request: CPU_REQUEST, limit: None },
            (_, Resource::Memory) => Self { request: MEMORY_REQUEST, limit: Some(memory) },
        }
    }

    /// Keeps within what a container may have: at least `min`, at most `max`, a limit not too far above the request.
    fn bound(&mut self, class: Class, resource: Resource, item: &LimitRangeItem) -> Result<(), String> {
        let name = resource.name();
        let get = |map: &Option<BTreeMap<String, Quantity>>| lookup(map.as_ref(), resource);
        let (min, max) = (get(&item.min), get(&item.max));
        // The API server would put the default in; so it is known here what that is.
        self.limit = self.limit.or_else(|| get(&item.default)).or(max);
        self.request = self.request.max(min.unwrap_or(0));
        if let Some(limit) = &mut self.limit {
            *limit = (*limit).max(self.request);
            if let Some(max) = max {
                *limit = (*limit).min(max);
            }
            self.request = self.request.min(*limit);
            if let Some(ratio) = get(&item.max_limit_request_ratio).filter(|ratio| *ratio > 0) {
                self.request = self.request.max(quantity::div_ceil(*limit * 1000, ratio)).min(*limit);
            }
            if class == Class::Guaranteed {
                self.request = *limit;
            }
        }
        if self.request < min.unwrap_or(0) {
            return Err(format!("no container can have its min.{name} and its max.{name}"));
        }
        if resource == Resource::Memory && self.limit.is_some_and(|limit| limit < MEMORY_REQUEST) {
            return Err(format!("the agent needs {} bytes of memory", quantity::format(MEMORY_REQUEST)));
        }
        Ok(())
    }

    /// Whether the pod as a whole stays within what a pod may have.
    fn within(&self, pod: &PodSpec, resource: Resource, item: &LimitRangeItem) -> Result<(), String> {
        let name = resource.name();
        let requests = total(pod, resource, Which::Request) + self.request;
        let limits = total(pod, resource, Which::Limit) + self.limit.unwrap_or(0);
        if lookup(item.max.as_ref(), resource).is_some_and(|max| limits.max(requests) > max) {
            return Err(format!("with the agent, the pod would have more {name} than its max.{name}"));
        }
        let ratio = lookup(item.max_limit_request_ratio.as_ref(), resource);
        if ratio.is_some_and(|ratio| limits * 1000 > requests * ratio) {
            return Err(format!("with the agent, the pod would exceed its maxLimitRequestRatio.{name}"));
        }
        Ok(())
    }

    /// Whether a quota has room for the pod with the agent. Quotas that only count some pods are taken to count this one: a
    /// pod without an agent is better than one that is refused.
    fn has_room(&self, pod: &PodSpec, resource: Resource, quota: &ResourceQuota) -> Result<(), String> {
        let hard = quota.spec.as_ref().and_then(|spec| spec.hard.as_ref());
        let used = quota.status.as_ref().and_then(|status| status.used.as_ref());
        for (key, which) in quota_keys(resource) {
            let Some(hard) = hard.and_then(|map| map.get(&key)) else { continue };
            let taken = used.and_then(|map| map.get(&key)).and_then(quantity::parse).unwrap_or(0);
            let ours = match which {
                Which::Request => self.request,
                Which::Limit => self.limit.unwrap_or(0),
            };
            if quantity::parse(hard).is_some_and(|hard| taken + total(pod, resource, which) + ours > hard) {
                let quota = quota.metadata.name.as_deref().unwrap_or_default();
                let taken = used.and_then(|map| map.get(&key)).map_or("0", |used| &used.0);
                return Err(format!(
                    "ResourceQuota {quota} has no room for the pod and its agent: {taken} of {} {key} are used",
                    hard.0
                ));
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Request,
    Limit,
}

fn quota_keys(resource: Resource) -> [(String, Which); 3] {
    let name = resource.name();
    [
        (name.to_owned(), Which::Request),
        (format!("requests.{name}"), Which::Request),
        (format!("limits.{name}"), Which::Limit),
    ]
}

/// Whether a quota has every container say its limit.
fn is_limited(quotas: &[ResourceQuota], resource: Resource) -> bool {
    let key = format!("limits.{}", resource.name());
    let mut hard = quotas.iter().filter_map(|quota| quota.spec.as_ref()?.hard.as_ref());
    hard.any(|hard| hard.contains_key(&key))
}

fn items<'a>(ranges: &'a [LimitRange], kind: &str) -> impl Iterator<Item = (&'a str, &'a LimitRangeItem)> {
    let all = ranges.iter().filter_map(|range| {
        let name = range.metadata.name.as_deref().unwrap_or_default();
        Some(range.spec.as_ref()?.limits.iter().map(move |item| (name, item)))
    });
    all.flatten().filter(move |(_, item)| item.type_ == kind)
}

/// What the pod counts for: its containers and sidecars together, or an init container with the sidecars before it.
fn total(pod: &PodSpec, resource: Resource, which: Which) -> Milli {
    let of = |container: &Container| amount(container, resource, which).unwrap_or(0);
    let mut sidecars = 0;
    let mut peak = 0;
    for container in pod.init_containers.iter().flatten() {
        if is_sidecar(container) {
            sidecars += of(container);
            peak = peak.max(sidecars);
        } else {
            peak = peak.max(sidecars + of(container));
        }
    }
    let running = sidecars + pod.containers.iter().map(of).sum::<Milli>();
    running.max(peak) + lookup(pod.overhead.as_ref(), resource).unwrap_or(0)
}

/// Whether an init container runs as long as the pod does.
#[must_use]
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

fn amount(container: &Container, resource: Resource, which: Which) -> Option<Milli> {
    let resources = container.resources.as_ref()?;
    let limit = lookup(resources.limits.as_ref(), resource);
    match which {
        // Who says only a limit asks for it, too.
        Which::Request => lookup(resources.requests.as_ref(), resource).or(limit),
        Which::Limit => limit,
    }
}

fn lookup(map: Option<&BTreeMap<String, Quantity>>, resource: Resource) -> Option<Milli> {
    map?.get(resource.name()).and_then(quantity::parse)
}

fn put(map: &mut Option<BTreeMap<String, Quantity>>, resource: Resource, value: Option<Milli>) {
    if let Some(value) = value {
        let quantity = Quantity(quantity::format(value));
        map.get_or_insert_default().insert(resource.name().to_owned(), quantity);
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{LimitRange, PodSpec, ResourceQuota};
    use serde_json::{Value, from_value, json, to_value};

    use super::{Class, class, fit};

    fn pod(resources: &[Value]) -> PodSpec {
        let containers: Vec<_> =
            resources.iter().map(|resources| json!({ "name": "c", "resources": resources })).collect();
        from_value(json!({ "containers": containers })).unwrap()
    }

    fn burstable() -> PodSpec {
        pod(&[json!({ "requests": { "cpu": "100m" } }), json!({})])
    }

    fn guaranteed() -> PodSpec {
        let one = json!({ "cpu": "1", "memory": "1Gi" });
        pod(&[json!({ "requests": one, "limits": one }), json!({ "limits": one })])
    }

    fn range(kind: &str, item: Value) -> Vec<LimitRange> {
        let mut item = item;
        item["type"] = kind.into();
        vec![from_value(json!({ "metadata": { "name": "r" }, "spec": { "limits": [item] } })).unwrap()]
    }

    fn quota(hard: Value, used: Value) -> Vec<ResourceQuota> {
        let quota =
            json!({ "metadata": { "name": "q" }, "spec": { "hard": hard }, "status": { "used": used } });
        vec![from_value(quota).unwrap()]
    }

    fn fitted(pod: &PodSpec, ranges: &[LimitRange], quotas: &[ResourceQuota]) -> Result<Value, String> {
        fit(pod, false, ranges, quotas).map(|resources| to_value(resources).unwrap())
    }

    #[test]
    fn who_stands_in_for_ports_has_room_for_their_connections_where_that_costs_nothing() {
        let limit = |pod: &PodSpec, ranges: &[LimitRange], quotas: &[ResourceQuota]| {
            let resources = to_value(fit(pod, true, ranges, quotas).unwrap()).unwrap();
            (resources["requests"]["memory"].clone(), resources["limits"]["memory"].clone())
        };
        assert_eq!(limit(&burstable(), &[], &[]), (json!("33554432"), json!("268435456")));
        assert_eq!(limit(&guaranteed(), &[], &[]), (json!("67108864"), json!("67108864")));
        let at_most = range("Container", json!({ "max": { "memory": "128Mi" } }));
        assert_eq!(limit(&burstable(), &at_most, &[]).1, json!("134217728"));
        let half = range("Container", json!({ "maxLimitRequestRatio": { "memory": "2" } }));
        assert_eq!(limit(&burstable(), &half, &[]), (json!("33554432"), json!("67108864")));
        let counted = quota(json!({ "limits.memory": "1Gi" }), json!({ "limits.memory": "100Mi" }));
        let with_limits = pod(&[json!({ "limits": { "memory": "10Mi" } })]);
        assert_eq!(limit(&with_limits, &[], &counted).1, json!("67108864"), "others pay for it");
    }

    /// The class of a pod that has the agent, too.
    fn class_with_agent(pod: &PodSpec) -> Class {
        let agent =
            json!({ "name": "a", "restartPolicy": "Always", "resources": fitted(pod, &[], &[]).unwrap() });
        let mut pod = pod.clone();
        pod.init_containers = Some(vec![from_value(agent).unwrap()]);
        class(&pod)
    }

    #[test]
    fn a_pod_keeps_its_class() {
        for (pod, expected) in [
            (pod(&[json!({}), json!(null)]), Class::BestEffort),
            (burstable(), Class::Burstable),
            (guaranteed(), Class::Guaranteed),
            (pod(&[json!({ "limits": { "memory": "1Gi" } })]), Class::Burstable),
        ] {
            assert_eq!(class(&pod), expected);
            assert_eq!(class_with_agent(&pod), expected);
        }
    }

    #[test]
    fn a_container_stays_within_its_range() {
        let fitted = |item: Value| fitted(&burstable(), &range("Container", item), &[]);
        assert_eq!(
            fitted(json!({ "min": { "cpu": "50m", "memory": "100Mi" } })).unwrap(),
            json!({ "limits": { "memory": "104857600" }, "requests": { "cpu": "50m", "memory": "104857600" } })
        );
        assert_eq!(
            fitted(json!({ "max": { "cpu": "5m", "memory": "40Mi" } })).unwrap(),
            json!({
                "limits": { "cpu": "5m", "memory": "41943040" },
                "requests": { "cpu": "5m", "memory": "33554432" },
            })
        );
        let ratio =
            json!({ "default": { "cpu": "1" }, "maxLimitRequestRatio": { "cpu": "4", "memory": "1" } });
        assert_eq!(
            fitted(ratio).unwrap(),
            json!({
                "limits": { "cpu": "1", "memory": "67108864" },
                "requests": { "cpu": "250m", "memory": "67108864" },
            })
        );
        let error = fitted(json!({ "max": { "memory": "16Mi" } })).unwrap_err();
        assert!(error.contains("LimitRange r") && error.contains("memory"), "{error}");
    }

    #[test]
    fn a_pod_stays_within_its_range() {
        let tight = range("Pod", json!({ "max": { "cpu": "2" } }));
        assert!(fitted(&guaranteed(), &tight, &[]).unwrap_err().contains("max.cpu"));
        let roomy = range("Pod", json!({ "max": { "cpu": "3", "memory": "3Gi" } }));
        assert!(fitted(&guaranteed(), &roomy, &[]).is_ok());
        let ratio = range("Pod", json!({ "maxLimitRequestRatio": { "memory": "1" } }));
        assert!(fitted(&guaranteed(), &ratio, &[]).is_ok());
    }

    #[test]
    fn a_quota_needs_room() {
        let full = quota(json!({ "requests.cpu": "1" }), json!({ "requests.cpu": "895m" }));
        let error = fitted(&burstable(), &[], &full).unwrap_err();
        assert_eq!(
            error,
            "ResourceQuota q has no room for the pod and its agent: 895m of 1 requests.cpu are used"
        );
        let roomy = quota(json!({ "requests.cpu": "1" }), json!({ "requests.cpu": "890m" }));
        assert!(fitted(&burstable(), &[], &roomy).is_ok());
        let limits = quota(json!({ "limits.cpu": "1" }), json!({}));
        assert_eq!(fitted(&burstable(), &[], &limits).unwrap()["limits"]["cpu"], "100m");
    }
}
