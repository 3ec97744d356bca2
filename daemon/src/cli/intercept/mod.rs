//! `tpd intercept`: a workload's traffic, or a part of it, for a process on this machine.

mod command;
mod consent;
mod environment;
mod kind;
mod parse;
mod result;
mod standing;
mod wait;

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::pin::pin;
use std::process::ExitCode as ProcessCode;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tpd_api::exit::ExitCode;
use tpd_api::filter::{Filter, GrpcCondition, HeaderCondition};
use tpd_api::intercept::{Mode, RESTARTED, WorkloadKind};
use tpd_api::local::{Intercept as Made, InterceptRequest, LocalPort};

use self::command::Interruptions;
use self::consent::{Person, Verdict, consider};
use self::standing::Standing;
use self::wait::{Until, wait};
use super::{OutputArgs, agrees};
use crate::failure::Failure;
use crate::invoker::Invoker;
use crate::local;
use crate::output::{self, Format};
use crate::progress::Progress;

pub(super) use result::{millis, silence};

/// Time for a command to begin listening before anyone is told that it does not.
const STARTING: Duration = Duration::from_secs(10);

/// How often it is looked at meanwhile; the daemon answers from memory.
const LOOK: Duration = Duration::from_millis(200);

/// What takes longer is not done in silence.
const MOMENT: Duration = Duration::from_secs(1);

/// What is said where an interruption has ended the intercept.
const LEFT: &str = "interrupted; the intercept was left";

/// Has a workload's traffic, or a part of it, come to this machine
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Intercept {
    /// Whose traffic: the name of a workload, or KIND/NAME
    workload: String,
    /// Local port or ADDRESS:PORT that the traffic goes to, and the workload's port by number or name [default: its only one] (may be repeated)
    #[arg(short, long = "port", value_name = "LOCAL[:PORT][/udp]", required = true, value_parser = parse::port)]
    ports: Vec<LocalPort>,
    /// Namespace of the workload [default: the connected one]
    #[arg(short, long, value_parser = super::label)]
    namespace: Option<String>,
    /// Kind of the workload, where several have its name
    #[arg(long, value_parser = parse::kind)]
    kind: Option<WorkloadKind>,
    /// Only requests with this header: NAME=VALUE, NAME^=PREFIX or NAME~=REGEX (all that are given must match)
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = parse::header)]
    headers: Vec<HeaderCondition>,
    /// Only requests for this path; * stands for anything (one of those given must match)
    #[arg(long = "path", value_name = "PATH")]
    paths: Vec<String>,
    /// Only requests with this method (one of those given must match)
    #[arg(long = "method", value_name = "METHOD")]
    methods: Vec<String>,
    /// Only calls of this gRPC service, or service and method (one of those given must match)
    #[arg(long, value_name = "SERVICE[/METHOD]", value_parser = parse::grpc)]
    grpc: Vec<GrpcCondition>,
    /// Only a copy: the app goes on answering
    #[arg(long)]
    wiretap: bool,
    /// Begin local connections with a PROXY protocol header that names the client
    #[arg(long)]
    proxy_protocol: bool,
    /// Write the app's environment to this file; it needs the right to exec into its pods
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,
    /// Give the command the app's environment; it needs the right to exec into its pods
    #[arg(long, requires = "command")]
    env: bool,
    /// Resolve this domain as the workload's pods do; `.` is everything (may be repeated)
    #[arg(long, value_name = "DOMAIN")]
    dns: Vec<String>,
    /// End by itself after this time, such as 90s, 15m or 1h30m
    #[arg(long = "for", value_name = "DURATION", value_parser = parse::duration)]
    duration: Option<u64>,
    /// Restart pods without an agent also where that interrupts their service (StatefulSets, DaemonSets, ReplicaSets)
    #[arg(long)]
    replace_pods: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Name of the Intercept [default: made from the workload and this machine]
    #[arg(long, value_parser = super::label)]
    name: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
    /// Run this command, and leave the intercept when it ends
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Intercept {
    pub(super) fn format(&self) -> Format {
        self.output.output
    }

    pub(super) async fn run(&self) -> Result<ProcessCode, Failure> {
        let status = local::status().await?.ok_or_else(local::not_connected)?;
        let mut request = self.request(status.request.namespace)?;
        let restarts = self.agree(&mut request).await?;

        let interruptions = Interruptions::catch()?;
        let mut progress = Progress::new();
        progress.step("creating the intercept");
        let made = local::intercept(&request).await?;
        if let Some(silence) = silence(&made.silent).filter(|_| self.command.is_empty()) {
            progress.note(&silence);
        }
        if self.command.is_empty() {
            let before = status.intercepts.iter().find(|one| key(one) == key(&made) && !one.over);
            self.alone(&made, before.is_none(), restarts, progress, interruptions).await.map(Into::into)
        } else {
            self.with_command(&made, restarts, progress, interruptions).await
        }
    }

    fn request(&self, connected: String) -> Result<InterceptRequest, Failure> {
        let workload = parse::workload(&self.workload, self.kind)
            .map_err(|error| Failure::new(ExitCode::Usage, error))?;
        Ok(InterceptRequest {
            namespace: self.namespace.clone().unwrap_or(connected),
            name: self.name.clone(),
            workload,
            ports: self.ports.clone(),
            filter: Filter {
                headers: self.headers.clone(),
                paths: self.paths.clone(),
                methods: self.methods.clone(),
                grpc: self.grpc.clone(),
            },
            mode: if self.wiretap { Mode::Wiretap } else { Mode::Intercept },
            proxy_protocol: self.proxy_protocol,
            environment: self.env || self.env_file.is_some(),
            replace_pods: self.replace_pods,
            ttl_seconds: self.duration,
            dns: self.dns.clone(),
        })
    }

    /// Says what is about to happen, and asks where somebody is there to answer. Whether pods will be restarted.
    async fn agree(&self, request: &mut InterceptRequest) -> Result<bool, Failure> {
        let person = match io::stdin().is_terminal() && io::stderr().is_terminal() {
            _ if self.yes => Person::Agreed,
            true => Person::Present,
            false => Person::Absent,
        };
        let is_named = self.kind.is_some() || self.workload.contains('/');
        let asked = async {
            if is_named { kind::ask(request, person).await } else { kind::find(request, person).await }
        };
        let notes = shown(asked, "asking the manager").await?;
        let verdict = consider(request, &notes, person);
        let restarts = notes.iter().any(|note| note.contains(RESTARTED));
        let repeated =
            |note: &&String| matches!(&verdict, Verdict::Refuse(failure) if failure.error == **note);
        notes.iter().filter(|note| !repeated(note)).for_each(|note| output::note(note));
        match verdict {
            Verdict::Go => Ok(restarts),
            Verdict::Refuse(failure) => Err(failure),
            Verdict::Ask { replace } => {
                output::note("Go on? [y/N]");
                if !agrees(io::stdin().lock()) {
                    return Err(Failure::new(ExitCode::Failure, "nothing was changed"));
                }
                // That they are replaced was said, so it is agreed to.
                request.replace_pods |= replace;
                Ok(restarts)
            }
        }
    }

    /// Waits for the proof, shows it, and leaves the intercept to itself. Who interrupts that does not want it.
    async fn alone(
        &self,
        made: &Made,
        is_new: bool,
        restarts: bool,
        mut progress: Progress,
        mut interruptions: Interruptions,
    ) -> Result<ExitCode, Failure> {
        let (namespace, name) = key(made);
        let proved = async {
            let ended = wait(namespace, name, Until::Proved, restarts, Some(&mut progress)).await?;
            if self.env_file.is_some() {
                progress.step("fetching the app's environment");
                self.environment(namespace, name).await?;
            }
            Ok::<_, Failure>(ended)
        };
        let ended = tokio::select! {
            ended = proved => ended?,
            _ = interruptions.next() => return Err(interrupted(made, is_new).await),
        };
        drop(progress);
        match self.format() {
            Format::Json => output::json(&ended.intercept),
            Format::Human => output::text(&result::summary(&ended.intercept)),
        }
        Ok(match ended.standing {
            Standing::Silent => ExitCode::NotServed,
            Standing::Empty => ExitCode::NoAgent,
            _ => ExitCode::Ok,
        })
    }

    /// Runs the command, and leaves the intercept however that ends.
    async fn with_command(
        &self,
        made: &Made,
        restarts: bool,
        progress: Progress,
        mut interruptions: Interruptions,
    ) -> Result<ProcessCode, Failure> {
        let (namespace, name) = key(made);
        let ended = self.accompany(made, restarts, progress, &mut interruptions).await;
        let left = local::leave(namespace, name).await;
        let code = ended?;
        left?;
        Ok(code.into())
    }

    async fn accompany(
        &self,
        made: &Made,
        restarts: bool,
        mut progress: Progress,
        interruptions: &mut Interruptions,
    ) -> Result<u8, Failure> {
        let (namespace, name) = key(made);
        let prepared = async {
            wait(namespace, name, Until::Covered, restarts, Some(&mut progress)).await?;
            self.environment(namespace, name).await
        };
        let variables = tokio::select! {
            variables = prepared => variables?,
            _ = interruptions.next() => {
                return Err(Failure::new(ExitCode::Failure, LEFT));
            }
        };
        drop(progress);
        let invoker = Invoker::detect();
        let mut child = command::start(&self.command, &environment::for_command(variables), &invoker)?;
        let finished = command::finish(&mut child, interruptions);
        tokio::pin!(finished);
        tokio::select! {
            code = &mut finished => return code,
            () = self.announce(namespace, name) => {}
        }
        finished.await
    }

    /// Says once that the command gets its traffic, or why it does not.
    async fn announce(&self, namespace: &str, name: &str) {
        let patience = Instant::now() + STARTING;
        loop {
            match wait(namespace, name, Until::Proved, false, None).await {
                Ok(ended) if ended.standing == Standing::Silent && Instant::now() < patience => {
                    sleep(LOOK).await;
                }
                Ok(ended) => return output::note(result::summary(&ended.intercept).trim_end()),
                Err(failure) => return output::note(failure.render().trim_end()),
            }
        }
    }

    /// Fetches the app's environment where it was asked for, and writes the file.
    async fn environment(&self, namespace: &str, name: &str) -> Result<BTreeMap<String, String>, Failure> {
        if !self.env && self.env_file.is_none() {
            return Ok(BTreeMap::new());
        }
        let found = local::environment(namespace, name).await?;
        if let Some(path) = &self.env_file {
            environment::write(path, &found.variables, &Invoker::detect())?;
        }
        Ok(found.variables)
    }
}

/// Says what is being done, if it takes a moment.
async fn shown<T>(done: impl Future<Output = T>, step: &str) -> T {
    let mut done = pin!(done);
    if let Ok(done) = timeout(MOMENT, &mut done).await {
        return done;
    }
    let mut progress = Progress::new();
    progress.step(step);
    done.await
}

/// Ends an intercept that was begun just now. One that was there before stays, as it is now.
async fn interrupted(made: &Made, is_new: bool) -> Failure {
    let (namespace, name) = key(made);
    let failure = |what: &str| Failure::new(ExitCode::Failure, what);
    let help = format!("leave it with: tpd leave {name}");
    if !is_new {
        return failure("interrupted; the intercept stays as it was changed").help(help);
    }
    match local::leave(namespace, name).await {
        Ok(()) => failure(LEFT),
        Err(why) => failure("interrupted; the intercept could not be left").because(why).help(help),
    }
}

fn key(made: &Made) -> (&str, &str) {
    (&made.request.namespace, made.request.name.as_deref().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        intercept: Intercept,
    }

    fn parsed(line: &str) -> Result<Intercept, clap::Error> {
        Line::try_parse_from(std::iter::once("tpd").chain(line.split(' '))).map(|line| line.intercept)
    }

    #[test]
    fn a_whole_command_line_becomes_a_request() {
        let line = "sts/web -p 9090:http -p 5353:53/udp --header x-dev=ann --path /api/* --method GET --grpc shop.Cart/Add \
                    --wiretap --proxy-protocol --dns corp.example --for 1h --replace-pods --env -- npm run dev -p 9090";
        let intercept = parsed(line).unwrap();
        assert_eq!(intercept.command, ["npm", "run", "dev", "-p", "9090"]);
        let request = intercept.request("shop".into()).unwrap();
        assert_eq!(
            (&*request.namespace, request.workload.to_string()),
            ("shop", "statefulset/web".to_owned())
        );
        assert_eq!(request.ports.len(), 2);
        assert_eq!((request.filter.headers.len(), request.filter.grpc.len()), (1, 1));
        assert!(request.environment && request.replace_pods && request.proxy_protocol);
        assert_eq!((request.mode, request.ttl_seconds), (Mode::Wiretap, Some(3600)));
    }

    #[test]
    fn the_environment_is_asked_for_only_on_request() {
        let plain = parsed("web -p 9090 -- run").unwrap();
        assert!(!plain.request("shop".into()).unwrap().environment);
        assert!(parsed("web -p 9090 --env-file .env").unwrap().request("shop".into()).unwrap().environment);
        assert!(parsed("web -p 9090 --env").is_err());
        assert!(parsed("web").is_err() && parsed("web -p x").is_err());
    }
}
