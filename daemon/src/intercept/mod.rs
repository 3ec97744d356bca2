//! Intercepts of this laptop: made, followed, and kept for as long as the laptop is connected.
//!
//! ```text
//! tpd intercept ─► local API ─► Keeper ─► Intercept in the cluster ─► agents
//!                                 │            │ status
//!                                 │◄───────────┘
//!                                 └─► Effects: overlay ports and what is behind them, domains of pods
//! ```

mod check;
mod environment;
mod keeper;
mod lookout;
mod refusals;
mod resource;
mod state;
mod targets;
mod webhook;

pub(crate) use keeper::{Effects, Keeper, Place};
pub(crate) use state::STATE;

#[cfg(test)]
pub(crate) fn example(workload: &str, ports: &[&str]) -> tpd_api::local::InterceptRequest {
    use tpd_api::intercept::{Protocol, Workload, WorkloadKind};
    use tpd_api::local::{InterceptRequest, LocalPort};

    let port = |(index, port): (usize, &&str)| LocalPort {
        local: ([127, 0, 0, 1], 9090 + index as u16).into(),
        port: Some((*port).into()),
        protocol: Protocol::Tcp,
    };
    InterceptRequest {
        namespace: "shop".into(),
        name: None,
        workload: Workload { kind: WorkloadKind::Deployment, name: workload.into() },
        ports: ports.iter().enumerate().map(port).collect(),
        filter: tpd_api::filter::Filter::default(),
        mode: tpd_api::intercept::Mode::Intercept,
        proxy_protocol: false,
        environment: false,
        replace_pods: false,
        ttl_seconds: None,
        dns: Vec::new(),
    }
}
