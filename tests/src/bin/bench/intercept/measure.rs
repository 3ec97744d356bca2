//! What is measured of each case.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Case;
use crate::contender::{self, Contender, Running};
use crate::cpu::{Involved, Meter};
use crate::lab::Lab;
use crate::load;
use crate::metric::{Amount, Figure, Metric, Outcome, figure};
use crate::results::Results;

/// Below this share of the rate that was asked for, the latencies are those of something that is saturated.
const KEPT_UP: f64 = 0.97;

/// Puts every load on a case, one at a time. The rate at which latencies are compared is half of what wrk got, in the first
/// round, from the agent whose filter passes everything, the first case: whatever is slower would be saturated itself.
pub(crate) async fn measure(
    lab: &Lab,
    case: Case,
    running: &Running,
    amount: Amount,
    results: &Results,
) -> Vec<Outcome> {
    let mut requests = requests(lab, running, amount).await;
    let mut outcomes = Vec::new();
    if !case.is_intercepted() {
        let mut most = results.first(Contender::Intercept(Case::Passing), Metric::ClusterRequests);
        if case == Case::Passing && most.is_none() {
            most = requests.as_ref().ok().map(|figures| figures[0].value);
        }
        let fixed = match most {
            Some(most) => fixed_rate(lab, case, running, amount, most / 2.0).await,
            None => Err(anyhow::anyhow!("the agent's saturation is unknown")),
        };
        outcomes.push((Metric::FixedP50, fixed));
    }
    let one = one_connection(lab, case, running, amount).await;
    if case.is_intercepted() {
        requests = match requests {
            Ok(figures) => reached_the_laptop(lab, figures).await,
            failed => failed,
        };
    }
    outcomes.extend([(Metric::ClusterRequests, requests), (Metric::OneP50, one)]);
    outcomes
}

async fn fixed_rate(
    lab: &Lab,
    case: Case,
    running: &Running,
    amount: Amount,
    rate: f64,
) -> Result<Vec<Figure>> {
    let processes = super::proxies(lab, case).await?;
    let proxy = Involved { processes, components: &[], node: lab.node };
    let meter = Meter::start(&proxy)?;
    let paced = load::paced(lab, running.place, running.servers.web, rate, amount.seconds).await?;
    let spent = meter.stop()?;
    let micros_each = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(paced.requests);
    let mut median = figure(Metric::FixedP50, paced.p50_micros, spent);
    median.remark = (paced.per_second < KEPT_UP * rate)
        .then(|| format!("{rate:.0} requests/s were asked for, and {:.0} made", paced.per_second));
    let mut figures = vec![
        median,
        figure(Metric::FixedP99, paced.p99_micros, spent),
        figure(Metric::AllCpu, micros_each(spent.everything), spent),
    ];
    if case != Case::NoAgent {
        figures.push(figure(Metric::AgentCpu, micros_each(spent.involved), spent));
    }
    Ok(figures)
}

async fn requests(lab: &Lab, running: &Running, amount: Amount) -> Result<Vec<Figure>> {
    let meter = Meter::start(&running.involved)?;
    let (rate, failed) = load::requests(lab, running.place, running.servers.web, amount.seconds).await?;
    let mut requests = figure(Metric::ClusterRequests, rate, meter.stop()?);
    requests.remark = (failed > 0.0).then(|| format!("{failed} requests failed"));
    Ok(vec![requests])
}

async fn one_connection(lab: &Lab, case: Case, running: &Running, amount: Amount) -> Result<Vec<Figure>> {
    let meter = Meter::start(&running.involved)?;
    let answered = load::one_by_one(lab, running.place, running.servers.web, amount.seconds).await?;
    let spent = meter.stop()?;
    let by_laptop = answered.unmarked.get("laptop").copied().unwrap_or_default();
    let expected = if case.is_intercepted() { answered.requests } else { 0 };
    ensure!(by_laptop == expected, "the laptop answered {by_laptop} of {} requests", answered.requests);
    Ok(vec![figure(Metric::OneP50, answered.p50_micros, spent)])
}

/// Requests that the app answered in the laptop's place would flatter the figures. While the load after theirs was on, the
/// manager has heard of them.
async fn reached_the_laptop(lab: &Lab, mut figures: Vec<Figure>) -> Result<Vec<Figure>> {
    let status = contender::status(lab).await.context("tpd status says nothing")?;
    let traffic = &status["intercepts"][0]["status"]["traffic"];
    let count = |name: &str| traffic[name].as_u64().with_context(|| format!("tpd status has no {name}"));
    let (to_laptop, failed_open) = (count("toLaptop")?, count("failedOpen")?);
    ensure!(
        100 * failed_open < to_laptop,
        "the app answered {failed_open} requests in the laptop's place, the laptop {to_laptop}"
    );
    for figure in figures.iter_mut().filter(|_| failed_open > 0) {
        figure.remark =
            Some(format!("the app answered {failed_open} of {} requests", failed_open + to_laptop));
    }
    Ok(figures)
}
