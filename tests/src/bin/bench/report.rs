//! The results as a table for people and as JSON for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::contender::Contender;
use crate::intercept::Case;
use crate::metric::Metric;
use crate::results::{Results, Summary};
use crate::target::TARGETS;

/// Those that others are shown as a multiple of.
const BASELINES: [Contender; 2] = [Contender::PortForward, Contender::Boringtun];

/// What intercepts and agents are shown beside.
const NO_AGENT: Contender = Contender::Intercept(Case::NoAgent);

/// Above this share of other work a median says little, and is marked.
const NOISY_PERCENT: f64 = 10.0;

/// The table.
pub(crate) fn table(results: &Results) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write_all(&mut text, results);
    text
}

fn write_all(text: &mut String, results: &Results) -> std::fmt::Result {
    for metric in Metric::ALL {
        write_metric(text, results, metric)?;
    }
    write_memory(text, results)?;
    write_agent_memory(text, results)?;
    write_targets(text, results)?;
    write_lines(text, "Remarks", &results.remarks)?;
    write_lines(text, "Not measured", &results.missing)
}

fn write_metric(text: &mut String, results: &Results, metric: Metric) -> std::fmt::Result {
    let Some(sample) = results.samples.iter().find(|sample| sample.metric == metric) else {
        return Ok(());
    };
    writeln!(text, "\n{}, {}", metric.title(), metric.unit())?;
    if matches!(sample.contender, Contender::Intercept(_)) {
        return write_intercept_metric(text, results, metric);
    }
    let [first, second] = BASELINES.map(|baseline| format!("x {}", baseline.name()));
    writeln!(text, "  {:30} {:>9}  {:19} {first:>22} {second:>16}  other load", "", "median", "min - max")?;
    for contender in Contender::ALL {
        let Some(summary) = results.summary(contender, metric) else { continue };
        let range = format!("{} - {}", number(summary.min), number(summary.max));
        let [first, second] = BASELINES.map(|baseline| multiple(results.ratio(metric, contender, baseline)));
        let median = number(summary.median);
        let (name, load) = (contender.name(), load(summary));
        writeln!(text, "  {name:30} {median:>9}  {range:19} {first:>22} {second:>16}  {load:>8}")?;
    }
    Ok(())
}

/// Those are shown beside what there is without an agent.
fn write_intercept_metric(text: &mut String, results: &Results, metric: Metric) -> std::fmt::Result {
    let baseline = NO_AGENT.name();
    writeln!(
        text,
        "  {:30} {:>9}  {:19} over {baseline:>9}  x {baseline:>9}  other load",
        "", "median", "min - max"
    )?;
    for contender in Contender::ALL {
        let Some(summary) = results.summary(contender, metric) else { continue };
        let range = format!("{} - {}", number(summary.min), number(summary.max));
        let more = results.difference(metric, contender, NO_AGENT).map_or_else(|| "-".to_owned(), signed);
        let ratio = multiple(results.ratio(metric, contender, NO_AGENT));
        let (name, median, load) = (contender.name(), number(summary.median), load(summary));
        writeln!(text, "  {name:30} {median:>9}  {range:19} {more:>14}  {ratio:>11}  {load:>10}")?;
    }
    match metric.elsewhere() {
        Some(value) => {
            writeln!(text, "  {:30} {:>9}  measured elsewhere, not in this run", "a peer", number(value))
        }
        None => Ok(()),
    }
}

fn write_memory(text: &mut String, results: &Results) -> std::fmt::Result {
    let Some(memory) = results.memory else { return Ok(()) };
    writeln!(text, "\nresident memory, MiB")?;
    writeln!(text, "  {:30} {:>9}  with {} connections", "", "idle", memory.connections)?;
    writeln!(text, "  {:30} {:>9.1}  {:.1}", "tpd-manager", memory.manager_idle, memory.manager_loaded)?;
    writeln!(text, "  {:30} {:>9.1}  {:.1}", "tpd on the laptop", memory.daemon_idle, memory.daemon_loaded)
}

fn write_agent_memory(text: &mut String, results: &Results) -> std::fmt::Result {
    let Some(memory) = results.agent_memory else { return Ok(()) };
    writeln!(text, "\nresident memory of an agent, both of its processes, MiB")?;
    writeln!(text, "  {:30} {:>9.1}", "no intercept", memory.idle)?;
    writeln!(text, "  {:30} {:>9.1}", "filter never matches", memory.passing)?;
    writeln!(text, "  {:30} {:>9.1}", format!("and {} connections", memory.connections), memory.loaded)
}

fn write_targets(text: &mut String, results: &Results) -> std::fmt::Result {
    writeln!(text, "\nTargets")?;
    for target in TARGETS {
        let (value, verdict) = match target.judge(results) {
            Some((value, true)) => (number(value), "reached"),
            Some((value, false)) => (number(value), "MISSED"),
            None => ("-".to_owned(), "not measured"),
        };
        let (who, what) = (target.contender.name(), target.metric.title());
        writeln!(text, "  {verdict:13} {value:>7}  {:36} {who}: {what}", target.words())?;
    }
    Ok(())
}

fn write_lines(text: &mut String, title: &str, lines: &[String]) -> std::fmt::Result {
    if lines.is_empty() {
        return Ok(());
    }
    writeln!(text, "\n{title}")?;
    lines.iter().try_for_each(|line| writeln!(text, "  {line}"))
}

/// Three digits that count.
fn number(value: f64) -> String {
    let decimals = match value {
        value if value >= 99.95 => 0,
        value if value >= 9.995 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

fn signed(value: f64) -> String {
    format!("{}{}", if value < 0.0 { '-' } else { '+' }, number(value.abs()))
}

fn multiple(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| "-".to_owned(), number)
}

fn load(summary: Summary) -> String {
    let mark = if summary.background_percent > NOISY_PERCENT { " *" } else { "  " };
    format!("{:.0} %{mark}", summary.background_percent)
}

/// Everything, also what the table leaves out.
pub(crate) fn json(results: &Results, machine: Value) -> Value {
    let samples: Vec<Value> = results
        .samples
        .iter()
        .map(|sample| {
            json!({
                "round": sample.round, "contender": sample.contender.name(), "metric": sample.metric.key(),
                "unit": sample.metric.unit(), "value": sample.value, "backgroundPercent": sample.background_percent,
            })
        })
        .collect();
    let targets: Vec<Value> = TARGETS
        .iter()
        .map(|target| {
            let judged = target.judge(results);
            json!({
                "contender": target.contender.name(), "metric": target.metric.key(), "bound": target.words(),
                "value": judged.map(|(value, _)| value), "reached": judged.map(|(_, reached)| reached),
            })
        })
        .collect();
    let elsewhere: Vec<Value> = Metric::ALL
        .into_iter()
        .filter_map(|metric| {
            let value = metric.elsewhere()?;
            Some(json!({ "contender": "a peer", "metric": metric.key(), "unit": metric.unit(), "value": value }))
        })
        .collect();
    json!({
        "machine": machine, "summary": summaries(results), "memoryMiB": results.memory,
        "agentMemoryMiB": results.agent_memory, "elsewhere": elsewhere, "targets": targets,
        "remarks": results.remarks, "missing": results.missing, "samples": samples,
    })
}

fn summaries(results: &Results) -> Vec<Value> {
    let mut all = Vec::new();
    for metric in Metric::ALL {
        for contender in Contender::ALL {
            let Some(summary) = results.summary(contender, metric) else { continue };
            let [port_forward, boringtun] =
                BASELINES.map(|baseline| results.ratio(metric, contender, baseline));
            all.push(json!({
                "metric": metric.key(), "unit": metric.unit(), "contender": contender.name(), "figures": summary,
                "timesPortForward": port_forward, "timesBoringtun": boringtun,
                "overNoAgent": results.difference(metric, contender, NO_AGENT),
            }));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metric::Figure;

    #[test]
    fn shows_each_figure_beside_its_peers() {
        let mut results = Results::default();
        for (contender, value) in [(Contender::PortForward, 1.5), (Contender::TpdProxy, 3.0)] {
            results.record(
                1,
                contender,
                Figure { metric: Metric::Down, value, background_percent: 12.0, remark: None },
            );
        }
        let text = table(&results);
        let row = text.lines().find(|line| line.starts_with("  tpd --path proxy")).unwrap();
        assert_eq!(
            row.split_whitespace().collect::<Vec<_>>()[3..],
            ["3.00", "3.00", "-", "3.00", "2.00", "-", "12", "%", "*"]
        );
        assert!(text.contains("reached          2.00  at least 1.2 x kubectl port-forward"));
    }

    #[test]
    fn shows_an_intercept_beside_no_agent_and_what_was_measured_elsewhere() {
        let mut results = Results::default();
        for (case, value) in [(Case::NoAgent, 100.0), (Case::Passing, 130.0), (Case::Udp, 300.0)] {
            let figure = Figure { metric: Metric::OneP50, value, background_percent: 1.0, remark: None };
            results.record(1, Contender::Intercept(case), figure);
        }
        let text = table(&results);
        let row = text.lines().find(|line| line.contains("filter never matches")).unwrap();
        assert!(row.contains(" +30.0 ") && row.contains(" 1.30 "), "{row}");
        assert!(text.contains("a peer") && text.contains("1700  measured elsewhere"));
        assert!(text.contains("reached           300  at most 400 us"));
    }

    #[test]
    fn keeps_three_digits() {
        assert_eq!(
            ["0.68", "12.3", "4560"],
            [0.678, 12.34, 4560.4].map(number).each_ref().map(String::as_str)
        );
    }
}
