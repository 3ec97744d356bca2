//! `tpd install`: the manager into a cluster.

use std::time::Duration;

use clap::ValueEnum;
use ipnet::IpNet;
use tpd_api::exit::ExitCode;
use tpd_api::install::{Options, UdpService, default_agent_image, default_image};

use super::{ClusterArgs, OutputArgs};
use crate::failure::Failure;
use crate::install::{self, Site};
use crate::invoker::Invoker;
use crate::kube::cluster::Cluster;
use crate::kube::config;
use crate::output::{self, Format};
use crate::progress::Progress;

/// Installs the manager into a cluster, or upgrades it, and waits until it is ready
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Install {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Image of the manager
    #[arg(long, value_name = "REF", default_value_t = default_image())]
    image: String,
    /// Image of the agent that is put into intercepted pods; their nodes must be able to pull it
    #[arg(long, value_name = "REF", default_value_t = default_agent_image())]
    agent_image: String,
    /// When nodes pull these images: Always, IfNotPresent or Never
    #[arg(long, value_name = "POLICY", default_value = "IfNotPresent", value_parser = ["Always", "IfNotPresent", "Never"])]
    pull_policy: String,
    /// Secret of the namespace with the registry's credentials (may be repeated)
    #[arg(long, value_name = "NAME")]
    pull_secret: Vec<String>,
    /// Replicas of the manager; with two, sessions survive the loss of one
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    replicas: u32,
    /// How laptops reach the managers by UDP
    #[arg(long, value_enum, default_value_t)]
    udp: UdpArg,
    /// Group whose members may connect (may be repeated)
    #[arg(long, value_name = "GROUP")]
    developers_group: Vec<String>,
    /// Namespaces where those groups may intercept, separated by commas
    #[arg(long, value_name = "NAMESPACE", value_delimiter = ',', requires = "developers_group")]
    intercept_namespaces: Vec<String>,
    /// Pod network beside those that the manager finds (may be repeated)
    #[arg(long, value_name = "CIDR")]
    pod_network: Vec<IpNet>,
    /// Service network beside those that the manager finds (may be repeated)
    #[arg(long, value_name = "CIDR")]
    service_network: Vec<IpNet>,
    /// Leave port-forward out of the developer's role; sessions then need the API server's proxy or UDP
    #[arg(long)]
    no_port_forward: bool,
    /// How long to wait until it is ready, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    /// Only print the objects: YAML, or JSON with -o json
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum UdpArg {
    /// A port of every node.
    #[default]
    NodePort,
    /// A load balancer for each replica.
    LoadBalancer,
    /// Not at all.
    None,
}

impl Install {
    pub(super) fn format(&self) -> Format {
        self.output.output
    }

    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let options = self.options();
        if self.dry_run {
            output::text(&install::render(&options, self.format() == Format::Json));
            return Ok(ExitCode::Ok);
        }
        let site = site(&self.cluster).await?;
        let mut progress = Progress::new();
        site.apply(&options, &mut progress).await?;
        install::wait_ready(&site, Duration::from_secs(self.timeout), &mut progress).await?;
        drop(progress);
        output::text(&format!(
            "installed in namespace {} ({} replicas of {})\n",
            options.namespace, options.replicas, options.image
        ));
        output::text(&self.next_step(&options));
        Ok(ExitCode::Ok)
    }

    fn options(&self) -> Options {
        Options {
            namespace: self.cluster.manager_namespace.clone(),
            image: self.image.clone(),
            agent_image: self.agent_image.clone(),
            pull_policy: self.pull_policy.clone(),
            pull_secrets: self.pull_secret.clone(),
            replicas: self.replicas,
            udp_service: match self.udp {
                UdpArg::NodePort => UdpService::NodePort,
                UdpArg::LoadBalancer => UdpService::LoadBalancer,
                UdpArg::None => UdpService::None,
            },
            pod_networks: self.pod_network.clone(),
            service_networks: self.service_network.clone(),
            developer_groups: self.developers_group.clone(),
            intercept_namespaces: self.intercept_namespaces.clone(),
            port_forward: !self.no_port_forward,
            ..Options::default()
        }
    }

    fn next_step(&self, options: &Options) -> String {
        if options.developer_groups.is_empty() {
            return format!(
                "administrators may connect now: sudo tpd up\nto let a group connect: tpd install --developers-group GROUP, or\n  kubectl -n {} create rolebinding NAME --role={} --group=GROUP\n",
                options.namespace,
                tpd_api::install::DEVELOPER_ROLE
            );
        }
        let groups = options.developer_groups.join(", ");
        let intercepting = match options.intercept_namespaces.as_slice() {
            [] => format!(
                "to let them intercept the workloads of a namespace: tpd install --intercept-namespaces NAMESPACE, or\n  kubectl -n NAMESPACE create rolebinding NAME --clusterrole={} --group=GROUP\n",
                tpd_api::install::INTERCEPT_ROLE
            ),
            namespaces => format!("they may intercept in {}\n", namespaces.join(", ")),
        };
        format!("members of {groups} may connect now: sudo tpd up\n{intercepting}")
    }
}

/// The cluster that a command is about.
pub(super) async fn site(cluster: &ClusterArgs) -> Result<Site, Failure> {
    let invoker = Invoker::detect();
    let files = config::files(&invoker, cluster.kubeconfig.as_deref())?;
    let target = config::load(&files, cluster.context.as_deref()).await?;
    let server = target.server.clone();
    let client = Cluster::new(target, &invoker).client().await?;
    Ok(Site { client, server, namespace: cluster.manager_namespace.clone() })
}
