//! A plain WireGuard tunnel between the laptop and the node, by a program that speaks the usual configuration protocol
//! (<https://www.wireguard.com/xplatform/>). The node routes what comes out of it, so that the laptop reaches Services
//! through it as it does through tpd.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::time::{sleep, timeout};

use crate::lab::{LAPTOP_ADDRESS, Lab, NODE_ADDRESS, Place};

/// Both ends are there within a few milliseconds.
const START: Duration = Duration::from_secs(5);

/// What tpd's own tunnel has too.
const MTU: u16 = 1420;

/// The cluster's Services, as `tests/kubernetes/lib.sh` has them.
const SERVICES: &str = "10.96.0.0/16";

/// One end: a device, an address for benchmarks (RFC 2544), and a key pair that guards nothing.
struct End {
    place: Place,
    device: &'static str,
    address: &'static str,
    underlay: &'static str,
    private_key: &'static str,
    public_key: &'static str,
}

const LAPTOP: End = End {
    place: Place::Laptop,
    device: "bench-laptop",
    address: "198.18.0.2",
    underlay: LAPTOP_ADDRESS,
    private_key: "0101010101010101010101010101010101010101010101010101010101010101",
    public_key: "a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209",
};

const NODE: End = End {
    place: Place::Node,
    device: "bench-node",
    address: "198.18.0.1",
    underlay: NODE_ADDRESS,
    private_key: "0202020202020202020202020202020202020202020202020202020202020202",
    public_key: "ce8d3ad1ccb633ec7b70c17814a5c76ecd029685050d344745ba05870e587d59",
};

const PORT: u16 = 51830;

/// Starts both ends and routes the Services through them. Killing them takes the devices and routes away.
pub(crate) async fn start(lab: &Lab, program: &str, options: &[&str]) -> Result<Vec<Child>> {
    ensure!(Path::new(program).exists(), "{program} is missing: tests/bench.sh builds it from crates.io");
    let mut ends = Vec::new();
    for (end, other, allowed) in [(&NODE, &LAPTOP, "198.18.0.2/32"), (&LAPTOP, &NODE, "0.0.0.0/0")] {
        ends.push(start_end(lab, program, options, end, other, allowed).await?);
    }
    lab.ip(LAPTOP.place, &format!("route add {SERVICES} dev {}", LAPTOP.device)).await?;
    Ok(ends)
}

async fn start_end(
    lab: &Lab,
    program: &str,
    options: &[&str],
    end: &End,
    other: &End,
    allowed: &str,
) -> Result<Child> {
    let device = end.device;
    let socket = lab.laptop_file(&format!("/run/wireguard/{device}.sock"));
    // A killed one leaves it behind.
    let _ = std::fs::remove_file(&socket);
    let child = lab
        .command(end.place, program)
        .args(options)
        .arg(device)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    configure(&socket, end, other, allowed).await.with_context(|| format!("cannot configure {program}"))?;
    lab.ip(end.place, &format!("address add {}/24 dev {device}", end.address)).await?;
    lab.ip(end.place, &format!("link set {device} mtu {MTU} up")).await?;
    Ok(child)
}

async fn configure(socket: &Path, end: &End, other: &End, allowed: &str) -> Result<()> {
    let mut stream = connect(socket).await?;
    let settings = format!(
        "set=1\nprivate_key={}\nlisten_port={PORT}\nreplace_peers=true\npublic_key={}\nendpoint={}:{PORT}\n\
         replace_allowed_ips=true\nallowed_ip={allowed}\n\n",
        end.private_key, other.public_key, other.underlay,
    );
    stream.write_all(settings.as_bytes()).await?;
    let mut answer = [0; 64];
    let length = timeout(START, stream.read(&mut answer)).await.context("it does not answer")??;
    let answer = String::from_utf8_lossy(&answer[..length]);
    ensure!(answer.contains("errno=0"), "it answers {answer:?}");
    Ok(())
}

async fn connect(socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + START;
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("no answer at {}", socket.display()));
            }
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}
