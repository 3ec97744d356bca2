//! The proxy alone, without taking over anything: `proxy LISTEN ZONE NAMESPACE GATEWAY UPSTREAM`, for trying it with dig.
//!
//! `proxy 127.0.0.5:5353 cluster.local shop 10.96.0.10:53 192.0.2.53:53`

use std::{error::Error, net::SocketAddr, sync::Arc};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tpd_dns::{Config, Proxy, Scope};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [listen, zone, namespace, gateway, upstream] = &*arguments else {
        return Err("usage: proxy LISTEN ZONE NAMESPACE GATEWAY UPSTREAM".into());
    };
    let networks = ["10.96.0.0/16", "10.244.0.0/16", "fd00:10:96::/112", "fd00:10:244::/56"];
    let scope = Scope {
        zone: zone.clone(),
        namespace: namespace.clone(),
        networks: networks.iter().map(|text| text.parse()).collect::<Result<_, _>>()?,
        ..Scope::default()
    };
    let upstreams: Arc<[SocketAddr]> = Arc::new([upstream.parse()?]);
    // The ends that could change them live as long as the proxy, which follows them.
    let (_scope, scope) = watch::channel(Arc::new(scope));
    let (_upstreams, upstreams) = watch::channel(upstreams);
    let config = Config { scope, gateways: vec![gateway.parse()?], listen: vec![listen.parse()?], upstreams };
    Proxy::bind(config).await?.run(CancellationToken::new()).await;
    Ok(())
}
