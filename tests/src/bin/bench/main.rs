//! `make bench`: tpd beside its peers, in the same topology and in turns, as a table and as JSON.

mod contender;
mod cpu;
mod intercept;
mod lab;
mod load;
mod memory;
mod metric;
mod paced;
mod report;
mod results;
mod target;
mod wireguard;

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::{Parser, Subcommand};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use contender::Contender;
use cpu::{Involved, Meter};
use intercept::Case;
use lab::Lab;
use metric::{Amount, Figure, Metric};
use results::Results;

/// Measures tpd beside its peers on the local cluster.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,

    /// How often everything is measured, in turns [default: 3, or 1 if quick]
    #[arg(long)]
    rounds: Option<u32>,

    /// Short measurements
    #[arg(long)]
    quick: bool,

    /// Only these: node, nodeport, boringtun, gotatun, port-forward, udp, proxy, forward, intercept
    #[arg(long, value_delimiter = ',', value_parser = word_of)]
    only: Vec<&'static str>,

    /// Root of the repository
    #[arg(long, default_value = ".")]
    repository: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Keeps connections open until standard input ends
    #[command(hide = true)]
    Hold {
        server: SocketAddr,
        count: u32,
        /// By a request, not by an echo
        #[arg(long)]
        http: bool,
    },
    /// Sends for so many seconds
    #[command(hide = true)]
    Fill { sink: SocketAddr, seconds: u64 },
    /// Makes so many HTTP requests in a second
    #[command(hide = true)]
    Paced { server: SocketAddr, rate: f64, seconds: u64 },
}

fn word_of(given: &str) -> Result<&'static str> {
    Contender::ALL
        .into_iter()
        .map(Contender::word)
        .find(|word| *word == given)
        .ok_or_else(|| anyhow!("there is no such contender"))
}

/// What is measured, and for how long at most.
#[derive(Debug)]
struct Plan {
    contenders: Vec<Contender>,
    rounds: u32,
    amount: Amount,
    limit: Duration,
}

impl Plan {
    fn new(arguments: &Arguments) -> Self {
        let only = &arguments.only;
        let contenders =
            Contender::ALL.into_iter().filter(|one| only.is_empty() || only.contains(&one.word())).collect();
        if arguments.quick {
            let amount = Amount { seconds: 2, round_trips: 1000 };
            let (rounds, limit) = (arguments.rounds.unwrap_or(1), Duration::from_secs(260));
            return Self { contenders, rounds, amount, limit };
        }
        let amount = Amount { seconds: 3, round_trips: 3000 };
        let (rounds, limit) = (arguments.rounds.unwrap_or(3), Duration::from_secs(870));
        Self { contenders, rounds, amount, limit }
    }
}

// Children die with the thread that started them, so there is only one.
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match arguments.command {
        Some(Command::Hold { server, count, http }) => return memory::hold(server, count, http),
        Some(Command::Fill { sink, seconds }) => return load::fill_here(sink, seconds),
        Some(Command::Paced { server, rate, seconds }) => return paced::ask_here(server, rate, seconds),
        None => {}
    }
    let repository = arguments.repository.canonicalize()?;
    fs::create_dir_all(repository.join("target/bench"))?;
    let plan = Plan::new(&arguments);
    let lab = Lab::open(&repository).await?;
    let mut results = Results::default();
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let finished = tokio::select! {
        () = run(&lab, &plan, &mut results) => true,
        _ = interrupt.recv() => false,
        _ = terminate.recv() => false,
    };
    if !finished {
        say(&"interrupted: what follows is what there is so far");
    }
    lab.close().await.context("cannot clean up")?;
    publish(&repository, &results)?;
    if finished { Ok(()) } else { std::process::exit(130) }
}

/// In turns, A B C A B C: whatever else the machine does meets all of them alike.
async fn run(lab: &Lab, plan: &Plan, results: &mut Results) {
    let began = Instant::now();
    if plan.contenders.contains(&Contender::TpdUdp) {
        say(&"memory with many connections");
        match memory::measure(lab).await {
            Ok(memory) => results.memory = Some(memory),
            Err(error) => results.missing.push(format!("memory: {error:#}")),
        }
    }
    if plan.contenders.contains(&Contender::Intercept(Case::Passing)) {
        say(&"memory of an agent");
        match memory::measure_agent(lab).await {
            Ok(memory) => results.agent_memory = Some(memory),
            Err(error) => results.missing.push(format!("memory of an agent: {error:#}")),
        }
    }
    for round in 1..=plan.rounds {
        for &contender in &plan.contenders {
            if began.elapsed() > plan.limit {
                results.miss(contender, None, &anyhow!("the time was up in round {round}"));
                continue;
            }
            let seconds = began.elapsed().as_secs();
            say(&format_args!("[{seconds:>3} s] round {round} of {}: {}", plan.rounds, contender.name()));
            if let Err(error) = visit(lab, plan.amount, round, contender, results).await {
                results.miss(contender, None, &error);
            }
        }
    }
}

async fn visit(
    lab: &Lab,
    amount: Amount,
    round: u32,
    contender: Contender,
    results: &mut Results,
) -> Result<()> {
    let nobody = Involved { node: lab.node, ..Involved::default() };
    let meter = Meter::start(&nobody)?;
    let running = contender.start(lab).await?;
    let ready = running.ready.filter(|_| !running.involved.processes.is_empty());
    if let Some(ready) = ready.filter(|_| !matches!(contender, Contender::Intercept(_))) {
        let value = ready.as_secs_f64() * 1000.0;
        let background_percent = meter.stop()?.background_percent;
        let figure = Figure { metric: Metric::Ready, value, background_percent, remark: None };
        results.record(round, contender, figure);
    }
    let outcomes = match contender {
        Contender::Intercept(case) => intercept::measure(lab, case, &running, amount, results).await,
        _ => metric::measure(lab, &running, amount).await,
    };
    for (metric, outcome) in outcomes {
        match outcome {
            Ok(figures) => figures.into_iter().for_each(|figure| results.record(round, contender, figure)),
            Err(error) => results.miss(contender, Some(metric), &error),
        }
    }
    running.stop(lab).await.context("it does not stop")
}

fn publish(repository: &Path, results: &Results) -> Result<()> {
    let file = repository.join("target/bench/RESULT.json");
    fs::write(&file, serde_json::to_vec_pretty(&report::json(results, machine()))?)?;
    let table = report::table(results);
    fs::write(repository.join("target/bench/RESULT.txt"), &table)?;
    writeln!(std::io::stdout(), "{table}\nAll of it is in {}.", file.display())?;
    Ok(())
}

fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let model =
        read("/proc/cpuinfo").lines().find_map(|line| line.strip_prefix("model name\t: ").map(str::to_owned));
    let since_1970 = std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_secs());
    json!({
        "processor": model, "processors": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "kernel": read("/proc/sys/kernel/osrelease"), "unixTime": since_1970,
        "congestionControl": read("/proc/sys/net/ipv4/tcp_congestion_control"),
    })
}

/// Progress, for people.
fn say(what: &dyn std::fmt::Display) {
    // Nobody may be listening any more, which is no reason to stop.
    let _ = writeln!(std::io::stderr(), "{what}");
}
