//! What in the Helm chart must follow the code.

use std::path::{Path, PathBuf};
use std::{env, fs};

use serde_json::Value;
use tpd_api::install::custom_resource_definitions_yaml;

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/chart")
}

#[test]
fn the_charts_crds_are_those_of_the_code() {
    let path = chart().join("templates/crds.yaml");
    let expected = custom_resource_definitions_yaml();
    if env::var_os("TPD_UPDATE").is_some() {
        fs::write(&path, &expected).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == expected,
        "{} is not what the code says; run the tests with TPD_UPDATE=1",
        path.display()
    );
}

#[test]
fn the_chart_has_the_version_of_the_code() {
    let text = fs::read_to_string(chart().join("Chart.yaml")).unwrap();
    let chart: Value = serde_yaml::from_str(&text).unwrap();
    for field in ["version", "appVersion"] {
        assert_eq!(chart[field], env!("CARGO_PKG_VERSION"), "{field}");
    }
}
