//! What a thousand open connections cost in memory.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;
use tokio::time::timeout;

use crate::contender::Contender;
use crate::cpu;
use crate::intercept::{self, Case};
use crate::lab::{Lab, Place};

const CONNECTIONS: u32 = 1000;

/// Opening them one after another takes a few seconds at most.
const LIMIT: Duration = Duration::from_secs(30);

/// Resident memory in MiB.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Memory {
    pub(crate) connections: u32,
    pub(crate) manager_idle: f64,
    pub(crate) manager_loaded: f64,
    pub(crate) daemon_idle: f64,
    pub(crate) daemon_loaded: f64,
}

/// Connects over UDP, and reads the memory of manager and daemon without and with the connections.
pub(crate) async fn measure(lab: &Lab) -> Result<Memory> {
    let running = Contender::TpdUdp.start(lab).await?;
    let figures = read(lab, &running.involved.processes, running.servers.echo).await;
    let stopped = running.stop(lab).await;
    let figures = figures?;
    stopped.map(|()| figures)
}

/// Resident memory of an agent, supervisor and worker together, in MiB.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AgentMemory {
    pub(crate) connections: u32,
    /// Without an intercept.
    pub(crate) idle: f64,
    /// With a filter that passes everything to the app, and no connection.
    pub(crate) passing: f64,
    /// The same, while the connections are open.
    pub(crate) loaded: f64,
}

/// Reads the memory of an agent that has nothing to do, and then under a filter that passes everything to the app.
pub(crate) async fn measure_agent(lab: &Lab) -> Result<AgentMemory> {
    // It has nothing of its own that would have to be stopped.
    Contender::Intercept(Case::Idle).start(lab).await?;
    let agent = intercept::proxies(lab, Case::Passing).await?;
    let idle = resident(&agent)?;
    let running = Contender::Intercept(Case::Passing).start(lab).await?;
    let figures = read_agent(lab, &agent, running.servers.web).await;
    let stopped = running.stop(lab).await;
    let (passing, loaded) = figures?;
    stopped?;
    Ok(AgentMemory { connections: CONNECTIONS, idle, passing, loaded })
}

async fn read_agent(lab: &Lab, agent: &[u32], server: SocketAddr) -> Result<(f64, f64)> {
    let passing = resident(agent)?;
    let mut holder = start_holder(lab, Place::Node, server, &["--http"]).await?;
    let loaded = resident(agent)?;
    holder.kill().await?;
    Ok((passing, loaded))
}

/// Opens the connections, and returns once all of them are.
async fn start_holder(lab: &Lab, place: Place, server: SocketAddr, options: &[&str]) -> Result<Child> {
    let program = std::env::current_exe()?.display().to_string();
    let mut holder = lab
        .command(place, "prlimit")
        .args(["--nofile=4096", "--", &program, "hold", &server.to_string(), &CONNECTIONS.to_string()])
        .args(options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let output = holder.stdout.take().context("its output is piped")?;
    timeout(LIMIT, BufReader::new(output).read_line(&mut line))
        .await
        .context("the connections do not open")??;
    ensure!(line.starts_with("open"), "the connections did not all open");
    Ok(holder)
}

async fn read(lab: &Lab, daemon: &[u32], server: SocketAddr) -> Result<Memory> {
    let managers = cpu::named("tpd-manager", lab.node);
    let (manager_idle, daemon_idle) = (resident(&managers)?, resident(daemon)?);
    let mut holder = start_holder(lab, Place::Laptop, server, &[]).await?;
    let (manager_loaded, daemon_loaded) = (resident(&managers)?, resident(daemon)?);
    holder.kill().await?;
    Ok(Memory { connections: CONNECTIONS, manager_idle, manager_loaded, daemon_idle, daemon_loaded })
}

/// Their resident memory, in MiB.
fn resident(processes: &[u32]) -> Result<f64> {
    ensure!(!processes.is_empty(), "there is no such process");
    let mut kibibytes = 0.0;
    for pid in processes {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("the process is gone")?;
        kibibytes += parse_resident(&status).context("/proc/PID/status has another form than expected")?;
    }
    Ok(kibibytes / 1024.0)
}

fn parse_resident(status: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

/// `bench hold SERVER COUNT`: opens the connections, uses each once, says so, and keeps them until standard input ends.
pub(crate) fn hold(server: SocketAddr, count: u32, http: bool) -> Result<()> {
    let mut connections = Vec::new();
    for index in 0..count {
        let opened = if http { open_http(server) } else { open(server) };
        let opened = opened.with_context(|| format!("connection {index} of {count}"))?;
        connections.push(opened);
    }
    writeln!(std::io::stdout(), "open")?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn open(server: SocketAddr) -> Result<TcpStream> {
    let mut connection = TcpStream::connect_timeout(&server, Duration::from_secs(5))?;
    connection.set_read_timeout(Some(Duration::from_secs(5)))?;
    connection.write_all(b"tpd")?;
    connection.read_exact(&mut [0; 3])?;
    Ok(connection)
}

/// The first bytes of the answer will do: the rest of it is short, and comes with them.
fn open_http(server: SocketAddr) -> Result<TcpStream> {
    let mut connection = TcpStream::connect_timeout(&server, Duration::from_secs(5))?;
    connection.set_read_timeout(Some(Duration::from_secs(5)))?;
    connection.write_all(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n")?;
    let mut answer = [0; 12];
    connection.read_exact(&mut answer)?;
    ensure!(answer == *b"HTTP/1.1 200", "the answer is {:?}", String::from_utf8_lossy(&answer));
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_resident_memory() {
        assert_eq!(parse_resident("VmPeak:\t 9 kB\nVmRSS:\t  123456 kB\nThreads:\t1\n"), Some(123_456.0));
    }
}
